// Pooling, backward, with any kernel: three passes, between which the rows' gradients lie in global
// memory as floats.
#ifndef STA_CUDA_POOL_BACKWARD_ANY_H_
#define STA_CUDA_POOL_BACKWARD_ANY_H_

#include "cuda/pool_backward.h"

namespace sta {

constexpr int kMostAcross = 7;  // taps along the width

// Float gradients of a unit's rows in global memory, for a frame of the same clip and head.
__device__ __forceinline__ float* grad_rows(const PoolProblem& a, const Unit& unit, int p, int n,
                                            int t_other) {
  const int64_t of_frame = static_cast<int64_t>(p) * a.units + n + (t_other - unit.t) * a.H;
  return a.grad_rows + of_frame * a.current() * a.D;
}

// Gradients of the rows, of the class tokens and of the norm's parameters.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 3)
    pool_backward_rows(const __grid_constant__ PoolProblem a) {
  const Lane lane(a);
  const PoolPlace place(a, blockIdx.x);
  float* parameters = reinterpret_cast<float*>(shared_memory());
  copy_parameters(parameters, a, place.p);
  __syncthreads();
  float sums[2][kVector] = {};
  for (int n = place.begin; n < place.end; ++n) {
    const Unit unit(a, lane, place.p, n);
    const uint4* grads = unit.rows(a, a.grad_pooled);
    const float* stats = unit.stats(a);
    float* rows = grad_rows(a, unit, place.p, n, unit.t);
#pragma unroll 1
    for (int first = lane.group - lane.in_warp; first < NormedRow::count(a); first += lane.groups) {
      const NormedRow row(a, first + lane.in_warp);
      float y[kVector] = {}, grad[kVector] = {}, norm_weight[kVector];
      Moments m = {0.f, 0.f};
      if (row.present) {
        if (row.is_class)
          unpack_row<T>(y, unit.tokens(a.tokens)[0]);
        else
          convolve<T>(y, a, lane, unit, parameters, row.y, row.x);
        read_gradient<T>(grad, a, grads, row);
        m = read_moments(a, stats, row);
      }
      load_floats(norm_weight, a, lane, parameters + a.taps() * a.D);
      norm_backward(grad, sums, a, lane, y, m, norm_weight);
      if (!row.present || !lane.active) continue;
      if (row.is_class)
        unit.tokens(a.grad_tokens)[0] = pack_row<T>(grad);
      else
        store_floats(rows + static_cast<int64_t>(row.position) * a.D, a, lane, grad);
    }
    clear_class_token(a, lane, unit);
  }
  write_partials(a, sums, 2, parameters, partial_row(a, blockIdx.x, a.taps()));
}

// Gradients of the spatial tokens: each gathers the rows whose kernel covered it.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 4)
    pool_backward_tokens(const __grid_constant__ PoolProblem a) {
  const Lane lane(a);
  const PoolPlace place(a, blockIdx.x);
  float* parameters = reinterpret_cast<float*>(shared_memory());
  copy_parameters(parameters, a, place.p);
  __syncthreads();
  for (int n = place.begin; n < place.end; ++n) {
    const Unit unit(a, lane, place.p, n);
    uint4* tokens = unit.tokens(a.grad_tokens) + a.class_token * a.grad_tokens.stride_n;
#pragma unroll 1
    for (int token = lane.group; token < a.grid_h * a.grid_w; token += lane.groups) {
      const int y = a.by_grid_w.divide(token) + a.kh / 2;
      const int x = a.by_grid_w.remainder(token) + a.kw / 2;
      float sum[kVector] = {};
#pragma unroll 1
      for (int frame = 0; frame < a.kt; ++frame) {
        const int t = unit.t + a.kt / 2 - frame;
        if (t < 0 || t >= a.T) continue;
        const float* rows = grad_rows(a, unit, place.p, n, t);
#pragma unroll 1
        for (int i = a.by_stride.remainder(y); i < a.kh && i <= y; i += a.stride) {
          const int out_y = a.by_stride.divide(y - i);
          if (out_y >= a.out_h) continue;
          for (int j = a.by_stride.remainder(x); j < a.kw && j <= x; j += a.stride) {
            const int out_x = a.by_stride.divide(x - j);
            if (out_x >= a.out_w) continue;
            const int tap = (frame * a.kh + i) * a.kw + j;
            float grad[kVector], weight[kVector];
            load_floats(grad, a, lane,
                        rows + (static_cast<int64_t>(out_y) * a.out_w + out_x) * a.D);
            load_floats(weight, a, lane, parameters + tap * a.D);
            add_product(sum, grad, weight);
          }
        }
      }
      if (lane.active) tokens[token * a.grad_tokens.stride_n] = pack_row<T>(sum);
    }
  }
}

// Gradients of the weights: a block takes one frame and line of the kernel.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 3)
    pool_backward_weights(const __grid_constant__ PoolProblem a) {
  const Lane lane(a);
  const int lines = a.kt * a.kh;
  const int line = blockIdx.x % lines;
  const PoolPlace place(a, blockIdx.x / lines);
  float sums[kMostAcross][kVector] = {};
  for (int n = place.begin; n < place.end; ++n) {
    const Unit unit(a, lane, place.p, n);
    const int t = unit.t + line / a.kh - a.kt / 2;
    if (t < 0 || t >= a.T) continue;
    const uint4* tokens = unit.tokens(a.tokens, t) + a.class_token * a.tokens.stride_n;
    const float* rows = grad_rows(a, unit, place.p, n, unit.t);
#pragma unroll 1
    for (int position = lane.group; position < a.current(); position += lane.groups) {
      const int y = a.by_out_w.divide(position) * a.stride + line % a.kh - a.kh / 2;
      const int left = a.by_out_w.remainder(position) * a.stride - a.kw / 2;
      if (y < 0 || y >= a.grid_h) continue;
      float grad[kVector];
      load_floats(grad, a, lane, rows + static_cast<int64_t>(position) * a.D);
#pragma unroll
      for (int j = 0; j < kMostAcross; ++j) {
        if (j >= a.kw || left + j < 0 || left + j >= a.grid_w) continue;
        float value[kVector];
        unpack_row<T>(value, tokens[(y * a.grid_w + left + j) * a.tokens.stride_n]);
        add_product(sums[j], value, grad);
      }
    }
  }
  write_partials(a, sums, a.kw, reinterpret_cast<float*>(shared_memory()),
                 partial_row(a, blockIdx.x / lines, line * a.kw));
}

}  // namespace sta

#endif  // STA_CUDA_POOL_BACKWARD_ANY_H_
