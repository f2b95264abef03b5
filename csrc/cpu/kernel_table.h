// What one instruction set offers to the dispatcher. Each isa_*.cpp defines one table.
#ifndef STA_CPU_KERNEL_TABLE_H_
#define STA_CPU_KERNEL_TABLE_H_

#include "sta_cpu.h"

namespace sta {

using Kernel = int (*)(const StaParams& params, StaParallelFor parallel_for);
using PoolKernel = int (*)(const StaPoolParams& params, StaParallelFor parallel_for);
using MlpKernel = int (*)(const StaMlpParams& params, StaParallelFor parallel_for);

struct KernelTable {
  // By StaDtype. Null: not compiled in, or left to a lower instruction set (dispatch.cpp).
  Kernel forward[4];
  Kernel backward[4];
  PoolKernel pool_forward[4];
  PoolKernel pool_backward[4];
  MlpKernel bias_gelu_forward[4];
  MlpKernel bias_gelu_backward[4];
  MlpKernel bias_residual_forward[4];
  MlpKernel bias_residual_backward[4];
};

extern const KernelTable kPortableKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAmxKernels;
extern const KernelTable kAmxEmulatedKernels;

}  // namespace sta

#endif  // STA_CPU_KERNEL_TABLE_H_
