// What multiply.h does, by vdpbf16ps: C (+)= A B, eight rows by two vectors of C at a time, whose
// sums stay in registers over the whole depth. Operands lie as they do for tiles, but only the rows
// and the depth asked for are computed.
#ifndef STA_CPU_AMX_MULTIPLY_VECTORS_H_
#define STA_CPU_AMX_MULTIPLY_VECTORS_H_

#include "matrix.h"

namespace sta {
namespace STA_ISA {

// Two products start in a cycle and take six: eight rows of two are enough to hide that, and each
// vector of B that is loaded serves eight products.
constexpr int64_t kVectorRows = 8;

// `pairs` products of a pair of elements of every row with 2 * kLanes of B.
template <int N>
STA_INLINE void add_products(__m512 (&sums)[kVectorRows][N], const char* left, int64_t left_row,
                             const char* right, int64_t right_pair, int64_t pairs) {
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh columns[N];
    STA_UNROLL
    for (int n = 0; n < N; ++n) {
      columns[n] = (__m512bh)_mm512_load_si512(right + n * right_pair + k * 64);
    }
    STA_UNROLL
    for (int m = 0; m < kVectorRows; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, left + m * left_row + 4 * k, 4);
      const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
      STA_UNROLL
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], row, columns[n]);
    }
  }
}

// Rows row .. row + 7 of C, and N columns of tiles from the even column n on.
template <int N>
STA_INLINE void multiply_rows(const TileMatrix& a, const TileMatrix& b, int64_t depth, int64_t row,
                              int64_t n, float* c, int64_t c_row, bool add) {
  float* corner = c + row * c_row + n * kTileRows;
  const int64_t m = row / kTileRows;
  const int64_t left = m % 2 * a.pair_bytes + row % kTileRows * a.row_bytes;
  __m512 sums[kVectorRows][N] = {};
  if (add) {
    STA_UNROLL
    for (int i = 0; i < kVectorRows * N; ++i) {
      sums[i / N][i % N] = _mm512_loadu_ps(corner + i / N * c_row + i % N * kTileRows);
    }
  }
  const int64_t pairs = (depth + 1) / 2;
  for (int64_t step = 0; step * kTileRows < pairs; ++step) {
    add_products<N>(sums, a.tile(m - m % 2, step) + left, a.row_bytes, b.tile(n, step),
                    b.pair_bytes, min_of(kTileRows, pairs - step * kTileRows));
  }
  STA_UNROLL
  for (int i = 0; i < kVectorRows * N; ++i) {
    _mm512_storeu_ps(corner + i / N * c_row + i % N * kTileRows, sums[i / N][i % N]);
  }
}

// As multiply.h, with rows rounded up to 8 and the depth to 2.
inline void multiply(TileRegisters&, const TileMatrix& a, int64_t rows, const TileMatrix& b,
                     int64_t columns, int64_t depth, float* c, int64_t c_row, bool add) {
  const int64_t n_tiles = tiles_of(columns);
  for (int64_t n = 0; n < n_tiles; n += 2) {
    for (int64_t row = 0; row < rows; row += kVectorRows) {
      if (n + 1 < n_tiles) {
        multiply_rows<2>(a, b, depth, row, n, c, c_row, add);
      } else {
        multiply_rows<1>(a, b, depth, row, n, c, c_row, add);
      }
    }
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_MULTIPLY_VECTORS_H_
