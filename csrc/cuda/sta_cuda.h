// The CUDA kernels' plain C interface. No torch type and no CUDA type crosses it.
#ifndef STA_CUDA_H_
#define STA_CUDA_H_

#include <stdint.h>

#include "sta_params.h"

#ifdef __cplusplus
extern "C" {
#endif

// Both take device pointers and return 0, a cudaError_t, or a negative code of our own. float16 and
// bfloat16, D of 64, 96 or 128. Pointers and strides of every tensor must be whole multiples of 16
// bytes. Work is queued on `stream` (a cudaStream_t) of the current device; nothing synchronises.
int sta_cuda_forward(const struct StaParams* params, void* stream);

// `workspace`: sta_cuda_workspace_bytes(params) bytes of device memory, aligned to 16; not read
// before it is written.
int sta_cuda_backward(const struct StaParams* params, void* workspace, void* stream);

// What a backward of these shapes needs on the current device. Looks at sizes only. Returns as the
// two above.
int sta_cuda_workspace_bytes(const struct StaParams* params, int64_t* bytes);

const char* sta_cuda_error_string(int code);

// What the compiler and the driver say of one kernel on the current device.
struct StaCudaKernel {
  const char* name;
  int32_t head_dim;
  int32_t dtype;            // StaDtype
  int32_t registers;        // a thread
  int32_t spilled_bytes;    // of local memory, a thread
  int32_t static_shared;    // bytes a block
  int32_t dynamic_shared;   // bytes a block, at STAT's 64-frame shapes
  int32_t threads;          // a block, at the same shapes
  int32_t blocks_resident;  // on one multiprocessor at the same time
};

// Fills `kernel` with the index-th instantiation. Returns 0, STA_CUDA_NO_SUCH_KERNEL after the last
// one, or a cudaError_t where there is no device.
int sta_cuda_kernel(int index, struct StaCudaKernel* kernel);

enum StaCudaError {
  STA_CUDA_NO_SUCH_KERNEL = -1,
  STA_CUDA_UNSUPPORTED = -2,    // dtype, head dim, kernel or stride of a pooling
  STA_CUDA_SHARED_MEMORY = -3,  // the device's blocks have too little of it
  STA_CUDA_TOO_LARGE = -4,      // sizes or strides beyond 32 bits, or more blocks than a grid has
  STA_CUDA_UNALIGNED = -5,      // a pointer or stride is no whole multiple of 16 bytes
};

#ifdef __cplusplus
}
#endif

#endif  // STA_CUDA_H_
