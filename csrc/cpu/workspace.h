// One aligned block of memory per thread, cut into arrays.
#ifndef STA_CPU_WORKSPACE_H_
#define STA_CPU_WORKSPACE_H_

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include "simd.h"

namespace sta {
namespace STA_ISA {

// Hands out arrays from a block, each on its own cache line. Without a block it only counts, so the
// same code first measures and then carves.
class Carver {
 public:
  explicit Carver(char* block) : block_(block) {}

  template <class X>
  X* take(int64_t count) {
    X* array = block_ ? reinterpret_cast<X*>(block_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(X) + 63) / 64 * 64;
    return array;
  }
  size_t used() const { return used_; }

 private:
  char* block_;
  size_t used_ = 0;
};

// Memory on a cache-line boundary, or null.
class Block {
 public:
  explicit Block(size_t bytes) : memory_(malloc(bytes + 64)) {}
  ~Block() { free(memory_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  char* data() const {
    if (memory_ == nullptr) return nullptr;
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
  }

 private:
  void* memory_;
};

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_WORKSPACE_H_
