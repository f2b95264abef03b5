// Vectors of one instruction set, as far as the kernels need them.
//
// Every file below kernels.h lives in namespace sta::STA_ISA and uses nothing from std::, so that
// no function compiled for one instruction set can be merged by the linker with another's.
#ifndef STA_CPU_SIMD_H_
#define STA_CPU_SIMD_H_

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define STA_INLINE inline __attribute__((always_inline))
#define STA_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define STA_UNROLL _Pragma("unroll")
#else
#define STA_UNROLL _Pragma("GCC unroll 32")
#endif

namespace sta {
namespace STA_ISA {

// W lanes of Real (float or double).
template <class R, int Lanes>
struct Simd {
  using Real = R;
  static constexpr int W = Lanes;
  static constexpr int kBytes = Lanes * sizeof(R);
  typedef R T __attribute__((vector_size(kBytes)));

  static STA_INLINE T load(const R* p) {
    T v;
    __builtin_memcpy(&v, p, kBytes);
    return v;
  }
  static STA_INLINE void store(R* p, T v) { __builtin_memcpy(p, &v, kBytes); }
  static STA_INLINE T set(R x) { return x - T{}; }

  // a * b + c, rounded once where the hardware can.
  static STA_INLINE T fma(T a, T b, T c) {
#if defined(__AVX512F__)
    if constexpr (kBytes == 64 && sizeof(R) == 4) return _mm512_fmadd_ps(a, b, c);
    if constexpr (kBytes == 64 && sizeof(R) == 8) return _mm512_fmadd_pd(a, b, c);
#endif
#if defined(__FMA__)
    if constexpr (kBytes == 32 && sizeof(R) == 4) return _mm256_fmadd_ps(a, b, c);
    if constexpr (kBytes == 32 && sizeof(R) == 8) return _mm256_fmadd_pd(a, b, c);
#endif
    if constexpr (kBytes <= 16) return a * b + c;
  }

  // The larger of the two; b where either is NaN. (GCC 12 warns about the unmasked 512-bit forms.)
  static STA_INLINE T max(T a, T b) {
#if defined(__AVX512F__)
    if constexpr (kBytes == 64 && sizeof(R) == 4) return _mm512_maskz_max_ps(0xffff, a, b);
    if constexpr (kBytes == 64 && sizeof(R) == 8) return _mm512_maskz_max_pd(0xff, a, b);
#endif
#if defined(__AVX2__)
    if constexpr (kBytes == 32 && sizeof(R) == 4) return _mm256_max_ps(a, b);
    if constexpr (kBytes == 32 && sizeof(R) == 8) return _mm256_max_pd(a, b);
#endif
    if constexpr (kBytes <= 16) return a > b ? a : b;
  }

  static STA_INLINE R sum(T v) {
    R total = 0;
    for (int i = 0; i < W; ++i) total += v[i];
    return total;
  }
};

// The widest vector, and half of it for a tile's last lanes. Tiles are cut in halves of a panel
// (see tile.h), which for narrower instruction sets is a whole number of full vectors already.
template <class R>
using Vector = Simd<R, STA_VECTOR_BYTES / static_cast<int>(sizeof(R))>;
template <class R>
using HalfPanelVector = Simd<R, 32 / static_cast<int>(sizeof(R))>;

// Register tiles: kScoreKeys x kScoreVectors and kRowGroup x kRowVectors accumulators leave room
// for the operands in 32 registers (AVX-512) or 16.
constexpr int kScoreKeys = 6;
constexpr int kScoreVectors = STA_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kRowGroup = STA_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kRowVectors = 3;

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_SIMD_H_
