// Inner products of every key with every query of a tile: S^T = K Q^T, and dP^T = V dO^T.
//
// A group of kScoreKeys key rows is broadcast element by element against vectors of queries. Key
// rows come from a table of pointers, so the parts of a frame's keys are never gathered.
#ifndef STA_CPU_SCORES_H_
#define STA_CPU_SCORES_H_

#include "tile.h"

namespace sta {
namespace STA_ISA {

// One register tile: kScoreKeys keys x N vectors of lanes starting at `lane`. The epilogue gets
// each finished vector, where it belongs in the score tile, and its first lane.
template <class V, int N, class Epilogue>
STA_INLINE void score_block(const typename V::Real* const* rows, const typename V::Real* xt,
                            int64_t depth, const ScoreTile<typename V::Real>& p, int64_t key,
                            int64_t lane, const Epilogue& epilogue) {
  using R = typename V::Real;
  const R* row[kScoreKeys];
  STA_UNROLL
  for (int m = 0; m < kScoreKeys; ++m) row[m] = rows[key + m];
  typename V::T acc[kScoreKeys][N] = {};
  const R* x = xt + lane;
  for (int64_t d = 0; d < depth; ++d, x += kTileLanes<R>) {
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
      epilogue.template apply<V>(acc[m][n], column + m * kPanelLanes<R>, lane + n * V::W);
    }
  }
}

// All lanes of the tile for one group of keys.
template <class R, class Epilogue>
STA_INLINE void score_group(const R* const* rows, const R* xt, int64_t depth, const ScoreTile<R>& p,
                            int64_t key, int64_t lanes, const Epilogue& epilogue) {
  using V = Vector<R>;
  int64_t lane = 0;
  for (; lane + kScoreVectors * V::W <= lanes; lane += kScoreVectors * V::W) {
    score_block<V, kScoreVectors>(rows, xt, depth, p, key, lane, epilogue);
  }
  if constexpr (kScoreVectors == 4) {
    if (lane + 3 * V::W <= lanes) {
      score_block<V, 3>(rows, xt, depth, p, key, lane, epilogue);
      lane += 3 * V::W;
    } else if (lane + 2 * V::W <= lanes) {
      score_block<V, 2>(rows, xt, depth, p, key, lane, epilogue);
      lane += 2 * V::W;
    }
  }
  if (lane + V::W <= lanes) {
    score_block<V, 1>(rows, xt, depth, p, key, lane, epilogue);
    lane += V::W;
  }
  if constexpr (V::kBytes == 64) {
    if (lane < lanes) {
      score_block<HalfPanelVector<R>, 1>(rows, xt, depth, p, key, lane, epilogue);
    }
  }
}

// rows: table padded to p.keys entries, a multiple of kScoreKeys.
template <class R, class Epilogue>
void score_tile(const R* const* rows, const R* xt, int64_t depth, const ScoreTile<R>& p,
                int64_t lanes, const Epilogue& epilogue) {
  for (int64_t key = 0; key < p.keys; key += kScoreKeys) {
    score_group(rows, xt, depth, p, key, lanes, epilogue);
  }
}

// S: the inner products themselves.
struct StoreScores {
  template <class V>
  STA_INLINE void apply(typename V::T product, typename V::Real* p, int64_t) const {
    V::store(p, product);
  }
};

// dS = P * (dP - delta), over P and in place, from dP while it is still in registers.
template <class R>
struct SoftmaxGradient {
  const R* delta;  // [lane]
  template <class V>
  STA_INLINE void apply(typename V::T product, R* p, int64_t lane) const {
    V::store(p, V::load(p) * (product - V::load(delta + lane)));
  }
};

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_SCORES_H_
