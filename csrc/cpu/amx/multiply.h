// Products of matrices cut into tiles: C (+)= A B, two by two tiles of C at a time.
#ifndef STA_CPU_AMX_MULTIPLY_H_
#define STA_CPU_AMX_MULTIPLY_H_

#include "matrix.h"

namespace sta {
namespace STA_ISA {

// Tiles (m, n) .. (m + M - 1, n + N - 1) of C, row-major with rows `c_row` floats apart.
template <int M, int N>
STA_INLINE void multiply_block(TileRegisters& t, const TileMatrix& a, const TileMatrix& b,
                               int64_t steps, int64_t m, int64_t n, float* c, int64_t c_row,
                               bool add) {
  float* corner = c + (m * c_row + n) * kTileRows;
  float* below = corner + kTileRows * c_row;
  const int64_t stride = c_row * static_cast<int64_t>(sizeof(float));
  if (add) {
    t.template load<0>(corner, stride);
    if constexpr (N == 2) t.template load<1>(corner + kTileRows, stride);
    if constexpr (M == 2) t.template load<2>(below, stride);
    if constexpr (M == 2 && N == 2) t.template load<3>(below + kTileRows, stride);
  } else {
    t.template zero<0>();
    if constexpr (N == 2) t.template zero<1>();
    if constexpr (M == 2) t.template zero<2>();
    if constexpr (M == 2 && N == 2) t.template zero<3>();
  }
  for (int64_t step = 0; step < steps; ++step) {
    t.template load<4>(a.tile(m, step), a.row_bytes);
    t.template load<6>(b.tile(n, step), b.row_bytes);
    t.template dot<0, 4, 6>();
    if constexpr (N == 2) {
      t.template load<7>(b.tile(n, step) + b.pair_bytes, b.row_bytes);
      t.template dot<1, 4, 7>();
    }
    if constexpr (M == 2) {
      t.template load<5>(a.tile(m, step) + a.pair_bytes, a.row_bytes);
      t.template dot<2, 5, 6>();
    }
    if constexpr (M == 2 && N == 2) t.template dot<3, 5, 7>();
  }
  t.template store<0>(corner, stride);
  if constexpr (N == 2) t.template store<1>(corner + kTileRows, stride);
  if constexpr (M == 2) t.template store<2>(below, stride);
  if constexpr (M == 2 && N == 2) t.template store<3>(below + kTileRows, stride);
}

// C of at least `rows` x `columns` floats, from sums over at least `depth` elements: each is
// rounded up to whole tiles. add: to what is there.
STA_INLINE void multiply(TileRegisters& t, const TileMatrix& a, int64_t rows, const TileMatrix& b,
                         int64_t columns, int64_t depth, float* c, int64_t c_row, bool add) {
  const int64_t m_tiles = tiles_of(rows), n_tiles = tiles_of(columns), steps = steps_of(depth);
  for (int64_t m = 0; m < m_tiles; m += 2) {
    int64_t n = 0;
    if (m + 1 < m_tiles) {
      for (; n + 1 < n_tiles; n += 2) multiply_block<2, 2>(t, a, b, steps, m, n, c, c_row, add);
      if (n < n_tiles) multiply_block<2, 1>(t, a, b, steps, m, n, c, c_row, add);
    } else {
      for (; n + 1 < n_tiles; n += 2) multiply_block<1, 2>(t, a, b, steps, m, n, c, c_row, add);
      if (n < n_tiles) multiply_block<1, 1>(t, a, b, steps, m, n, c, c_row, add);
    }
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_MULTIPLY_H_
