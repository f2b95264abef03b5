// Inner products of every key with every query of a tile: S^T = K Q^T, and dP^T = V dO^T.
//
// A group of kScoreKeys key rows is broadcast element by element against vectors of queries. Key
// rows come from a table of pointers, so the parts of a frame's keys are never gathered.
#ifndef STA_CPU_SCORES_H_
#define STA_CPU_SCORES_H_

#include "prefetch.h"
#include "tile.h"

namespace sta {
namespace STA_ISA {

// Long sums round too much: a head dim above kDepthWhole is summed in blocks of kDepthBlock.
constexpr int64_t kDepthWhole = 128;
constexpr int64_t kDepthBlock = 64;

// One register tile: kScoreKeys keys x N vectors of lanes starting at `lane`, over elements
// begin .. end - 1 of the head dim. Written to the score tile, or added where begin > 0. Not
// inlined: the loop needs most of the general registers for its row pointers.
template <class V, int N>
STA_NOINLINE void score_block(const typename V::Real* const* rows, const typename V::Real* xt,
                              int64_t begin, int64_t end, const ScoreTile<typename V::Real>& p,
                              int64_t key, int64_t lane) {
  using R = typename V::Real;
  const R* row[kScoreKeys];
  STA_UNROLL
  for (int m = 0; m < kScoreKeys; ++m) row[m] = rows[key + m];
  typename V::T acc[kScoreKeys][N] = {};
  const R* x = xt + begin * kTileLanes<R> + lane;
  for (int64_t d = begin; d < end; ++d, x += kTileLanes<R>) {
    typename V::T queries[N];
    STA_UNROLL
    for (int n = 0; n < N; ++n) queries[n] = V::load(x + n * V::W);
    STA_UNROLL
    for (int m = 0; m < kScoreKeys; ++m) {
      const typename V::T element = V::set(row[m][d]);
      STA_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = V::fma(element, queries[n], acc[m][n]);
    }
  }
  STA_UNROLL
  for (int n = 0; n < N; ++n) {
    R* column = p.at(key, lane + n * V::W);
    STA_UNROLL
    for (int m = 0; m < kScoreKeys; ++m) {
      R* entry = column + m * kPanelLanes<R>;
      V::store(entry, begin > 0 ? V::load(entry) + acc[m][n] : acc[m][n]);
    }
  }
}

// All lanes of the tile for one group of keys.
template <class R>
STA_INLINE void score_group(const R* const* rows, const R* xt, int64_t begin, int64_t end,
                            const ScoreTile<R>& p, int64_t key, int64_t lanes) {
  using V = Vector<R>;
  int64_t lane = 0;
  for (; lane + kScoreVectors * V::W <= lanes; lane += kScoreVectors * V::W) {
    score_block<V, kScoreVectors>(rows, xt, begin, end, p, key, lane);
  }
  if constexpr (kScoreVectors == 4) {
    if (lane + 3 * V::W <= lanes) {
      score_block<V, 3>(rows, xt, begin, end, p, key, lane);
      lane += 3 * V::W;
    } else if (lane + 2 * V::W <= lanes) {
      score_block<V, 2>(rows, xt, begin, end, p, key, lane);
      lane += 2 * V::W;
    }
  }
  if (lane + V::W <= lanes) {
    score_block<V, 1>(rows, xt, begin, end, p, key, lane);
    lane += V::W;
  }
  if constexpr (V::kBytes == 64) {
    if (lane < lanes) score_block<HalfPanelVector<R>, 1>(rows, xt, begin, end, p, key, lane);
  }
}

// p[key][query] = rows[key] . query, from the transposed queries xt. rows: table padded to p.keys
// entries, a multiple of kScoreKeys. `prefetch` is spread over the work.
template <class R>
void score_tile(const R* const* rows, const R* xt, int64_t depth, const ScoreTile<R>& p,
                int64_t lanes, Prefetch& prefetch) {
  prefetch.spread(p.keys / kScoreKeys);
  const int64_t blocks = depth > kDepthWhole ? (depth + kDepthBlock - 1) / kDepthBlock : 1;
  for (int64_t key = 0; key < p.keys; key += kScoreKeys) {
    prefetch.step();
    for (int64_t block = 0; block < blocks; ++block) {
      score_group(rows, xt, block * depth / blocks, (block + 1) * depth / blocks, p, key, lanes);
    }
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_SCORES_H_
