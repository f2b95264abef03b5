// The pooling's launches and its plain C interface. What is chosen here depends on a call's sizes
// and on the shared memory that the device offers, never on how many multiprocessors it has, so
// results are the same bits on every device of a kind.
#include "cuda/pool_cuda.h"

#include <limits.h>

#include <algorithm>

#include "cuda/pool_backward_any.h"
#include "cuda/pool_forward.h"
#include "cuda/runtime.h"

namespace sta {
namespace {

constexpr int kEnoughBlocks = 1024;  // some for each multiprocessor, several times over

bool is_small(const PoolProblem& a) { return a.kt == 1 && a.kh == 3 && a.kw == 3; }

int parameter_bytes(const PoolProblem& a) { return (a.kt * a.kh * a.kw + 2) * a.D * 4; }

// Of a forward: the parameters and, for the mean, a row for each group of lanes.
int forward_bytes(const PoolProblem& a) {
  const int totals = a.long_mode == STA_LONG_MEAN ? kPoolThreads / a.width * a.D * 4 : 0;
  return parameter_bytes(a) + totals;
}

int64_t small_backward_bytes(const PoolProblem& a) {
  return parameter_bytes(a) + static_cast<int64_t>(a.out_h) * a.out_w * a.D * 4;
}

int64_t partial_floats(const PoolProblem& a) {
  return static_cast<int64_t>(a.P) * a.chunks * (a.kt * a.kh * a.kw + 2) * a.D;
}

bool is_taken(const StaPoolParams& p) {
  const auto odd_to = [](int64_t size, int64_t most) { return size % 2 == 1 && size <= most; };
  return (p.dtype == STA_F16 || p.dtype == STA_BF16) && p.D % kVector == 0 && p.D >= 16 &&
         p.D <= 256 && odd_to(p.kt, 3) && odd_to(p.kh, kMostAcross) && odd_to(p.kw, kMostAcross) &&
         p.stride >= 1 && p.stride <= 8 && p.P <= STA_POOL_MAX;
}

PoolTensor narrow_tensor(Narrow& narrow, const StaPoolTensor& x, int64_t tokens) {
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) narrow.error = STA_CUDA_UNALIGNED;
  narrow.number(tokens * x.stride_n);  // places in a frame are counted in 32 bits
  return {static_cast<uint4*>(x.data), narrow.vectors(x.stride_p), narrow.vectors(x.stride_b),
          narrow.vectors(x.stride_t),  narrow.vectors(x.stride_n), narrow.vectors(x.stride_h)};
}

// Fills `a` from a call; returns 0 or a code.
int plan(PoolProblem& a, const StaPoolParams& p) {
  if (!is_taken(p)) return STA_CUDA_UNSUPPORTED;
  Narrow narrow;
  const auto number = [&narrow](int64_t value) { return narrow.number(value); };
  a.P = number(p.P), a.B = number(p.B), a.T = number(p.T), a.H = number(p.H), a.D = number(p.D);
  a.vectors = a.D / kVector;
  for (a.width_log2 = 1; 1 << a.width_log2 < a.vectors;) ++a.width_log2;
  a.width = 1 << a.width_log2;
  a.grid_h = number(p.grid_h), a.grid_w = number(p.grid_w);
  a.out_h = number(p.out_h), a.out_w = number(p.out_w);
  a.short_h = number(p.short_h), a.short_w = number(p.short_w);
  a.kt = number(p.kt), a.kh = number(p.kh), a.kw = number(p.kw), a.stride = number(p.stride);
  a.class_token = p.class_token, a.long_mode = p.long_rows;
  // A cell as large as the grid holds all of it; without short tokens rows go one by one.
  a.cell = p.short_h > 0 ? number(std::min(p.short_stride, std::max(p.out_h, p.out_w))) : 1;
  a.cells_w = ceil_div(a.out_w, a.cell);
  a.cells = ceil_div(a.out_h, a.cell) * a.cells_w;
  // The largest number that any of them divides: a token's or a cell's, or a coordinate in a grid.
  const int64_t most = p.grid_h * p.grid_w + kPoolThreads;
  const auto divider = [&](int64_t d) {
    number(most * d);
    return Divider{static_cast<int>(d), static_cast<uint32_t>(((1u << 31) + d - 1) / d)};
  };
  a.by_grid_w = divider(a.grid_w), a.by_out_w = divider(a.out_w), a.by_cell = divider(a.cell);
  a.by_cells_w = divider(a.cells_w), a.by_stride = divider(a.stride);
  a.eps = static_cast<float>(p.eps);
  a.per_channel = 1.f / static_cast<float>(p.D);
  const int64_t rows = p.class_token + p.grid_h * p.grid_w;
  a.tokens = narrow_tensor(narrow, p.tokens, rows);
  a.grad_tokens = narrow_tensor(narrow, p.grad_tokens, rows);
  for (int i = 0; i < STA_POOL_MAX; ++i) {
    a.weight[i] = static_cast<const float*>(p.weight[i]);
    a.norm_weight[i] = static_cast<const float*>(p.norm_weight[i]);
    a.norm_bias[i] = static_cast<const float*>(p.norm_bias[i]);
  }
  a.pooled = static_cast<uint4*>(p.pooled);
  a.grad_pooled = static_cast<const uint4*>(p.grad_pooled);
  if ((reinterpret_cast<uintptr_t>(p.pooled) | reinterpret_cast<uintptr_t>(p.grad_pooled)) % 16)
    narrow.error = STA_CUDA_UNALIGNED;
  a.stats = static_cast<float*>(p.stats);
  a.grad_params = static_cast<float*>(p.grad_params);
  a.units = number(p.B * p.T * p.H);
  number(p.P * p.B * p.T * p.H);
  a.pitch = number(p.H * a.vectors);
  number((p.out_h * p.out_w + p.short_h * p.short_w + 1) * p.H * p.D);
  const int64_t normed = p.out_h * p.out_w + (p.long_rows == STA_LONG_CLASS);
  a.statistics = p.P * p.B * p.T * p.H * normed;
  a.per_block = std::max(1, ceil_div(static_cast<int64_t>(a.P) * a.units, kEnoughBlocks));
  a.chunks = ceil_div(a.units, a.per_block);
  return narrow.error;
}

bool is_empty(const PoolProblem& a) { return a.P == 0 || a.units == 0; }

template <typename T>
int forward(const PoolProblem& a, int limit, void* stream) {
  const int bytes = forward_bytes(a);
  if (bytes > limit) return STA_CUDA_SHARED_MEMORY;
  const auto kernel = is_small(a) ? pool_forward<T, true> : pool_forward<T, false>;
  return launch(kernel, static_cast<int64_t>(a.P) * a.chunks, kPoolThreads, bytes, stream, a);
}

template <typename T>
int backward(const PoolProblem& a, int limit, void* stream) {
  const int64_t blocks = static_cast<int64_t>(a.P) * a.chunks;
  const int bytes = parameter_bytes(a);
  const auto run = [&](auto kernel, int64_t count, int64_t shared) {
    return launch(kernel, count, kPoolThreads, static_cast<int>(shared), stream, a);
  };
  int error = 0;
  if (a.grad_rows == nullptr) {
    error = run(pool_backward_small<T>, blocks, small_backward_bytes(a));
  } else {
    if (bytes > limit) return STA_CUDA_SHARED_MEMORY;
    error = run(pool_backward_rows<T>, blocks, bytes);
    if (error == 0) error = run(pool_backward_tokens<T>, blocks, bytes);
    if (error == 0) error = run(pool_backward_weights<T>, blocks * a.kt * a.kh, a.kw * a.D * 4);
  }
  if (error != 0) return error;
  const int64_t columns = ceil_div(bytes / 4, kReduceColumns);
  constexpr int kThreads = kReduceColumns * kReduceSlices;
  return launch(pool_reduce, a.P * columns, kThreads, kThreads * 4, stream, a);
}

// Whether the one kernel for (1, 3, 3) serves: a unit's rows must fit in shared memory.
bool is_fused(const PoolProblem& a, int limit) {
  return is_small(a) && small_backward_bytes(a) <= limit;
}

template <typename Use>
int with_limit(const StaPoolParams& params, Use use) {
  PoolProblem a = {};
  if (const int error = plan(a, params)) return error;
  int limit = 0;
  if (const int error = shared_memory_limit(&limit)) return error;
  return use(a, limit);
}

// The sizes of keys and values of STAT's first stage at 64 frames, for reports.
StaPoolParams first_stage() {
  StaPoolParams p = {};
  p.P = 2, p.B = 8, p.T = 32, p.H = 2, p.D = 96, p.grid_h = p.grid_w = 28;
  p.out_h = p.out_w = 7, p.short_h = p.short_w = 4, p.stride = 4, p.short_stride = 2;
  p.kt = 1, p.kh = p.kw = 3, p.class_token = 1, p.long_rows = STA_LONG_CLASS, p.dtype = STA_BF16;
  return p;
}

template <typename T>
int describe_of(int index, StaCudaKernel* report) {
  PoolProblem a = {};
  if (const int error = plan(a, first_stage())) return error;
  const auto tell = [report](const char* name, auto kernel, int threads, int64_t shared) {
    report->name = name;
    report->threads = threads;
    report->dynamic_shared = static_cast<int>(shared);
    return describe(kernel, threads, report->dynamic_shared, &report->registers,
                    &report->spilled_bytes, &report->static_shared, &report->blocks_resident);
  };
  constexpr int kReduceThreads = kReduceColumns * kReduceSlices;
  const int bytes = parameter_bytes(a);
  switch (index) {
    case 0:
      return tell("pool_forward, (1, 3, 3)", pool_forward<T, true>, kPoolThreads, bytes);
    case 1:
      return tell("pool_forward, any kernel", pool_forward<T, false>, kPoolThreads, bytes);
    case 2:
      return tell("pool_backward_small", pool_backward_small<T>, kPoolThreads,
                  small_backward_bytes(a));
    case 3:
      return tell("pool_backward_rows", pool_backward_rows<T>, kPoolThreads, bytes);
    case 4:
      return tell("pool_backward_tokens", pool_backward_tokens<T>, kPoolThreads, bytes);
    case 5:
      return tell("pool_backward_weights", pool_backward_weights<T>, kPoolThreads, a.kw * a.D * 4);
    default:
      return tell("pool_reduce", pool_reduce, kReduceThreads, kReduceThreads * 4);
  }
}

constexpr int kKernels = 7;  // for each of the two dtypes; the last has none

}  // namespace
}  // namespace sta

