// Rows in the caller's dtype to rows in the arithmetic type and back.
#ifndef STA_CPU_STORAGE_H_
#define STA_CPU_STORAGE_H_

#include "simd.h"

namespace sta {
namespace STA_ISA {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

STA_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
STA_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

STA_INLINE float load_one(float x) { return x; }
STA_INLINE double load_one(double x) { return x; }
STA_INLINE float load_one(Bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
STA_INLINE float load_one(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Exponent and mantissa moved into place, then the bias corrected by an exact multiplication,
  // which also renormalises the subnormals; only infinity and NaN need their exponent filled up.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return float_of(sign | 0x70000000u | magnitude);
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
#endif
}

STA_INLINE void store_one(float x, float* p) { *p = x; }
STA_INLINE void store_one(double x, double* p) { *p = x; }
STA_INLINE void store_one(float x, Bfloat16* p) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // nearest even
  p->bits =
      static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
STA_INLINE void store_one(float x, Half* p) {
#if defined(__F16C__)
  p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = bits_of(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // a subnormal: the addition of 1/2 rounds it, nearest even
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
#endif
}

// How many leading elements of a row the hardware converts from or to half precision by itself. The
// other dtypes are left to the compiler, which vectorises load_one and store_one.
template <class S>
STA_INLINE int64_t load_halves(const S*, int64_t, Arithmetic<S>*) {
  return 0;
}
template <class S>
STA_INLINE int64_t store_halves(const Arithmetic<S>*, Arithmetic<S>, int64_t, S*) {
  return 0;
}
#if defined(__F16C__)
STA_INLINE int64_t load_halves(const Half* src, int64_t n, float* dst) {
  const int64_t whole = n & ~int64_t{7};
  for (int64_t i = 0; i < whole; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(halves));
  }
  return whole;
}
STA_INLINE int64_t store_halves(const float* src, float factor, int64_t n, Half* dst) {
  const int64_t whole = n & ~int64_t{7};
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(src + i), _mm256_set1_ps(factor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT));
  }
  return whole;
}
#endif

// dst[0:n] = src[0:n], dst[n:padded] = 0.
template <class S>
void load_row(const S* __restrict src, int64_t n, Arithmetic<S>* __restrict dst, int64_t padded) {
  for (int64_t i = load_halves(src, n, dst); i < n; ++i) dst[i] = load_one(src[i]);
  for (int64_t i = n; i < padded; ++i) dst[i] = 0;
}

// dst[0:n] = factor * src[0:n]
template <class S>
void store_row(const Arithmetic<S>* __restrict src, Arithmetic<S> factor, int64_t n,
               S* __restrict dst) {
  for (int64_t i = store_halves(src, factor, n, dst); i < n; ++i) {
    store_one(src[i] * factor, dst + i);
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_STORAGE_H_
