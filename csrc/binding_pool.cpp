// Binds the pooling kernels as operators on the stable ABI. Python checks every argument before it
// comes here; what is checked below guards memory.
#include <vector>

#include "binding.h"
#include "binding_calls.h"
#include "binding_cuda.h"
#include "cuda/pool_cuda.h"
#include "pool_params.h"

namespace {

StaPoolTensor view(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 6, "stat_kernels: tokens have ", x.dim(), " axes, not 6");
  STD_TORCH_CHECK(x.size(5) == 1 || x.stride(5) == 1,
                  "stat_kernels: the last axis of the tokens must have stride 1");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

// The data of a contiguous tensor with that many elements, which lies where the tokens do.
void* data(const Tensor& x, const Tensor& tokens, int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      x.is_cuda() == tokens.is_cuda() && x.get_device_index() == tokens.get_device_index(),
      "stat_kernels: ", name, " must be on the tokens' device");
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == numel, "stat_kernels: ", name,
                  " must be contiguous and hold ", numel, " elements, it holds ", x.numel());
  return x.data_ptr();
}

int32_t accumulate_dtype(int32_t dtype) { return dtype == STA_F64 ? STA_F64 : STA_F32; }

int32_t long_rows(const std::string& name) {
  if (name == "class") return STA_LONG_CLASS;
  return name == "mean" ? STA_LONG_MEAN : STA_LONG_NONE;
}

// Sets data[p] to the parameter of each of the P tensors.
void add_parameters(const StaPoolParams& a, const Tensor& tokens,
                    const std::vector<Tensor>& tensors, int64_t numel, const char* name,
                    const void** data_of) {
  STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == a.P, "stat_kernels: ", name, " must be ",
                  a.P, " tensors, not ", tensors.size());
  for (int64_t p = 0; p < a.P; ++p) {
    STD_TORCH_CHECK(dtype_of(tensors[p]) == accumulate_dtype(a.dtype), "stat_kernels: ", name,
                    " must be float32, or float64 for float64 tokens");
    data_of[p] = data(tensors[p], tokens, numel, name);
  }
}

StaPoolParams problem(const Tensor& tokens, const PoolCall& call) {
  const PoolSizes& sizes = call.sizes;
  STD_TORCH_CHECK(sizes.size() == 7,
                  "stat_kernels: sizes are h, w, kt, kh, kw, stride and short stride");
  for (size_t i = 0; i < 7; ++i) {
    STD_TORCH_CHECK(sizes[i] >= (i < 6), "stat_kernels: sizes must be positive");
  }
  StaPoolParams a{};
  a.tokens = view(tokens);
  a.P = tokens.size(0);
  a.B = tokens.size(1);
  a.T = tokens.size(2);
  a.H = tokens.size(4);
  a.D = tokens.size(5);
  a.grid_h = sizes[0];
  a.grid_w = sizes[1];
  a.kt = sizes[2];
  a.kh = sizes[3];
  a.kw = sizes[4];
  a.stride = sizes[5];
  a.short_stride = sizes[6];
  a.out_h = (a.grid_h + a.stride - 1) / a.stride;
  a.out_w = (a.grid_w + a.stride - 1) / a.stride;
  if (a.short_stride > 0) {
    a.short_h = (a.out_h + a.short_stride - 1) / a.short_stride;
    a.short_w = (a.out_w + a.short_stride - 1) / a.short_stride;
  }
  a.class_token = call.class_token;
  a.long_rows = long_rows(call.long_mode);
  a.dtype = dtype_of(tokens);
  STD_TORCH_CHECK(a.P >= 1 && a.P <= STA_POOL_MAX, "stat_kernels: 1 to ", int(STA_POOL_MAX),
                  " tensors are pooled at once, not ", a.P);
  STD_TORCH_CHECK(tokens.size(3) == a.class_token + a.grid_h * a.grid_w,
                  "stat_kernels: the tokens do not fit the grid");
  STD_TORCH_CHECK(a.class_token || a.long_rows != STA_LONG_CLASS,
                  "stat_kernels: there is no class token");
  return a;
}

PoolRows rows_of(const StaPoolParams& a) {
  const int64_t current = a.out_h * a.out_w;
  return {a.long_rows != STA_LONG_NONE, current, a.short_h * a.short_w,
          current + (a.long_rows == STA_LONG_CLASS)};
}

int64_t pooled_numel(const StaPoolParams& a) {
  return a.P * a.B * a.T * rows_of(a).all() * a.H * a.D;
}

