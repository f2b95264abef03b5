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
  int64_t radius;    // no larger than the clip
  int64_t max_keys;  // of any frame
  int64_t depth;     // head dim, padded to whole vectors
  bool direct_rows;  // key rows can be read where they lie: arithmetic type, whole vectors
  int64_t tile_queries;
  int64_t tiles;  // query tiles a frame
  R scale_log2e;  // of |scale|; a negative scale flips the packed queries instead
  R query_sign;

  explicit Problem(const StaParams& p) : params(p) {
    radius = p.Ns > 0 ? max_of(0, min_of(p.radius, p.T - 1)) : 0;
    max_keys = p.Nc + min_of(2 * radius, max_of(p.T - 1, 0)) * p.Ns + p.L;
    depth = round_up(p.D, Vector<R>::W);
    direct_rows = sizeof(S) == sizeof(R) && depth == p.D;
    tile_queries = tile_panels<R>(max_keys) * kPanelLanes<R>;
    tiles = (p.Nq + tile_queries - 1) / tile_queries;
    scale_log2e = static_cast<R>(__builtin_fabs(p.scale) * 1.4426950408889634);
    query_sign = p.scale < 0 ? -1 : 1;
  }

  // Frames within the window of frame t, t itself included.
  FrameRange window(int64_t t) const {
    return {max_of(0, t - radius), min_of(params.T, t + radius + 1)};
  }
};

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_PROBLEM_H_
