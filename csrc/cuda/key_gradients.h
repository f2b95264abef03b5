// Adds a tile of queries to the gradients of 32 keys and their values (two strips), which two warps
// share. One warp holds the gradient of the values and computes the weights. The other one holds
// the gradient of the keys and computes the gradient of the scores:
//
//   values' warp   S^T = K Q^T     P^T = 2^(S^T - lse)             grad_V += P^T dO
//   keys' warp     dP^T = V dO^T   dS^T = P^T (dP^T - delta)       grad_K += dS^T Q
//
// Every fragment of queries or incoming gradients that a warp reads from shared memory serves both
// strips. A warp with both gradients would have registers for one strip only. The weights pass from
// one warp to the other, rounded to 16 bits, through the memory that dS^T takes afterwards.
#ifndef STA_CUDA_KEY_GRADIENTS_H_
#define STA_CUDA_KEY_GRADIENTS_H_

#include "cuda/tiles.h"

namespace sta {

constexpr int kTile = 64;  // queries
constexpr int kHalf = 32;  // of them at a time in registers
constexpr int kScorePitch = kTile + 8;
constexpr int kPairStrips = 2;  // of the two warps
constexpr int kPairKeys = kPairStrips * kStrip;

template <typename T, int D>
struct KeyGradients {
  static constexpr int P = kPitch<D>;

  using Products = float[kPairStrips][kHalf / 8][4];  // 32 keys x 32 queries
  using Operand = uint32_t[kHalf / 16][kPairStrips][4];

  float sums[kPairStrips][D / 8][4];  // of this warp's gradient, 32 x D

  // A select and not a branch: the compiler would make two kernels of a branch.
  __device__ __forceinline__ void clear(int strip, bool wanted) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[strip][n][e] = wanted ? 0.f : sums[strip][n][e];
  }

  // In the values' warp: turns its products S^T into the weights and passes them on. lse: of the
  // half's queries; present: rows of each strip that are keys; score_grads: rows [key][query] of
  // the two strips at the half's first column.
  static __device__ __forceinline__ void pass_weights(Operand& weights, Products& products,
                                                      const float* lse, float scale_log2,
                                                      const int (&present)[kPairStrips],
                                                      T* score_grads) {
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n) {
      const float2 of_query = reinterpret_cast<const float2*>(lse + n * 8)[lane() % 4];
#pragma unroll
      for (int s = 0; s < kPairStrips; ++s)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float score = products[s][n][e] * scale_log2 - (e % 2 ? of_query.y : of_query.x);
          products[s][n][e] = lane() / 4 + e / 2 * 8 < present[s] ? exp2_fast(score) : 0.f;
        }
    }
    round(weights, products);
    uint4* passed = reinterpret_cast<uint4*>(score_grads + lane() * kScorePitch);
#pragma unroll
    for (int k = 0; k < kHalf / 16; ++k)
#pragma unroll
      for (int s = 0; s < kPairStrips; ++s) {
        const uint32_t (&x)[4] = weights[k][s];
        passed[k * kPairStrips + s] = uint4{x[0], x[1], x[2], x[3]};
      }
  }

  // In the keys' warp: turns its products dP^T into dS^T (of the scaled scores) by the weights in
  // score_grads, and leaves dS^T there. delta: of the half's queries.
  static __device__ __forceinline__ void take_weights(Operand& gradients, Products& products,
                                                      const float* delta, T* score_grads) {
    const uint4* passed = reinterpret_cast<const uint4*>(score_grads + lane() * kScorePitch);
#pragma unroll
    for (int k = 0; k < kHalf / 16; ++k)
#pragma unroll
      for (int s = 0; s < kPairStrips; ++s) {
        const uint4 x = passed[k * kPairStrips + s];
        const uint32_t weights[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int n = 2 * k + e / 2;
          float (&four)[4] = products[s][n];
          const float2 weight = unpack<T>(weights[e]);
          const float2 of_query = reinterpret_cast<const float2*>(delta + n * 8)[lane() % 4];
          four[e % 2 * 2] = weight.x * (four[e % 2 * 2] - of_query.x);
          four[e % 2 * 2 + 1] = weight.y * (four[e % 2 * 2 + 1] - of_query.y);
        }
      }
    round(gradients, products);
    __syncwarp();  // all lanes have taken the weights
#pragma unroll
    for (int k = 0; k < kHalf / 16; ++k)
#pragma unroll
      for (int s = 0; s < kPairStrips; ++s)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          T* row = score_grads + (s * kStrip + e % 2 * 8 + lane() / 4) * kScorePitch;
          reinterpret_cast<uint32_t*>(row + k * 16 + e / 2 * 8)[lane() % 4] = gradients[k][s][e];
        }
  }

  // products = rows (two strips, 32 x D) times the transpose of columns (kHalf x D).
  static __device__ __forceinline__ void multiply(Products& products,
                                                  const T* const (&rows)[kPairStrips],
                                                  const T* columns) {
#pragma unroll
    for (int s = 0; s < kPairStrips; ++s)
#pragma unroll
      for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) products[s][n][e] = 0.f;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t a[kPairStrips][4];
#pragma unroll
      for (int s = 0; s < kPairStrips; ++s) left<T, P>(a[s], rows[s] + d);
#pragma unroll
      for (int n = 0; n < kHalf / 16; ++n) {
        uint32_t b[4];
        right_transposed<T, P>(b, columns + n * 16 * P + d);
#pragma unroll
        for (int s = 0; s < kPairStrips; ++s) {
          multiply_add<T>(products[s][2 * n], a[s], b[0], b[1]);
          multiply_add<T>(products[s][2 * n + 1], a[s], b[2], b[3]);
        }
      }
    }
  }

  // Products as left operands (16 keys x 16 queries each) of the next one.
  static __device__ __forceinline__ void round(Operand& rounded, const Products& products) {
#pragma unroll
    for (int k = 0; k < kHalf / 16; ++k)
#pragma unroll
      for (int s = 0; s < kPairStrips; ++s)
        as_left<T>(rounded[k][s], products[s][2 * k], products[s][2 * k + 1]);
  }

  // sums (32 x D) += weights (32 x kHalf) rows (kHalf x D).
  __device__ __forceinline__ void accumulate(const Operand& weights, const T* rows) {
#pragma unroll
    for (int k = 0; k < kHalf / 16; ++k)
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        right<T, P>(b, rows + k * 16 * P + n * 16);
#pragma unroll
        for (int s = 0; s < kPairStrips; ++s) {
          multiply_add<T>(sums[s][2 * n], weights[k][s], b[0], b[1]);
          multiply_add<T>(sums[s][2 * n + 1], weights[k][s], b[2], b[3]);
        }
      }
  }
};

}  // namespace sta

#endif  // STA_CUDA_KEY_GRADIENTS_H_
