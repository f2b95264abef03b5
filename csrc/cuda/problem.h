// A call as the kernels take it: StaParams in 32-bit numbers, which are half the registers.
#ifndef STA_CUDA_PROBLEM_H_
#define STA_CUDA_PROBLEM_H_

#include "cuda/device.h"
#include "cuda/sta_cuda.h"
#include "sta_params.h"

namespace sta {

// (B, T, N, H, D) or, without stride_t, (B, L, H, D). Strides count vectors of 16 bytes.
struct Tensor {
  char* data;
  int stride_b, stride_t, stride_n, stride_h;
};

struct Problem {
  int B, T, Nq, H, Nc, Ns, L, S;
  // Frame i is frame i + frame_offset of the short keys. It reads those of frames i - behind to
  // i + ahead but its own, and the first i + long_lead long keys, all as far as they exist.
  int frame_offset, behind, ahead, long_lead;
  float scale, scale_log2;  // scale_log2 = scale * log2(e): scores in base 2
  Tensor q, k_cur, v_cur, k_short, v_short, k_long, v_long, out;
  float* lse;  // (B, T, H, Nq)
};

struct Gradients {
  Tensor out;
  const float* lse;  // laid out as Problem::lse; may be null
  Tensor q, k_cur, v_cur, k_short, v_short, k_long, v_long;
};

// The first of the D values of a token.
template <typename T>
__device__ __forceinline__ T* token(const Tensor& x, int b, int t, int n, int h) {
  const int64_t vectors =
      static_cast<int64_t>(b) * x.stride_b + static_cast<int64_t>(t) * x.stride_t +
      static_cast<int64_t>(n) * x.stride_n + static_cast<int64_t>(h) * x.stride_h;
  return reinterpret_cast<T*>(x.data + vectors * 16);
}

// Where queries of a frame and head begin in an array (B, T, H, Nq).
__device__ __forceinline__ int64_t statistics_row(const Problem& p, int b, int i, int h) {
  return ((static_cast<int64_t>(b) * p.T + i) * p.H + h) * p.Nq;
}

// ---- host
// ----------------------------------------------------------------------------------------

// Narrows numbers and says through `error` where one does not fit or is no whole vector.
struct Narrow {
  int error = 0;

  int number(int64_t value) {
    if (value < INT32_MIN || value > INT32_MAX) error = STA_CUDA_TOO_LARGE;
    return static_cast<int>(value);
  }

  int vectors(int64_t elements) {
    constexpr int kElements = 8;
    if (elements % kElements != 0) error = STA_CUDA_UNALIGNED;
    return number(elements / kElements);
  }

  Tensor tensor(const StaTensor& x) {
    if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) error = STA_CUDA_UNALIGNED;
    return {static_cast<char*>(x.data), vectors(x.stride_b), vectors(x.stride_t),
            vectors(x.stride_n), vectors(x.stride_h)};
  }

  Problem problem(const StaParams& p) {
    constexpr double kLog2E = 1.4426950408889634;
    // Frames farther than S - 1 do not exist, so a wider window says the same.
    const int64_t left = p.left < p.S ? p.left : p.S - 1;
    const int64_t right = p.right < p.S ? p.right : p.S - 1;
    Problem n;
    n.B = number(p.B), n.T = number(p.T), n.Nq = number(p.Nq), n.H = number(p.H);
    n.Nc = number(p.Nc), n.Ns = number(p.Ns), n.L = number(p.L), n.S = number(p.S);
    n.frame_offset = number(p.frame_offset);
    n.behind = number(left - p.frame_offset), n.ahead = number(right + p.frame_offset);
    n.long_lead = number(p.causal_long ? p.frame_offset + 1 : p.L);
    number(p.T + p.S + p.L);                     // sums of a frame and one of these
    number(p.Nc + (left + right) * p.Ns + p.L);  // a frame's keys are counted in 32 bits too
    n.scale = static_cast<float>(p.scale);
    n.scale_log2 = static_cast<float>(p.scale * kLog2E);
    n.q = tensor(p.q), n.k_cur = tensor(p.k_cur), n.v_cur = tensor(p.v_cur);
    n.k_short = tensor(p.k_short), n.v_short = tensor(p.v_short);
    n.k_long = tensor(p.k_long), n.v_long = tensor(p.v_long), n.out = tensor(p.out);
    n.lse = static_cast<float*>(p.lse);
    return n;
  }

  Gradients gradients(const StaParams& p) {
    Gradients n;
    n.out = tensor(p.grad_out), n.lse = static_cast<const float*>(p.grad_lse);
    n.q = tensor(p.grad_q), n.k_cur = tensor(p.grad_k_cur), n.v_cur = tensor(p.grad_v_cur);
    n.k_short = tensor(p.grad_k_short), n.v_short = tensor(p.grad_v_short);
    n.k_long = tensor(p.grad_k_long), n.v_long = tensor(p.grad_v_long);
    return n;
  }
};

}  // namespace sta

#endif  // STA_CUDA_PROBLEM_H_
