// How operands of tile products lie in memory.
#ifndef STA_CPU_AMX_MATRIX_H_
#define STA_CPU_AMX_MATRIX_H_

#include "tiles.h"

namespace sta {
namespace STA_ISA {

// Tile (i, step) of a matrix: i counts rows of tiles of A or columns of tiles of B, step goes along
// the axis that is summed. Tiles of even i lie tile_bytes times i apart, the next one pair_bytes
// behind.
struct TileMatrix {
  const void* data;
  int64_t row_bytes, tile_bytes, pair_bytes, step_bytes;

  // i even
  STA_INLINE const char* tile(int64_t i, int64_t step) const {
    return static_cast<const char*>(data) + i * tile_bytes + step * step_bytes;
  }
};

// The left operand in rows of 32 bfloat16 a step, `row_bytes` apart.
inline TileMatrix rows_matrix(const void* rows, int64_t row_bytes) {
  return {rows, row_bytes, kTileRows * row_bytes, kTileRows * row_bytes, 64};
}
// The left operand in tiles: in each step one of the first 16 rows and one of the next.
inline TileMatrix strip_matrix(const void* tiles) {
  return {tiles, 64, kTileBytes, kTileBytes, 2 * kTileBytes};
}
// The right operand, packed in the order in which products read it: pairs of columns of tiles, in
// each the steps, in each the two tiles. So the processor's prefetcher can follow.
inline TileMatrix packed_matrix(const void* tiles, int64_t steps) {
  return {tiles, 64, steps * kTileBytes, kTileBytes, 2 * kTileBytes};
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_MATRIX_H_
