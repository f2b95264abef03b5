// The kernels between an MLP's products, on the stable ABI: raw operators, which write into tensors
// that Python allocated, and the public operators without Python (see binding_ops.cpp). Python
// checks every argument before it comes here; what is checked below guards memory.
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "binding.h"
#include "binding_calls.h"
#include "mlp_params.h"

namespace {

int32_t accumulate_dtype(int32_t dtype) { return dtype == STA_F64 ? STA_F64 : STA_F32; }

// The data of a contiguous tensor with that many elements of a dtype, where `like` lies.
void* data(const char* name, const Tensor& x, int32_t dtype, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(dtype_of(x) == dtype, "stat_kernels: ", name, " has an unfitting dtype ",
                  x.scalar_type());
  STD_TORCH_CHECK(x.is_contiguous() && x.numel() == numel, "stat_kernels: ", name,
                  " must be contiguous and hold ", numel, " elements, it holds ", x.numel());
  STD_TORCH_CHECK(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(),
                  "stat_kernels: ", name, " must be on the device of the others");
  return x.data_ptr();
}

// Of a call on `matrix`, whose columns are its last axis.
StaMlpParams problem(const Tensor& matrix, int32_t dtype) {
  STD_TORCH_CHECK(matrix.dim() > 0, "stat_kernels: a matrix must have rows and columns");
  StaMlpParams p{};
  p.columns = matrix.size(matrix.dim() - 1);
  p.rows = p.columns > 0 ? matrix.numel() / p.columns : 0;
  p.dtype = p.skip_dtype = dtype;
  return p;
}

StaMlpParams gelu_problem(const Tensor& x, const Tensor& bias) {
  StaMlpParams p = problem(x, dtype_of(x));
  p.x = data("x", x, p.dtype, x.numel(), x);
  p.bias = data("bias", bias, accumulate_dtype(p.dtype), p.columns, x);
  return p;
}

void add_gradients(StaMlpParams& p, const Tensor& grad_out, const Tensor& grad_x,
                   const Tensor& grad_bias) {
  p.grad_out = data("grad_out", grad_out, p.skip_dtype, p.rows * p.columns, grad_out);
  if (grad_x.numel() > 0) {
    p.grad_x = data("grad_x", grad_x, p.dtype, p.rows * p.columns, grad_out);
  }
  p.grad_bias = data("grad_bias", grad_bias, accumulate_dtype(p.dtype), p.columns, grad_out);
}

void gelu(int isa, const Tensor& x, const Tensor& bias, const Tensor& out) {
  StaMlpParams p = gelu_problem(x, bias);
  p.out = data("out", out, p.dtype, x.numel(), x);
  check_cpu(sta_cpu_bias_gelu_forward(&p, run_parallel, isa));
}

void gelu_gradients(int isa, const Tensor& grad_out, const Tensor& x, const Tensor& bias,
                    const Tensor& grad_x, const Tensor& grad_bias) {
  StaMlpParams p = gelu_problem(x, bias);
  add_gradients(p, grad_out, grad_x, grad_bias);
  check_cpu(sta_cpu_bias_gelu_backward(&p, run_parallel, isa));
}

// skip or its gradient may be float32 beside a 16-bit x.
StaMlpParams residual_problem(const Tensor& matrix, int32_t dtype, const OptionalTensor& scale) {
  StaMlpParams p = problem(matrix, dtype);
  p.skip_dtype = dtype_of(matrix);
  STD_TORCH_CHECK(p.skip_dtype == dtype || p.skip_dtype == accumulate_dtype(dtype),
                  "stat_kernels: the residual must have the dtype of x, or float32");
  if (scale.has_value()) {
    const int64_t clips = scale->numel();
    p.scale = data("scale", *scale, accumulate_dtype(dtype), clips, matrix);
    STD_TORCH_CHECK(p.rows == 0 || (clips > 0 && p.rows % clips == 0),
                    "stat_kernels: scale must divide the rows");
    p.scale_rows = clips > 0 ? p.rows / clips : 0;
  }
  return p;
}

void residual(int isa, const Tensor& skip, const Tensor& x, const Tensor& bias,
              const OptionalTensor& scale, const Tensor& out) {
  StaMlpParams p = residual_problem(skip, dtype_of(x), scale);
  p.skip = data("skip", skip, p.skip_dtype, x.numel(), x);
  p.x = data("x", x, p.dtype, x.numel(), x);
  p.bias = data("bias", bias, accumulate_dtype(p.dtype), p.columns, x);
  p.out = data("out", out, p.skip_dtype, x.numel(), x);
  check_cpu(sta_cpu_bias_residual_forward(&p, run_parallel, isa));
}

// grad_x without elements is not written.
void residual_gradients(int isa, const Tensor& grad_out, const OptionalTensor& scale,
                        const Tensor& grad_x, const Tensor& grad_bias) {
  StaMlpParams p = residual_problem(grad_out, dtype_of(grad_x), scale);
  add_gradients(p, grad_out, grad_x, grad_bias);
  check_cpu(sta_cpu_bias_residual_backward(&p, run_parallel, isa));
}

void cpu_bias_gelu_forward(Tensor x, Tensor bias, std::string isa, Tensor out) {
  gelu(isa_by_name(isa), x, bias, out);
}

void cpu_bias_gelu_backward(Tensor grad_out, Tensor x, Tensor bias, std::string isa, Tensor grad_x,
                            Tensor grad_bias) {
  gelu_gradients(isa_by_name(isa), grad_out, x, bias, grad_x, grad_bias);
}

void cpu_bias_residual_forward(Tensor skip, Tensor x, Tensor bias, OptionalTensor scale,
                               std::string isa, Tensor out) {
  residual(isa_by_name(isa), skip, x, bias, scale, out);
}

void cpu_bias_residual_backward(Tensor grad_out, OptionalTensor scale, std::string isa,
                                Tensor grad_x, Tensor grad_bias) {
  residual_gradients(isa_by_name(isa), grad_out, scale, grad_x, grad_bias);
}

// The instruction set of a graph's call.
int isa_of(const std::string& name, const Tensor& x) {
  const Backend backend = backend_of(name, x);
  STD_TORCH_CHECK(!backend.cuda,
                  "stat_kernels: there are no CUDA kernels for bias with GELU or "
                  "residual; a graph for CUDA must not contain these operators");
  return backend.isa;
}

Tensor dense(const Tensor& x) { return torch::stable::contiguous(x); }

// A bias or a scale in the dtype of the sums.
Tensor accumulated(const Tensor& x, ScalarType dtype) {
  return torch::stable::contiguous(torch::stable::to(x, sum_dtype(dtype)));
}

OptionalTensor accumulated(const OptionalTensor& x, ScalarType dtype) {
  return x.has_value() ? OptionalTensor(accumulated(*x, dtype)) : std::nullopt;
}

Tensor bias_gelu_forward(Tensor x, Tensor bias, std::string backend) {
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  gelu(isa_of(backend, x), dense(x), accumulated(bias, x.scalar_type()), out);
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor grad_out, Tensor x, Tensor bias,
                                              std::string backend) {
  const ScalarType dtype = x.scalar_type();
  const Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  const Tensor grad_bias = torch::stable::new_empty(x, bias.sizes(), sum_dtype(dtype));
  gelu_gradients(isa_of(backend, x), dense(grad_out), dense(x), accumulated(bias, dtype), grad_x,
                 grad_bias);
  return {grad_x, grad_bias};
}

Tensor bias_residual_forward(Tensor skip, Tensor x, Tensor bias, OptionalTensor scale,
                             std::string backend) {
  const ScalarType dtype = x.scalar_type();
  const Tensor out = torch::stable::new_empty(skip, skip.sizes());
  residual(isa_of(backend, x), dense(skip), dense(x), accumulated(bias, dtype),
           accumulated(scale, dtype), out);
  return out;
}

std::tuple<Tensor, Tensor> bias_residual_backward(Tensor grad_out, OptionalTensor scale,
                                                  ScalarType dtype, std::string backend) {
  const int isa = isa_of(backend, grad_out);
  STD_TORCH_CHECK(grad_out.dim() > 0, "stat_kernels: a matrix must have rows and columns");
  // Where grad_x would be grad_out itself it has no elements.
  const bool same = !scale.has_value() && dtype == grad_out.scalar_type();
  const Tensor grad_x = same ? torch::stable::new_empty(grad_out, {0}, dtype)
                             : torch::stable::new_empty(grad_out, grad_out.sizes(), dtype);
  const Tensor grad_bias =
      torch::stable::new_empty(grad_out, {grad_out.size(grad_out.dim() - 1)}, sum_dtype(dtype));
  residual_gradients(isa, dense(grad_out), accumulated(scale, dtype), grad_x, grad_bias);
  return {grad_x, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(stat_kernels, m) {
  m.def("cpu_bias_gelu_forward(Tensor x, Tensor bias, str isa, Tensor(a!) out) -> ()");
  m.def(
      "cpu_bias_gelu_backward(Tensor grad_out, Tensor x, Tensor bias, str isa, "
      "Tensor(a!) grad_x, Tensor(b!) grad_bias) -> ()");
  m.def(
      "cpu_bias_residual_forward(Tensor skip, Tensor x, Tensor bias, Tensor? scale, str isa, "
      "Tensor(a!) out) -> ()");
  m.def(
      "cpu_bias_residual_backward(Tensor grad_out, Tensor? scale, str isa, Tensor(a!) grad_x, "
      "Tensor(b!) grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stat_kernels, CPU, m) {
  m.impl("cpu_bias_gelu_forward", TORCH_BOX(&cpu_bias_gelu_forward));
  m.impl("cpu_bias_gelu_backward", TORCH_BOX(&cpu_bias_gelu_backward));
  m.impl("cpu_bias_residual_forward", TORCH_BOX(&cpu_bias_residual_forward));
  m.impl("cpu_bias_residual_backward", TORCH_BOX(&cpu_bias_residual_backward));
}

STABLE_TORCH_LIBRARY_IMPL(stat_kernels, CompositeExplicitAutograd, m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
  m.impl("bias_residual_forward", TORCH_BOX(&bias_residual_forward));
  m.impl("bias_residual_backward", TORCH_BOX(&bias_residual_backward));
}