void add_stats(StaPoolParams& a, const Tensor& tokens, const Tensor& stats) {
  STD_TORCH_CHECK(dtype_of(stats) == accumulate_dtype(a.dtype), "stat_kernels: dtype of stats");
  a.stats = data(stats, tokens, 2 * a.P * a.B * a.T * rows_of(a).normed * a.H, "stats");
}

StaPoolParams forward_problem(const Tensor& tokens, const PoolParameters& parameters,
                              const PoolCall& call, double eps, const Tensor& pooled,
                              const Tensor& stats) {
  StaPoolParams a = problem(tokens, call);
  a.eps = eps;
  const int64_t taps = a.kt * a.kh * a.kw;
  add_parameters(a, tokens, parameters.weights, a.D * taps, "weights", a.weight);
  add_parameters(a, tokens, parameters.norm_weights, a.D, "norm_weights", a.norm_weight);
  add_parameters(a, tokens, parameters.norm_biases, a.D, "norm_biases", a.norm_bias);
  add_stats(a, tokens, stats);
  STD_TORCH_CHECK(dtype_of(pooled) == a.dtype, "stat_kernels: dtype of pooled");
  a.pooled = data(pooled, tokens, pooled_numel(a), "pooled");
  return a;
}

StaPoolParams backward_problem(const Tensor& grad_pooled, const Tensor& tokens,
                               const PoolParameters& parameters, const Tensor& stats,
                               const PoolCall& call, const Tensor& grad_tokens,
                               const Tensor& grad_params) {
  StaPoolParams a = problem(tokens, call);
  const int64_t taps = a.kt * a.kh * a.kw;
  add_parameters(a, tokens, parameters.weights, a.D * taps, "weights", a.weight);
  add_parameters(a, tokens, parameters.norm_weights, a.D, "norm_weights", a.norm_weight);
  add_stats(a, tokens, stats);
  STD_TORCH_CHECK(dtype_of(grad_pooled) == a.dtype && dtype_of(grad_params) == dtype_of(stats),
                  "stat_kernels: dtypes of the gradients");
  a.grad_pooled = data(grad_pooled, tokens, pooled_numel(a), "grad_pooled");
  a.grad_tokens = view(grad_tokens);
  check("grad_tokens", grad_tokens, tokens, tokens.scalar_type(),
        {a.P, a.B, a.T, tokens.size(3), a.H, a.D});
  a.grad_params = data(grad_params, tokens, a.P * a.D * (taps + 2), "grad_params");
  return a;
}

#ifdef STA_WITH_CUDA
int64_t workspace_bytes(const StaPoolParams& a) {
  int64_t bytes = 0;
  check_cuda(sta_cuda_pool_workspace_bytes(&a, &bytes));
  return bytes;
}
#endif

}  // namespace

PoolRows pool_rows(const Tensor& tokens, const PoolCall& call) {
  return rows_of(problem(tokens, call));
}

void pool(Backend backend, const Tensor& tokens, const PoolParameters& parameters,
          const PoolCall& call, double eps, const Tensor& pooled, const Tensor& stats) {
  const StaPoolParams a = forward_problem(tokens, parameters, call, eps, pooled, stats);
  if (!backend.cuda) return check_cpu(sta_cpu_pool_forward(&a, run_parallel, backend.isa));
#ifdef STA_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  check_cuda(sta_cuda_pool_forward(&a, current_stream(tokens)));
#endif
}

void pool_backward(Backend backend, const Tensor& grad_pooled, const Tensor& tokens,
                   const PoolParameters& parameters, const Tensor& stats, const PoolCall& call,
                   [[maybe_unused]] const OptionalTensor& workspace, const Tensor& grad_tokens,
                   const Tensor& grad_params) {
  const StaPoolParams a =
      backward_problem(grad_pooled, tokens, parameters, stats, call, grad_tokens, grad_params);
  if (!backend.cuda) return check_cpu(sta_cpu_pool_backward(&a, run_parallel, backend.isa));
#ifdef STA_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  check("workspace", *workspace, tokens, ScalarType::Byte, {kAny});
  STD_TORCH_CHECK(
      workspace->is_contiguous() && workspace->numel() >= workspace_bytes(a),
      "stat_kernels: the workspace must be contiguous and of cuda_pool_workspace bytes");
  check_cuda(sta_cuda_pool_backward(&a, workspace->data_ptr(), current_stream(tokens)));
#endif
}

int64_t pool_workspace([[maybe_unused]] const Tensor& tokens,
                       [[maybe_unused]] const PoolCall& call) {
#ifdef STA_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  return workspace_bytes(problem(tokens, call));
#else
  return 0;
#endif
}

