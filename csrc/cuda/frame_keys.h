// The keys of one frame as one sequence: its own, then its neighbours' short ones, then the long
// ones. A row number becomes an address here; nothing is gathered in memory.
#ifndef STA_CUDA_FRAME_KEYS_H_
#define STA_CUDA_FRAME_KEYS_H_

#include "cuda/problem.h"

namespace sta {

enum class Part { kCurrent, kShort, kLong };

// Where a row of the sequence comes from: token `token` of frame `frame` (unused for long keys).
struct Row {
  Part part;
  int frame, token;
};

// Frame i of the queries: the short keys are those of frames first to last without its own, a
// contiguous run of rows with one hole.
struct FrameKeys {
  int frame, own;       // i; the same among the frames of the short keys
  int first;            // neighbour inside the clip
  int current, shorts;  // rows of each part; the rest are long
  int per_frame;        // short keys of one frame
  int count;            // all rows

  __device__ __forceinline__ FrameKeys(const Problem& p, int i) {
    frame = i;
    own = i + p.frame_offset;
    first = max(0, i - p.behind);
    const int last = min(p.S - 1, i + p.ahead);
    per_frame = p.Ns;
    current = p.Nc;
    shorts = (last - first) * per_frame;
    count = current + shorts + min(p.L, i + p.long_lead);
  }

  __device__ __forceinline__ Row row(int r) const {
    if (r < current) return {Part::kCurrent, frame, r};
    r -= current;
    if (r >= shorts) return {Part::kLong, 0, r - shorts};
    const int nth = r / per_frame;
    const int neighbour = first + nth;
    return {Part::kShort, neighbour + (neighbour >= own), r - nth * per_frame};
  }
};

// One of three tensors, by the part that a row belongs to.
template <typename T>
__device__ __forceinline__ T* token(const Tensor& current, const Tensor& shorts,
                                    const Tensor& longs, const Row& row, int b, int h) {
  if (row.part == Part::kCurrent) return token<T>(current, b, row.frame, row.token, h);
  if (row.part == Part::kShort) return token<T>(shorts, b, row.frame, row.token, h);
  return token<T>(longs, b, 0, row.token, h);
}

}  // namespace sta

#endif  // STA_CUDA_FRAME_KEYS_H_
