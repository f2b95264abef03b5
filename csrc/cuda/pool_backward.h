// Pooling, backward: the gradient of every row that a norm read, then of every token, which gathers
// the rows that its convolution went into. Parameters' gradients are summed block by block, and the
// blocks' sums in their order. No atomics.
//
// With the (1, 3, 3) kernel one kernel does all of it, rows of float gradients in shared memory.
// Any other kernel, and grids whose rows do not fit, take the passes of pool_backward_any.h.
#ifndef STA_CUDA_POOL_BACKWARD_H_
#define STA_CUDA_POOL_BACKWARD_H_

#include "cuda/pool_rows.h"

namespace sta {

constexpr int kReduceColumns = 32;  // of partial sums, that a block of pool_reduce takes
constexpr int kReduceSlices = 16;   // of the chunks

// ---- gradients of rows
// ---------------------------------------------------------------------------

// A row that a norm wrote: current row `position` at (y, x), or, after the last of them, the class
// token's. Rows past that one are not present.
struct NormedRow {
  int position, y, x;
  bool present, is_class;

  __device__ __forceinline__ NormedRow(const PoolProblem& a, int number) {
    position = number;
    y = a.by_out_w.divide(number);
    x = number - y * a.out_w;
    is_class = number == a.current() && a.classes();
    present = number < a.current() || is_class;
  }

  static __device__ __forceinline__ int count(const PoolProblem& a) {
    return a.current() + a.classes();
  }
};

template <typename T>
__device__ __forceinline__ void add_share(float (&grad)[kVector], const uint4& row, int count) {
  const float share = 1.f / count;
  float values[kVector];
  unpack_row<T>(values, row);
#pragma unroll
  for (int c = 0; c < kVector; ++c) grad[c] += values[c] * share;
}

// The gradient of a row after its norm: its own and, of a current row, its share of its short
// token's and of the mean's.
template <typename T>
__device__ __forceinline__ void read_gradient(float (&grad)[kVector], const PoolProblem& a,
                                              const uint4* rows, const NormedRow& row) {
  unpack_row<T>(grad, rows[(row.is_class ? 0 : a.longs() + row.position) * a.pitch]);
  if (row.is_class) return;
  if (a.short_h > 0) {
    const int i = a.by_cell.divide(row.y), j = a.by_cell.divide(row.x);
    const int height = min(a.cell, a.out_h - i * a.cell), width = min(a.cell, a.out_w - j * a.cell);
    const uint4 of_short = rows[(a.longs() + a.current() + i * a.short_w + j) * a.pitch];
    add_share<T>(grad, of_short, height * width);
  }
  if (a.long_mode == STA_LONG_MEAN) add_share<T>(grad, rows[0], a.current());
}

__device__ __forceinline__ Moments read_moments(const PoolProblem& a, const float* stats,
                                                const NormedRow& row) {
  const float* of_row = stats + (row.is_class ? 0 : a.classes() + row.position) * a.H;
  return {of_row[0], of_row[a.statistics]};
}

// The gradient of a class token that nobody reads is zero.
__device__ __forceinline__ void clear_class_token(const PoolProblem& a, const Lane& lane,
                                                  const Unit& unit) {
  if (a.class_token && !a.classes() && lane.group == 0 && lane.active)
    unit.tokens(a.grad_tokens)[0] = uint4{0, 0, 0, 0};
}

// ---- sums over a block
// ---------------------------------------------------------------------------

// Adds the lanes' sums of all groups of the block into N rows of shared memory, then writes them to
// `partials`. Groups of a warp meet in shuffles, warps in turn.
template <int N>
__device__ __forceinline__ void write_partials(const PoolProblem& a, float (&sums)[N][kVector],
                                               int count, float* shared, float* partials) {
  const Lane lane(a);
#pragma unroll 1
  for (int mask = 16; mask >= a.width; mask /= 2) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int c = 0; c < kVector; ++c) sums[n][c] += shuffle_xor(sums[n][c], mask);
    }
  }
  __syncthreads();  // what was in shared memory is done with
  for (int turn = 0; turn < kPoolThreads / 32; ++turn) {
    if (turn == warp() && lane.in_warp == 0 && lane.active) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n >= count) break;
        float before[kVector] = {};
        if (turn > 0) load_floats(before, a, lane, shared + n * a.D);
