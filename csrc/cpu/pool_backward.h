// Pooling, backward. With dz the gradient of a normalised row, its averages' share included,
//
//   hat = (y - mean) * rstd        y, the convolution, is computed again from the tokens
//   g   = dz * norm_weight         dy = rstd * (g - mean(g) - hat * mean(g * hat))
//   d norm_weight = sum dz * hat   d norm_bias = sum dz
//   d weight[tap] = sum dy * token under the tap
//   d token = sum over the rows that the token is under a tap of: weight[tap] * dy
//
// A task owns the rows of some frames of one of the P tensors, sums the parameters' gradients in a
// slab of its own, and the slabs are added in a fixed order. Each token gathers its gradient, so
// nothing is added to memory that another task writes.
#ifndef STA_CPU_POOL_BACKWARD_H_
#define STA_CPU_POOL_BACKWARD_H_

#include "pool_forward.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sta {
namespace STA_ISA {

// Writes whole cache lines past the caches. A gradient that no cache holds until its reader comes
// is otherwise read from memory first, line by line, only to be overwritten. src is aligned.
STA_INLINE bool stream_lines([[maybe_unused]] void* dst, [[maybe_unused]] const void* src,
                             [[maybe_unused]] int64_t bytes) {
#if defined(__SSE2__)
  if ((reinterpret_cast<uintptr_t>(dst) | static_cast<uintptr_t>(bytes)) % 64 != 0) return false;
  for (int64_t i = 0; i < bytes; i += 16) {
    _mm_stream_si128(
        reinterpret_cast<__m128i*>(static_cast<char*>(dst) + i),
        _mm_load_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(src) + i)));
  }
  return true;
#else
  return false;
#endif
}

// Streamed lines become visible to other threads in order with what this thread writes next.
STA_INLINE void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class S>
struct PoolBackwardWorkspace {
  using R = Arithmetic<S>;
  Taps<S> taps;
  Taps<R> readers;  // rows dy that a token contributed to
  R* hat;           // [H * D]
  R* g;             // [H * D]
  R* cells;         // [short_w][H * D] gradients of one row of cells, over their sizes
  R* mean;          // [H * D] gradient of the mean, over the frame's positions
  R* token;         // [H * D]
  S* line;          // [H * D], the same as the caller stores it
  S* zeros;         // [H * D]
  R* dy;            // [Nc][H * D] of one frame; only where the kernel stays within a frame

  PoolBackwardWorkspace(const PoolProblem<S>& problem, Carver& carver)
      : taps(problem.taps, carver),
        readers(problem.taps, carver),
        hat(carver.take<R>(problem.width)),
        g(carver.take<R>(problem.width)),
        cells(carver.take<R>(problem.params.short_w * problem.width)),
        mean(carver.take<R>(problem.width)),
        token(carver.take<R>(problem.width)),
        line(carver.take<S>(problem.width)),
        zeros(carver.take<S>(problem.width)),
        dy(problem.params.kt > 1 ? nullptr : carver.take<R>(problem.current * problem.width)) {}
};

template <class S>
struct PoolBackwardJob {
  using R = Arithmetic<S>;
  const PoolProblem<S>& problem;
  const R* weights;  // [P][tap][D]
  R* slabs;          // [P][chunk][tap, norm_weight, norm_bias][D]
  R* dy;             // [P][B][T][Nc][H * D] where the kernel reaches over frames, else null
  int64_t chunks;    // of the B * T frames of each tensor
  int64_t chunk_frames;
  bool streams;  // whether the tokens' gradients go past the caches
  int error;

  int64_t slab_size() const { return (problem.taps + 2) * problem.params.D; }
  int64_t dy_size() const { return problem.current * problem.width; }  // of a frame
};

// dy of one row from its y in row and dz in g, both overwritten; adds to the norm's gradients.
template <class S>
STA_INLINE void norm_backward(const PoolProblem<S>& problem, int64_t p, Arithmetic<S>* row,
                              Arithmetic<S>* g, Arithmetic<S> mean, Arithmetic<S> rstd,
                              Arithmetic<S>* grad_weight, Arithmetic<S>* grad_bias,
                              Arithmetic<S>* dy) {
  using R = Arithmetic<S>;
  const int64_t size = problem.params.D;
  const R* weight = static_cast<const R*>(problem.params.norm_weight[p]);
  R sum = 0, product = 0;
  over_lanes<R>(size, [&](int64_t d, auto vector, auto number) {
    using V = decltype(vector);
    typename V::T sums = V::set(0), products = V::set(0);
    for (int64_t i = d; i < d + decltype(number)::value * V::W; i += V::W) {
      const typename V::T hat = (V::load(row + i) - V::set(mean)) * V::set(rstd);
      const typename V::T dz = V::load(g + i);
      V::store(grad_weight + i, V::fma(dz, hat, V::load(grad_weight + i)));
      V::store(grad_bias + i, dz + V::load(grad_bias + i));
      const typename V::T scaled = dz * V::load(weight + i);
      sums += scaled;
      products = V::fma(scaled, hat, products);
      V::store(row + i, hat);
      V::store(g + i, scaled);
    }
    sum += lane_sum<V>(sums);
    product += lane_sum<V>(products);
  });
  sum /= size;
  product /= size;
  over_lanes<R>(size, [&](int64_t d, auto vector, auto number) {
    using V = decltype(vector);
    for (int64_t i = d; i < d + decltype(number)::value * V::W; i += V::W) {
      const typename V::T away = V::fma(V::load(row + i), V::set(product), V::set(sum));
      V::store(dy + i, (V::load(g + i) - away) * V::set(rstd));
    }
  });
}

