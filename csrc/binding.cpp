// Binds the attention kernels as operators on the stable ABI (2.11 and newer); binding_pool.cpp the
// pooling kernels. The public function checks its arguments; an operator may be called without it
// (from a traced graph, from C++), so whatever a kernel relies on to stay inside its tensors is
// checked here.

#include "binding.h"
#include "binding_calls.h"
#include "binding_cuda.h"
#include "build_info.h"
#include "introspection.h"
#include "sta_params.h"

namespace {

// A (B, T, N, H, D) tensor, or (B, L, H, D) for the long part, which has no frame axis.
StaTensor view(const char* name, const Tensor& x, const Tensor& q,
               std::initializer_list<int64_t> sizes) {
  check(name, x, q, q.scalar_type(), sizes);
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(x.size(dims - 1) == 1 || x.stride(dims - 1) == 1 || x.numel() == 0,
                  "stat_kernels: the last axis of ", name, " must have stride 1, got ",
                  x.stride(dims - 1));
  StaTensor v{};
  v.data = x.data_ptr();
  v.stride_b = x.stride(0);
  v.stride_t = dims == 5 ? x.stride(1) : 0;
  v.stride_n = x.stride(dims - 3);
  v.stride_h = x.stride(dims - 2);
  return v;
}

// lse or its gradient: contiguous (B, T, H, Nq), float, or double for double inputs.
void* statistics(const char* name, const Tensor& x, const Tensor& q) {
  const ScalarType dtype =
      q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(name, x, q, dtype, {q.size(0), q.size(1), q.size(3), q.size(2)});
  STD_TORCH_CHECK(x.is_contiguous(), "stat_kernels: ", name, " must be contiguous");
  return x.data_ptr();
}

StaParams problem(const Inputs& in, const Reach& reach, double scale) {
  const auto& [q, k_cur, v_cur, k_short, v_short, k_long, v_long] = in;
  const auto& [left, right, frame_offset, causal_long] = reach;
  StaParams p{};
  p.dtype = dtype_of(q);
  p.q = view("q", q, q, {kAny, kAny, kAny, kAny, kAny});
  p.B = q.size(0), p.T = q.size(1), p.Nq = q.size(2), p.H = q.size(3), p.D = q.size(4);
  p.k_cur = view("k_cur", k_cur, q, {p.B, p.T, kAny, p.H, p.D});
  p.Nc = k_cur.size(2);
  p.v_cur = view("v_cur", v_cur, q, {p.B, p.T, p.Nc, p.H, p.D});
  STD_TORCH_CHECK(p.Nc > 0, "stat_kernels: k_cur must hold at least one token a frame");
  STD_TORCH_CHECK(k_short.has_value() == v_short.has_value(),
                  "stat_kernels: k_short and v_short come together");
  STD_TORCH_CHECK(k_long.has_value() == v_long.has_value(),
                  "stat_kernels: k_long and v_long come together");
  if (k_short.has_value()) {
    p.k_short = view("k_short", *k_short, q, {p.B, kAny, kAny, p.H, p.D});
    p.S = k_short->size(1);
    p.Ns = k_short->size(2);
    p.v_short = view("v_short", *v_short, q, {p.B, p.S, p.Ns, p.H, p.D});
  }
  if (k_long.has_value()) {
    p.k_long = view("k_long", *k_long, q, {p.B, kAny, p.H, p.D});
    p.L = k_long->size(1);
    p.v_long = view("v_long", *v_long, q, {p.B, p.L, p.H, p.D});
  }
  if (!k_short.has_value()) p.S = causal_long ? p.L : p.T;
  STD_TORCH_CHECK(left >= 0 && right >= 0,
                  "stat_kernels: left and right must not be negative, got ", left, " and ", right);
  STD_TORCH_CHECK(frame_offset >= 0 && frame_offset <= p.S - p.T,
                  "stat_kernels: frame_offset must be from 0 to ", p.S - p.T, ", got ",
                  frame_offset);
  STD_TORCH_CHECK(!causal_long || p.L == p.S,
                  "stat_kernels: causal long keys must be as many as the ", p.S,
                  " frames of k_short, got ", p.L);
  p.left = left, p.right = right;
  p.frame_offset = frame_offset;
  p.causal_long = causal_long;
  p.scale = scale;
  return p;
}

// Adds what a forward writes.
void add_results(StaParams& p, const Tensor& q, const Tensor& out, const Tensor& lse) {
  p.out = view("out", out, q, {p.B, p.T, p.Nq, p.H, p.D});
  p.lse = statistics("lse", lse, q);
}

// Adds what a backward reads and writes besides the inputs and the results. The gradients may have
// any strides.
void add_gradients(StaParams& p, const Tensor& q, const Tensor& grad_out,
                   const OptionalTensor& grad_lse, const Gradients& grads) {
  const auto& [grad_q, grad_k_cur, grad_v_cur, grad_k_short, grad_v_short, grad_k_long,
               grad_v_long] = grads;
  p.grad_out = view("grad_out", grad_out, q, {p.B, p.T, p.Nq, p.H, p.D});
  p.grad_lse = grad_lse.has_value() ? statistics("grad_lse", *grad_lse, q) : nullptr;
  p.grad_q = view("grad_q", grad_q, q, {p.B, p.T, p.Nq, p.H, p.D});
  p.grad_k_cur = view("grad_k_cur", grad_k_cur, q, {p.B, p.T, p.Nc, p.H, p.D});
  p.grad_v_cur = view("grad_v_cur", grad_v_cur, q, {p.B, p.T, p.Nc, p.H, p.D});
  if (p.Ns > 0) {
    p.grad_k_short = view("grad_k_short", grad_k_short, q, {p.B, p.S, p.Ns, p.H, p.D});
    p.grad_v_short = view("grad_v_short", grad_v_short, q, {p.B, p.S, p.Ns, p.H, p.D});
  }
  if (p.L > 0) {
    p.grad_k_long = view("grad_k_long", grad_k_long, q, {p.B, p.L, p.H, p.D});
    p.grad_v_long = view("grad_v_long", grad_v_long, q, {p.B, p.L, p.H, p.D});
  }
}

#ifdef STA_WITH_CUDA
int64_t workspace_bytes(const StaParams& p) {
  int64_t bytes = 0;
  check_cuda(sta_cuda_workspace_bytes(&p, &bytes));
  return bytes;
}
#endif

}  // namespace

