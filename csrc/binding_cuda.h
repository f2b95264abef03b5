// What the bindings of CUDA kernels share: torch's stream and device, errors.
#ifndef STA_BINDING_CUDA_H_
#define STA_BINDING_CUDA_H_

#ifdef STA_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "binding.h"
#include "cuda/sta_cuda.h"

// Torch's CUDA library defines it. Weak, so that this library loads in a torch that has none.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

inline void check_cuda(int code) {
  STD_TORCH_CHECK(code == 0, "stat_kernels: the CUDA kernel failed: ", sta_cuda_error_string(code));
}

// The stream that torch queues its own kernels on, of the device that a tensor lies on.
inline void* current_stream(const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "stat_kernels: this PyTorch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}
#endif  // STA_WITH_CUDA

#endif  // STA_BINDING_CUDA_H_
