// What 32 lanes do together, in one piece: shuffles, ldmatrix, mma.sync.
#ifndef STA_TESTS_WARP_H_
#define STA_TESTS_WARP_H_

#include <stdint.h>

#include <string>

#include "cuda/device.h"
#include "shared_memory.h"

namespace sta {
namespace emulator {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Counters {
  int64_t blocks, barriers, shuffles, multiply_adds;
  int64_t load_phases;     // of ldmatrix: 8 rows of 16 bytes, one pass over the 32 banks at best
  int64_t bank_conflicts;  // passes beyond the first
  int64_t copies, copied_bytes;
};

inline void add(Counters& sums, const Counters& more) {
  int64_t* to = &sums.blocks;
  const int64_t* from = &more.blocks;
  for (size_t i = 0; i < sizeof(Counters) / sizeof(int64_t); ++i) to[i] += from[i];
}

// A lane's operands, as collective() takes them.
struct LaneOperands {
  const void* in;
  void* out;
};

const char* name_of(Operation operation);

// Returns a sentence where an operand cannot be; empty where all is done.
std::string execute(Operation operation, const LaneOperands (&lanes)[kLanes], int warp,
                    int64_t interval, SharedMemory& memory, Counters& counters);

}  // namespace emulator
}  // namespace sta

#endif  // STA_TESTS_WARP_H_