// grad[tap] += sum over the heads of dy * token, for every tap of one position.
template <class S>
STA_INLINE void weight_gradient(const PoolProblem<S>& problem, const Taps<S>& taps,
                                const Arithmetic<S>* dy, Arithmetic<S>* grad) {
  using R = Arithmetic<S>;
  const StaPoolParams& a = problem.params;
  for (int64_t i = 0; i < taps.count; ++i) {
    R* sums = grad + taps.index[i] * a.D;
    over_lanes<R>(a.D, [&](int64_t d, auto vector, auto number) {
      using V = decltype(vector);
      constexpr int n = decltype(number)::value;
      typename V::T sum[n];
      STA_UNROLL
      for (int j = 0; j < n; ++j) sum[j] = V::load(sums + d + j * V::W);
      for (int64_t h = 0; h < a.H; ++h) {
        const S* row = taps.rows[i] + h * a.tokens.stride_h + d;
        const R* from = dy + h * a.D + d;
        STA_UNROLL
        for (int j = 0; j < n; ++j) {
          sum[j] = V::fma(V::load(from + j * V::W), load_lanes<V>(row + j * V::W), sum[j]);
        }
      }
      STA_UNROLL
      for (int j = 0; j < n; ++j) V::store(sums + d + j * V::W, sum[j]);
    });
  }
}

// The gradient of one frame's class token and, in ws.cells and ws.mean, of its averages.
template <class S>
void class_token_backward(const PoolProblem<S>& problem, PoolBackwardWorkspace<S>& ws, int64_t p,
                          int64_t b, int64_t t, const S* grad_long, Arithmetic<S>* slab) {
  using R = Arithmetic<S>;
  const StaPoolParams& a = problem.params;
  const int64_t frame = problem.frame_index(p, b, t);
  const S* token = problem.template token_frame<const S>(a.tokens, p, b, t);
  S* grad_token = problem.template token_frame<S>(a.grad_tokens, p, b, t);
  R* grad_norm = slab + problem.taps * a.D;
  for (int64_t h = 0; h < a.H; ++h) {
    S* out = grad_token + h * a.grad_tokens.stride_h;
    if (a.long_rows != STA_LONG_CLASS) {
      memset(out, 0, a.D * sizeof(S));
      continue;
    }
    load_row(token + h * a.tokens.stride_h, a.D, ws.hat, a.D);
    load_row(grad_long + h * a.D, a.D, ws.g, a.D);
    norm_backward(problem, p, ws.hat, ws.g, problem.mean(frame)[h], problem.rstd(frame)[h],
                  grad_norm, grad_norm + a.D, ws.token);
    write_row(ws.token, R{1}, a.D, out);
  }
}

