// What the fake runtime remembers of kernels, devices and calls.
#include <string.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda/device.h"
#include "grid.h"

namespace sta {
namespace emulator {

namespace {

constexpr int kWithoutAsking = 48 * 1024;  // shared memory of a block

struct RuntimeCalls {
  int64_t device_queries, attributes_set, launches;
  int64_t launches_without_carveout;  // of those that ask for more than kWithoutAsking
};

struct Machine {
  std::mutex mutex;
  std::vector<int> limits;  // of the devices
  int current = 0;
  std::map<std::pair<int, const void*>, std::map<cudaFuncAttribute, int>> attributes;
  RuntimeCalls calls{};
} machine;

}  // namespace

void use_device_with(int limit) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  std::vector<int>& limits = machine.limits;
  const auto found = std::find(limits.begin(), limits.end(), limit);
  machine.current = static_cast<int>(found - limits.begin());
  if (found == limits.end()) limits.push_back(limit);
}

int shared_limit() {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  return machine.limits.at(machine.current);
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  ++machine.calls.attributes_set;
  const int most = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize
                       ? machine.limits.at(machine.current)
                       : cudaSharedmemCarveoutMaxShared;
  if (value > most) return cudaErrorInvalidValue;
  machine.attributes[{machine.current, kernel}][attribute] = value;
  return cudaSuccess;
}

int check_launch(const void* kernel, int shared_bytes) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  ++machine.calls.launches;
  if (shared_bytes <= kWithoutAsking) return 0;
  std::map<cudaFuncAttribute, int>& set = machine.attributes[{machine.current, kernel}];
  if (set[cudaFuncAttributePreferredSharedMemoryCarveout] != cudaSharedmemCarveoutMaxShared)
    ++machine.calls.launches_without_carveout;
  const int allowed = set[cudaFuncAttributeMaxDynamicSharedMemorySize];
  return shared_bytes > std::max(kWithoutAsking, allowed) ? kInvalidValue : 0;
}

}  // namespace emulator
}  // namespace sta

cudaError_t cudaGetDevice(int* device) {
  const std::lock_guard<std::mutex> lock(sta::emulator::machine.mutex);
  *device = sta::emulator::machine.current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  const std::lock_guard<std::mutex> lock(sta::emulator::machine.mutex);
  ++sta::emulator::machine.calls.device_queries;
  *value = sta::emulator::machine.limits.at(device);
  return cudaSuccess;
}

// The sums since the last call.
extern "C" void emulator_take_runtime_calls(int64_t* calls) {
  const std::lock_guard<std::mutex> lock(sta::emulator::machine.mutex);
  memcpy(calls, &sta::emulator::machine.calls, sizeof(sta::emulator::machine.calls));
  sta::emulator::machine.calls = {};
}
