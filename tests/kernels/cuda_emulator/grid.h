// A grid of blocks to run, and the rules that it runs by.
#ifndef STA_TESTS_GRID_H_
#define STA_TESTS_GRID_H_

#include <stdint.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "warp.h"

namespace sta {
namespace emulator {

constexpr int kMaxThreads = 1024;  // a block
constexpr int kBarriers = 16;      // a block
constexpr int kFault = -100;       // the code of a launch that ended with a sentence
constexpr int kInvalidValue = 1;   // cudaErrorInvalidValue
constexpr int kInvalidConfig = 9;  // cudaErrorInvalidConfiguration

struct Options {
  uint64_t seed = 0;
  bool watch_races = true;  // off: a race shows only in the values
  int workers = 1;          // OS threads that run blocks
};

// Makes the device with this limit of a block's shared memory, in bytes, the current one.
void use_device_with(int limit);

struct Grid {
  void (*body)(const void*);
  const void* data;
  int64_t blocks;
  int threads, shared_bytes;
  Options options;
  std::vector<int64_t> order;  // of the blocks
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;  // guards what follows
  std::string sentence;
  Counters counters{};
};

}  // namespace emulator
}  // namespace sta

#endif  // STA_TESTS_GRID_H_