// dy of a frame's current rows; adds to the slab.
template <class S>
void rows_backward(const PoolBackwardJob<S>& job, PoolBackwardWorkspace<S>& ws, int64_t p,
                   int64_t b, int64_t t, Arithmetic<S>* slab, Arithmetic<S>* dy) {
  using R = Arithmetic<S>;
  const PoolProblem<S>& problem = job.problem;
  const StaPoolParams& a = problem.params;
  const int64_t frame = problem.frame_index(p, b, t), width = problem.width;
  const R* weights = job.weights + p * problem.taps * a.D;
  const S* grad = static_cast<const S*>(a.grad_pooled) + frame * problem.rows * width;
  const S* grad_current = grad + problem.first * width;
  const S* grad_shorts = grad_current + problem.current * width;
  R* grad_norm = slab + problem.taps * a.D;

  if (a.class_token) class_token_backward(problem, ws, p, b, t, grad, slab);
  memset(ws.mean, 0, width * sizeof(R));
  if (a.long_rows == STA_LONG_MEAN) {
    load_row(grad, width, ws.mean, width);
    for (int64_t d = 0; d < width; ++d) ws.mean[d] /= problem.current;
  }
  for (int64_t y = 0; y < a.out_h; ++y) {
    if (problem.shorts > 0 && y % a.short_stride == 0) {
      const int64_t row = y / a.short_stride;
      for (int64_t cell = 0; cell < a.short_w; ++cell) {
        R* share = ws.cells + cell * width;
        const R size = problem.cell_size(row, cell);
        load_row(grad_shorts + (row * a.short_w + cell) * width, width, share, width);
        for (int64_t d = 0; d < width; ++d) share[d] = share[d] / size + ws.mean[d];
      }
    }
    for (int64_t x = 0; x < a.out_w; ++x) {
      const int64_t n = y * a.out_w + x, stats = problem.stats_row(n);
      const R* share = problem.shorts > 0 ? ws.cells + x / a.short_stride * width : ws.mean;
      problem.gather(p, b, t, y, x, ws.taps);
      load_row(grad_current + n * width, width, ws.g, width);
      add_to(ws.g, share, width);
      for (int64_t h = 0; h < a.H; ++h) {
        ws.taps.weighted_sum(weights, h * a.tokens.stride_h, a.D, ws.hat + h * a.D);
      }
      for (int64_t h = 0; h < a.H; ++h) {
        norm_backward(problem, p, ws.hat + h * a.D, ws.g + h * a.D, problem.mean(frame)[stats + h],
                      problem.rstd(frame)[stats + h], grad_norm, grad_norm + a.D,
                      dy + n * width + h * a.D);
      }
      weight_gradient(problem, ws.taps, dy + n * width, slab);
    }
  }
}

// All heads of one token's gradient; row is aligned.
template <class S>
STA_INLINE void write_token(const PoolBackwardJob<S>& job, const S* row, S* token) {
  const StaPoolParams& a = job.problem.params;
  const bool together = a.grad_tokens.stride_h == a.D;
  const int64_t size = together ? job.problem.width : a.D;
  for (int64_t d = 0; d < job.problem.width; d += size) {
    S* out = token + d / a.D * a.grad_tokens.stride_h;
    const int64_t bytes = size * sizeof(S);
    if (!job.streams || !stream_lines(out, row + d, bytes)) memcpy(out, row + d, bytes);
  }
}

// The gradient of a frame's spatial tokens. dy: of frame `first` and those after it.
template <class S>
void tokens_backward(const PoolBackwardJob<S>& job, PoolBackwardWorkspace<S>& ws, int64_t p,
                     int64_t b, int64_t t, const Arithmetic<S>* dy, int64_t first) {
  using R = Arithmetic<S>;
  const PoolProblem<S>& problem = job.problem;
  const StaPoolParams& a = problem.params;
  const R* weights = job.weights + p * problem.taps * a.D;
  S* frame = problem.template token_frame<S>(a.grad_tokens, p, b, t);
  for (int64_t n = 0; n < a.grid_h * a.grid_w; ++n) {
    const int64_t y = n / a.grid_w + a.kh / 2, x = n % a.grid_w + a.kw / 2;
    ws.readers.clear();
    for (int64_t k = max_of(0, t + a.kt / 2 - a.T + 1); k <= min_of(a.kt - 1, t + a.kt / 2); ++k) {
      const R* rows = dy + (t + a.kt / 2 - k - first) * job.dy_size();
      for (int64_t i = y % a.stride; i <= min_of(a.kh - 1, y); i += a.stride) {
        const int64_t out_y = (y - i) / a.stride;
        if (out_y >= a.out_h) continue;
        for (int64_t j = x % a.stride; j <= min_of(a.kw - 1, x); j += a.stride) {
          const int64_t out_x = (x - j) / a.stride;
          if (out_x >= a.out_w) continue;
          ws.readers.add(rows + (out_y * a.out_w + out_x) * problem.width,
                         (k * a.kh + i) * a.kw + j);
        }
      }
    }
    S* token = frame + (a.class_token + n) * a.grad_tokens.stride_n;
    if (ws.readers.count == 0) {
      write_token(job, ws.zeros, token);
      continue;
    }
    for (int64_t h = 0; h < a.H; ++h) {
      ws.readers.weighted_sum(weights, h * a.D, a.D, ws.token + h * a.D);
    }
    write_row(ws.token, R{1}, problem.width, ws.line);
    write_token(job, ws.line, token);
  }
}