#pragma unroll
        for (int c = 0; c < kVector; ++c) before[c] += sums[n][c];
        store_floats(shared + n * a.D, a, lane, before);
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < count * a.D; i += kPoolThreads) partials[i] = shared[i];
}

// Where the sums of a block for one tap, or for the norm, begin. Computed at the end, so that
// nothing of it is kept until then.
__device__ __forceinline__ float* partial_row(const PoolProblem& a, int block, int row) {
  const PoolPlace place(a, opaque(block));
  const int64_t chunk = static_cast<int64_t>(place.p) * a.chunks + place.chunk;
  return a.partials + (chunk * (a.taps() + 2) + row) * a.D;
}

// ---- (1, 3, 3): one kernel
// -----------------------------------------------------------------------

// The output positions along one axis that read a token through tap 0, 1 and 2: quotients and
// remainders of (token + 1 - tap) by the stride, which move on without a division.
struct Readers {
  int quotient[3], remainder[3];

  __device__ __forceinline__ Readers(int token, const Divider& stride) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
      const int at = token + 1 - tap + stride.divisor;  // never negative
      quotient[tap] = stride.divide(at) - 1;
      remainder[tap] = stride.remainder(at);
    }
  }

  __device__ __forceinline__ void next(int stride) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
      const bool wraps = ++remainder[tap] == stride;
      quotient[tap] += wraps;
      if (wraps) remainder[tap] = 0;
    }
  }

  __device__ __forceinline__ bool reads(int tap, int size) const {
    return remainder[tap] == 0 &&
           static_cast<unsigned>(quotient[tap]) < static_cast<unsigned>(size);
  }
};

