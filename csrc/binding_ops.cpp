// The public operators: their schemas, and kernels that need no Python. A graph that torch.jit or
// AOTInductor saved runs on them in any program that loads this library.
//
// The kernels are registered under CompositeExplicitAutograd. The package stat_kernels registers
// its own under CPU and CUDA, which come first whatever was loaded first, so that Python keeps its
// choice of backends. Both call the same code: binding_calls.h. Those of bias with GELU or residual
// are in binding_mlp.cpp.

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <tuple>

#include "binding.h"
#include "binding_calls.h"
#include "schemas.h"

Backend backend_of(const std::string& name, const Tensor& x) {
  const char* device = x.is_cpu() ? "cpu" : x.is_cuda() ? "cuda" : "another device";
  STD_TORCH_CHECK(name == "cpu" || name == "cuda", "stat_kernels: backend '", name,
                  "' needs Python with stat_kernels imported; without it a graph must name 'cpu' "
                  "or 'cuda'");
  STD_TORCH_CHECK(name == device, "stat_kernels: this graph was made with backend '", name,
                  "', its tensors are on ", device, "; make it on the device that it runs on");
  if (name == "cuda") {
#ifndef STA_WITH_CUDA
    STD_TORCH_CHECK(false, "stat_kernels: this library was built without the CUDA kernels");
#endif
    return {true, 0};
  }
  const char* isa = std::getenv("STAT_CPU_ISA");
  return {false, isa != nullptr && *isa != '\0' ? isa_by_name(isa) : sta_cpu_best_isa()};
}

namespace {

constexpr int64_t kVectorBytes = 16;  // the CUDA kernels copy as much at a time

Tensor copied(const Tensor& x) {
  Tensor copy = torch::stable::new_empty(x, x.sizes());
  return torch::stable::copy_(copy, x);
}

bool whole_vectors(const Tensor& x) {
  const int64_t last = x.dim() - 1, bytes = x.element_size();
  bool whole = x.stride(last) == 1 && reinterpret_cast<int64_t>(x.data_ptr()) % kVectorBytes == 0;
  for (int64_t i = 0; i < last; ++i) whole = whole && x.stride(i) * bytes % kVectorBytes == 0;
  return whole;
}

// x, or a copy where its last stride is not 1.
Tensor unit_last_stride(const Tensor& x) { return x.stride(x.dim() - 1) == 1 ? x : copied(x); }

// x, or a copy where a kernel cannot read it where it lies.
Tensor readable(Backend backend, const Tensor& x) {
  return !backend.cuda ? unit_last_stride(x) : whole_vectors(x) ? x : copied(x);
}

OptionalTensor readable(Backend backend, const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(readable(backend, *x)) : std::nullopt;
}

Inputs readable(Backend backend, const Inputs& in) {
  return {readable(backend, in.q),       readable(backend, in.k_cur),
          readable(backend, in.v_cur),   readable(backend, in.k_short),
          readable(backend, in.v_short), readable(backend, in.k_long),
          readable(backend, in.v_long)};
}

Tensor empty_like_input(const Inputs& in, const OptionalTensor& x) {
  return x.has_value() ? torch::stable::new_empty(*x, x->sizes())
                       : torch::stable::new_empty(in.q, {0});
}

Tensor workspace_of(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// out and lse of inputs as they come.
std::tuple<Tensor, Tensor> attention(Backend backend, const Inputs& inputs, const Reach& reach,
                                     double scale) {
  const Tensor& q = inputs.q;
  STD_TORCH_CHECK(q.dim() == 5, "stat_kernels: q must have 5 axes, got ", q.dim());
  const Tensor out = torch::stable::new_empty(q, q.sizes());
  const Tensor lse =
      torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(3), q.size(2)}, sum_dtype(q));
  if (q.numel() > 0) attend(backend, readable(backend, inputs), reach, scale, out, lse);
  return {out, lse};
}

// Fills gradients that a kernel can write where they lie.
void attention_gradients(Backend backend, const Tensor& grad_out, const OptionalTensor& grad_lse,
                         const Inputs& inputs, const OptionalTensor& out, const OptionalTensor& lse,
                         const Reach& reach, double scale, const Gradients& grads) {
  if (inputs.q.numel() == 0) {
    for (Tensor grad : grads) torch::stable::zero_(grad);
    return;
  }
  const Inputs in = readable(backend, inputs);
  OptionalTensor workspace, dense_grad_lse, dense_lse;
  if (backend.cuda) workspace = workspace_of(in.q, attend_workspace(in, reach));
  if (grad_lse.has_value()) dense_grad_lse = torch::stable::contiguous(*grad_lse);
  if (lse.has_value()) dense_lse = torch::stable::contiguous(*lse);
  attend_backward(backend, readable(backend, grad_out), dense_grad_lse, in, readable(backend, out),
                  dense_lse, reach, scale, workspace, grads);
}

