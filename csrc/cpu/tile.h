// The tile of queries that all kernels work on, and how it is laid out.
//
// Queries lie in SIMD lanes. A panel is 64 bytes of them (16 floats); a tile is up to 4 panels, one
// 256-byte row. Two layouts:
//   transposed operand  xt[d][lane]            q or grad_out of the tile, row length kTileLanes
//   scores              p[panel][key][lane]    S, P or dS of the tile, softmax runs down a lane
// Lanes past the tile's last query are computed up to the next half panel and never read.
#ifndef STA_CPU_TILE_H_
#define STA_CPU_TILE_H_

#include "simd.h"

namespace sta {
namespace STA_ISA {

template <class R>
constexpr int kPanelLanes = 64 / static_cast<int>(sizeof(R));
constexpr int kTilePanels = 4;
template <class R>
constexpr int kTileLanes = kTilePanels * kPanelLanes<R>;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Lanes of a tile that have to be computed for `queries` queries.
template <class R>
constexpr int64_t used_lanes(int64_t queries) {
  return round_up(queries, kPanelLanes<R> / 2);
}

// Scores of one tile against all keys of a frame: p[panel][key][lane].
template <class R>
struct ScoreTile {
  R* data;
  int64_t keys;  // padded to kScoreKeys
  int64_t panel_stride() const { return keys * kPanelLanes<R>; }
  R* at(int64_t key, int64_t lane) const {
    return data + lane / kPanelLanes<R> * panel_stride() + key * kPanelLanes<R> +
           lane % kPanelLanes<R>;
  }
};

// Panels a tile, so that the scores of a tile stay in the second-level cache however many keys.
template <class R>
int64_t tile_panels(int64_t keys) {
  constexpr int64_t kScoreBytes = 256 * 1024;
  int64_t panels = kTilePanels;
  while (panels > 1 &&
         panels * keys * kPanelLanes<R> * static_cast<int64_t>(sizeof(R)) > kScoreBytes) {
    panels /= 2;
  }
  return panels;
}

// out[d][0:4] = sign * rows[0:4][d] for d < 4, out's rows kTileLanes apart.
STA_INLINE void transpose_quad(const float* rows, int64_t row_stride, float sign, float* out) {
  using Quad = Simd<float, 4>;
  constexpr int64_t kStride = kTileLanes<float>;
  const Quad::T signs = Quad::set(sign);
  const Quad::T a = Quad::load(rows) * signs;
  const Quad::T b = Quad::load(rows + row_stride) * signs;
  const Quad::T c = Quad::load(rows + 2 * row_stride) * signs;
  const Quad::T d = Quad::load(rows + 3 * row_stride) * signs;
  const Quad::T ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Quad::T ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad::T cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Quad::T cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  Quad::store(out, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
  Quad::store(out + kStride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
  Quad::store(out + 2 * kStride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
  Quad::store(out + 3 * kStride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

// xt[d][lane] = sign * rows[lane][d] for lane < queries, 0 in the other used lanes. A panel at a
// time, so that each of its cache lines is filled at once; they are fetched ahead.
template <class R>
void pack_transposed(const R* rows, int64_t row_stride, int64_t queries, int64_t depth, R sign,
                     R* xt) {
  constexpr int64_t kStride = kTileLanes<R>;
  constexpr int64_t kAhead = 16;
  int64_t lane = 0;
  if constexpr (sizeof(R) == 4) {
    const int64_t whole = queries & ~int64_t{3};
    while (lane < whole) {
      const int64_t end = min_of(lane + kPanelLanes<R>, whole);
      for (int64_t d = 0; d < depth; d += 4) {
        for (int i = 0; i < 4; ++i) __builtin_prefetch(xt + (d + kAhead + i) * kStride + lane, 1);
        for (int64_t first = lane; first < end; first += 4) {
          transpose_quad(rows + first * row_stride + d, row_stride, sign, xt + d * kStride + first);
        }
      }
      lane = end;
    }
  }
  const int64_t used = used_lanes<R>(queries);
  for (; lane < used; ++lane) {
    const R* row = rows + lane * row_stride;
    for (int64_t d = 0; d < depth; ++d)
      xt[d * kStride + lane] = lane < queries ? sign * row[d] : R{0};
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_TILE_H_
