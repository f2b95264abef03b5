#include "shared_memory.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace sta {
namespace emulator {

namespace {
constexpr int kAlignment = 128;  // of the block's shared memory, as device.h declares it
constexpr unsigned char kPoison = 0xff;

std::string at(const void* pointer, const char* data) {
  return "byte " + std::to_string(static_cast<const char*>(pointer) - data) + " of shared memory";
}
}  // namespace

SharedMemory::SharedMemory(int capacity) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t usable = (capacity + page - 1) / page * page;
  mapped_bytes_ = usable + page;
  void* memory =
      mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  end_ = mapping_ + usable;
  if (mprotect(end_, page, PROT_NONE) != 0) throw std::bad_alloc();
  data_ = end_;
}

SharedMemory::~SharedMemory() { munmap(mapping_, mapped_bytes_); }

void SharedMemory::begin_block(int bytes, bool watch_races) {
  bytes_ = bytes;
  watch_races_ = watch_races;
  data_ = end_ - (bytes + kAlignment - 1) / kAlignment * kAlignment;
  memset(data_, kPoison, end_ - data_);
  units_.assign((bytes + kUnit - 1) / kUnit, Unit());
}

std::string SharedMemory::check_tail() const {
  for (const char* byte = data_ + bytes_; byte < end_; ++byte)
    if (static_cast<unsigned char>(*byte) != kPoison)
      return at(byte, data_) + " was written, the block asked for " + std::to_string(bytes_);
  return "";
}

std::string SharedMemory::check_access(const void* pointer, const char* what) const {
  const char* byte = static_cast<const char*>(pointer);
  if (byte < data_ || byte + kUnit > data_ + bytes_)
    return std::string(what) + " at " + at(pointer, data_) + ", the block asked for " +
           std::to_string(bytes_);
  if ((byte - data_) % kUnit != 0)
    return std::string(what) + " at " + at(pointer, data_) + " is not aligned to 16 bytes";
  return "";
}

std::string SharedMemory::copy_issued(const void* pointer, int warp, int64_t interval) {
  if (!watch_races_) return "";
  Unit& unit = unit_at(pointer);
  if (unit.read_interval == interval && (unit.readers & ~(1u << warp)) != 0)
    return "a copy goes to " + at(pointer, data_) +
           ", which another warp has read since the last barrier";
  if (unit.copies_under_way > 0)
    return "a copy goes to " + at(pointer, data_) + ", where another one is under way";
  ++unit.copies_under_way;
  unit.copier = warp;
  return "";
}

void SharedMemory::copy_awaited(const void* pointer, int warp, int64_t interval) {
  Unit& unit = unit_at(pointer);
  --unit.copies_under_way;
  unit.copier = warp;
  unit.copied_interval = interval;
}

std::string SharedMemory::matrix_row_read(const void* pointer, int warp, int64_t interval) {
  if (!watch_races_) return "";
  Unit& unit = unit_at(pointer);
  if (unit.copies_under_way > 0)
    return "a matrix row is read from " + at(pointer, data_) +
           ", where a copy is under way that nothing has waited for";
  if (unit.copied_interval == interval && unit.copier != warp)
    return "a matrix row is read from " + at(pointer, data_) +
           ", which another warp's copy has filled since the last barrier";
  if (unit.read_interval != interval) unit.readers = 0;
  unit.read_interval = interval;
  unit.readers |= 1u << warp;
  return "";
}

}  // namespace emulator
}  // namespace sta
