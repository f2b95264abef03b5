// Launches. What the CUDA runtime must be asked or told is asked or told once for each device and
// kernel: every call of it costs time on the host, and a limit set again with each launch could be
// lowered by one host thread between another's setting and launch.
#ifndef STA_CUDA_RUNTIME_H_
#define STA_CUDA_RUNTIME_H_

#include <atomic>
#include <mutex>
#include <set>
#include <utility>

#include "cuda/device.h"

namespace sta {

constexpr int kMostDevices = 64;          // whose limits are remembered
constexpr int kAlwaysShared = 48 * 1024;  // bytes that a block gets without asking

// Shared memory that one block may ask for on the current device, bytes.
inline int shared_memory_limit(int* bytes) {
  static std::atomic<int> known[kMostDevices];  // 0: not asked yet
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const bool remembered = device < kMostDevices;
  if (remembered && (*bytes = known[device].load()) != 0) return 0;
  error = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess && remembered) known[device].store(*bytes);
  return error;
}

// Lets a kernel's blocks ask for all shared memory that the current device offers, and prefers it
// to L1, so that as many blocks are resident as fit. The kernels have no static shared memory.
template <typename Arguments>
int allow_all_shared_memory(void (*kernel)(Arguments)) {
  static std::mutex mutex;
  static std::set<std::pair<int, void (*)(Arguments)>> allowed;
  int device = 0, limit = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, kernel}) != 0) return 0;
  if (const int error = shared_memory_limit(&limit)) return error;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) allowed.insert({device, kernel});
  return error;
}

// Queues kernel(arguments) on `stream` with one-dimensional blocks.
template <typename Arguments>
int launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes, void* stream,
           const Arguments& arguments) {
  if (shared_bytes > kAlwaysShared)
    if (const int error = allow_all_shared_memory(kernel)) return error;
  Arguments copy = arguments;
  void* pointers[] = {&copy};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3{static_cast<unsigned>(blocks), 1, 1},
                                             dim3{static_cast<unsigned>(threads), 1, 1}, pointers,
                                             shared_bytes, static_cast<cudaStream_t>(stream));
  return error != cudaSuccess ? error : cudaGetLastError();
}

// What compiler and driver say of a kernel.
template <typename Arguments>
int describe(void (*kernel)(Arguments), int threads, int shared_bytes, int* registers,
             int* spilled_bytes, int* static_shared, int* blocks_resident) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  *registers = attributes.numRegs;
  *spilled_bytes = static_cast<int>(attributes.localSizeBytes);
  *static_shared = static_cast<int>(attributes.sharedSizeBytes);
  if (shared_bytes > kAlwaysShared)
    if (const int failed = allow_all_shared_memory(kernel)) return failed;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks_resident, kernel, threads,
                                                       shared_bytes);
}

}  // namespace sta

#endif  // STA_CUDA_RUNTIME_H_
