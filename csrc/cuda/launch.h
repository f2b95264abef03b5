// From a call's sizes to launches. What is chosen here depends on the sizes and on the shared
// memory that the device offers, never on how many multiprocessors it has, so results are the same
// bits on every device of a kind.
#ifndef STA_CUDA_LAUNCH_H_
#define STA_CUDA_LAUNCH_H_

#include <limits.h>

#include <algorithm>

#include "cuda/backward.h"
#include "cuda/forward.h"
#include "cuda/head_dim.h"
#include "cuda/runtime.h"

namespace sta {

inline int most_keys(const Problem& p) {
  return p.Nc + std::min(p.behind + p.ahead, p.S - 1) * p.Ns + p.L;
}

inline bool is_empty(const Problem& p) { return p.B == 0 || p.T == 0 || p.H == 0; }

inline bool fits_a_grid(int64_t blocks) { return blocks <= INT_MAX; }

// ---- forward
// -------------------------------------------------------------------------------------

// Bands of 32 queries read each key from shared memory half as often as bands of 16, but waste more
// of a short frame, and at D = 128 their registers do not suffice.
template <int D>
constexpr int kMostStrips = D > 96 ? 1 : 2;

struct ForwardPlan {
  ForwardArguments arguments;
  bool resident;
  int strips, warps, shared_bytes;
  int64_t blocks;
};

// Bytes of shared memory: `rows` keys and values, and a band of queries for each warp.
template <int D>
int64_t forward_bytes(int64_t rows, int warps, int strips) {
  return (2 * rows + warps * strips * kStrip) * kPitch<D> * 2;
}

// Prefers all keys resident, by two blocks of four warps on a multiprocessor, so that the one
// computes while the other loads; then by one of eight; else keys stream.
template <int D>
int plan_forward(ForwardPlan& plan, const Problem& p, int shared_limit) {
  constexpr int kReserved = 1024;      // of every block, by the driver
  constexpr int kEnoughBlocks = 1024;  // some for each multiprocessor, several times over
  plan.arguments.p = p;
  plan.strips = p.Nq > 64 ? kMostStrips<D> : 1;
  const int bands = ceil_div(p.Nq, plan.strips * kStrip);
  const int64_t heads = static_cast<int64_t>(p.B) * p.T * p.H;
  const int rows = ceil_div(most_keys(p), kStrip) * kStrip;
  const auto bytes = [&](int warps) { return forward_bytes<D>(rows, warps, plan.strips); };

  plan.resident = bytes(4) <= shared_limit;
  if (plan.resident) {
    const bool two = 2 * (bytes(4) + kReserved) <= shared_limit + kReserved;
    plan.warps = two || bytes(kForwardWarps) > shared_limit ? 4 : kForwardWarps;
    plan.warps = std::min(plan.warps, bands);
    plan.arguments.rows = rows;
    const int64_t wanted = std::max<int64_t>(1, kEnoughBlocks / heads);
    const int splits = static_cast<int>(std::min<int64_t>(wanted, ceil_div(bands, plan.warps)));
    plan.arguments.bands = ceil_div(bands, splits);
    plan.arguments.splits = ceil_div(bands, plan.arguments.bands);
    plan.shared_bytes = static_cast<int>(bytes(plan.warps));
  } else {
    plan.strips = kMostStrips<D>;
    plan.warps = 4;
    plan.arguments.rows = kStep<D, kMostStrips<D>>;
    plan.arguments.bands = plan.warps;
    plan.arguments.splits = ceil_div(p.Nq, plan.warps * plan.strips * kStrip);
    plan.shared_bytes =
        static_cast<int>(forward_bytes<D>(2 * plan.arguments.rows, plan.warps, plan.strips));
    if (plan.shared_bytes > shared_limit) return STA_CUDA_SHARED_MEMORY;
  }
  plan.blocks = heads * plan.arguments.splits;
  return fits_a_grid(plan.blocks) ? 0 : STA_CUDA_TOO_LARGE;
}

template <typename T, int D>
int launch_forward(const ForwardPlan& plan, void* stream) {
  const auto kernel = !plan.resident     ? forward_streamed<T, D, kMostStrips<D>>
                      : plan.strips == 1 ? forward_resident<T, D, 1>
                                         : forward_resident<T, D, kMostStrips<D>>;
  return launch(kernel, plan.blocks, plan.warps * 32, plan.shared_bytes, stream, plan.arguments);
}

template <int D>
int HeadDim<D>::forward(const StaParams& params, void* stream) {
  Narrow narrow;
  const Problem p = narrow.problem(params);
  if (narrow.error) return narrow.error;
  if (is_empty(p) || p.Nq == 0) return 0;
  int limit = 0;
  if (const int error = shared_memory_limit(&limit)) return error;
  ForwardPlan plan;
  if (const int error = plan_forward<D>(plan, p, limit)) return error;
  if (params.dtype == STA_BF16) return launch_forward<BFloat16, D>(plan, stream);
  return launch_forward<Half, D>(plan, stream);
}

// ---- backward
// ------------------------------------------------------------------------------------

struct BackwardPlan {
  BackwardArguments arguments;
  int warps, shared_bytes;
  int64_t blocks, reduce_blocks;
  int64_t shared_sums;  // floats of the rows for shared keys' grad_k, and again of grad_v
  int64_t query_sums;   // floats of grad_q, where a frame's keys need more than one pass
};

constexpr int kReduceThreads = 256;

// Whether strips can be aligned (see backward_steps.h): in one pass, with no more warps than dense
// strips need, and where every frame reads all long keys. Fills in how they are divided.
inline bool align_strips(BackwardArguments& a, int most_warps) {
  const Problem& p = a.p;
  a.behind = p.Ns > 0 ? p.behind + p.frame_offset : 0;
  a.ahead = p.Ns > 0 ? p.ahead - p.frame_offset : 0;
  a.current_strips = ceil_div(p.Nc, kStrip);
  a.short_strips = ceil_div(p.Ns, kStrip);
  const int64_t neighbours = static_cast<int64_t>(a.behind) + a.ahead;
  const int64_t shorts = neighbours * a.short_strips, longs = ceil_div(p.L, kStrip);
  const int64_t pairs = ceil_div(a.current_strips + shorts + longs, kPairStrips);
  if (p.long_lead < p.L || 2 * pairs > most_warps) return false;
  if (pairs > ceil_div(most_keys(p), kPairKeys)) return false;
  a.first_long_strip = a.current_strips + static_cast<int>(shorts);
  return true;
}

// Rows of shared memory for the next frame's keys besides those of the current one.
inline int spare_rows(const BackwardArguments& a) {
  const int rings = (a.behind > 0) + (a.ahead > 0);
  return (a.current_strips + rings * a.short_strips) * kStrip;
}

template <int D>
int plan_backward(BackwardPlan& plan, const Problem& p, int shared_limit) {
  constexpr int kEnoughBlocks = 256;
  BackwardArguments& a = plan.arguments;
  a.p = p;

  const auto bytes = [](int warps, int key_rows) {
    return BackwardMemory<Half, D>::bytes(warps, key_rows);
  };
  int most_warps = kBackwardWarps<D>;
  while (most_warps > 0 && bytes(most_warps, most_warps * kStrip) > shared_limit) most_warps -= 2;
  if (most_warps == 0) return STA_CUDA_SHARED_MEMORY;
  const int pairs = ceil_div(most_keys(p), kPairKeys);
  const int passes = ceil_div(pairs, most_warps / 2);
  plan.warps = 2 * ceil_div(pairs, passes);
  a.aligned = align_strips(a, most_warps);
  if (a.aligned)
    plan.warps = ceil_div(a.first_long_strip + ceil_div(p.L, kStrip), kPairStrips) * kPairStrips;
  a.key_rows = plan.warps * kStrip;
  a.spare = a.aligned && bytes(plan.warps, a.key_rows + spare_rows(a)) <= shared_limit;
  if (a.spare) a.key_rows += spare_rows(a);
  plan.shared_bytes = bytes(plan.warps, a.key_rows);

  // Two frames at least, so that short keys are never stored once for each frame that sees them.
  const int64_t heads = static_cast<int64_t>(p.B) * p.H;
  a.frames = 8;
  while (a.frames > 2 && heads * ceil_div(p.T, a.frames) < kEnoughBlocks) a.frames /= 2;
  a.chunks = ceil_div(p.T, a.frames);
  a.shared_rows = (a.frames + p.behind + p.ahead) * p.Ns + p.L;
  plan.shared_sums = heads * a.chunks * a.shared_rows * D;
  plan.query_sums = passes > 1 && !a.aligned ? heads * p.T * p.Nq * D : 0;

  plan.blocks = heads * a.chunks;
  const int64_t reduced = heads * (static_cast<int64_t>(p.S) * p.Ns + p.L) * (D / 4);
  plan.reduce_blocks = (reduced + kReduceThreads - 1) / kReduceThreads;
  return fits_a_grid(plan.blocks) && fits_a_grid(plan.reduce_blocks) ? 0 : STA_CUDA_TOO_LARGE;
}

template <typename T, int D>
int launch_backward(const BackwardPlan& plan, void* stream) {
  const int error = launch(backward<T, D>, plan.blocks, plan.warps * 32, plan.shared_bytes, stream,
                           plan.arguments);
  if (error != 0 || plan.reduce_blocks == 0) return error;
  return launch(reduce_shared_keys<T, D>, plan.reduce_blocks, kReduceThreads, 0, stream,
                plan.arguments);
}

template <int D>
int plan_backward(BackwardPlan& plan, const StaParams& params) {
  Narrow narrow;
  const Problem p = narrow.problem(params);
  plan.arguments.grads = narrow.gradients(params);
  if (narrow.error) return narrow.error;
  int limit = 0;
  if (const int error = shared_memory_limit(&limit)) return error;
  return plan_backward<D>(plan, p, limit);
}

template <int D>
int HeadDim<D>::backward(const StaParams& params, void* workspace, void* stream) {
  BackwardPlan plan;
  if (const int error = plan_backward<D>(plan, params)) return error;
  if (is_empty(plan.arguments.p)) return 0;
  plan.arguments.grad_k = static_cast<float*>(workspace);
  plan.arguments.grad_v = plan.arguments.grad_k + plan.shared_sums;
  plan.arguments.grad_q = plan.arguments.grad_v + plan.shared_sums;
  if (params.dtype == STA_BF16) return launch_backward<BFloat16, D>(plan, stream);
  return launch_backward<Half, D>(plan, stream);
}

template <int D>
int HeadDim<D>::workspace_bytes(const StaParams& params, int64_t* bytes) {
  BackwardPlan plan;
  const int error = plan_backward<D>(plan, params);
  *bytes = (2 * plan.shared_sums + plan.query_sums) * static_cast<int64_t>(sizeof(float));
  return error;
}

// ---- what was built
// ------------------------------------------------------------------------------

// The sizes of one of STAT's stages at 64 frames, for reports: queries and heads differ.
inline Problem stage(int queries, int heads) {
  Problem p = {};
  p.B = 8, p.T = 32, p.Nq = queries, p.H = heads, p.Nc = 49, p.Ns = 16, p.L = 32;
  p.S = 32, p.behind = 3, p.ahead = 3, p.long_lead = 32;
  return p;
}

template <typename Arguments>
int describe(StaCudaKernel* report, const char* name, void (*kernel)(Arguments), int warps,
             int shared_bytes) {
  report->name = name;
  report->dynamic_shared = shared_bytes;
  report->threads = warps * 32;
  return describe(kernel, report->threads, shared_bytes, &report->registers, &report->spilled_bytes,
                  &report->static_shared, &report->blocks_resident);
}

template <typename T, int D>
int describe_of(int index, StaCudaKernel* report, int limit) {
  ForwardPlan many, few;
  BackwardPlan back;
  int error = plan_forward<D>(many, stage(785, 2), limit);
  if (error == 0) error = plan_forward<D>(few, stage(50, 8), limit);
  if (error == 0) error = plan_backward<D>(back, stage(785, 2), limit);
  if (error != 0) return error;
  constexpr int kStrips = kMostStrips<D>;
  const int streamed_bytes = static_cast<int>(forward_bytes<D>(2 * kStep<D, kStrips>, 4, kStrips));
  switch (index) {
    case 0:
      return describe(report, "forward_resident, many queries", forward_resident<T, D, kStrips>,
                      many.warps, many.shared_bytes);
    case 1:
      return describe(report, "forward_resident, few queries", forward_resident<T, D, 1>, few.warps,
                      few.shared_bytes);
    case 2:
      return describe(report, "forward_streamed", forward_streamed<T, D, kStrips>, 4,
                      streamed_bytes);
    case 3:
      return describe(report, "backward", backward<T, D>, back.warps, back.shared_bytes);
    case 4:
      return describe(report, "reduce_shared_keys", reduce_shared_keys<T, D>, kReduceThreads / 32,
                      0);
    default:
      return STA_CUDA_NO_SUCH_KERNEL;
  }
}

template <int D>
int HeadDim<D>::describe_kernel(int index, StaCudaKernel* report) {
  int limit = 0;
  if (const int error = shared_memory_limit(&limit)) return error;
  report->head_dim = D;
  report->dtype = index < kKernels ? STA_BF16 : STA_F16;
  if (index < kKernels) return describe_of<BFloat16, D>(index, report, limit);
  return describe_of<Half, D>(index - kKernels, report, limit);
}

}  // namespace sta

#endif  // STA_CUDA_LAUNCH_H_
