// What the operators call: one function for each kernel, with tensors that the caller allocated.
// binding.cpp and binding_pool.cpp define them; binding_ops.cpp and the raw operators call them.
#ifndef STA_BINDING_CALLS_H_
#define STA_BINDING_CALLS_H_

#include <array>
#include <string>
#include <vector>

#include "binding.h"

// Where a call runs: on torch's threads with the code of an instruction set, or on torch's current
// stream of the tensors' GPU.
struct Backend {
  bool cuda;
  int isa;  // read where cuda is false
};

// The backend that a graph names, for tensors like x.
Backend backend_of(const std::string& name, const Tensor& x);

inline ScalarType sum_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType sum_dtype(const Tensor& x) { return sum_dtype(x.scalar_type()); }

// The tensors of an attention call, in the order in which every operator has them.
struct Inputs {
  Tensor q, k_cur, v_cur;
  OptionalTensor k_short, v_short, k_long, v_long;
};

struct Reach {
  int64_t left, right, frame_offset;
  bool causal_long;
};

using Gradients = std::array<Tensor, 7>;  // of Inputs; without elements where there is no input

void attend(Backend backend, const Inputs& in, const Reach& reach, double scale, const Tensor& out,
            const Tensor& lse);
// On a CPU out and lse are not read.
void attend_backward(Backend backend, const Tensor& grad_out, const OptionalTensor& grad_lse,
                     const Inputs& in, const OptionalTensor& out, const OptionalTensor& lse,
                     const Reach& reach, double scale, const OptionalTensor& workspace,
                     const Gradients& grads);
// Bytes of the uint8 workspace that attend_backward needs on a GPU.
int64_t attend_workspace(const Inputs& in, const Reach& reach);

// Of a pooling: h, w, kt, kh, kw, stride, short stride (0: no short tokens).
using PoolSizes = std::vector<int64_t>;

struct PoolCall {
  PoolSizes sizes;
  bool class_token;
  std::string long_mode;  // "class", "mean" or "none"
};

// Rows of a frame's pooled tokens, and how many of them a LayerNorm wrote.
struct PoolRows {
  int64_t long_rows, current, short_rows, normed;
  int64_t all() const { return long_rows + current + short_rows; }
};

// The parameters of P tensors that are pooled at once, in the dtype of the sums.
struct PoolParameters {
  std::vector<Tensor> weights, norm_weights, norm_biases;
};

PoolRows pool_rows(const Tensor& tokens, const PoolCall& call);
void pool(Backend backend, const Tensor& tokens, const PoolParameters& parameters,
          const PoolCall& call, double eps, const Tensor& pooled, const Tensor& stats);
void pool_backward(Backend backend, const Tensor& grad_pooled, const Tensor& tokens,
                   const PoolParameters& parameters, const Tensor& stats, const PoolCall& call,
                   const OptionalTensor& workspace, const Tensor& grad_tokens,
                   const Tensor& grad_params);
int64_t pool_workspace(const Tensor& tokens, const PoolCall& call);

#endif  // STA_BINDING_CALLS_H_
