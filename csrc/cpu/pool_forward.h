// Pooling, forward: convolution, norm, averages, a frame at a time; every token is read once.
#ifndef STA_CPU_POOL_FORWARD_H_
#define STA_CPU_POOL_FORWARD_H_

#include <string.h>

#include "pool.h"

namespace sta {
namespace STA_ISA {

template <class S>
struct PoolForwardWorkspace {
  using R = Arithmetic<S>;
  Taps<S> taps;
  R* row;    // [H * D] before the norm
  R* norm;   // [D] after it
  R* cells;  // [short_w][H * D] sums of one row of cells
  R* mean;   // [H * D] sum over the frame

  PoolForwardWorkspace(const PoolProblem<S>& problem, Carver& carver)
      : taps(problem.taps, carver),
        row(carver.take<R>(problem.width)),
        norm(carver.take<R>(problem.params.D)),
        cells(carver.take<R>(problem.params.short_w * problem.width)),
        mean(carver.take<R>(problem.width)) {}
};

template <class S>
struct PoolForwardJob {
  const PoolProblem<S>& problem;
  const Arithmetic<S>* weights;  // [P][tap][D]
  int error;
};

// norm = LayerNorm(row); leaves mean and 1 / standard deviation behind.
template <class S>
STA_INLINE void normalise(const PoolProblem<S>& problem, int64_t p, const Arithmetic<S>* row,
                          Arithmetic<S>* norm, Arithmetic<S>* mean, Arithmetic<S>* rstd) {
  using R = Arithmetic<S>;
  const int64_t size = problem.params.D;
  const R* weight = static_cast<const R*>(problem.params.norm_weight[p]);
  const R* bias = static_cast<const R*>(problem.params.norm_bias[p]);
  const R centre = row_sum(row, size) / size;
  const R variance = squared_distance(row, centre, size) / size;
  const R scale = 1 / square_root(variance + static_cast<R>(problem.params.eps));
  *mean = centre;
  *rstd = scale;
  over_lanes<R>(size, [&](int64_t d, auto vector, auto number) {
    using V = decltype(vector);
    for (int64_t i = d; i < d + decltype(number)::value * V::W; i += V::W) {
      const typename V::T hat = (V::load(row + i) - V::set(centre)) * V::set(scale);
      V::store(norm + i, V::fma(hat, V::load(weight + i), V::load(bias + i)));
    }
  });
}

template <class R>
STA_INLINE void add_to(R* __restrict sum, const R* __restrict x, int64_t size) {
  for (int64_t d = 0; d < size; ++d) sum[d] += x[d];
}

template <class S>
void pool_frame(const PoolForwardJob<S>& job, PoolForwardWorkspace<S>& ws, int64_t p, int64_t b,
                int64_t t) {
  using R = Arithmetic<S>;
  const PoolProblem<S>& problem = job.problem;
  const StaPoolParams& a = problem.params;
  const int64_t frame = problem.frame_index(p, b, t);
  const R* weights = job.weights + p * problem.taps * a.D;
  R *mean = problem.mean(frame), *rstd = problem.rstd(frame);
  S* pooled = static_cast<S*>(a.pooled) + frame * problem.rows * problem.width;
  S* current = pooled + problem.first * problem.width;
  S* shorts = current + problem.current * problem.width;

  if (a.long_rows == STA_LONG_CLASS) {
    const S* token = problem.template token_frame<const S>(a.tokens, p, b, t);
    for (int64_t h = 0; h < a.H; ++h) {
      load_row(token + h * a.tokens.stride_h, a.D, ws.row, a.D);
      normalise(problem, p, ws.row, ws.norm, mean + h, rstd + h);
      write_row(ws.norm, R{1}, a.D, pooled + h * a.D);
    }
  }
  memset(ws.mean, 0, problem.width * sizeof(R));
  for (int64_t y = 0; y < a.out_h; ++y) {
    if (problem.shorts > 0 && y % a.short_stride == 0) {
      memset(ws.cells, 0, a.short_w * problem.width * sizeof(R));
    }
    for (int64_t x = 0; x < a.out_w; ++x) {
      const int64_t n = y * a.out_w + x, stats = problem.stats_row(n);
      problem.gather(p, b, t, y, x, ws.taps);
      // One loop for all convolutions and one for all norms: a norm is a chain of dependent steps,
      // and the chains of several heads overlap only where they follow closely.
      for (int64_t h = 0; h < a.H; ++h) {
        ws.taps.weighted_sum(weights, h * a.tokens.stride_h, a.D, ws.row + h * a.D);
      }
      for (int64_t h = 0; h < a.H; ++h) {
        normalise(problem, p, ws.row + h * a.D, ws.norm, mean + stats + h, rstd + stats + h);
        write_row(ws.norm, R{1}, a.D, current + n * problem.width + h * a.D);
        if (problem.shorts > 0) {
          add_to(ws.cells + x / a.short_stride * problem.width + h * a.D, ws.norm, a.D);
        }
        if (a.long_rows == STA_LONG_MEAN) add_to(ws.mean + h * a.D, ws.norm, a.D);
      }
    }
    if (problem.shorts > 0 && ((y + 1) % a.short_stride == 0 || y + 1 == a.out_h)) {
      const int64_t row = y / a.short_stride;
      for (int64_t cell = 0; cell < a.short_w; ++cell) {
        write_row(ws.cells + cell * problem.width, R{1} / problem.cell_size(row, cell),
                  problem.width, shorts + (row * a.short_w + cell) * problem.width);
      }
    }
  }
  if (a.long_rows == STA_LONG_MEAN) {
    write_row(ws.mean, R{1} / problem.current, problem.width, pooled);
  }
}

// Units are frames, the P tensors of one next to each other: they share pages of the projection.
template <class S>
void pool_forward_range(int64_t begin, int64_t end, void* context) {
  auto& job = *static_cast<PoolForwardJob<S>*>(context);
  const StaPoolParams& a = job.problem.params;
  with_workspace<PoolForwardWorkspace<S>>(job, [&](PoolForwardWorkspace<S>& ws) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t frame = unit / a.P;
      pool_frame(job, ws, unit % a.P, frame / a.T, frame % a.T);
    }
  });
}

template <class S>
int pool_forward(const StaPoolParams& params, StaParallelFor parallel_for) {
  using R = Arithmetic<S>;
  const PoolProblem<S> problem(params);
  const int64_t units = params.P * params.B * params.T;
  if (units * problem.width == 0) return STA_OK;
  const Block weights(params.P * problem.taps * params.D * sizeof(R));
  if (weights.data() == nullptr) return STA_ERROR_MEMORY;
  problem.transpose_weights(reinterpret_cast<R*>(weights.data()));
  PoolForwardJob<S> job = {problem, reinterpret_cast<const R*>(weights.data()), STA_OK};
  if (parallel_for(0, units, 1, pool_forward_range<S>, &job) != 0) return STA_ERROR_PARALLEL;
  return job.error;
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_POOL_FORWARD_H_
