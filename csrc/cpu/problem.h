// The call in typed form: sizes derived from the parameters, and rows of the tensors.
#ifndef STA_CPU_PROBLEM_H_
#define STA_CPU_PROBLEM_H_

#include "../sta_params.h"
#include "storage.h"
#include "tile.h"

namespace sta {
namespace STA_ISA {

// Row (b, t, n, h) of a tensor: D elements.
template <class S>
STA_INLINE S* row_of(const StaTensor& x, int64_t b, int64_t t, int64_t n, int64_t h) {
  return static_cast<S*>(x.data) + b * x.stride_b + t * x.stride_t + n * x.stride_n +
         h * x.stride_h;
}

struct FrameRange {
  int64_t begin, end;
};

// Queries first .. first + count - 1 of one frame and head: the unit of work. count == 0: none.
struct QueryTile {
  int64_t b, t, h, first, count;
};

template <class S>
struct Problem {
  using R = Arithmetic<S>;

  const StaParams& params;
  int64_t left, right;  // no larger than the clip; 0 without a short part
  int64_t max_keys;     // of any frame
  int64_t depth;        // head dim, padded to whole vectors
  bool direct_rows;     // key rows can be read where they lie: arithmetic type, whole vectors
  int64_t tile_queries;
  int64_t tiles;  // query tiles a frame
  R scale_log2e;  // of |scale|; a negative scale flips the packed queries instead
  R query_sign;

  explicit Problem(const StaParams& p) : params(p) {
    const int64_t farthest = p.Ns > 0 ? max_of(0, p.S - 1) : 0;
    left = min_of(p.left, farthest);
    right = min_of(p.right, farthest);
    max_keys = p.Nc + min_of(left + right, farthest) * p.Ns + p.L;
    depth = round_up(p.D, Vector<R>::W);
    direct_rows = sizeof(S) == sizeof(R) && depth == p.D;
    tile_queries = tile_panels<R>(max_keys) * kPanelLanes<R>;
    tiles = (p.Nq + tile_queries - 1) / tile_queries;
    scale_log2e = static_cast<R>(__builtin_fabs(p.scale) * 1.4426950408889634);
    query_sign = p.scale < 0 ? -1 : 1;
  }

  // Where the frames of the queries lie among those of the short keys.
  int64_t own(int64_t t) const { return t + params.frame_offset; }

  // Frames of the short keys within the window of frame t, its own included.
  FrameRange window(int64_t t) const {
    return {max_of(0, own(t) - left), min_of(params.S, own(t) + right + 1)};
  }

  // Frames of the queries within whose window frame j of the short keys lies; may be none.
  FrameRange readers(int64_t j) const {
    const int64_t begin = max_of(0, j - right - params.frame_offset);
    const int64_t end = min_of(params.T, j + left - params.frame_offset + 1);
    return begin < end ? FrameRange{begin, end} : FrameRange{0, 0};
  }

  // The first so many long keys are read by frame t.
  int64_t longs(int64_t t) const { return params.causal_long ? own(t) + 1 : params.L; }
};

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_PROBLEM_H_
