// The kernels in 512-bit vectors. An empty table where the flags are missing (not x86-64).
// Flags: -O3 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c.
#include "kernel_table.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define STA_ISA avx512
#define STA_VECTOR_BYTES 64
#include "kernels.h"

namespace sta {
const KernelTable kAvx512Kernels = avx512::make_table();
}
#else
namespace sta {
const KernelTable kAvx512Kernels = {};
}
#endif
