// All tile kernels of one instruction set, as kernels.h is for the vector kernels. An isa_*.cpp
// also defines which tiles it has (tiles.h).
#ifndef STA_CPU_AMX_KERNELS_H_
#define STA_CPU_AMX_KERNELS_H_

#include "../kernel_table.h"
#include "backward.h"
#include "forward.h"

namespace sta {
namespace STA_ISA {

constexpr KernelTable make_tile_table() {
  return {{nullptr, nullptr, nullptr, tile_forward}, {nullptr, nullptr, nullptr, tile_backward}};
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_KERNELS_H_
