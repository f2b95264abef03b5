// bfloat16 by AMX's tile products. Flags: isa_avx512.cpp's and -mavx512bf16; the tile instructions
// are written in assembly, so any assembler that knows them will do.
#include "kernel_table.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define STA_ISA amx
#define STA_VECTOR_BYTES 64
#define STA_TILES_AMX
#include "amx/kernels.h"

namespace sta {
const KernelTable kAmxKernels = amx::make_tile_table();
}
#else
namespace sta {
const KernelTable kAmxKernels = {};
}
#endif
