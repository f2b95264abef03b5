// Vectors from and to the caller's storage, and loops over a row in vectors.
#ifndef STA_CPU_LANES_H_
#define STA_CPU_LANES_H_

#include "storage.h"

namespace sta {
namespace STA_ISA {

// W elements of storage as arithmetic values.
template <class V, class S>
STA_INLINE typename V::T load_lanes(const S* p) {
  if constexpr (sizeof(S) == sizeof(typename V::Real)) {
    return V::load(p);
  } else if constexpr (V::W == 1) {
    return V::set(load_one(*p));
  } else if constexpr (sizeof(load_one(*p)) == 4) {
    float lanes[V::W];
    for (int i = 0; i < V::W; ++i) lanes[i] = load_one(p[i]);
    return V::load(lanes);
  }
}
#if defined(__F16C__)
template <>
STA_INLINE Simd<float, 8>::T load_lanes<Simd<float, 8>, Half>(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <>
STA_INLINE Simd<float, 8>::T load_lanes<Simd<float, 8>, Bfloat16>(const Bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#endif
#if defined(__AVX512F__)
template <>
STA_INLINE Simd<float, 16>::T load_lanes<Simd<float, 16>, Half>(const Half* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <>
STA_INLINE Simd<float, 16>::T load_lanes<Simd<float, 16>, Bfloat16>(const Bfloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, bits);
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16));
}
#endif

// Arithmetic values as W elements of storage, rounded to nearest even.
template <class V, class S>
STA_INLINE void store_lanes(typename V::T v, S* p) {
  if constexpr (sizeof(S) == sizeof(typename V::Real)) {
    V::store(p, v);
  } else {
    typename V::Real lanes[V::W];
    V::store(lanes, v);
    for (int i = 0; i < V::W; ++i) store_one(lanes[i], p + i);
  }
}
#if defined(__F16C__)
template <>
STA_INLINE void store_lanes<Simd<float, 8>, Half>(Simd<float, 8>::T v, Half* p) {
  const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
}
#endif
#if STA_VECTOR_BYTES == 64
template <>
STA_INLINE void store_lanes<Simd<float, 16>, Half>(Simd<float, 16>::T v, Half* p) {
  const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
template <>
STA_INLINE void store_lanes<Simd<float, 16>, Bfloat16>(Simd<float, 16>::T v, Bfloat16* p) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(v);  // subnormal numbers become zero
  __builtin_memcpy(p, &rounded, sizeof rounded);
#else
  typedef uint32_t Bits __attribute__((vector_size(64)));
  Bits bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = (Bits)_mm512_mask_mov_epi32((__m512i)rounded, nan, (__m512i)((bits >> 16) | 0x40u));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)rounded));
#endif
}
#endif

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls body(d, V{}, Count<n>{}) for n vectors of type V from element d on, such that the calls
// cover [0, size): blocks of vectors first, then single ones, a half and elements.
template <class R, class Body>
STA_INLINE void over_lanes(int64_t size, Body body) {
  using V = Vector<R>;
  int64_t d = 0;
  for (; d + 6 * V::W <= size; d += 6 * V::W) body(d, V{}, Count<6>{});
  for (; d + 2 * V::W <= size; d += 2 * V::W) body(d, V{}, Count<2>{});
  for (; d + V::W <= size; d += V::W) body(d, V{}, Count<1>{});
#if STA_VECTOR_BYTES == 64
  using Narrow = HalfPanelVector<R>;
  for (; d + Narrow::W <= size; d += Narrow::W) body(d, Narrow{}, Count<1>{});
#endif
  for (; d < size; ++d) body(d, Simd<R, 1>{}, Count<1>{});
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_LANES_H_