std::tuple<Tensor, Tensor> sta_forward(Tensor q, Tensor k_cur, Tensor v_cur, OptionalTensor k_short,
                                       OptionalTensor v_short, OptionalTensor k_long,
                                       OptionalTensor v_long, int64_t left, int64_t right,
                                       int64_t frame_offset, bool causal_long, double scale,
                                       std::string backend) {
  return attention(backend_of(backend, q), {q, k_cur, v_cur, k_short, v_short, k_long, v_long},
                   {left, right, frame_offset, causal_long}, scale);
}

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors sta_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k_cur,
                          Tensor v_cur, OptionalTensor k_short, OptionalTensor v_short,
                          OptionalTensor k_long, OptionalTensor v_long, OptionalTensor out,
                          OptionalTensor lse, int64_t left, int64_t right, int64_t frame_offset,
                          bool causal_long, double scale, std::string backend) {
  const Inputs in{q, k_cur, v_cur, k_short, v_short, k_long, v_long};
  const Gradients grads{empty_like_input(in, q),       empty_like_input(in, k_cur),
                        empty_like_input(in, v_cur),   empty_like_input(in, k_short),
                        empty_like_input(in, v_short), empty_like_input(in, k_long),
                        empty_like_input(in, v_long)};
  attention_gradients(backend_of(backend, q), grad_out, grad_lse, in, out, lse,
                      {left, right, frame_offset, causal_long}, scale, grads);
  return std::tuple_cat(grads);
}

std::vector<Tensor> accumulated(const std::vector<Tensor>& parameters, const Tensor& tokens) {
  std::vector<Tensor> cast;
  for (const Tensor& p : parameters)
    cast.push_back(torch::stable::contiguous(torch::stable::to(p, sum_dtype(tokens))));
  return cast;
}

PoolParameters accumulated(const PoolParameters& p, const Tensor& tokens) {
  return {accumulated(p.weights, tokens), accumulated(p.norm_weights, tokens),
          accumulated(p.norm_biases, tokens)};
}

PoolCall pool_call(const std::vector<int64_t>& grid, const Tensor& weight, int64_t stride,
                   std::optional<int64_t> short_stride, bool class_token,
                   const std::string& long_mode) {
  STD_TORCH_CHECK(grid.size() == 2 && weight.dim() == 5,
                  "stat_kernels: a grid has two sizes and a pooling's weight 5 axes");
  return {{grid[0], grid[1], weight.size(2), weight.size(3), weight.size(4), stride,
           short_stride.value_or(0)},
          class_token,
          long_mode};
}

// pooled (P, B, T, R, H, D) and stats of tokens (P, B, T, N, H, D).
std::tuple<Tensor, Tensor> pooling(Backend backend, const Tensor& tokens,
                                   const PoolParameters& parameters, const PoolCall& call,
                                   double eps) {
  const Tensor read = readable(backend, tokens);
  const PoolRows rows = pool_rows(read, call);
  const int64_t P = tokens.size(0), B = tokens.size(1), T = tokens.size(2), H = tokens.size(4);
  const Tensor pooled = torch::stable::new_empty(tokens, {P, B, T, rows.all(), H, tokens.size(5)});
  const Tensor stats =
      torch::stable::new_empty(tokens, {2, P, B, T, rows.normed, H}, sum_dtype(tokens));
  if (tokens.numel() > 0)
    pool(backend, read, accumulated(parameters, tokens), call, eps, pooled, stats);
  return {pooled, stats};
}

// grad_params; fills grad_tokens.
Tensor pooling_gradients(Backend backend, const Tensor& grad_pooled, const Tensor& tokens,
                         const PoolParameters& parameters, const Tensor& stats,
                         const PoolCall& call, Tensor grad_tokens) {
  const int64_t channels = parameters.norm_weights[0].numel();
  Tensor grad_params = torch::stable::new_empty(
      tokens, {tokens.size(0), parameters.weights[0].numel() + 2 * channels}, sum_dtype(tokens));
  if (tokens.numel() == 0) return torch::stable::zero_(grad_params);
  const Tensor read = readable(backend, tokens);
  const bool in_place = !backend.cuda || whole_vectors(grad_tokens);
  const Tensor filled = in_place ? grad_tokens : torch::stable::new_empty(tokens, tokens.sizes());
  OptionalTensor workspace;
  if (backend.cuda) workspace = workspace_of(tokens, pool_workspace(read, call));
  pool_backward(backend, torch::stable::contiguous(grad_pooled), read,
                accumulated(parameters, tokens), stats, call, workspace, filled, grad_params);
  if (!in_place) torch::stable::copy_(grad_tokens, filled);
  return grad_params;
}

