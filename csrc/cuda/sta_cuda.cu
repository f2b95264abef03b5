// The plain C interface: picks the head dim's kernels.
#include "cuda/device.h"
#include "cuda/head_dim.h"
#include "cuda/pool_cuda.h"

namespace {

using sta::HeadDim;

// Calls `use` with the HeadDim of these sizes.
template <typename Use>
int with_head_dim(const StaParams& p, Use use) {
  if (p.dtype != STA_F16 && p.dtype != STA_BF16) return STA_CUDA_UNSUPPORTED;
  switch (p.D) {
    case 64:
      return use(HeadDim<64>());
    case 96:
      return use(HeadDim<96>());
    case 128:
      return use(HeadDim<128>());
    default:
      return STA_CUDA_UNSUPPORTED;
  }
}

}  // namespace

extern "C" int sta_cuda_forward(const StaParams* params, void* stream) {
  return with_head_dim(*params, [&](auto d) { return d.forward(*params, stream); });
}

extern "C" int sta_cuda_backward(const StaParams* params, void* workspace, void* stream) {
  return with_head_dim(*params, [&](auto d) { return d.backward(*params, workspace, stream); });
}

extern "C" int sta_cuda_workspace_bytes(const StaParams* params, int64_t* bytes) {
  return with_head_dim(*params, [&](auto d) { return d.workspace_bytes(*params, bytes); });
}

extern "C" int sta_cuda_kernel(int index, StaCudaKernel* kernel) {
  constexpr int kEach = 2 * HeadDim<64>::kKernels;
  switch (index / kEach) {
    case 0:
      return HeadDim<64>::describe_kernel(index % kEach, kernel);
    case 1:
      return HeadDim<96>::describe_kernel(index % kEach, kernel);
    case 2:
      return HeadDim<128>::describe_kernel(index % kEach, kernel);
    default:
      return sta_cuda_pool_kernel(index - 3 * kEach, kernel);
  }
}