void attend(Backend backend, const Inputs& in, const Reach& reach, double scale, const Tensor& out,
            const Tensor& lse) {
  StaParams p = problem(in, reach, scale);
  add_results(p, in.q, out, lse);
  if (!backend.cuda) return check_cpu(sta_cpu_forward(&p, run_parallel, backend.isa));
#ifdef STA_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(in.q.get_device_index());
  check_cuda(sta_cuda_forward(&p, current_stream(in.q)));
#endif
}

void attend_backward(Backend backend, const Tensor& grad_out, const OptionalTensor& grad_lse,
                     const Inputs& in, [[maybe_unused]] const OptionalTensor& out,
                     [[maybe_unused]] const OptionalTensor& lse, const Reach& reach, double scale,
                     [[maybe_unused]] const OptionalTensor& workspace, const Gradients& grads) {
  StaParams p = problem(in, reach, scale);
  add_gradients(p, in.q, grad_out, grad_lse, grads);
  if (!backend.cuda) return check_cpu(sta_cpu_backward(&p, run_parallel, backend.isa));
#ifdef STA_WITH_CUDA
  STD_TORCH_CHECK(out.has_value() && lse.has_value(),
                  "stat_kernels: the backward of 'cuda' reads out and lse, they must be given");
  add_results(p, in.q, *out, *lse);
  const torch::stable::accelerator::DeviceGuard guard(in.q.get_device_index());
  check("workspace", *workspace, in.q, ScalarType::Byte, {kAny});
  STD_TORCH_CHECK(workspace->is_contiguous() && workspace->numel() >= workspace_bytes(p),
                  "stat_kernels: the workspace must be contiguous and of cuda_workspace bytes");
  check_cuda(sta_cuda_backward(&p, workspace->data_ptr(), current_stream(in.q)));
#endif
}

