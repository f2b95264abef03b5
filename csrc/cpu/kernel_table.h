// What one instruction set offers to the dispatcher. Each isa_*.cpp defines one table.
#ifndef STA_CPU_KERNEL_TABLE_H_
#define STA_CPU_KERNEL_TABLE_H_

#include "sta_cpu.h"

namespace sta {

using Kernel = int (*)(const StaParams& params, StaParallelFor parallel_for);

struct KernelTable {
  Kernel forward[4];  // by StaDtype; null throughout where the instruction set is not compiled in
  Kernel backward[4];
};

extern const KernelTable kPortableKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;

}  // namespace sta

#endif  // STA_CPU_KERNEL_TABLE_H_
