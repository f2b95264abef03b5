// The CPU kernels' C interface: no C++ runtime types, no framework, no threads of their own.
#ifndef STA_CPU_H_
#define STA_CPU_H_

#include "../mlp_params.h"
#include "../pool_params.h"
#include "../sta_params.h"

#ifdef __cplusplus
extern "C" {
#endif

// The caller's parallel loop: runs body over disjoint sub-ranges that cover [begin, end), on any
// number of threads. Non-zero means that it failed. NULL stands for a plain serial loop.
typedef void (*StaParallelBody)(int64_t begin, int64_t end, void* ctx);
typedef int (*StaParallelFor)(int64_t begin, int64_t end, int64_t grain, StaParallelBody body,
                              void* ctx);

// STA_ISA_BEST: decided by the processor.
enum StaCpuIsa {
  STA_ISA_BEST = -1,
  STA_ISA_PORTABLE = 0,
  STA_ISA_AVX2 = 1,
  STA_ISA_AVX512 = 2,
  // From here on only bfloat16 has kernels of its own; other dtypes use those of a lower set.
  STA_ISA_AVX512_BF16 = 3,
  STA_ISA_AMX = 4,
  STA_ISA_AMX_EMULATED = 5,  // for tests, on any processor; never the best
  STA_ISA_COUNT = 6,
};

enum StaCpuError {
  STA_OK = 0,
  STA_ERROR_MEMORY = 1,
  STA_ERROR_ISA = 2,
  STA_ERROR_DTYPE = 3,
  STA_ERROR_PARALLEL = 4,
};

// All return a StaCpuError. The result's bits depend on the instruction set, never on the threads.
int sta_cpu_forward(const struct StaParams* params, StaParallelFor parallel_for, int isa);
int sta_cpu_backward(const struct StaParams* params, StaParallelFor parallel_for, int isa);
int sta_cpu_pool_forward(const struct StaPoolParams* params, StaParallelFor parallel_for, int isa);
int sta_cpu_pool_backward(const struct StaPoolParams* params, StaParallelFor parallel_for, int isa);
int sta_cpu_bias_gelu_forward(const struct StaMlpParams* params, StaParallelFor parallel_for,
                              int isa);
int sta_cpu_bias_gelu_backward(const struct StaMlpParams* params, StaParallelFor parallel_for,
                               int isa);
int sta_cpu_bias_residual_forward(const struct StaMlpParams* params, StaParallelFor parallel_for,
                                  int isa);
int sta_cpu_bias_residual_backward(const struct StaMlpParams* params, StaParallelFor parallel_for,
                                   int isa);
const char* sta_cpu_error_string(int error);

int sta_cpu_best_isa(void);
int sta_cpu_isa_usable(int isa);         // compiled in, and this processor runs it
int sta_cpu_isa_of(int isa, int dtype);  // the set whose kernel `isa` uses for a StaDtype
const char* sta_cpu_isa_name(int isa);

#ifdef __cplusplus
}
#endif

#endif  // STA_CPU_H_