int64_t attend_workspace([[maybe_unused]] const Inputs& in, [[maybe_unused]] const Reach& reach) {
#ifdef STA_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(in.q.get_device_index());
  return workspace_bytes(problem(in, reach, 1.0));
#else
  return 0;
#endif
}

namespace {

void cpu_forward(Tensor q, Tensor k_cur, Tensor v_cur, OptionalTensor k_short,
                 OptionalTensor v_short, OptionalTensor k_long, OptionalTensor v_long, int64_t left,
                 int64_t right, int64_t frame_offset, bool causal_long, double scale,
                 std::string isa, Tensor out, Tensor lse) {
  attend({false, isa_by_name(isa)}, {q, k_cur, v_cur, k_short, v_short, k_long, v_long},
         {left, right, frame_offset, causal_long}, scale, out, lse);
}

void cpu_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k_cur, Tensor v_cur,
                  OptionalTensor k_short, OptionalTensor v_short, OptionalTensor k_long,
                  OptionalTensor v_long, int64_t left, int64_t right, int64_t frame_offset,
                  bool causal_long, double scale, std::string isa, Tensor grad_q, Tensor grad_k_cur,
                  Tensor grad_v_cur, Tensor grad_k_short, Tensor grad_v_short, Tensor grad_k_long,
                  Tensor grad_v_long) {
  attend_backward(
      {false, isa_by_name(isa)}, grad_out, grad_lse,
      {q, k_cur, v_cur, k_short, v_short, k_long, v_long}, std::nullopt, std::nullopt,
      {left, right, frame_offset, causal_long}, scale, std::nullopt,
      {grad_q, grad_k_cur, grad_v_cur, grad_k_short, grad_v_short, grad_k_long, grad_v_long});
}

// The name of a usable instruction set, "" when there are no more: the best, then the others, the
// emulated one last.
std::string cpu_isa(int64_t rank) {
  const int best = sta_cpu_best_isa();
  if (rank-- == 0) return sta_cpu_isa_name(best);
  for (int isa = STA_ISA_AMX_EMULATED - 1; isa >= 0; --isa) {
    if (isa != best && sta_cpu_isa_usable(isa) && rank-- == 0) return sta_cpu_isa_name(isa);
  }
  return rank == 0 ? sta_cpu_isa_name(STA_ISA_AMX_EMULATED) : "";
}

// The set whose kernel serves a dtype where `isa` is asked for. like: any tensor of the dtype.
std::string cpu_isa_of(std::string isa, Tensor like) {
  return sta_cpu_isa_name(sta_cpu_isa_of(isa_by_name(isa), dtype_of(like)));
}

// The GPUs that the CUDA kernels were compiled for, "8.0 9.0a 10.0+PTX"; "" where they were not.
std::string cuda_architectures() { return STA_CUDA_ARCHITECTURES; }

#ifdef STA_WITH_CUDA
void cuda_forward(Tensor q, Tensor k_cur, Tensor v_cur, OptionalTensor k_short,
                  OptionalTensor v_short, OptionalTensor k_long, OptionalTensor v_long,
                  int64_t left, int64_t right, int64_t frame_offset, bool causal_long, double scale,
                  Tensor out, Tensor lse) {
  attend({true, 0}, {q, k_cur, v_cur, k_short, v_short, k_long, v_long},
         {left, right, frame_offset, causal_long}, scale, out, lse);
}