std::tuple<Tensor, Tensor> pool_forward(Tensor tokens, Tensor weight, Tensor norm_weight,
                                        Tensor norm_bias, std::vector<int64_t> grid, int64_t stride,
                                        std::optional<int64_t> short_stride, bool class_token,
                                        std::string long_mode, double eps, std::string backend) {
  const PoolCall call = pool_call(grid, weight, stride, short_stride, class_token, long_mode);
  const auto [pooled, stats] =
      pooling(backend_of(backend, tokens), torch::stable::unsqueeze(tokens, 0),
              {{weight}, {norm_weight}, {norm_bias}}, call, eps);
  return {torch::stable::select(pooled, 0, 0), stats};
}

std::tuple<Tensor, Tensor> pool_backward_op(Tensor grad_pooled, Tensor tokens, Tensor weight,
                                            Tensor norm_weight, Tensor stats,
                                            std::vector<int64_t> grid, int64_t stride,
                                            std::optional<int64_t> short_stride, bool class_token,
                                            std::string long_mode, std::string backend) {
  const PoolCall call = pool_call(grid, weight, stride, short_stride, class_token, long_mode);
  const Tensor grad_tokens = torch::stable::new_empty(tokens, tokens.sizes());
  const Tensor grad_params =
      pooling_gradients(backend_of(backend, tokens), torch::stable::unsqueeze(grad_pooled, 0),
                        torch::stable::unsqueeze(tokens, 0), {{weight}, {norm_weight}, {}}, stats,
                        call, torch::stable::unsqueeze(grad_tokens, 0));
  return {grad_tokens, grad_params};
}

// The options of both operators of the layer's core.
struct Core {
  PoolCall kv, q;
  PoolRows rows;  // of keys and values
  Reach reach;
};

Core core_of(const Tensor& slots, const OptionalTensor& q_weight, const Tensor& k_weight,
             const std::vector<int64_t>& grid, int64_t q_stride, int64_t kv_stride,
             std::optional<int64_t> short_stride, bool class_token, const std::string& long_mode,
             int64_t left, int64_t right, bool causal_long) {
  Core core;
  core.kv = pool_call(grid, k_weight, kv_stride, short_stride, class_token, long_mode);
  if (q_weight.has_value())
    core.q = pool_call(grid, *q_weight, q_stride, {}, class_token, class_token ? "class" : "none");
  core.rows = pool_rows(slots, core.kv);
  core.reach = {left, right, 0, causal_long};
  return core;
}

