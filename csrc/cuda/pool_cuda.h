// The CUDA pooling kernels' plain C interface; codes and sentences are those of sta_cuda.h.
#ifndef STA_POOL_CUDA_H_
#define STA_POOL_CUDA_H_

#include <stdint.h>

#include "cuda/sta_cuda.h"
#include "pool_params.h"

#ifdef __cplusplus
extern "C" {
#endif

// Both take device pointers and return 0, a cudaError_t, or a code of sta_cuda.h. float16 and
// bfloat16, D a multiple of 8 from 16 to 256, kernels up to (3, 7, 7), strides up to 8. Pointers
// and strides of tensors must be whole multiples of 16 bytes; parameters may lie anywhere. Work is
// queued on `stream` (a cudaStream_t) of the current device; nothing synchronises.
int sta_cuda_pool_forward(const struct StaPoolParams* params, void* stream);

// `workspace`: sta_cuda_pool_workspace_bytes(params) bytes of device memory, aligned to 16; not
// read before it is written. Without tokens (P, B, T or H of 0) nothing is written.
int sta_cuda_pool_backward(const struct StaPoolParams* params, void* workspace, void* stream);

// What a backward of these shapes needs on the current device. Looks at sizes only.
int sta_cuda_pool_workspace_bytes(const struct StaPoolParams* params, int64_t* bytes);

// As sta_cuda_kernel, of these kernels.
int sta_cuda_pool_kernel(int index, struct StaCudaKernel* kernel);

#ifdef __cplusplus
}
#endif

#endif  // STA_POOL_CUDA_H_
