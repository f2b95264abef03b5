// Vectors of 16 floats, or 32 bfloat16, for what tiles cannot do: softmax, conversions, transposes.
// In AVX-512 where the compiler's flags allow it, else in vectors that it cuts up itself.
#ifndef STA_CPU_AMX_LANES_H_
#define STA_CPU_AMX_LANES_H_

#include "../storage.h"

namespace sta {
namespace STA_ISA {

constexpr int64_t kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(64)));

STA_INLINE Floats load_floats(const void* p) {
  Floats v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
STA_INLINE Words load_words(const void* p) { return (Words)load_floats(p); }
STA_INLINE void store_floats(void* p, Floats v) { __builtin_memcpy(p, &v, 64); }
STA_INLINE void store_words(void* p, Words v) { __builtin_memcpy(p, &v, 64); }
STA_INLINE Floats set_floats(float x) { return x - Floats{}; }

#if defined(__AVX512BF16__)

STA_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// b where either is NaN.
STA_INLINE Floats larger(Floats a, Floats b) { return _mm512_maskz_max_ps(0xffff, a, b); }
// The first `count` lanes; the others are filled with `rest`.
STA_INLINE Floats first_lanes(Floats v, int64_t count, float rest) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  return _mm512_mask_mov_ps(_mm512_set1_ps(rest), mask, v);
}
// 32 bfloat16, rounded to the nearest even: those of `low`, then those of `high`.
STA_INLINE Words round_to_bfloat16(Floats low, Floats high) {
  return (Words)_mm512_cvtne2ps_pbh(high, low);
}
#else

STA_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
STA_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
STA_INLINE Floats first_lanes(Floats v, int64_t count, float rest) {
  for (int i = 0; i < kLanes; ++i) v[i] = i < count ? v[i] : rest;
  return v;
}
STA_INLINE Words round_to_bfloat16(Floats low, Floats high) {
  Bfloat16 rounded[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    store_one(low[i], rounded + i);
    store_one(high[i], rounded + kLanes + i);
  }
  return load_words(rounded);
}
#endif

// All lanes combined by `join`, halves first.
template <class Join>
STA_INLINE float reduce(Floats v, const Join& join) {
  v = join(
      v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15));
  v = join(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7));
  v = join(v, __builtin_shufflevector(v, v, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3));
  v = join(v, __builtin_shufflevector(v, v, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1));
  return v[0];
}
STA_INLINE float sum_of(Floats v) {
  return reduce(v, [](Floats a, Floats b) { return a + b; });
}
STA_INLINE float largest_of(Floats v) {
  return reduce(v, [](Floats a, Floats b) { return larger(a, b); });
}

// The elements of a and b alternating, from the lower (upper) half of each 16 bytes.
STA_INLINE Words alternate_low(Words a, Words b) {
  return (Words)__builtin_shufflevector((Shorts)a, (Shorts)b, 0, 32, 1, 33, 2, 34, 3, 35,  //
                                        8, 40, 9, 41, 10, 42, 11, 43,                      //
                                        16, 48, 17, 49, 18, 50, 19, 51,                    //
                                        24, 56, 25, 57, 26, 58, 27, 59);
}
STA_INLINE Words alternate_high(Words a, Words b) {
  return (Words)__builtin_shufflevector((Shorts)a, (Shorts)b, 4, 36, 5, 37, 6, 38, 7, 39,  //
                                        12, 44, 13, 45, 14, 46, 15, 47,                    //
                                        20, 52, 21, 53, 22, 54, 23, 55,                    //
                                        28, 60, 29, 61, 30, 62, 31, 63);
}
// The element whose pair is word i of alternate_low; that of alternate_high is four further.
constexpr int64_t alternated(int64_t i) { return i / 4 * 8 + i % 4; }

// exp(scale * (x - maximum)) for x <= maximum with a relative error below 3e-6: what it gives is
// rounded to bfloat16 (2e-3). Exactly 1 for the maximum, as the difference comes first, and exactly
// 0 for -inf and below 2^-126; NaN stays NaN.
class Exponential {
 public:
  STA_INLINE Exponential(float maximum, float scale_log2e)
      : maximum_(set_floats(maximum)), factor_(set_floats(scale_log2e)) {}

  STA_INLINE Floats operator()(Floats x) const {
    const Floats t = (x - maximum_) * factor_;
#if defined(__AVX512BF16__)
    constexpr int kFloor = 1;
    const Floats fraction = _mm512_maskz_reduce_ps(0xffff, t, kFloor);
    const Floats power =
        polynomial(fraction, 0.693044841f, 0.241280213f, 0.0522424728f, 0.0134266857f);
    // Lanes that are masked take no time, but results below the normal numbers do: 200 cycles.
    const __mmask16 normal = _mm512_cmp_ps_mask(t, set_floats(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, power, t);
#else
    // As exp2.h: rounded to an integer by an addition, which leaves the biased exponent in the low
    // bits.
    const Floats magic = set_floats(12582912.0f + 127.0f);
    const Floats limited = larger(set_floats(-127.0f), t);
    const Floats shifted = limited + magic;
    const Floats power = polynomial(limited - (shifted - magic), 0.693124175f, 0.240240991f,
                                    0.0559064262f, 0.00958285294f);
    return power * (Floats)((Words)shifted << 23);
#endif
  }

 private:
  // Minimax in relative error for 2^fraction, with p(0) = 1.
  static STA_INLINE Floats polynomial(Floats fraction, float c1, float c2, float c3, float c4) {
    Floats power = multiply_add(set_floats(c4), fraction, set_floats(c3));
    power = multiply_add(power, fraction, set_floats(c2));
    power = multiply_add(power, fraction, set_floats(c1));
    return multiply_add(power, fraction, set_floats(1.0f));
  }

  Floats maximum_, factor_;
};

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_LANES_H_