// (B, T, N, 3, H, D) -> (3, B, T, N, H, D), a view.
Tensor slots_of(const Tensor& qkv) {
  STD_TORCH_CHECK(qkv.dim() == 6 && qkv.size(3) == 3,
                  "stat_kernels: qkv must be (B, T, N, 3, H, D)");
  std::array<StableIValue, 3> stack{torch::stable::detail::from(qkv),
                                    torch::stable::detail::from(int64_t{3}),
                                    torch::stable::detail::from(int64_t{0})};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::movedim", "int", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor queries(Tensor slots) { return torch::stable::narrow(slots, 0, 0, 1); }
Tensor keys_values(Tensor slots) { return torch::stable::narrow(slots, 0, 1, 2); }

// q and the six parts of keys and values, views of the pooled buffer (2, B, T, R, H, D).
Inputs attention_views(const Tensor& q, const Tensor& kv, const PoolRows& rows) {
  auto part = [&](int64_t which, int64_t first, int64_t count) {
    Tensor tokens = torch::stable::select(kv, 0, which);
    return torch::stable::narrow(tokens, 2, first, count);
  };
  Inputs in{};
  in.q = q;
  in.k_cur = part(0, rows.long_rows, rows.current);
  in.v_cur = part(1, rows.long_rows, rows.current);
  if (const int64_t first = rows.long_rows + rows.current; rows.short_rows > 0) {
    in.k_short = part(0, first, rows.short_rows);
    in.v_short = part(1, first, rows.short_rows);
  }
  if (rows.long_rows > 0) {
    in.k_long = torch::stable::squeeze(part(0, 0, 1), 2);
    in.v_long = torch::stable::squeeze(part(1, 0, 1), 2);
  }
  return in;
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors core_forward(Tensor qkv, OptionalTensor q_weight, OptionalTensor q_norm_weight,
                        Tensor k_weight, Tensor k_norm_weight, Tensor v_weight,
                        Tensor v_norm_weight, OptionalTensor q_norm_bias, Tensor k_norm_bias,
                        Tensor v_norm_bias, std::vector<int64_t> grid, int64_t q_stride,
                        int64_t kv_stride, std::optional<int64_t> short_stride, bool class_token,
                        std::string long_mode, double eps, int64_t left, int64_t right,
                        bool causal_long, double scale, std::string backend_name) {
  const Backend backend = backend_of(backend_name, qkv);
  const Tensor slots = slots_of(unit_last_stride(qkv));
  const Core core = core_of(slots, q_weight, k_weight, grid, q_stride, kv_stride, short_stride,
                            class_token, long_mode, left, right, causal_long);
  const auto [kv, kv_stats] =
      pooling(backend, keys_values(slots),
              {{k_weight, v_weight}, {k_norm_weight, v_norm_weight}, {k_norm_bias, v_norm_bias}},
              core.kv, eps);
  // Tensors without elements where queries are not pooled: an operator cannot return None.
  Tensor q = torch::stable::new_empty(qkv, {0});
  Tensor q_stats = torch::stable::new_empty(qkv, {0}, sum_dtype(qkv));
  if (q_weight.has_value())
    std::tie(q, q_stats) = pooling(backend, queries(slots),
                                   {{*q_weight}, {*q_norm_weight}, {*q_norm_bias}}, core.q, eps);
  const Tensor attending = torch::stable::select(q_weight.has_value() ? q : slots, 0, 0);
  const auto [out, lse] =
      attention(backend, attention_views(attending, kv, core.rows), core.reach, scale);
  return {out, lse, kv, kv_stats, q, q_stats};
}

std::tuple<Tensor, Tensor, Tensor> core_backward(
    Tensor grad_out, Tensor qkv, OptionalTensor q_weight, OptionalTensor q_norm_weight,
    Tensor k_weight, Tensor k_norm_weight, Tensor v_weight, Tensor v_norm_weight,
    OptionalTensor out, OptionalTensor lse, Tensor kv, Tensor kv_stats, Tensor q, Tensor q_stats,
    std::vector<int64_t> grid, int64_t q_stride, int64_t kv_stride,
    std::optional<int64_t> short_stride, bool class_token, std::string long_mode, double,
    int64_t left, int64_t right, bool causal_long, double scale, std::string backend_name) {
  const Backend backend = backend_of(backend_name, qkv);
  const Tensor slots = slots_of(unit_last_stride(qkv));
  const Core core = core_of(slots, q_weight, k_weight, grid, q_stride, kv_stride, short_stride,
                            class_token, long_mode, left, right, causal_long);
  const bool pools_queries = q_weight.has_value();
  const Tensor grad_qkv = torch::stable::new_empty(qkv, qkv.sizes()),
               grad_slots = slots_of(grad_qkv);
  const Tensor grad_kv = torch::stable::new_empty(kv, kv.sizes());
  const Tensor grad_q = torch::stable::new_empty(q, q.sizes());
  const Inputs views =
      attention_views(torch::stable::select(pools_queries ? q : slots, 0, 0), kv, core.rows);
  const Inputs grads = attention_views(
      torch::stable::select(pools_queries ? grad_q : grad_slots, 0, 0), grad_kv, core.rows);
  const Tensor none = torch::stable::new_empty(qkv, {0});
  attention_gradients(
      backend, grad_out, std::nullopt, views, out, lse, core.reach, scale,
      {grads.q, grads.k_cur, grads.v_cur, grads.k_short.value_or(none),
       grads.v_short.value_or(none), grads.k_long.value_or(none), grads.v_long.value_or(none)});
  const Tensor grad_kv_params =
      pooling_gradients(backend, grad_kv, keys_values(slots),
                        {{k_weight, v_weight}, {k_norm_weight, v_norm_weight}, {}}, kv_stats,
                        core.kv, keys_values(grad_slots));
  if (!pools_queries)
    return {grad_qkv, grad_kv_params, torch::stable::new_empty(qkv, {0}, sum_dtype(qkv))};
  return {grad_qkv, grad_kv_params,
          pooling_gradients(backend, grad_q, queries(slots), {{*q_weight}, {*q_norm_weight}, {}},
                            q_stats, core.q, queries(grad_slots))};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(stat_kernels, m) {
  for (const char* schema : STA_SCHEMAS) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(stat_kernels, CompositeExplicitAutograd, m) {
  m.impl("sta_forward", TORCH_BOX(&sta_forward));
  m.impl("sta_backward", TORCH_BOX(&sta_backward));
  m.impl("pool_forward", TORCH_BOX(&pool_forward));
  m.impl("pool_backward", TORCH_BOX(&pool_backward_op));
  m.impl("core_forward", TORCH_BOX(&core_forward));
  m.impl("core_backward", TORCH_BOX(&core_backward));
}
