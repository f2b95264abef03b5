// Stacks for the fibers of a block.
#ifndef STA_TESTS_STACKS_H_
#define STA_TESTS_STACKS_H_

#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace sta {
namespace emulator {

constexpr size_t kStackBytes = 64 * 1024;

// Each has a page below it that must not be touched.
class Stacks {
 public:
  explicit Stacks(int count) : count_(count), page_(sysconf(_SC_PAGESIZE)) {
    void* memory = mmap(nullptr, count_ * stride(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (int i = 0; i < count_; ++i)
      if (mprotect(memory_ + i * stride(), page_, PROT_NONE) != 0) throw std::bad_alloc();
  }
  ~Stacks() { munmap(memory_, count_ * stride()); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  char* at(int i) const { return memory_ + i * stride() + page_; }

  // Tops lie at different offsets from a page's start, or they would share the cache's few ways.
  static size_t bytes(int i) { return kStackBytes - i % 32 * 128; }

 private:
  size_t stride() const { return kStackBytes + page_; }
  int count_;
  size_t page_;
  char* memory_ = nullptr;
};

}  // namespace emulator
}  // namespace sta

#endif  // STA_TESTS_STACKS_H_
