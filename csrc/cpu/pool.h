// What both directions of the pooling share: rows of the tensors, taps, sums along the head dim.
//
// A frame is computed position by position with all its heads, because a token's heads lie next to
// each other in memory; the head dim lies in SIMD lanes.
#ifndef STA_CPU_POOL_H_
#define STA_CPU_POOL_H_

#include "../pool_params.h"
#include "sta_cpu.h"
#include "storage.h"
#include "tile.h"
#include "workspace.h"

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

#if STA_VECTOR_BYTES == 64
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
template <>
STA_INLINE void store_lanes<Simd<float, 16>, Half>(Simd<float, 16>::T v, Half* p) {
  const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
}
template <>
STA_INLINE void store_lanes<Simd<float, 16>, Bfloat16>(Simd<float, 16>::T v, Bfloat16* p) {
  typedef uint32_t Bits __attribute__((vector_size(64)));
  Bits bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = (Bits)_mm512_mask_mov_epi32((__m512i)rounded, nan, (__m512i)((bits >> 16) | 0x40u));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)rounded));
}
#endif

// The sum of a vector's lanes, in halves.
template <class V>
STA_INLINE typename V::Real lane_sum(typename V::T v) {
  using Half = Simd<typename V::Real, V::W / 2>;
  if constexpr (V::W == 16) {
    return lane_sum<Half>(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                          __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  } else if constexpr (V::W == 8) {
    return lane_sum<Half>(__builtin_shufflevector(v, v, 0, 1, 2, 3) +
                          __builtin_shufflevector(v, v, 4, 5, 6, 7));
  } else if constexpr (V::W == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else if constexpr (V::W == 2) {
    return v[0] + v[1];
  } else {
    return v[0];
  }
}

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

// dst[0:size] = factor * src[0:size]
template <class S>
STA_INLINE void write_row(const Arithmetic<S>* src, Arithmetic<S> factor, int64_t size, S* dst) {
#if STA_VECTOR_BYTES == 64
  over_lanes<Arithmetic<S>>(size, [&](int64_t d, auto vector, auto number) {
    using V = decltype(vector);
    for (int64_t i = d; i < d + decltype(number)::value * V::W; i += V::W) {
      store_lanes<V>(V::load(src + i) * V::set(factor), dst + i);
    }
  });
#else
  store_row(src, factor, size, dst);
#endif
}

// The rows that one row is a weighted sum of, with their weights. X: the rows' storage.
template <class X>
struct Taps {
  using R = Arithmetic<X>;
  const X** rows;
  int64_t* index;  // of the tap in the kernel, (kt, kh, kw) in order
  int64_t count = 0;

  Taps(int64_t most, Carver& carver)
      : rows(carver.take<const X*>(most)), index(carver.take<int64_t>(most)) {}

  void clear() { count = 0; }
  void add(const X* row, int64_t tap) {
    rows[count] = row;
    index[count++] = tap;
  }

  // out[0:size] = sum of weights[tap][0:size] * row[offset:offset + size]
  STA_INLINE void weighted_sum(const R* weights, int64_t offset, int64_t size, R* out) const {
    over_lanes<R>(size, [&](int64_t d, auto vector, auto number) {
      using V = decltype(vector);
      constexpr int n = decltype(number)::value;
      typename V::T sum[n] = {};
      for (int64_t i = 0; i < count; ++i) {
        const X* row = rows[i] + offset + d;
        const R* weight = weights + index[i] * size + d;
        STA_UNROLL
        for (int j = 0; j < n; ++j) {
          sum[j] = V::fma(V::load(weight + j * V::W), load_lanes<V>(row + j * V::W), sum[j]);
        }
      }
      STA_UNROLL
      for (int j = 0; j < n; ++j) V::store(out + d + j * V::W, sum[j]);
    });
  }
};

// The call in typed form.
template <class S>
struct PoolProblem {
  using R = Arithmetic<S>;

  const StaPoolParams& params;
  int64_t taps;     // of the kernel
  int64_t current;  // rows of a frame: Nc
  int64_t shorts;   // Ns
  int64_t rows;     // of the pooled buffer, R
  int64_t first;    // the buffer's first current row, and 1 where there is a long one
  int64_t normed;   // rows with statistics
  int64_t width;    // elements of a row with all its heads

  explicit PoolProblem(const StaPoolParams& p) : params(p) {
    taps = p.kt * p.kh * p.kw;
    current = p.out_h * p.out_w;
    shorts = p.short_h * p.short_w;
    first = p.long_rows != STA_LONG_NONE ? 1 : 0;
    rows = first + current + shorts;
    normed = current + (p.long_rows == STA_LONG_CLASS ? 1 : 0);
    width = p.H * p.D;
  }

  // The frame's first token row, head 0.
  template <class X>
  X* token_frame(const StaPoolTensor& x, int64_t p, int64_t b, int64_t t) const {
    return static_cast<X*>(x.data) + p * x.stride_p + b * x.stride_b + t * x.stride_t;
  }
  // Frames of the contiguous buffers are numbered through P, B and T.
  int64_t frame_index(int64_t p, int64_t b, int64_t t) const {
    return (p * params.B + b) * params.T + t;
  }
  R* mean(int64_t frame) const { return static_cast<R*>(params.stats) + frame * normed * params.H; }
  R* rstd(int64_t frame) const {
    return mean(frame) + params.P * params.B * params.T * normed * params.H;
  }
  int64_t stats_row(int64_t n) const { return (n + normed - current) * params.H; }

  // How many positions the cell (y, x) of the average pooling holds.
  int64_t cell_size(int64_t y, int64_t x) const {
    const int64_t s = params.short_stride;
    return min_of(s, params.out_h - y * s) * min_of(s, params.out_w - x * s);
  }

  // The token rows under the kernel at output (t, y, x).
  void gather(int64_t p, int64_t b, int64_t t, int64_t y, int64_t x, Taps<S>& found) const {
    const StaPoolParams& a = params;
    const int64_t top = y * a.stride - a.kh / 2, left = x * a.stride - a.kw / 2;
    found.clear();
    for (int64_t k = max_of(0, a.kt / 2 - t); k < min_of(a.kt, a.T + a.kt / 2 - t); ++k) {
      const S* frame = token_frame<const S>(a.tokens, p, b, t - a.kt / 2 + k);
      for (int64_t i = max_of(0, -top); i < min_of(a.kh, a.grid_h - top); ++i) {
        for (int64_t j = max_of(0, -left); j < min_of(a.kw, a.grid_w - left); ++j) {
          const int64_t n = a.class_token + (top + i) * a.grid_w + left + j;
          found.add(frame + n * a.tokens.stride_n, (k * a.kh + i) * a.kw + j);
        }
      }
    }
  }

  // weights[p][tap][d] of all P tensors.
  void transpose_weights(R* weights) const {
    for (int64_t p = 0; p < params.P; ++p) {
      const R* from = static_cast<const R*>(params.weight[p]);
      R* to = weights + p * taps * params.D;
      for (int64_t d = 0; d < params.D; ++d) {
        for (int64_t i = 0; i < taps; ++i) to[i * params.D + d] = from[d * taps + i];
      }
    }
  }
};

template <class R>
STA_INLINE R row_sum(const R* x, int64_t size) {
  R total = 0;
  over_lanes<R>(size, [&](int64_t d, auto vector, auto number) {
    using V = decltype(vector);
    typename V::T sum = V::load(x + d);
    for (int j = 1; j < decltype(number)::value; ++j) sum += V::load(x + d + j * V::W);
    total += lane_sum<V>(sum);
  });
  return total;
}

template <class R>
STA_INLINE R squared_distance(const R* x, R from, int64_t size) {
  R total = 0;
  over_lanes<R>(size, [&](int64_t d, auto vector, auto number) {
    using V = decltype(vector);
    typename V::T sum = V::set(0);
    for (int j = 0; j < decltype(number)::value; ++j) {
      const typename V::T apart = V::load(x + d + j * V::W) - V::set(from);
      sum = V::fma(apart, apart, sum);
    }
    total += lane_sum<V>(sum);
  });
  return total;
}

STA_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
STA_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Calls body(workspace) with a workspace of the calling thread's own.
template <class Workspace, class Job, class Body>
void with_workspace(Job& job, Body body) {
  Carver measure(nullptr);
  Workspace sizes(job.problem, measure);
  const Block block(measure.used());
  if (block.data() == nullptr) {
    __atomic_store_n(&job.error, STA_ERROR_MEMORY, __ATOMIC_RELAXED);
    return;
  }
  Carver carver(block.data());
  Workspace workspace(job.problem, carver);
  body(workspace);
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_POOL_H_
