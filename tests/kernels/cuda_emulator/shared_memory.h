// A block's shared memory: poisoned, fenced, and watched for reads and copies that race.
#ifndef STA_TESTS_SHARED_MEMORY_H_
#define STA_TESTS_SHARED_MEMORY_H_

#include <stdint.h>

#include <string>
#include <vector>

namespace sta {
namespace emulator {

// Sentences are returned, empty where all is well. `interval` counts the barriers that a block has
// passed: two accesses of different warps are ordered only by a barrier between them.
class SharedMemory {
 public:
  static constexpr int kUnit = 16;  // bytes that one copy writes and one row of a matrix has

  explicit SharedMemory(int capacity);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  char* data() const { return data_; }

  // Fills everything with 0xff, which is NaN in every float format. A page that must not be touched
  // follows the `bytes`, rounded up to what keeps data() aligned to 128.
  void begin_block(int bytes, bool watch_races);
  std::string check_tail() const;

  std::string check_access(const void* pointer, const char* what) const;

  // A copy is under way from its issue until its own thread has waited for it; then the others may
  // read it after the next barrier.
  std::string copy_issued(const void* unit, int warp, int64_t interval);
  void copy_awaited(const void* unit, int warp, int64_t interval);
  std::string matrix_row_read(const void* unit, int warp, int64_t interval);

 private:
  struct Unit {
    int copies_under_way = 0;
    int copier = 0;                // warp
    int64_t copied_interval = -1;  // of the wait
    uint32_t readers = 0;          // warps, during read_interval
    int64_t read_interval = -1;
  };

  Unit& unit_at(const void* pointer) {
    return units_[(static_cast<const char*>(pointer) - data_) / kUnit];
  }

  int64_t mapped_bytes_ = 0;
  char* mapping_ = nullptr;
  char* end_ = nullptr;  // the page that must not be touched
  char* data_ = nullptr;
  int bytes_ = 0;
  bool watch_races_ = true;
  std::vector<Unit> units_;
};

}  // namespace emulator
}  // namespace sta

#endif  // STA_TESTS_SHARED_MEMORY_H_
