// The one C function that libstat_kernels.so exports: what reports are made of.
#ifndef STA_INTROSPECTION_H_
#define STA_INTROSPECTION_H_

#include "cuda/sta_cuda.h"

// As sta_cuda_kernel; STA_CUDA_NO_SUCH_KERNEL for every index in a library without CUDA kernels.
// `error` is set to a sentence where something else than 0 or that is returned.
extern "C" __attribute__((visibility("default"))) int stat_kernels_cuda_kernel(
    int index, StaCudaKernel* kernel, const char** error);

#endif  // STA_INTROSPECTION_H_
