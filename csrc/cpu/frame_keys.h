// The keys and values one frame attends to, as tables of row pointers: the frame's own, the short
// ones of its neighbours, the clip's long ones. Nothing is gathered or repeated.
#ifndef STA_CPU_FRAME_KEYS_H_
#define STA_CPU_FRAME_KEYS_H_

#include "prefetch.h"
#include "workspace.h"

namespace sta {
namespace STA_ISA {

// Calls body(part, frame, n) for every key of frame t in the order of the tables.
enum class KeyPart { kCurrent, kShort, kLong };

template <class S, class Body>
STA_INLINE void for_keys(const Problem<S>& problem, int64_t t, const Body& body) {
  const StaParams& p = problem.params;
  for (int64_t n = 0; n < p.Nc; ++n) body(KeyPart::kCurrent, t, n);
  const FrameRange window = problem.window(t);
  for (int64_t j = window.begin; j < window.end; ++j) {
    for (int64_t n = 0; j != problem.own(t) && n < p.Ns; ++n) body(KeyPart::kShort, j, n);
  }
  for (int64_t n = 0; n < problem.longs(t); ++n) body(KeyPart::kLong, int64_t{0}, n);
}

// The rows that frame t reads and frame t - 1 did not.
template <class S>
void prefetch_new_keys(const Problem<S>& problem, int64_t b, int64_t t, int64_t h,
                       Prefetch& prefetch) {
  const StaParams& p = problem.params;
  prefetch.add<S>(p.k_cur, b, t, 0, p.Nc, h);
  prefetch.add<S>(p.v_cur, b, t, 0, p.Nc, h);
  const int64_t entering = problem.own(t) + (problem.right > 0 ? problem.right : -1);
  if (problem.left + problem.right == 0 || entering < 0 || entering >= p.S) return;
  prefetch.add<S>(p.k_short, b, entering, 0, p.Ns, h);
  prefetch.add<S>(p.v_short, b, entering, 0, p.Ns, h);
}

template <class S>
class FrameKeys {
 public:
  using R = Arithmetic<S>;

  FrameKeys(const Problem<S>& problem, Carver& carver) : problem_(problem) {
    const int64_t capacity = round_up(problem.max_keys, kScoreKeys);
    k_rows_ = carver.take<const R*>(capacity);
    v_rows_ = carver.take<const R*>(capacity);
    if (problem.direct_rows) return;
    k_staged_ = carver.take<R>(problem.max_keys * problem.depth);
    v_staged_ = carver.take<R>(problem.max_keys * problem.depth);
  }

  // Points the tables at the keys of frame t, head h of clip b.
  void bind(int64_t b, int64_t t, int64_t h) {
    const StaParams& p = problem_.params;
    count_ = 0;
    for_keys(problem_, t, [&](KeyPart part, int64_t frame, int64_t n) {
      const StaTensor& k = part == KeyPart::kCurrent ? p.k_cur
                           : part == KeyPart::kShort ? p.k_short
                                                     : p.k_long;
      const StaTensor& v = part == KeyPart::kCurrent ? p.v_cur
                           : part == KeyPart::kShort ? p.v_short
                                                     : p.v_long;
      k_rows_[count_] = present(row_of<const S>(k, b, frame, n, h), k_staged_);
      v_rows_[count_] = present(row_of<const S>(v, b, frame, n, h), v_staged_);
      ++count_;
    });
    for (int64_t key = count_; key < padded_count(); ++key) {
      k_rows_[key] = k_rows_[count_ - 1];
      v_rows_[key] = v_rows_[count_ - 1];
    }
  }

  int64_t count() const { return count_; }
  int64_t padded_count() const { return round_up(count_, kScoreKeys); }
  // Both tables are padded to whole register tiles by repeating the last key.
  const R* const* k_rows() const { return k_rows_; }
  const R* const* v_rows() const { return v_rows_; }

 private:
  // The row itself where it can be read in place, else its converted copy.
  const R* present(const S* row, R* staged) const {
    if constexpr (sizeof(S) == sizeof(R)) {
      if (problem_.direct_rows) return row;
    }
    R* copy = staged + count_ * problem_.depth;
    load_row(row, problem_.params.D, copy, problem_.depth);
    return copy;
  }

  const Problem<S>& problem_;
  const R** k_rows_;
  const R** v_rows_;
  R* k_staged_ = nullptr;
  R* v_staged_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_FRAME_KEYS_H_
