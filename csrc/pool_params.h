// The one description of a pooling call that every native kernel takes; stat_kernels/reference.py
// says what is computed. Plain data and C types only, as in sta_params.h.
//
// Axes: P tensors of one shape (keys, values), B clips, T frames, N tokens of a frame (the class
// token, then the grid row by row), H heads, D head dim.
#ifndef STA_POOL_PARAMS_H_
#define STA_POOL_PARAMS_H_

#include "sta_params.h"

enum { STA_POOL_MAX = 4 };  // tensors a call

enum StaLong { STA_LONG_NONE = 0, STA_LONG_CLASS = 1, STA_LONG_MEAN = 2 };

// A (P, B, T, N, H, D) tensor. Strides count elements; the last axis has stride 1.
struct StaPoolTensor {
  void* data;
  int64_t stride_p, stride_b, stride_t, stride_n, stride_h;
};

struct StaPoolParams {
  int64_t P, B, T, H, D;
  int64_t grid_h, grid_w;    // of the spatial tokens
  int64_t out_h, out_w;      // of the current tokens: the grid over the stride, rounded up
  int64_t short_h, short_w;  // of the short tokens; 0 without
  int64_t kt, kh, kw;        // odd; padding is half of them
  int64_t stride, short_stride;
  int32_t class_token;  // 1: the first token of a frame is one
  int32_t long_rows;    // StaLong; STA_LONG_CLASS only with a class token
  double eps;
  int32_t
      dtype;  // StaDtype of the tensors; parameters and statistics are float (double for STA_F64)

  struct StaPoolTensor tokens;
  const void* weight[STA_POOL_MAX];       // contiguous (D, kt, kh, kw)
  const void* norm_weight[STA_POOL_MAX];  // (D)
  const void* norm_bias[STA_POOL_MAX];    // (D); forward only

  // Rows of a frame: the long one (class token or mean) if there is one, then current, then short.
  void* pooled;             // forward writes it: contiguous (P, B, T, R, H, D)
  const void* grad_pooled;  // backward reads it: the same layout
  // Contiguous (2, P, B, T, Rn, H): mean and 1 / standard deviation of the rows that a norm wrote,
  // which are the class token's, if STA_LONG_CLASS, and the current ones.
  void* stats;

  // Backward only. Both are written in full.
  struct StaPoolTensor grad_tokens;
  void* grad_params;  // contiguous (P, D * (kt * kh * kw + 2)): of weight, norm_weight, norm_bias
};

#endif  // STA_POOL_PARAMS_H_
