// The kernels in 128-bit vectors without intrinsics: SSE2 on x86-64, NEON on aarch64. Flags: -O3.
#define STA_ISA portable
#define STA_VECTOR_BYTES 16
#include "kernels.h"

namespace sta {
const KernelTable kPortableKernels = portable::make_table();
}
