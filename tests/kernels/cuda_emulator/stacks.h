// Stacks for the fibers of a block.
#ifndef STA_TESTS_STACKS_H_
#define STA_TESTS_STACKS_H_

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#include <new>
#include <utility>

namespace sta {
namespace emulator {

// A mark at the far end of each tells whether it was too small. Pages that must not be touched
// would be surer, but each is a mapping, and a process may have only some 65,000.
class Stacks {
 public:
  explicit Stacks(int count) : bytes_(count * kStride) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (int i = 0; i < count; ++i) *mark(i) = kMark;
  }
  ~Stacks() { munmap(memory_, bytes_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* at(int i) const { return memory_ + i * kStride; }

  // Tops lie at different offsets from a page's start, or they would share the cache's few ways.
  static size_t bytes(int i) { return kStride - i % 32 * 128; }

  // Sets the mark again.
  bool overflowed(int i) const { return std::exchange(*mark(i), kMark) != kMark; }

 private:
  static constexpr size_t kStride = 64 * 1024;
  static constexpr uint64_t kMark = 0x5ca1ab1e0ddba11;

  uint64_t* mark(int i) const { return reinterpret_cast<uint64_t*>(at(i)); }

  size_t bytes_;
  char* memory_ = nullptr;
};

}  // namespace emulator
}  // namespace sta

#endif  // STA_TESTS_STACKS_H_
