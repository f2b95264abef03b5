// Pooling, forward: each group of lanes computes the rows under one short token, one after
// another, and averages them on the way, so no row is ever stored but in its result.
#ifndef STA_CUDA_POOL_FORWARD_H_
#define STA_CUDA_POOL_FORWARD_H_

#include "cuda/pool_rows.h"

namespace sta {

// Adds a cell's sum to its group's row of shared memory.
__device__ __forceinline__ void add_to_total(const PoolProblem& a, const Lane& lane, float* totals,
                                             const float (&sum)[kVector], bool first) {
  if (!lane.active) return;
  float total[kVector] = {};
  if (!first) load_floats(total, a, lane, totals + lane.group * a.D);
#pragma unroll
  for (int c = 0; c < kVector; ++c) total[c] += sum[c];
  store_floats(totals + lane.group * a.D, a, lane, total);
}

// Writes the mean of a unit's current rows from the groups' totals.
template <typename T>
__device__ __forceinline__ void write_mean(const PoolProblem& a, const Lane& lane, uint4* mean_row,
                                           const float* totals) {
  __syncthreads();
  if (lane.group == 0 && lane.active) {
    float mean[kVector] = {};
    for (int group = 0; group < min(lane.groups, a.cells); ++group) {
      float part[kVector];
      load_floats(part, a, lane, totals + group * a.D);
#pragma unroll
      for (int c = 0; c < kVector; ++c) mean[c] += part[c];
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) mean[c] *= 1.f / a.current();
    *mean_row = pack_row<T>(mean);
  }
  __syncthreads();
}

// y = row (i, j) of a cell before its norm: the convolution, or the class token.
template <typename T, bool Small>
__device__ __forceinline__ void read_input(float (&y)[kVector], const PoolProblem& a,
                                           const Lane& lane, const Unit& unit, const uint4* tokens,
                                           bool is_class, int out_y, int out_x,
                                           const float* parameters,
                                           const float (&weights)[kSmallTaps][kVector]) {
  if (is_class) return unpack_row<T>(y, tokens[0]);
  if constexpr (Small) {
    uint4 taps[kSmallTaps];
    load_taps(taps, a, tokens, out_y, out_x);
#pragma unroll
    for (int tap = 0; tap < kSmallTaps; ++tap) {
      float value[kVector];
      unpack_row<T>(value, taps[tap]);
      add_product(y, value, weights[tap]);
    }
  } else {
    convolve<T>(y, a, lane, unit, parameters, out_y, out_x);
  }
}

// `Small`: the kernel is (1, 3, 3), and each lane keeps its weights in registers.
template <typename T, bool Small>
__global__ void __launch_bounds__(kPoolThreads, 3)
    pool_forward(const __grid_constant__ PoolProblem a) {
  const Lane lane(a);
  const PoolPlace place(a, blockIdx.x);
  float* parameters = reinterpret_cast<float*>(shared_memory());
  float* totals = parameters + (a.taps() + 2) * a.D;
  copy_parameters(parameters, a, place.p);
  __syncthreads();
  float weights[kSmallTaps][kVector];
  if constexpr (Small) {
#pragma unroll
    for (int tap = 0; tap < kSmallTaps; ++tap)
      load_floats(weights[tap], a, lane, parameters + tap * a.D);
  }

  for (int n = place.begin; n < place.end; ++n) {
    const Unit unit(a, lane, place.p, n);
    const uint4* tokens = unit.tokens(a.tokens);
    uint4* rows = unit.rows(a, a.pooled);
    float* stats = unit.stats(a);
    for (int first = lane.group - lane.in_warp; first < a.cells + a.classes();
         first += lane.groups) {
      const Cell cell(a, first + lane.in_warp);
      // The warp's first cell is as high as any of its cells.
      const int height = Cell(a, first).height, width = Cell(a, first).is_class ? 1 : a.cell;
      float sum[kVector] = {};
#pragma unroll 1
      for (int i = 0; i < height; ++i) {
#pragma unroll 1
        for (int j = 0; j < width; ++j) {
          float y[kVector] = {};
          if (cell.has(i, j))
            read_input<T, Small>(y, a, lane, unit, tokens, cell.is_class, cell.y + i, cell.x + j,
                                 parameters, weights);
          const Moments m = moments(a, lane, y);
          if (!cell.has(i, j)) continue;
          float scale[kVector], bias[kVector];
          load_floats(scale, a, lane, parameters + a.taps() * a.D);
          load_floats(bias, a, lane, parameters + (a.taps() + 1) * a.D);
#pragma unroll
          for (int c = 0; c < kVector; ++c) {
            y[c] = (y[c] - m.mean) * m.rstd * scale[c] + bias[c];
            sum[c] += y[c];
          }
          const int position = (cell.y + i) * a.out_w + cell.x + j;
          if (lane.active)
            rows[(cell.is_class ? 0 : a.longs() + position) * a.pitch] = pack_row<T>(y);
          if (lane.active && lane.vector == 0) {
            float* of_row = stats + (cell.is_class ? 0 : a.classes() + position) * a.H;
            of_row[0] = m.mean;
            of_row[a.statistics] = m.rstd;
          }
        }
      }
      if (cell.is_class || cell.size() == 0) continue;
      if (a.long_mode == STA_LONG_MEAN) add_to_total(a, lane, totals, sum, first < lane.groups);
      if (a.short_h > 0 && lane.active) {
#pragma unroll
        for (int c = 0; c < kVector; ++c) sum[c] *= 1.f / cell.size();
        rows[(a.longs() + a.current() + first + lane.in_warp) * a.pitch] = pack_row<T>(sum);
      }
    }
    if (a.long_mode == STA_LONG_MEAN) write_mean<T>(a, lane, rows, totals);
  }
}

}  // namespace sta

#endif  // STA_CUDA_POOL_FORWARD_H_
