// As much of the CUDA runtime as csrc/cuda/runtime.h uses, over the emulator. Every call is
// counted. A machine has a device for each limit of shared memory that a test configures, and a
// launch is refused as CUDA refuses it: when it asks for more than its kernel was allowed on the
// current device.
#ifndef STA_TESTS_FAKE_RUNTIME_H_
#define STA_TESTS_FAKE_RUNTIME_H_

#include <stddef.h>
#include <stdint.h>

#include <algorithm>

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;

struct cudaFuncAttributes {
  size_t sharedSizeBytes, localSizeBytes;
  int numRegs;
};

namespace sta {
namespace emulator {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
// 0, or the code of a launch that may not be.
int check_launch(const void* kernel, int shared_bytes);
// Runs `blocks` blocks of `threads` calls of body(data). Returns 0 or a code of `error_string`.
int run_grid(void (*body)(const void*), const void* data, int64_t blocks, int threads,
             int shared_bytes);
const char* error_string(int code);
int shared_limit();

}  // namespace emulator
}  // namespace sta

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t code) {
  return sta::emulator::error_string(code);
}

template <typename Arguments>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Arguments), cudaFuncAttribute attribute,
                                 int value) {
  return sta::emulator::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 blocks, dim3 threads, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments& arguments;
  };
  const int bytes = static_cast<int>(shared_bytes);
  int code = sta::emulator::check_launch(reinterpret_cast<const void*>(kernel), bytes);
  if (code == 0) {
    const Call call{kernel, *static_cast<const Arguments*>(arguments[0])};
    const auto body = [](const void* data) {
      const Call& call = *static_cast<const Call*>(data);
      call.kernel(call.arguments);
    };
    code = sta::emulator::run_grid(body, &call, blocks.x, threads.x, bytes);
  }
  return static_cast<cudaError_t>(code);
}

// There are no registers here; what is known of occupancy is what shared memory leaves.
template <typename Arguments>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Arguments)) {
  *attributes = {};
  return cudaSuccess;
}
template <typename Arguments>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Arguments), int,
                                                          size_t shared_bytes) {
  *blocks = sta::emulator::shared_limit() / std::max<int>(static_cast<int>(shared_bytes), 1);
  return cudaSuccess;
}

#endif  // STA_TESTS_FAKE_RUNTIME_H_
