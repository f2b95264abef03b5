// The kernels in 256-bit vectors. An empty table where the flags are missing (not x86-64).
// Flags: -O3 -mavx2 -mfma -mf16c.
#include "kernel_table.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define STA_ISA avx2
#define STA_VECTOR_BYTES 32
#include "kernels.h"

namespace sta {
const KernelTable kAvx2Kernels = avx2::make_table();
}
#else
namespace sta {
const KernelTable kAvx2Kernels = {};
}
#endif
