// bfloat16 by vdpbf16ps, for processors without AMX: the tile kernels, with tiles kept in memory.
// Flags: isa_avx512.cpp's and -mavx512bf16.
#include "kernel_table.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define STA_ISA avx512_bf16
#define STA_VECTOR_BYTES 64
#define STA_TILES_AVX512_BF16
#include "amx/kernels.h"

namespace sta {
const KernelTable kAvx512Bf16Kernels = avx512_bf16::make_tile_table();
}
#else
namespace sta {
const KernelTable kAvx512Bf16Kernels = {};
}
#endif