void cuda_backward(Tensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k_cur, Tensor v_cur,
                   OptionalTensor k_short, OptionalTensor v_short, OptionalTensor k_long,
                   OptionalTensor v_long, Tensor out, Tensor lse, int64_t left, int64_t right,
                   int64_t frame_offset, bool causal_long, double scale, Tensor workspace,
                   Tensor grad_q, Tensor grad_k_cur, Tensor grad_v_cur, Tensor grad_k_short,
                   Tensor grad_v_short, Tensor grad_k_long, Tensor grad_v_long) {
  attend_backward(
      {true, 0}, grad_out, grad_lse, {q, k_cur, v_cur, k_short, v_short, k_long, v_long}, out, lse,
      {left, right, frame_offset, causal_long}, scale, workspace,
      {grad_q, grad_k_cur, grad_v_cur, grad_k_short, grad_v_short, grad_k_long, grad_v_long});
}

// Bytes of the uint8 tensor that cuda_backward works in; looks at sizes only.
int64_t cuda_workspace(Tensor q, Tensor k_cur, Tensor v_cur, OptionalTensor k_short,
                       OptionalTensor v_short, OptionalTensor k_long, OptionalTensor v_long,
                       int64_t left, int64_t right, int64_t frame_offset, bool causal_long) {
  return attend_workspace({q, k_cur, v_cur, k_short, v_short, k_long, v_long},
                          {left, right, frame_offset, causal_long});
}
#endif  // STA_WITH_CUDA

}  // namespace

int stat_kernels_cuda_kernel([[maybe_unused]] int index, [[maybe_unused]] StaCudaKernel* kernel,
                             [[maybe_unused]] const char** error) {
#ifdef STA_WITH_CUDA
  const int code = sta_cuda_kernel(index, kernel);
  if (code != 0) *error = sta_cuda_error_string(code);
  return code;
#else
  return STA_CUDA_NO_SUCH_KERNEL;
#endif
}

#define STA_INPUTS                                                           \
  "Tensor q, Tensor k_cur, Tensor v_cur, Tensor? k_short, Tensor? v_short, " \
  "Tensor? k_long, Tensor? v_long, "
#define STA_GRADIENTS                                                 \
  "Tensor(a!) grad_q, Tensor(b!) grad_k_cur, Tensor(c!) grad_v_cur, " \
  "Tensor(d!) grad_k_short, Tensor(e!) grad_v_short, "                \
  "Tensor(f!) grad_k_long, Tensor(g!) grad_v_long"

STABLE_TORCH_LIBRARY_FRAGMENT(stat_kernels, m) {
  m.def("cpu_forward(" STA_INPUTS
        "int left, int right, int frame_offset, bool causal_long, float scale, str isa, Tensor(a!) "
        "out, Tensor(b!) lse) -> ()");
  m.def("cpu_backward(Tensor grad_out, Tensor? grad_lse, " STA_INPUTS
        "int left, int right, int frame_offset, bool causal_long, float scale, str "
        "isa, " STA_GRADIENTS ") -> ()");
  m.def("cpu_isa(int rank) -> str");
  m.def("cpu_isa_of(str isa, Tensor like) -> str");
  m.def("cuda_architectures() -> str");
  m.def("cuda_workspace(" STA_INPUTS
        "int left, int right, int frame_offset, bool causal_long) -> int");
  m.def("cuda_forward(" STA_INPUTS
        "int left, int right, int frame_offset, bool causal_long, float scale, Tensor(a!) out, "
        "Tensor(b!) lse) -> ()");
  m.def("cuda_backward(Tensor grad_out, Tensor? grad_lse, " STA_INPUTS
        "Tensor out, Tensor lse, int left, int right, int frame_offset, bool causal_long, float "
        "scale, Tensor(h!) workspace, " STA_GRADIENTS ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stat_kernels, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
}

STABLE_TORCH_LIBRARY_IMPL(stat_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isa_of", TORCH_BOX(&cpu_isa_of));
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}

#ifdef STA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(stat_kernels, CUDA, m) {
  m.impl("cuda_workspace", TORCH_BOX(&cuda_workspace));
  m.impl("cuda_forward", TORCH_BOX(&cuda_forward));
  m.impl("cuda_backward", TORCH_BOX(&cuda_backward));
}
#endif