namespace {

void cpu_pool_forward(Tensor tokens, std::vector<Tensor> weights, std::vector<Tensor> norm_weights,
                      std::vector<Tensor> norm_biases, PoolSizes sizes, bool class_token,
                      std::string long_mode, double eps, std::string isa, Tensor pooled,
                      Tensor stats) {
  pool({false, isa_by_name(isa)}, tokens, {weights, norm_weights, norm_biases},
       {sizes, class_token, long_mode}, eps, pooled, stats);
}

void cpu_pool_backward(Tensor grad_pooled, Tensor tokens, std::vector<Tensor> weights,
                       std::vector<Tensor> norm_weights, Tensor stats, PoolSizes sizes,
                       bool class_token, std::string long_mode, std::string isa, Tensor grad_tokens,
                       Tensor grad_params) {
  pool_backward({false, isa_by_name(isa)}, grad_pooled, tokens, {weights, norm_weights, {}}, stats,
                {sizes, class_token, long_mode}, std::nullopt, grad_tokens, grad_params);
}

#ifdef STA_WITH_CUDA
void cuda_pool_forward(Tensor tokens, std::vector<Tensor> weights, std::vector<Tensor> norm_weights,
                       std::vector<Tensor> norm_biases, PoolSizes sizes, bool class_token,
                       std::string long_mode, double eps, Tensor pooled, Tensor stats) {
  pool({true, 0}, tokens, {weights, norm_weights, norm_biases}, {sizes, class_token, long_mode},
       eps, pooled, stats);
}

void cuda_pool_backward(Tensor grad_pooled, Tensor tokens, std::vector<Tensor> weights,
                        std::vector<Tensor> norm_weights, Tensor stats, PoolSizes sizes,
                        bool class_token, std::string long_mode, Tensor workspace,
                        Tensor grad_tokens, Tensor grad_params) {
  pool_backward({true, 0}, grad_pooled, tokens, {weights, norm_weights, {}}, stats,
                {sizes, class_token, long_mode}, workspace, grad_tokens, grad_params);
}

// Bytes of the uint8 tensor that cuda_pool_backward works in; looks at sizes only.
int64_t cuda_pool_workspace(Tensor tokens, PoolSizes sizes, bool class_token,
                            std::string long_mode) {
  return pool_workspace(tokens, {sizes, class_token, long_mode});
}
#endif  // STA_WITH_CUDA

}  // namespace

// sizes: h, w, kt, kh, kw, stride, short stride (0: no short tokens)
#define STA_POOL_OPTIONS "int[] sizes, bool class_token, str long, "

STABLE_TORCH_LIBRARY_FRAGMENT(stat_kernels, m) {
  m.def(
      "cpu_pool_forward(Tensor tokens, Tensor[] weights, Tensor[] norm_weights, "
      "Tensor[] norm_biases, " STA_POOL_OPTIONS
      "float eps, str isa, Tensor(a!) pooled, Tensor(b!) stats) -> ()");
  m.def(
      "cpu_pool_backward(Tensor grad_pooled, Tensor tokens, Tensor[] weights, "
      "Tensor[] norm_weights, Tensor stats, " STA_POOL_OPTIONS
      "str isa, Tensor(a!) grad_tokens, Tensor(b!) grad_params) -> ()");
  m.def(
      "cuda_pool_forward(Tensor tokens, Tensor[] weights, Tensor[] norm_weights, "
      "Tensor[] norm_biases, " STA_POOL_OPTIONS
      "float eps, Tensor(a!) pooled, Tensor(b!) stats) -> ()");
  m.def("cuda_pool_workspace(Tensor tokens, int[] sizes, bool class_token, str long) -> int");
  m.def(
      "cuda_pool_backward(Tensor grad_pooled, Tensor tokens, Tensor[] weights, "
      "Tensor[] norm_weights, Tensor stats, " STA_POOL_OPTIONS
      "Tensor(c!) workspace, Tensor(a!) grad_tokens, Tensor(b!) grad_params) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stat_kernels, CPU, m) {
  m.impl("cpu_pool_forward", TORCH_BOX(&cpu_pool_forward));
  m.impl("cpu_pool_backward", TORCH_BOX(&cpu_pool_backward));
}

#ifdef STA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(stat_kernels, CUDA, m) {
  m.impl("cuda_pool_forward", TORCH_BOX(&cuda_pool_forward));
  m.impl("cuda_pool_workspace", TORCH_BOX(&cuda_pool_workspace));
  m.impl("cuda_pool_backward", TORCH_BOX(&cuda_pool_backward));
}
#endif
