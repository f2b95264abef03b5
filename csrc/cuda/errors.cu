// What the codes of every CUDA kernel's interface mean.
#include "cuda/device.h"
#include "cuda/sta_cuda.h"

extern "C" const char* sta_cuda_error_string(int code) {
  switch (code) {
    case STA_CUDA_NO_SUCH_KERNEL:
      return "there is no kernel of that number";
    case STA_CUDA_UNSUPPORTED:
      return "no kernel takes this dtype, head dim, pooling kernel or stride";
    case STA_CUDA_SHARED_MEMORY:
      return "this device offers a block too little shared memory";
    case STA_CUDA_TOO_LARGE:
      return "a size or stride does not fit in 32 bits, or a grid would have too many blocks";
    case STA_CUDA_UNALIGNED:
      return "a pointer or stride is no whole multiple of 16 bytes";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}