// The tokens' gradients of a unit from its rows' in shared memory. A group goes down a column of
// the grid, or, where there are more groups than columns, down a part of it.
template <typename T>
__device__ __forceinline__ void gather_small(const PoolProblem& a, int p, int n, const float* rows,
                                             const float (&weights)[kSmallTaps][kVector]) {
  const Lane lane(a);
  const Unit unit(a, lane, p, opaque(n));
  uint4* tokens = unit.tokens(a.grad_tokens) + a.class_token * a.grad_tokens.stride_n;
  const int parts = max(1, a.by_grid_w.divide(lane.groups));
  const int height = ceil_div(a.grid_h, parts);
#pragma unroll 1
  for (int item = lane.group; item < parts * a.grid_w; item += lane.groups) {
    const int x = a.by_grid_w.remainder(item), top = a.by_grid_w.divide(item) * height;
    const Readers across(x, a.by_stride);
    Readers down(top, a.by_stride);
#pragma unroll 1
    for (int y = top; y < min(a.grid_h, top + height); ++y, down.next(a.stride)) {
      float sum[kVector] = {};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (!down.reads(i, a.out_h)) continue;
        const float* line = rows + down.quotient[i] * a.out_w * a.D;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          if (!across.reads(j, a.out_w)) continue;
          float grad[kVector];
          load_floats(grad, a, lane, line + across.quotient[j] * a.D);
          add_product(sum, grad, weights[3 * i + j]);
        }
      }
      if (lane.active) tokens[(y * a.grid_w + x) * a.grad_tokens.stride_n] = pack_row<T>(sum);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 2)
    pool_backward_small(const __grid_constant__ PoolProblem a) {
  const PoolPlace place(a, blockIdx.x);
  float* parameters = reinterpret_cast<float*>(shared_memory());
  float* rows = parameters + (kSmallTaps + 2) * a.D;  // of a unit: Nc of them
  copy_parameters(parameters, a, place.p);
  __syncthreads();
  float weights[kSmallTaps][kVector];
  float sums[kSmallTaps + 2][kVector] = {};
  float (&norm_sums)[2][kVector] = *reinterpret_cast<float (*)[2][kVector]>(&sums[kSmallTaps]);
#pragma unroll
  for (int tap = 0; tap < kSmallTaps; ++tap)
    load_floats(weights[tap], a, Lane(a), parameters + tap * a.D);

  for (int n = place.begin; n < place.end; ++n) {
    const Lane lane(a);
    const Unit unit(a, lane, place.p, n);
    const uint4 *tokens = unit.tokens(a.tokens), *grads = unit.rows(a, a.grad_pooled);
    const float* stats = unit.stats(a);
#pragma unroll 1
    for (int first = lane.group - lane.in_warp; first < NormedRow::count(a); first += lane.groups) {
      const NormedRow row(a, first + lane.in_warp);
      uint4 taps[kSmallTaps];
      float y[kVector] = {}, grad[kVector] = {}, norm_weight[kVector];
      Moments m = {0.f, 0.f};
      if (row.present) {
        if (row.is_class) {
          unpack_row<T>(y, tokens[0]);
        } else {
          load_taps(taps, a, tokens, row.y, row.x);
#pragma unroll
          for (int tap = 0; tap < kSmallTaps; ++tap) {
            float value[kVector];
            unpack_row<T>(value, taps[tap]);
            add_product(y, value, weights[tap]);
          }
        }
        read_gradient<T>(grad, a, grads, row);
        m = read_moments(a, stats, row);
      }
      load_floats(norm_weight, a, lane, parameters + kSmallTaps * a.D);
      norm_backward(grad, norm_sums, a, lane, y, m, norm_weight);
      if (row.is_class) {
        if (lane.active) unit.tokens(a.grad_tokens)[0] = pack_row<T>(grad);
      } else if (row.present) {
#pragma unroll
        for (int tap = 0; tap < kSmallTaps; ++tap) {
          float value[kVector];
          unpack_row<T>(value, opaque(taps[tap]));
          add_product(sums[tap], value, grad);
        }
        if (lane.active) store_floats(rows + row.position * a.D, a, lane, grad);
      }
    }
    clear_class_token(a, lane, unit);
    __syncthreads();  // the unit's rows are complete
    gather_small<T>(a, place.p, n, rows, weights);
    __syncthreads();  // and done with
  }
  write_partials(a, sums, kSmallTaps + 2, parameters, partial_row(a, blockIdx.x, 0));
}

// ---- sums over blocks
// ----------------------------------------------------------------------------

// grad_params: adds the blocks' sums in their order. A block takes kReduceColumns of them, each of
// its slices every kReduceSlices-th chunk.
__global__ void __launch_bounds__(kReduceColumns* kReduceSlices)
    pool_reduce(const __grid_constant__ PoolProblem a) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // (kReduceSlices, kReduceColumns)
  const int size = (a.taps() + 2) * a.D;
  const int blocks = ceil_div(size, kReduceColumns);
  const int p = blockIdx.x / blocks;
  const int column = threadIdx.x % kReduceColumns, slice = threadIdx.x / kReduceColumns;
  const int at = blockIdx.x % blocks * kReduceColumns + column;
  float sum = 0.f;
  if (at < size) {
    const float* partials = a.partials + static_cast<int64_t>(p) * a.chunks * size + at;
#pragma unroll 8
    for (int chunk = slice; chunk < a.chunks; chunk += kReduceSlices)
      sum += partials[static_cast<int64_t>(chunk) * size];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (slice > 0 || at >= size) return;
  for (int other = 1; other < kReduceSlices; ++other)
    sum += shared[other * kReduceColumns + column];
  // From the row of a tap, as place_in_row has it, to (D, taps), then the norm's two rows.
  const int row = at / a.D, half = at % a.D / (a.D / 2), rest = at % (a.D / 2);
  const int channel = rest / 4 * 8 + half * 4 + rest % 4;
  const int taps = a.taps();
  const int target = row < taps ? channel * taps + row : row * a.D + channel;
  a.grad_params[static_cast<int64_t>(p) * size + target] = sum;
}

}  // namespace sta

#endif  // STA_CUDA_POOL_BACKWARD_H_
