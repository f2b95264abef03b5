// What both directions of the pooling share: rows of the tensors, taps, sums along the head dim.
//
// A frame is computed position by position with all its heads, because a token's heads lie next to
// each other in memory; the head dim lies in SIMD lanes.
#ifndef STA_CPU_POOL_H_
#define STA_CPU_POOL_H_

#include "../pool_params.h"
#include "lanes.h"
#include "sta_cpu.h"
#include "tile.h"
#include "workspace.h"

namespace sta {
namespace STA_ISA {

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
