// Softmax down the lanes of a score tile, exact as all keys of a frame are there, and its gradient.
#ifndef STA_CPU_SOFTMAX_H_
#define STA_CPU_SOFTMAX_H_

#include "exp2.h"
#include "tile.h"

namespace sta {
namespace STA_ISA {

// Sums over keys are taken in blocks of kSumKeys, each in four partial sums: one long sum would
// round too much.
constexpr int64_t kSumKeys = 256;

// Calls body(key, partial sum's number) for keys begin .. end - 1, four at a time.
template <class Body>
STA_INLINE void for_quads(int64_t begin, int64_t end, const Body& body) {
  int64_t key = begin;
  for (; key + 4 <= end; key += 4) {
    STA_UNROLL
    for (int u = 0; u < 4; ++u) body(key + u, u);
  }
  for (; key < end; ++key) body(key, 0);
}

// One vector of lanes: p[key] becomes exp(scale * (p[key] - max)); max and the sum are kept.
// The difference comes first, so that the largest score gives exactly 1.
template <class V>
STA_INLINE void softmax_lanes(typename V::Real* p, int64_t keys, typename V::Real scale_log2e,
                              typename V::Real* max, typename V::Real* sum) {
  using R = typename V::Real;
  using T = typename V::T;
  constexpr int64_t kStep = kPanelLanes<R>;
  T largest[4];
  for (int u = 0; u < 4; ++u) largest[u] = V::set(-__builtin_inf());
  for_quads(0, keys,
            [&](int64_t key, int u) { largest[u] = V::max(largest[u], V::load(p + key * kStep)); });
  const T top = V::max(V::max(largest[0], largest[1]), V::max(largest[2], largest[3]));
  const T factor = V::set(scale_log2e);
  T total = {};
  for (int64_t begin = 0; begin < keys; begin += kSumKeys) {
    T part[4] = {};
    for_quads(begin, min_of(begin + kSumKeys, keys), [&](int64_t key, int u) {
      R* entry = p + key * kStep;
      const T e = exp2_nonpositive<V>((V::load(entry) - top) * factor);
      V::store(entry, e);
      part[u] += e;
    });
    total += (part[0] + part[1]) + (part[2] + part[3]);
  }
  V::store(max, top);
  V::store(sum, total);
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
  T sum = {};
  for (int64_t begin = 0; begin < keys; begin += kSumKeys) {
    T part[4] = {};
    for_quads(begin, min_of(begin + kSumKeys, keys), [&](int64_t key, int u) {
      part[u] = V::fma(V::load(p + key * kStep), V::load(dp + key * kStep), part[u]);
    });
    sum += (part[0] + part[1]) + (part[2] + part[3]);
  }
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
