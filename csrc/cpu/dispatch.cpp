// Chooses the instruction set at run time and hands the call to its kernels.
#include "kernel_table.h"

namespace {

constexpr int kIsaCount = 3;

const sta::KernelTable* table(int isa) {
  switch (isa) {
    case STA_ISA_PORTABLE:
      return &sta::kPortableKernels;
    case STA_ISA_AVX2:
      return &sta::kAvx2Kernels;
    case STA_ISA_AVX512:
      return &sta::kAvx512Kernels;
    default:
      return nullptr;
  }
}

bool processor_runs(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == STA_ISA_AVX2) return avx2;
  if (isa == STA_ISA_AVX512) return avx512;
#endif
  return isa == STA_ISA_PORTABLE;
}

const sta::KernelTable* select(int isa) {
  if (isa == STA_ISA_BEST) isa = sta_cpu_best_isa();
  return sta_cpu_isa_usable(isa) ? table(isa) : nullptr;
}

int run(const sta::Kernel (sta::KernelTable::*kernels)[4], const StaParams* params,
        StaParallelFor parallel_for, int isa) {
  const sta::KernelTable* chosen = select(isa);
  if (chosen == nullptr) return STA_ERROR_ISA;
  if (params->dtype < STA_F32 || params->dtype > STA_BF16) return STA_ERROR_DTYPE;
  return (chosen->*kernels)[params->dtype](*params, parallel_for);
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
  const sta::KernelTable* kernels = table(isa);
  return kernels != nullptr && kernels->forward[STA_F32] != nullptr && processor_runs(isa);
}

int sta_cpu_best_isa(void) {
  for (int isa = kIsaCount - 1; isa > STA_ISA_PORTABLE; --isa) {
    if (sta_cpu_isa_usable(isa)) return isa;
  }
  return STA_ISA_PORTABLE;
}

const char* sta_cpu_isa_name(int isa) {
  switch (isa) {
    case STA_ISA_PORTABLE:
      return "portable";
    case STA_ISA_AVX2:
      return "avx2";
    case STA_ISA_AVX512:
      return "avx512";
    default:
      return "unknown";
  }
}

}  // extern "C"
