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

// xt[d][lane] = sign * rows[lane][d] for lane < queries, 0 in the other used lanes.
template <class R>
void pack_transposed(const R* rows, int64_t row_stride, int64_t queries, int64_t depth, R sign,
                     R* xt) {
  using Quad = Simd<R, 4>;
  constexpr int64_t kStride = kTileLanes<R>;
  int64_t lane = 0;
  if constexpr (sizeof(R) == 4) {
    const typename Quad::T signs = Quad::set(sign);
    for (; lane + 4 <= queries; lane += 4) {
      const R* row = rows + lane * row_stride;
      for (int64_t d = 0; d < depth; d += 4) {
        const typename Quad::T a = Quad::load(row + d) * signs;
        const typename Quad::T b = Quad::load(row + row_stride + d) * signs;
        const typename Quad::T c = Quad::load(row + 2 * row_stride + d) * signs;
        const typename Quad::T e = Quad::load(row + 3 * row_stride + d) * signs;
        const typename Quad::T ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        const typename Quad::T ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        const typename Quad::T ce_low = __builtin_shufflevector(c, e, 0, 4, 1, 5);
        const typename Quad::T ce_high = __builtin_shufflevector(c, e, 2, 6, 3, 7);
        R* out = xt + d * kStride + lane;
        Quad::store(out, __builtin_shufflevector(ab_low, ce_low, 0, 1, 4, 5));
        Quad::store(out + kStride, __builtin_shufflevector(ab_low, ce_low, 2, 3, 6, 7));
        Quad::store(out + 2 * kStride, __builtin_shufflevector(ab_high, ce_high, 0, 1, 4, 5));
        Quad::store(out + 3 * kStride, __builtin_shufflevector(ab_high, ce_high, 2, 3, 6, 7));
      }
    }
  }
  for (; lane < queries; ++lane) {
    for (int64_t d = 0; d < depth; ++d) xt[d * kStride + lane] = sign * rows[lane * row_stride + d];
  }
  const int64_t used = used_lanes<R>(queries);
  for (int64_t d = 0; d < depth && lane < used; ++d) {
    for (int64_t pad = lane; pad < used; ++pad) xt[d * kStride + pad] = 0;
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_TILE_H_
