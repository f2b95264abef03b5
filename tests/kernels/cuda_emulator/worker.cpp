#include "worker.h"

#include <string.h>

#include <algorithm>

__thread dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace sta {
namespace emulator {

__thread Worker* worker;

static void thread_entry() { worker->thread_main(); }

void Worker::run(Grid& grid) {
  worker = this;
  grid_ = &grid;
  counters_ = Counters{};
  gridDim = {static_cast<unsigned>(grid.blocks), 1, 1};
  blockDim = {static_cast<unsigned>(grid.threads), 1, 1};
  for (int64_t i; !grid.failed && (i = grid.next++) < grid.blocks;) run_block(grid.order[i]);
  const std::lock_guard<std::mutex> lock(grid.mutex);
  add(grid.counters, counters_);
}

void Worker::run_block(int64_t block) {
  constexpr Landing kLandings[] = {Landing::kAtOnce, Landing::kAtTheWait, Landing::kInBetween};
  const uint64_t seed = grid_->options.seed;
  chance_ = Chance(seed * 0x100000001b3 + block);
  landing_ = kLandings[(seed + block) % 3];
  preempts_ = landing_ == Landing::kInBetween;
  rotation_ = 2 * chance_.below(kLanes / 2) + 1;
  interval_ = 0;
  blockIdx = {static_cast<unsigned>(block), 0, 0};
  memory_.begin_block(grid_->shared_bytes, grid_->options.watch_races);
  start_threads();
  while (!grid_->failed) {
    if (run_some_warp()) continue;
    const std::string sentence = stuck_sentence();
    if (!sentence.empty()) return report(sentence);
    if (warps_[0].exited != 0) break;
    open_barrier();
  }
  if (grid_->failed) return;
  for (int i = 1; i < kBarriers; ++i)
    if (arrivals_[i] != 0)
      return report("barrier " + std::to_string(i) + " is left with " +
                    std::to_string(arrivals_[i]) + " threads that nobody waited for");
  ++counters_.blocks;
  const std::string tail = memory_.check_tail();
  if (!tail.empty()) report(tail);
  for (int i = 0; i < grid_->threads; ++i)
    if (stacks_.overflowed(i)) report("thread " + std::to_string(i) + " needs a larger stack");
}

void Worker::start_threads() {
  for (int i = 0; i < grid_->threads; ++i) {
    threads_[i].fiber.prepare(stacks_.at(i), Stacks::bytes(i), thread_entry);
    threads_[i].copies.clear();
    threads_[i].committed_groups = 0;
  }
  for (int i = 0; i < grid_->threads / kLanes; ++i) {
    warps_[i] = Warp();
    warps_[i].ready = kAllLanes;
  }
  std::fill(arrivals_, arrivals_ + kBarriers, 0);
}

// False where no warp has a lane that can go on.
bool Worker::run_some_warp() {
  const int warps = grid_->threads / kLanes;
  const int first = chance_.below(warps);
  for (int i = 0; i < warps; ++i) {
    const int chosen = (first + i) % warps;
    const uint32_t ready = warps_[chosen].ready;
    if (ready == 0) continue;
    int lane = chance_.below(kLanes);
    while ((ready >> lane & 1) == 0) lane = (lane + rotation_) % kLanes;
    current_ = chosen * kLanes + lane;
    threadIdx = {static_cast<unsigned>(current_), 0, 0};
    switch_fiber(scheduler_, threads_[current_].fiber);
    return true;
  }
  return false;
}

// Called where nobody can go on: empty if all threads have exited or all are at the barrier.
std::string Worker::stuck_sentence() const {
  int waiting = 0, gone = 0;
  for (int i = 0; i < grid_->threads / kLanes; ++i) {
    const Warp& warp = warps_[i];
    waiting += __builtin_popcount(warp.at_barrier);
    gone += __builtin_popcount(warp.exited);
    if (warp.waiting != 0)
      return "warp " + std::to_string(i) + " waits at barrier " + std::to_string(warp.barrier) +
             ", to which " + std::to_string(arrivals_[warp.barrier]) + " threads have come";
    if (warp.arrived == 0) continue;
    return "warp " + std::to_string(i) +
           " diverges: " + std::to_string(__builtin_popcount(warp.arrived)) +
           " of its lanes wait in " + name_of(warp.operation) + ", " +
           std::to_string(__builtin_popcount(warp.at_barrier)) + " at __syncthreads, " +
           std::to_string(__builtin_popcount(warp.exited)) + " have exited";
  }
  if (waiting == 0 || gone == 0) return "";
  return std::to_string(waiting) + " threads wait at __syncthreads, " + std::to_string(gone) +
         " have exited";
}

void Worker::open_barrier() {
  ++interval_;
  ++counters_.barriers;
  for (int i = 0; i < grid_->threads / kLanes; ++i) {
    warps_[i].ready = kAllLanes;
    warps_[i].at_barrier = 0;
  }
}

void Worker::thread_main() {
  grid_->body(grid_->data);
  Warp& mine = warp();
  mine.ready &= ~lane_bit();
  mine.exited |= lane_bit();
  leave();
  __builtin_unreachable();
}

void Worker::enter(int thread) {
  const int from = current_;
  current_ = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  switch_fiber(threads_[from].fiber, threads_[thread].fiber);
}

// Hands over to the next lane of this warp that can go on, or to the scheduler.
void Worker::leave() {
  const uint32_t ready = warp().ready;
  if (ready == 0) return to_scheduler();
  int lane = current_ % kLanes;
  do lane = (lane + rotation_) % kLanes;
  while ((ready >> lane & 1) == 0);
  enter(current_ / kLanes * kLanes + lane);
}

void Worker::collective(Operation operation, const LaneOperands& operands) {
  Warp& mine = warp();
  if (mine.arrived == 0) mine.operation = operation;
  if (mine.operation != operation)
    fail(std::string("its warp diverges: it comes to ") + name_of(operation) +
         " where others wait in " + name_of(mine.operation));
  mine.operands[current_ % kLanes] = operands;
  mine.arrived |= lane_bit();
  if (mine.arrived != kAllLanes) {
    mine.ready &= ~lane_bit();
    return leave();
  }
  require(execute(operation, mine.operands, current_ / kLanes, interval_, memory_, counters_));
  mine.arrived = 0;
  mine.ready = kAllLanes;
  if (preempts_ && chance_.below(16) == 0) to_scheduler();
}

void Worker::barrier() {
  land_some();
  Warp& mine = warp();
  mine.ready &= ~lane_bit();
  mine.at_barrier |= lane_bit();
  leave();
}

void Worker::named_barrier(int number, int threads, bool waits) {
  if (number < 1 || number >= kBarriers) fail("there is no barrier " + std::to_string(number));
  Warp& mine = warp();
  if (++arrivals_[number] == threads) {
    arrivals_[number] = 0;
    for (int i = 0; i < grid_->threads / kLanes; ++i) {
      Warp& other = warps_[i];
      if (other.waiting == 0 || other.barrier != number) continue;
      other.ready |= other.waiting;
      other.waiting = 0;
    }
    return;
  }
  if (!waits) {
    if (preempts_ && chance_.below(4) == 0) to_scheduler();
    return;
  }
  mine.barrier = number;
  mine.ready &= ~lane_bit();
  mine.waiting |= lane_bit();
  leave();
}

void Worker::issue(const Copy& copy) {
  require(memory_.check_access(copy.shared, "a copy"));
  if (reinterpret_cast<uintptr_t>(copy.global) % SharedMemory::kUnit != 0)
    fail("a copy's source is not aligned to 16 bytes");
  require(memory_.copy_issued(copy.shared, current_ / kLanes, interval_));
  ++counters_.copies;
  counters_.copied_bytes += copy.present ? SharedMemory::kUnit : 0;
  Thread& mine = threads_[current_];
  mine.copies.push_back(copy);
  mine.copies.back().group = mine.committed_groups;
  if (landing_ == Landing::kAtOnce) land(mine.copies.back());
}

void Worker::commit() {
  ++threads_[current_].committed_groups;
  land_some();
}

void Worker::wait(int pending) {
  Thread& mine = threads_[current_];
  const int covered = mine.committed_groups - pending;  // groups
  const auto left =
      std::remove_if(mine.copies.begin(), mine.copies.end(), [this, covered](Copy& copy) {
        if (copy.group >= covered) return false;
        land(copy);
        memory_.copy_awaited(copy.shared, current_ / kLanes, interval_);
        return true;
      });
  mine.copies.erase(left, mine.copies.end());
  land_some();
}

void Worker::land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  if (copy.present)
    memcpy(copy.shared, copy.global, SharedMemory::kUnit);
  else
    memset(copy.shared, 0, SharedMemory::kUnit);
}

void Worker::land_some() {
  if (landing_ != Landing::kInBetween) return;
  for (Copy& copy : threads_[current_].copies)
    if (chance_.below(4) == 0) land(copy);
}

void Worker::report(const std::string& sentence) {
  const std::lock_guard<std::mutex> lock(grid_->mutex);
  if (!grid_->failed) grid_->sentence = "block " + std::to_string(blockIdx.x) + ": " + sentence;
  grid_->failed = true;
}

// The block is given up where it stands; nobody comes back to its threads.
void Worker::fail(const std::string& sentence) {
  report("thread " + std::to_string(threadIdx.x) + ": " + sentence);
  to_scheduler();
}

void collective(Operation operation, const void* in, void* out) {
  worker->collective(operation, {in, out});
}
void barrier() { worker->barrier(); }
void named_barrier(int number, int threads, bool waits) {
  worker->named_barrier(number, threads, waits);
}
char* block_shared_memory() { return worker->shared(); }
void issue_copy(void* shared, const void* global, bool present) {
  worker->issue({shared, global, present, false, 0});
}
void commit_copies() { worker->commit(); }
void wait_for_copies(int pending) { worker->wait(pending); }
}  // namespace emulator
}  // namespace sta
