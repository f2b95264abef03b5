// Launches, and what a test may set and read: the C functions at the end.
#include "grid.h"

#include <algorithm>
#include <memory>
#include <random>
#include <thread>

#include "worker.h"

namespace sta {
namespace emulator {

namespace {
Options options;
std::string last_sentence;
Counters totals{};
}  // namespace

const char* error_string(int code) {
  switch (code) {
    case 0:
      return "no error";
    case kInvalidValue:
      return "invalid argument";
    case kInvalidConfig:
      return "invalid configuration argument";
    case kFault:
      return last_sentence.c_str();
  }
  return "unknown error";
}

int run_grid(void (*body)(const void*), const void* data, int64_t blocks, int threads,
             int shared_bytes) {
  if (shared_bytes < 0 || shared_bytes > shared_limit()) return kInvalidValue;
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMaxThreads)
    return kInvalidConfig;
  if (threads % kLanes != 0) {
    last_sentence = "a block has " + std::to_string(threads) + " threads, must be whole warps";
    return kFault;
  }
  static std::vector<std::unique_ptr<Worker>> workers;
  while (static_cast<int>(workers.size()) < options.workers)
    workers.push_back(std::make_unique<Worker>());
  Grid grid;
  grid.body = body;
  grid.data = data;
  grid.blocks = blocks;
  grid.threads = threads;
  grid.shared_bytes = shared_bytes;
  grid.options = options;
  for (int64_t i = 0; i < blocks; ++i) grid.order.push_back(i);
  std::shuffle(grid.order.begin(), grid.order.end(), std::mt19937_64(options.seed));
  std::vector<std::thread> others;
  const int count = static_cast<int>(std::min<int64_t>(options.workers, blocks));
  for (int i = 1; i < count; ++i) others.emplace_back([&grid, i] { workers[i]->run(grid); });
  workers[0]->run(grid);
  for (std::thread& other : others) other.join();
  add(totals, grid.counters);
  last_sentence = grid.sentence;
  return grid.failed ? kFault : 0;
}

}  // namespace emulator
}  // namespace sta

extern "C" {

void emulator_configure(uint64_t seed, int shared_limit, int watch_races, int workers) {
  sta::emulator::options = {seed, watch_races != 0, workers};
  sta::emulator::use_device_with(shared_limit);
}

// The sums over all launches since the last call.
void emulator_take_counters(int64_t* counters) {
  memcpy(counters, &sta::emulator::totals, sizeof(sta::emulator::totals));
  sta::emulator::totals = {};
}

const char* emulator_sentence() { return sta::emulator::last_sentence.c_str(); }

}  // extern "C"
