// Chooses the instruction set at run time and hands the call to its kernels.
#include "amx/permission.h"
#include "kernel_table.h"

namespace {

struct InstructionSet {
  const char* name;
  const sta::KernelTable* kernels;
  int base;  // the set that serves the dtypes without kernels here
};

const InstructionSet kSets[STA_ISA_COUNT] = {
    {"portable", &sta::kPortableKernels, STA_ISA_PORTABLE},
    {"avx2", &sta::kAvx2Kernels, STA_ISA_AVX2},
    {"avx512", &sta::kAvx512Kernels, STA_ISA_AVX512},
    {"avx512-bf16", &sta::kAvx512Bf16Kernels, STA_ISA_AVX512},
    {"amx", &sta::kAmxKernels, STA_ISA_AVX512},
    {"amx-emulated", &sta::kAmxEmulatedKernels, STA_ISA_PORTABLE},
};

bool known(int isa) { return isa >= 0 && isa < STA_ISA_COUNT; }

bool processor_runs(int isa) {
  if (isa == STA_ISA_PORTABLE || isa == STA_ISA_AMX_EMULATED) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == STA_ISA_AVX2) return avx2;
  if (isa == STA_ISA_AVX512) return avx512;
  if (isa == STA_ISA_AVX512_BF16) return bf16;
  if (isa == STA_ISA_AMX) return bf16 && sta::amx_permitted();
#endif
  return false;
}

// vdpbf16ps has half the rate of float32 arithmetic on Intel, so there it must be asked for.
bool worthwhile(int isa) {
#if defined(__x86_64__)
  if (isa == STA_ISA_AVX512_BF16) return __builtin_cpu_is("amd");
#endif
  return isa != STA_ISA_AMX_EMULATED;
}

// The kernel that `isa` uses for a dtype: its own, or that of its base.
template <class KernelType>
KernelType kernel_of(const KernelType (sta::KernelTable::*kernels)[4], int isa, int dtype) {
  const KernelType own = (kSets[isa].kernels->*kernels)[dtype];
  return own != nullptr ? own : (kSets[kSets[isa].base].kernels->*kernels)[dtype];
}

template <class KernelType, class Params>
int run(const KernelType (sta::KernelTable::*kernels)[4], const Params* params,
        StaParallelFor parallel_for, int isa) {
  if (isa == STA_ISA_BEST) isa = sta_cpu_best_isa();
  if (!sta_cpu_isa_usable(isa)) return STA_ERROR_ISA;
  if (params->dtype < STA_F32 || params->dtype > STA_BF16) return STA_ERROR_DTYPE;
  return kernel_of(kernels, isa, params->dtype)(*params, parallel_for);
}

int run_serially(int64_t begin, int64_t end, int64_t, StaParallelBody body, void* ctx) {
  if (begin < end) body(begin, end, ctx);
  return 0;
}

}  // namespace

extern "C" {

int sta_cpu_forward(const StaParams* params, StaParallelFor parallel_for, int isa) {
  return run(&sta::KernelTable::forward, params, parallel_for ? parallel_for : run_serially, isa);
}

int sta_cpu_backward(const StaParams* params, StaParallelFor parallel_for, int isa) {
  return run(&sta::KernelTable::backward, params, parallel_for ? parallel_for : run_serially, isa);
}

int sta_cpu_pool_forward(const StaPoolParams* params, StaParallelFor parallel_for, int isa) {
  return run(&sta::KernelTable::pool_forward, params, parallel_for ? parallel_for : run_serially,
             isa);
}

int sta_cpu_pool_backward(const StaPoolParams* params, StaParallelFor parallel_for, int isa) {
  return run(&sta::KernelTable::pool_backward, params, parallel_for ? parallel_for : run_serially,
             isa);
}

int sta_cpu_bias_gelu_forward(const StaMlpParams* params, StaParallelFor parallel_for, int isa) {
  return run(&sta::KernelTable::bias_gelu_forward, params,
             parallel_for ? parallel_for : run_serially, isa);
}

int sta_cpu_bias_gelu_backward(const StaMlpParams* params, StaParallelFor parallel_for, int isa) {
  return run(&sta::KernelTable::bias_gelu_backward, params,
             parallel_for ? parallel_for : run_serially, isa);
}

int sta_cpu_bias_residual_forward(const StaMlpParams* params, StaParallelFor parallel_for,
                                  int isa) {
  return run(&sta::KernelTable::bias_residual_forward, params,
             parallel_for ? parallel_for : run_serially, isa);
}

int sta_cpu_bias_residual_backward(const StaMlpParams* params, StaParallelFor parallel_for,
                                   int isa) {
  return run(&sta::KernelTable::bias_residual_backward, params,
             parallel_for ? parallel_for : run_serially, isa);
}

const char* sta_cpu_error_string(int error) {
  switch (error) {
    case STA_OK:
      return "success";
    case STA_ERROR_MEMORY:
      return "out of memory for the kernel's workspace";
    case STA_ERROR_ISA:
      return "instruction set not compiled in or not supported by this processor";
    case STA_ERROR_DTYPE:
      return "dtype is none of float32, float64, float16, bfloat16";
    case STA_ERROR_PARALLEL:
      return "the parallel loop failed";
    default:
      return "unknown error";
  }
}

int sta_cpu_isa_usable(int isa) {
  return known(isa) && kSets[isa].kernels->forward[STA_BF16] != nullptr && processor_runs(isa);
}

int sta_cpu_best_isa(void) {
  static const int best = [] {
    int isa = STA_ISA_COUNT - 1;
    while (isa > STA_ISA_PORTABLE && !(worthwhile(isa) && sta_cpu_isa_usable(isa))) --isa;
    return isa;
  }();
  return best;
}

int sta_cpu_isa_of(int isa, int dtype) {
  return kSets[isa].kernels->forward[dtype] != nullptr ? isa : kSets[isa].base;
}

const char* sta_cpu_isa_name(int isa) { return known(isa) ? kSets[isa].name : "unknown"; }

}  // extern "C"