template <class S>
void pool_backward_range(int64_t begin, int64_t end, void* context) {
  auto& job = *static_cast<PoolBackwardJob<S>*>(context);
  const StaPoolParams& a = job.problem.params;
  with_workspace<PoolBackwardWorkspace<S>>(job, [&](PoolBackwardWorkspace<S>& ws) {
    memset(static_cast<void*>(ws.zeros), 0, job.problem.width * sizeof(S));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / job.chunks, first = task % job.chunks * job.chunk_frames;
      Arithmetic<S>* slab = job.slabs + task * job.slab_size();
      memset(slab, 0, job.slab_size() * sizeof(*slab));
      for (int64_t i = first; i < min_of(first + job.chunk_frames, a.B * a.T); ++i) {
        const int64_t b = i / a.T, t = i % a.T;
        if (job.dy != nullptr) {
          rows_backward(job, ws, p, b, t, slab, job.dy + (p * a.B * a.T + i) * job.dy_size());
        } else {
          rows_backward(job, ws, p, b, t, slab, ws.dy);
          tokens_backward(job, ws, p, b, t, ws.dy, t);
        }
      }
    }
    end_stream();
  });
}

// Where the kernel reaches over frames: the tokens' gradients, once every dy is known.
template <class S>
void pool_tokens_range(int64_t begin, int64_t end, void* context) {
  auto& job = *static_cast<PoolBackwardJob<S>*>(context);
  const StaPoolParams& a = job.problem.params;
  with_workspace<PoolBackwardWorkspace<S>>(job, [&](PoolBackwardWorkspace<S>& ws) {
    memset(static_cast<void*>(ws.zeros), 0, job.problem.width * sizeof(S));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t clip = unit / a.T;  // (p, b)
      tokens_backward(job, ws, clip / a.B, clip % a.B, unit % a.T,
                      job.dy + clip * a.T * job.dy_size(), 0);
    }
    end_stream();
  });
}

// Adds the slabs of each tensor in the order of their frames, in double precision.
template <class S>
void pool_reduce(const PoolBackwardJob<S>& job, double* total) {
  using R = Arithmetic<S>;
  const StaPoolParams& a = job.problem.params;
  const int64_t size = job.slab_size(), taps = job.problem.taps;
  for (int64_t p = 0; p < a.P; ++p) {
    for (int64_t i = 0; i < size; ++i) total[i] = 0;
    for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
      const R* slab = job.slabs + (p * job.chunks + chunk) * size;
      for (int64_t i = 0; i < size; ++i) total[i] += slab[i];
    }
    R* grad = static_cast<R*>(a.grad_params) + p * size;
    for (int64_t d = 0; d < a.D; ++d) {
      for (int64_t tap = 0; tap < taps; ++tap) grad[d * taps + tap] = total[tap * a.D + d];
    }
    for (int64_t i = taps * a.D; i < size; ++i) grad[i] = total[i];
  }
}

template <class S>
int pool_backward(const StaPoolParams& params, StaParallelFor parallel_for) {
  using R = Arithmetic<S>;
  constexpr int64_t kChunks = 64;      // tasks of each tensor, enough for as many threads
  constexpr size_t kCached = 8 << 20;  // bytes that may still lie in a cache when they are read
  const PoolProblem<S> problem(params);
  const int64_t frames = params.B * params.T;
  PoolBackwardJob<S> job = {problem, nullptr, nullptr, nullptr, 0, 1, false, STA_OK};
  job.chunk_frames = max_of(1, (frames + kChunks - 1) / kChunks);
  job.chunks = (frames + job.chunk_frames - 1) / job.chunk_frames;
  const int64_t tasks = params.P * job.chunks;
  const int64_t tokens = params.class_token + params.grid_h * params.grid_w;
  job.streams = params.P * frames * tokens * problem.width * sizeof(S) > kCached;

  const Block weights(params.P * problem.taps * params.D * sizeof(R));
  const Block slabs(tasks * job.slab_size() * sizeof(R));
  const Block total(job.slab_size() * sizeof(double));
  const bool over_frames = params.kt > 1;
  const Block dy(over_frames ? params.P * frames * job.dy_size() * sizeof(R) : 0);
  const Block* const blocks[] = {&weights, &slabs, &total, &dy};
  for (const Block* block : blocks) {
    if (block->data() == nullptr) return STA_ERROR_MEMORY;
  }
  problem.transpose_weights(reinterpret_cast<R*>(weights.data()));
  job.weights = reinterpret_cast<const R*>(weights.data());
  job.slabs = reinterpret_cast<R*>(slabs.data());
  job.dy = over_frames ? reinterpret_cast<R*>(dy.data()) : nullptr;

  if (tasks > 0 && parallel_for(0, tasks, 1, pool_backward_range<S>, &job) != 0) {
    return STA_ERROR_PARALLEL;
  }
  if (job.error == STA_OK && over_frames && frames > 0 &&
      parallel_for(0, params.P * frames, 1, pool_tokens_range<S>, &job) != 0) {
    return STA_ERROR_PARALLEL;
  }
  if (job.error == STA_OK) pool_reduce(job, reinterpret_cast<double*>(total.data()));
  return job.error;
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_POOL_BACKWARD_H_
