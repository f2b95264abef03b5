// Fetches rows that the next steps will read or write, a few at a time while arithmetic goes on.
// Rows of one head lie far apart, so the hardware's own prefetcher sees no stream in them.
#ifndef STA_CPU_PREFETCH_H_
#define STA_CPU_PREFETCH_H_

#include "problem.h"

namespace sta {
namespace STA_ISA {

class Prefetch {
 public:
  explicit Prefetch(int64_t row_bytes) : row_bytes_(row_bytes) {}

  // Rows (b, t, first .. first + count - 1, h) of a tensor. At most kMaxBlocks blocks.
  template <class S>
  void add(const StaTensor& x, int64_t b, int64_t t, int64_t first, int64_t count, int64_t h) {
    if (x.data == nullptr || count <= 0) return;
    const char* row = reinterpret_cast<const char*>(row_of<const S>(x, b, t, first, h));
    blocks_[added_++] = {row, x.stride_n * static_cast<int64_t>(sizeof(S)), count};
    total_rows_ += count;
  }

  // Announces how often step() will be called.
  void spread(int64_t steps) { rows_per_step_ = (total_rows_ + steps - 1) / steps; }

  STA_INLINE void step() {
    for (int64_t n = rows_per_step_; n > 0 && current_ < added_; --n) {
      Rows& rows = blocks_[current_];
      for (int64_t byte = 0; byte < row_bytes_; byte += 64) {
        __builtin_prefetch(rows.row + byte, 0, 2);
      }
      rows.row += rows.stride_bytes;
      if (--rows.count == 0) ++current_;
    }
  }

 private:
  static constexpr int kMaxBlocks = 8;
  struct Rows {
    const char* row;
    int64_t stride_bytes, count;
  };
  Rows blocks_[kMaxBlocks];
  int added_ = 0, current_ = 0;
  int64_t row_bytes_;
  int64_t total_rows_ = 0, rows_per_step_ = 0;
};

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_PREFETCH_H_
