// What one head dim offers. Each is compiled in a unit of its own, so that they build side by side.
#ifndef STA_CUDA_HEAD_DIM_H_
#define STA_CUDA_HEAD_DIM_H_

#include "cuda/sta_cuda.h"
#include "sta_params.h"

namespace sta {

template <int D>
struct HeadDim {
  static constexpr int kKernels = 5;  // for each of the two dtypes

  static int forward(const StaParams& params, void* stream);
  static int backward(const StaParams& params, void* workspace, void* stream);
  static int workspace_bytes(const StaParams& params, int64_t* bytes);
  static int describe_kernel(int index, StaCudaKernel* report);
};

}  // namespace sta

#endif  // STA_CUDA_HEAD_DIM_H_
