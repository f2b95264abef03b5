// The AMX kernels over emulated tiles: their logic can be tested on any processor. Flags: -O3.
#define STA_ISA amx_emulated
#define STA_VECTOR_BYTES 16
#define STA_TILES_EMULATED
#include "amx/kernels.h"

namespace sta {
const KernelTable kAmxEmulatedKernels = amx_emulated::make_tile_table();
}
