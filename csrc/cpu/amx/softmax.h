// Softmax along the rows of a score tile: one row a query, `keys` scores in it, padding behind
// them. The weights are rounded to bfloat16 for the next product; maxima and sums are float32.
#ifndef STA_CPU_AMX_SOFTMAX_H_
#define STA_CPU_AMX_SOFTMAX_H_

#include "lanes.h"
#include "tiles.h"

namespace sta {
namespace STA_ISA {

// Calls body(key, low, high) for groups of kTileDepth scores. Those in the padding become -inf.
template <class Body>
STA_INLINE void for_scores(const float* scores, int64_t keys, const Body& body) {
  int64_t key = 0;
  for (; key + kTileDepth <= keys; key += kTileDepth) {
    body(key, load_floats(scores + key), load_floats(scores + key + kLanes));
  }
  if (key == keys) return;
  const int64_t rest = keys - key;
  const float nothing = -__builtin_inff();
  const Floats low = load_floats(scores + key);
  if (rest <= kLanes) {
    body(key, rest < kLanes ? first_lanes(low, rest, nothing) : low, set_floats(nothing));
  } else {
    body(key, low, first_lanes(load_floats(scores + key + kLanes), rest - kLanes, nothing));
  }
}

STA_INLINE float row_maximum(const float* scores, int64_t keys) {
  Floats top[2] = {set_floats(-__builtin_inff()), set_floats(-__builtin_inff())};
  for_scores(scores, keys, [&](int64_t, Floats low, Floats high) {
    top[0] = larger(top[0], low);
    top[1] = larger(top[1], high);
  });
  return largest_of(larger(top[0], top[1]));
}

// weights[key] = exp(scale * (scores[key] - maximum)) in bfloat16, 0 in the padding, as a row of a
// strip_matrix. Returns their sum.
STA_INLINE float row_weights(const float* scores, int64_t keys, float maximum, float scale_log2e,
                             Bfloat16* weights) {
  const Exponential exponential(maximum, scale_log2e);
  Floats sum[2] = {};
  for_scores(scores, keys, [&](int64_t key, Floats low, Floats high) {
    low = exponential(low);
    high = exponential(high);
    sum[0] += low;
    sum[1] += high;
    store_words(weights + key * kTileDepth, round_to_bfloat16(low, high));
  });
  return sum_of(sum[0] + sum[1]);
}

// What a row's gradient needs to know about all of its keys.
struct RowSums {
  float weights;   // sum of e = exp(scale * (score - maximum))
  float weighted;  // sum of e * dP
};

// Replaces the scores by e, float32.
STA_INLINE RowSums row_exponentials(float* scores, const float* grad_weights, int64_t keys,
                                    float maximum, float scale_log2e) {
  const Exponential exponential(maximum, scale_log2e);
  Floats sum[2] = {}, weighted[2] = {};
  for_scores(scores, keys, [&](int64_t key, Floats low, Floats high) {
    low = exponential(low);
    high = exponential(high);
    store_floats(scores + key, low);
    store_floats(scores + key + kLanes, high);
    sum[0] += low;
    sum[1] += high;
    weighted[0] = multiply_add(low, load_floats(grad_weights + key), weighted[0]);
    weighted[1] = multiply_add(high, load_floats(grad_weights + key + kLanes), weighted[1]);
  });
  return {sum_of(sum[0] + sum[1]), sum_of(weighted[0] + weighted[1])};
}

// One query's factors: P = inverse * e, dS = P * (dP - shift).
struct RowFactors {
  float inverse, shift;
};

struct RowGradient {
  Words weights, grad_scores;  // 32 keys, bfloat16
};

STA_INLINE RowGradient row_gradient(const float* exponentials, const float* grad_weights,
                                    const RowFactors& row) {
  const Floats inverse = set_floats(row.inverse), shift = set_floats(row.shift);
  const Floats low = load_floats(exponentials) * inverse;
  const Floats high = load_floats(exponentials + kLanes) * inverse;
  return {round_to_bfloat16(low, high),
          round_to_bfloat16(low * (load_floats(grad_weights) - shift),
                            high * (load_floats(grad_weights + kLanes) - shift))};
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_SOFTMAX_H_
