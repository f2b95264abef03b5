// Softmax down the lanes of a score tile, exact as all keys of a frame are there, and its gradient.
#ifndef STA_CPU_SOFTMAX_H_
#define STA_CPU_SOFTMAX_H_

#include "exp2.h"
#include "tile.h"

namespace sta {
namespace STA_ISA {

// One vector of lanes: p[key] becomes exp(scale * (p[key] - max)); max and the sum are kept.
// Four partial sums: faster, and they round less than one long sum. The difference comes first, so
// that the largest score gives exactly 1.
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
  T total[4] = {};
  for (int64_t key = 0; key < quads; key += 4) {
    STA_UNROLL
    for (int u = 0; u < 4; ++u) {
      R* entry = p + (key + u) * kStep;
      const T e = exp2_nonpositive<V>((V::load(entry) - top) * factor);
      V::store(entry, e);
      total[u] += e;
    }
  }
  for (int64_t key = quads; key < keys; ++key) {
    R* entry = p + key * kStep;
    const T e = exp2_nonpositive<V>((V::load(entry) - top) * factor);
    V::store(entry, e);
    total[0] += e;
  }
  V::store(max, top);
  V::store(sum, (total[0] + total[1]) + (total[2] + total[3]));
}

// Calls body(V, lane) for each vector of the tile's used lanes.
template <class R, class Body>
STA_INLINE void for_lane_vectors(int64_t lanes, const Body& body) {
  using V = Vector<R>;
  int64_t lane = 0;
  for (; lane + V::W <= lanes; lane += V::W) body(V{}, lane);
  if constexpr (V::kBytes == 64) {
    if (lane < lanes) body(HalfPanelVector<R>{}, lane);
  }
}

// p becomes the softmax's numerators; max[lane] and sum[lane] complete it. scale_log2e must not be
// negative.
template <class R>
void softmax_tile(const ScoreTile<R>& p, int64_t keys, int64_t lanes, R scale_log2e, R* max,
                  R* sum) {
  for_lane_vectors<R>(lanes, [&](auto v, int64_t lane) {
    softmax_lanes<decltype(v)>(p.at(0, lane), keys, scale_log2e, max + lane, sum + lane);
  });
}

// One vector of lanes: p becomes p * (dp - delta + addend), delta = factor * sum of p * dp over
// keys. The sum is taken here and not as rowsum(dO * O): it then cancels exactly where dS has to
// vanish.
template <class V>
STA_INLINE void softmax_gradient_lanes(typename V::Real* p, const typename V::Real* dp,
                                       int64_t keys, const typename V::Real* addend,
                                       const typename V::Real* factor) {
  using T = typename V::T;
  constexpr int64_t kStep = kPanelLanes<typename V::Real>;
  const int64_t quads = keys & ~int64_t{3};
  T total[4] = {};
  for (int64_t key = 0; key < quads; key += 4) {
    STA_UNROLL
    for (int u = 0; u < 4; ++u) {
      const int64_t at = (key + u) * kStep;
      total[u] = V::fma(V::load(p + at), V::load(dp + at), total[u]);
    }
  }
  for (int64_t key = quads; key < keys; ++key) {
    total[0] = V::fma(V::load(p + key * kStep), V::load(dp + key * kStep), total[0]);
  }
  const T sum = (total[0] + total[1]) + (total[2] + total[3]);
  const T delta = sum * V::load(factor);
  const T added = V::load(addend);
  for (int64_t key = 0; key < keys; ++key) {
    const int64_t at = key * kStep;
    V::store(p + at, V::load(p + at) * ((V::load(dp + at) - delta) + added));
  }
}

template <class R>
void softmax_gradient_tile(const ScoreTile<R>& p, const ScoreTile<R>& dp, int64_t keys,
                           int64_t lanes, const R* addend, const R* factor) {
  for_lane_vectors<R>(lanes, [&](auto v, int64_t lane) {
    softmax_gradient_lanes<decltype(v)>(p.at(0, lane), dp.at(0, lane), keys, addend + lane,
                                        factor + lane);
  });
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_SOFTMAX_H_
