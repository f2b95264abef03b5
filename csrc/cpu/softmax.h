// Softmax down the lanes of a score tile, exact: all keys of a frame are there.
#ifndef STA_CPU_SOFTMAX_H_
#define STA_CPU_SOFTMAX_H_

#include "exp2.h"
#include "tile.h"

namespace sta {
namespace STA_ISA {

// One vector of lanes: p[key] becomes exp(scale * (p[key] - max)); max and the sum are kept.
// Four partial sums: faster, and they round less than one long sum.
template <class V>
STA_INLINE void softmax_lanes(typename V::Real* p, int64_t keys, typename V::Real scale_log2e,
                              typename V::Real* max, typename V::Real* sum) {
  using R = typename V::Real;
  using T = typename V::T;
  constexpr int64_t kStep = kPanelLanes<R>;
  const int64_t quads = keys & ~int64_t{3};
  T largest[4];
  for (int u = 0; u < 4; ++u) largest[u] = V::set(-__builtin_inf());
  for (int64_t key = 0; key < quads; key += 4) {
    STA_UNROLL
    for (int u = 0; u < 4; ++u) largest[u] = V::max(largest[u], V::load(p + (key + u) * kStep));
  }
  for (int64_t key = quads; key < keys; ++key) {
    largest[0] = V::max(largest[0], V::load(p + key * kStep));
  }
  const T top = V::max(V::max(largest[0], largest[1]), V::max(largest[2], largest[3]));
  const T factor = V::set(scale_log2e);
  const T offset = -(top * factor);
  T total[4] = {};
  for (int64_t key = 0; key < quads; key += 4) {
    STA_UNROLL
    for (int u = 0; u < 4; ++u) {
      R* entry = p + (key + u) * kStep;
      const T e = exp2_nonpositive<V>(V::fma(V::load(entry), factor, offset));
      V::store(entry, e);
      total[u] += e;
    }
  }
  for (int64_t key = quads; key < keys; ++key) {
    R* entry = p + key * kStep;
    const T e = exp2_nonpositive<V>(V::fma(V::load(entry), factor, offset));
    V::store(entry, e);
    total[0] += e;
  }
  V::store(max, top);
  V::store(sum, (total[0] + total[1]) + (total[2] + total[3]));
}

// scale_log2e must not be negative. max[lane], sum[lane]: of the tile's used lanes.
template <class R>
void softmax_tile(const ScoreTile<R>& p, int64_t keys, int64_t lanes, R scale_log2e, R* max,
                  R* sum) {
  using V = Vector<R>;
  int64_t lane = 0;
  for (; lane + V::W <= lanes; lane += V::W) {
    softmax_lanes<V>(p.at(0, lane), keys, scale_log2e, max + lane, sum + lane);
  }
  if constexpr (V::kBytes == 64) {
    if (lane < lanes) {
      using Half = HalfPanelVector<R>;
      softmax_lanes<Half>(p.at(0, lane), keys, scale_log2e, max + lane, sum + lane);
    }
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_SOFTMAX_H_
