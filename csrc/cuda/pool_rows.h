// What a group of lanes does with a row of D values: 8 of them a lane, in float.
#ifndef STA_CUDA_POOL_ROWS_H_
#define STA_CUDA_POOL_ROWS_H_

#include "cuda/pool_problem.h"

namespace sta {

constexpr int kSmallTaps = 9;  // of the (1, 3, 3) kernel, whose weights fit in registers

template <typename T>
__device__ __forceinline__ void unpack_row(float (&values)[kVector], const uint4& x) {
  const uint32_t words[] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(words[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// The same vector, unpacked anew: in 4 registers until then, where the compiler would keep 8.
__device__ __forceinline__ uint4 opaque(uint4 x) {
  asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
  return x;
}

template <typename T>
__device__ __forceinline__ uint4 pack_row(const float (&v)[kVector]) {
  return {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
}

__device__ __forceinline__ void add_product(float (&sum)[kVector], const float (&x)[kVector],
                                            const float (&y)[kVector]) {
#pragma unroll
  for (int c = 0; c < kVector; ++c) sum[c] += x[c] * y[c];
}

// Over the D values of a row, whose lanes hold a term each. All lanes of the warp together.
__device__ __forceinline__ float sum_of_row(const PoolProblem& a, const Lane& lane, float term) {
  float sum = lane.active ? term : 0.f;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
    if (mask < a.width) sum += shuffle_xor(sum, mask);
  return sum;
}

// ---- rows of floats
// ------------------------------------------------------------------------------

// A row of D floats holds the first four values of every vector, then the last four: lanes that
// read 16 bytes each, side by side, meet in no bank.
__device__ __forceinline__ int place_in_row(const PoolProblem& a, int channel) {
  return channel % 8 / 4 * (a.D / 2) + channel / 8 * 4 + channel % 4;
}

__device__ __forceinline__ void load_floats(float (&values)[kVector], const PoolProblem& a,
                                            const Lane& lane, const float* row) {
  const float4* at = reinterpret_cast<const float4*>(row) + lane.vector;
  const float4 low = at[0], high = at[a.vectors];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

__device__ __forceinline__ void store_floats(float* row, const PoolProblem& a, const Lane& lane,
                                             const float (&values)[kVector]) {
  float4* at = reinterpret_cast<float4*>(row) + lane.vector;
  at[0] = float4{values[0], values[1], values[2], values[3]};
  at[a.vectors] = float4{values[4], values[5], values[6], values[7]};
}

// Copies the parameters of tensor p to shared memory, by the whole block: a row for each tap, then
// the norm's weight, then, in a forward, its bias. Parameters may begin at any float.
__device__ __forceinline__ void copy_parameters(float* rows, const PoolProblem& a, int p) {
  const float *weight = a.weight[p], *norm_weight = a.norm_weight[p], *norm_bias = a.norm_bias[p];
  const int taps = a.taps();
  for (int i = threadIdx.x; i < a.D * taps; i += kPoolThreads)
    rows[i % taps * a.D + place_in_row(a, i / taps)] = weight[i];
  for (int c = threadIdx.x; c < a.D; c += kPoolThreads) {
    rows[taps * a.D + place_in_row(a, c)] = norm_weight[c];
    if (norm_bias != nullptr) rows[(taps + 1) * a.D + place_in_row(a, c)] = norm_bias[c];
  }
}

// ---- convolution
// ---------------------------------------------------------------------------------

// The nine vectors under the (1, 3, 3) kernel at output position (y, x); zeros outside the grid.
// All loads are issued before the first is waited for.
__device__ __forceinline__ void load_taps(uint4 (&taps)[kSmallTaps], const PoolProblem& a,
                                          const uint4* tokens, int y, int x) {
  const int top = y * a.stride - 1, left = x * a.stride - 1;
  const int first = a.class_token + top * a.grid_w + left;
#pragma unroll
  for (int tap = 0; tap < kSmallTaps; ++tap) {
    const int i = tap / 3, j = tap % 3;
    const bool inside = static_cast<unsigned>(top + i) < static_cast<unsigned>(a.grid_h) &&
                        static_cast<unsigned>(left + j) < static_cast<unsigned>(a.grid_w);
    taps[tap] = uint4{0, 0, 0, 0};
    if (inside) taps[tap] = tokens[(first + i * a.grid_w + j) * a.tokens.stride_n];
  }
}

// y = the convolution at output position (y, x) with any kernel, whose weights are rows in shared
// memory.
template <typename T>
__device__ __forceinline__ void convolve(float (&sum)[kVector], const PoolProblem& a,
                                         const Lane& lane, const Unit& unit, const float* weights,
                                         int y, int x) {
  const int top = y * a.stride - a.kh / 2, left = x * a.stride - a.kw / 2;
#pragma unroll 1
  for (int frame = 0; frame < a.kt; ++frame) {
    const int t = unit.t + frame - a.kt / 2;
    if (t < 0 || t >= a.T) continue;
    const uint4* tokens = unit.tokens(a.tokens, t);
#pragma unroll 1
    for (int i = max(0, -top); i < min(a.kh, a.grid_h - top); ++i) {
      const uint4* row = tokens + (a.class_token + (top + i) * a.grid_w + left) * a.tokens.stride_n;
      const float* row_weights = weights + (frame * a.kh + i) * a.kw * a.D;
      for (int j = max(0, -left); j < min(a.kw, a.grid_w - left); ++j) {
        float value[kVector], weight[kVector];
        unpack_row<T>(value, row[j * a.tokens.stride_n]);
        load_floats(weight, a, lane, row_weights + j * a.D);
        add_product(sum, value, weight);
      }
    }
  }
}

// ---- norm
// ----------------------------------------------------------------------------------------

struct Moments {
  float mean, rstd;
};

__device__ __forceinline__ Moments moments(const PoolProblem& a, const Lane& lane,
                                           const float (&y)[kVector]) {
  float sum = 0.f, squares = 0.f;
#pragma unroll
  for (int c = 0; c < kVector; ++c) sum += y[c];
  const float mean = sum_of_row(a, lane, sum) * a.per_channel;
#pragma unroll
  for (int c = 0; c < kVector; ++c) squares += (y[c] - mean) * (y[c] - mean);
  return {mean, rsqrtf(sum_of_row(a, lane, squares) * a.per_channel + a.eps)};
}

// The norm's backward. `grad` holds the gradient of the norm's output and then that of its input
// y; `sums` are those of the norm's weight and bias. Rows that are not there have zeros in y, grad
// and m.
__device__ __forceinline__ void norm_backward(float (&grad)[kVector], float (&sums)[2][kVector],
                                              const PoolProblem& a, const Lane& lane,
                                              const float (&y)[kVector], const Moments& m,
                                              const float (&norm_weight)[kVector]) {
  float sum = 0.f, dot = 0.f;
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    const float unit = (y[c] - m.mean) * m.rstd;
    sums[0][c] += grad[c] * unit;
    sums[1][c] += grad[c];
    grad[c] *= norm_weight[c];
    sum += grad[c];
    dot += grad[c] * unit;
  }
  sum = sum_of_row(a, lane, sum) * a.per_channel;
  dot = sum_of_row(a, lane, dot) * a.per_channel;
#pragma unroll
  for (int c = 0; c < kVector; ++c)
    grad[c] = m.rstd * (grad[c] - sum - (y[c] - m.mean) * m.rstd * dot);
}

}  // namespace sta

#endif  // STA_CUDA_POOL_ROWS_H_
