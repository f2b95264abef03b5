// The one description of a shrinking-temporal-attention call that every native kernel takes.
// Plain data and C types only, so that a binding, a test driver and any compiler can share it.
//
// Axes: B clips, T frames, N tokens of a frame (Nq queries, Nc current keys, Ns short keys),
// H heads, D head dim, L long keys of a clip, S frames of the short keys.
#ifndef STA_PARAMS_H_
#define STA_PARAMS_H_

#include <stdint.h>

enum StaDtype { STA_F32 = 0, STA_F64 = 1, STA_F16 = 2, STA_BF16 = 3 };

// A (B, T, N, H, D) tensor. Strides count elements; the last axis has stride 1. Any other stride
// may be zero or negative where the tensor is only read. data == NULL: the tensor is absent.
struct StaTensor {
  void* data;
  int64_t stride_b, stride_t, stride_n, stride_h;
};

struct StaParams {
  int64_t B, T, Nq, H, D, Nc, Ns, L;  // Ns == 0: no short part, L == 0: no long part
  // Frame i of the queries is frame f = i + frame_offset of the short keys, 0 <= f < S. It reads
  // those of frames f-left..f+right without f, as far as they exist.
  int64_t S, frame_offset, left, right;
  int32_t causal_long;  // frame i reads long keys 0..f only; L == S (where Ns == 0, f < L)
  int32_t dtype;        // StaDtype of every tensor but lse
  double scale;         // multiplies q.k before the softmax

  struct StaTensor q, k_cur, v_cur;
  struct StaTensor k_short, v_short;  // (B, S, Ns, H, D)
  struct StaTensor k_long, v_long;    // (B, L, H, D): stride_n walks L, stride_t is not used

  struct StaTensor out;  // (B, T, Nq, H, D): written by forward; a backward may read it
  void* lse;  // contiguous (B, T, H, Nq), float (double for STA_F64), natural log; may be NULL

  // Backward only. Every gradient is written in full; none is read.
  struct StaTensor grad_out;
  const void* grad_lse;  // laid out as lse; may be NULL
  struct StaTensor grad_q, grad_k_cur, grad_v_cur, grad_k_short, grad_v_short;
  struct StaTensor grad_k_long, grad_v_long;
};

#endif  // STA_PARAMS_H_