using sta::PoolProblem;

extern "C" int sta_cuda_pool_forward(const StaPoolParams* params, void* stream) {
  return sta::with_limit(*params, [&](PoolProblem& a, int limit) {
    if (sta::is_empty(a)) return 0;
    if (params->dtype == STA_BF16) return sta::forward<sta::BFloat16>(a, limit, stream);
    return sta::forward<sta::Half>(a, limit, stream);
  });
}

extern "C" int sta_cuda_pool_backward(const StaPoolParams* params, void* workspace, void* stream) {
  return sta::with_limit(*params, [&](PoolProblem& a, int limit) {
    if (sta::is_empty(a)) return 0;
    a.partials = static_cast<float*>(workspace);
    if (!sta::is_fused(a, limit)) a.grad_rows = a.partials + sta::partial_floats(a);
    if (params->dtype == STA_BF16) return sta::backward<sta::BFloat16>(a, limit, stream);
    return sta::backward<sta::Half>(a, limit, stream);
  });
}

extern "C" int sta_cuda_pool_workspace_bytes(const StaPoolParams* params, int64_t* bytes) {
  return sta::with_limit(*params, [&](PoolProblem& a, int limit) {
    const int64_t rows = static_cast<int64_t>(a.P) * a.units * a.out_h * a.out_w * a.D;
    *bytes = (sta::partial_floats(a) + (sta::is_fused(a, limit) ? 0 : rows)) * 4;
    return 0;
  });
}

extern "C" int sta_cuda_pool_kernel(int index, StaCudaKernel* kernel) {
  if (index >= 2 * sta::kKernels) return STA_CUDA_NO_SUCH_KERNEL;
  kernel->head_dim = 96;
  kernel->dtype = index < sta::kKernels ? STA_BF16 : STA_F16;
  if (index < sta::kKernels) return sta::describe_of<sta::BFloat16>(index, kernel);
  return sta::describe_of<sta::Half>(index - sta::kKernels, kernel);
}
