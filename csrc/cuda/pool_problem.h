// A pooling call as the kernels take it, and how its work is shared out to blocks and lanes.
//
// A unit is one frame and head of one tensor: (p, b, t, h). A block takes a few consecutive units
// of one tensor. Inside a block, groups of lanes take rows of D values, 16 bytes a lane, so sums
// over D are a few shuffles.
#ifndef STA_CUDA_POOL_PROBLEM_H_
#define STA_CUDA_POOL_PROBLEM_H_

#include "cuda/problem.h"
#include "cuda/tiles.h"
#include "pool_params.h"

namespace sta {

constexpr int kPoolThreads = 128;
constexpr int kVector = 8;  // values in 16 bytes

// A (P, B, T, N, H, D) tensor. Strides count vectors of 16 bytes.
struct PoolTensor {
  uint4* data;
  int stride_p, stride_b, stride_t, stride_n, stride_h;
};

// Division of small numbers by a number that all lanes share, in two instructions: exact for
// 0 <= n where n * divisor < 2^31, which the host checks.
struct Divider {
  int divisor;
  uint32_t reciprocal;  // 2^31 / divisor, rounded up

  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * reciprocal >> 31);
  }
  __device__ __forceinline__ int remainder(int n) const { return n - divide(n) * divisor; }
};

struct PoolProblem {
  int P, B, T, H, D;
  int vectors;  // of a row: D / 8
  int width;    // lanes of a row: `vectors`, rounded up to a power of two
  int width_log2;
  int grid_h, grid_w, out_h, out_w, short_h, short_w;
  int kt, kh, kw, stride;
  int cell;  // positions of a side that a short token averages; 1 where there are no short tokens
  int cells, cells_w;  // of a frame; along the width
  Divider by_grid_w, by_out_w, by_cell, by_cells_w, by_stride;
  int class_token, long_mode;
  int units;               // of one tensor: B * T * H
  int per_block;           // units
  int chunks;              // blocks of one tensor
  float eps, per_channel;  // 1 / D
  int pitch;               // vectors from one row of `pooled` to the next: H * D / 8
  int64_t statistics;      // means, as many as deviations
  PoolTensor tokens, grad_tokens;
  const float* weight[STA_POOL_MAX];       // (D, kt, kh, kw)
  const float* norm_weight[STA_POOL_MAX];  // (D)
  const float* norm_bias[STA_POOL_MAX];    // (D)
  uint4* pooled;                           // (P, B, T, R, H, D)
  const uint4* grad_pooled;                // the same
  float* stats;                            // (2, P, B, T, Rn, H)
  float* grad_params;                      // (P, D * (taps + 2))
  float* partials;   // (P, chunks, taps + 2, D), rows as place_in_row has them
  float* grad_rows;  // (P, units, Nc, D), the same; unused where they fit in shared memory

  __device__ __forceinline__ int taps() const { return kt * kh * kw; }
  __device__ __forceinline__ int current() const { return out_h * out_w; }
  __device__ __forceinline__ int shorts() const { return short_h * short_w; }
  __device__ __forceinline__ int longs() const { return long_mode != STA_LONG_NONE; }
  __device__ __forceinline__ int classes() const { return long_mode == STA_LONG_CLASS; }
  __device__ __forceinline__ int rows() const { return longs() + current() + shorts(); }
  __device__ __forceinline__ int normed() const { return classes() + current(); }
};

// This thread's place among the groups of `width` lanes. Like a unit it is made anew where it is
// used: registers are for sums and weights.
struct Lane {
  int vector;   // of a row; 0 where the row has none for this lane
  bool active;  // the row has one
  int in_warp;  // number of the group in its warp
  int group;    // in the block
  int groups;

  __device__ __forceinline__ explicit Lane(const PoolProblem& a) {
    const int thread = opaque(threadIdx.x);
    vector = thread & (a.width - 1);
    active = vector < a.vectors;
    if (!active) vector = 0;
    group = thread >> a.width_log2;
    groups = kPoolThreads >> a.width_log2;
    in_warp = group & ((32 >> a.width_log2) - 1);
  }
};

// One frame and head of tensor p: where its rows lie, this lane's vector already added.
struct Unit {
  int p, b, t, h, vector;

  __device__ __forceinline__ Unit(const PoolProblem& a, const Lane& lane, int p, int number)
      : p(p), b(number / a.H / a.T), t(number / a.H % a.T), h(number % a.H), vector(lane.vector) {}

  // Token 0 of frame `t_other`, for this unit's clip and head.
  __device__ __forceinline__ uint4* tokens(const PoolTensor& x, int t_other) const {
    return x.data + (static_cast<int64_t>(p) * x.stride_p + static_cast<int64_t>(b) * x.stride_b +
                     static_cast<int64_t>(t_other) * x.stride_t +
                     static_cast<int64_t>(h) * x.stride_h + vector);
  }
  __device__ __forceinline__ uint4* tokens(const PoolTensor& x) const { return tokens(x, t); }

  // Row 0 of the unit in `pooled` or `grad_pooled`; the next row lies a.pitch farther.
  template <typename Vector>
  __device__ __forceinline__ Vector* rows(const PoolProblem& a, Vector* pooled) const {
    return pooled + ((frame(a) * a.rows() * a.H + h) * a.vectors + vector);
  }

  // The mean of the first row that a norm wrote; the next row's lies a.H farther, its own
  // 1 / deviation a.statistics.
  __device__ __forceinline__ float* stats(const PoolProblem& a) const {
    return a.stats + (frame(a) * a.normed() * a.H + h);
  }

  __device__ __forceinline__ int64_t frame(const PoolProblem& a) const {
    return (static_cast<int64_t>(p) * a.B + b) * a.T + t;
  }
};

// The tensor and the units of this block. Tensors come in turn, so that keys and values of a frame,
// which lie side by side, are read at about the same time.
struct PoolPlace {
  int p, chunk, begin, end;  // units

  __device__ __forceinline__ PoolPlace(const PoolProblem& a, int block) {
    p = block % a.P;
    chunk = block / a.P;
    begin = chunk * a.per_block;
    end = min(a.units, begin + a.per_block);
  }
};

// The current rows that a short token averages, which one group takes one after another. The class
// token's row is a cell of its own, after the last. Cells past that one are empty.
struct Cell {
  int y, x, height, width;
  bool is_class;

  __device__ __forceinline__ Cell(const PoolProblem& a, int number) {
    const int row = a.by_cells_w.divide(number);
    y = row * a.cell;
    x = (number - row * a.cells_w) * a.cell;
    is_class = number == a.cells && a.classes();
    height = is_class ? 1 : number < a.cells ? min(a.cell, a.out_h - y) : 0;
    width = is_class ? 1 : min(a.cell, a.out_w - x);
  }

  __device__ __forceinline__ bool has(int i, int j) const { return i < height && j < width; }
  __device__ __forceinline__ int size() const { return height * width; }
};

}  // namespace sta

#endif  // STA_CUDA_POOL_PROBLEM_H_
