// Runs blocks on one OS thread, their warps and lanes in an order that the seed decides.
//
// A warp runs until all its lanes wait; then another one is chosen by chance. In some blocks it may
// also lose its turn after any joint operation. Lanes take turns in a fixed rotation whose start
// moves on at every joint operation. So an order that no barrier enforces is not kept for long.
//
// A copy into shared memory lands between its issue and the wait of its own thread that covers it,
// and its source is read then: in a third of the blocks at once, in a third at that wait, in a
// third at a moment in between.
//
// A thread that arrives at a barrier of some warps, without waiting, may go on at once or much
// later.
//
// What cannot be on a device ends the grid with a sentence: lanes that wait for one another in
// different operations, a barrier that some threads have left behind, an address that is not the
// block's or not aligned, a matrix row read where a copy may still land.
#ifndef STA_TESTS_WORKER_H_
#define STA_TESTS_WORKER_H_

#include <stdint.h>

#include <string>
#include <vector>

#include "fiber.h"
#include "grid.h"
#include "stacks.h"

namespace sta {
namespace emulator {

// splitmix64 (Steele, Lea, Flood 2014): small, and good enough to shuffle with.
class Chance {
 public:
  explicit Chance(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(next() % n); }

 private:
  uint64_t state_;
};

struct Copy {
  void* shared;
  const void* global;
  bool present, landed;
  int group;
};

struct Thread {
  Fiber fiber;
  std::vector<Copy> copies;  // not yet waited for, oldest first
  int committed_groups = 0;
};

struct Warp {
  // Of lanes, one bit each. A lane that has not exited is ready, arrived or at a barrier: that of
  // the whole block or, waiting, number `barrier`.
  uint32_t ready = 0, arrived = 0, at_barrier = 0, waiting = 0, exited = 0;
  int barrier = 0;
  Operation operation = Operation::kSyncWarp;
  LaneOperands operands[kLanes];
};

class Worker {
 public:
  Worker() : memory_(1 << 20), threads_(kMaxThreads), warps_(kMaxThreads / kLanes) {}

  void run(Grid& grid);

  // What a thread of the block calls.
  void collective(Operation operation, const LaneOperands& operands);
  void barrier();
  void named_barrier(int number, int threads, bool waits);
  void issue(const Copy& copy);
  void commit();
  void wait(int pending);
  char* shared() const { return memory_.data(); }
  [[noreturn]] void thread_main();

 private:
  enum class Landing { kAtOnce, kAtTheWait, kInBetween };

  void run_block(int64_t block);
  void start_threads();
  bool run_some_warp();
  void open_barrier();
  void enter(int thread);
  void leave();
  void to_scheduler() { switch_fiber(threads_[current_].fiber, scheduler_); }
  void require(const std::string& sentence) {
    if (!sentence.empty()) fail(sentence);
  }
  void fail(const std::string& sentence);
  void report(const std::string& sentence);
  void land(Copy& copy);
  void land_some();
  std::string stuck_sentence() const;

  Warp& warp() { return warps_[current_ / kLanes]; }
  uint32_t lane_bit() const { return 1u << current_ % kLanes; }

  SharedMemory memory_;
  Stacks stacks_{kMaxThreads};
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  int arrivals_[kBarriers] = {};  // of threads at each barrier but 0
  Fiber scheduler_;
  Grid* grid_ = nullptr;
  Chance chance_{0};
  Landing landing_ = Landing::kAtOnce;
  bool preempts_ = false;
  int rotation_ = 1;  // from one lane to the next; odd
  int current_ = 0;   // thread
  int64_t interval_ = 0;
  Counters counters_{};
};

// The one that runs the calling fiber.
extern __thread Worker* worker;

}  // namespace emulator
}  // namespace sta

#endif  // STA_TESTS_WORKER_H_
