// Forward: out = softmax(scale * Q K^T) V over all keys of a frame, one query tile at a time.
#ifndef STA_CPU_FORWARD_H_
#define STA_CPU_FORWARD_H_

#include <math.h>

#include "frame_keys.h"
#include "products.h"
#include "scores.h"
#include "softmax.h"
#include "sta_cpu.h"

namespace sta {
namespace STA_ISA {

STA_INLINE float natural_log(float x) { return ::logf(x); }
STA_INLINE double natural_log(double x) { return __builtin_log(x); }

// What a thread needs for its tiles.
template <class S>
struct ForwardWorkspace {
  using R = Arithmetic<S>;
  FrameKeys<S> keys;
  R* queries;     // [query][depth]: only where the caller's rows cannot be read in place
  R* transposed;  // [d][lane]
  R* scores;      // [panel][key][lane]
  R* out;         // [query][depth], not yet divided by the softmax's sum
  R** out_rows;
  R* max;  // [lane]
  R* sum;  // [lane]

  ForwardWorkspace(const Problem<S>& problem, Carver& carver) : keys(problem, carver) {
    const int64_t tile = problem.tile_queries;
    queries = problem.direct_rows ? nullptr : carver.take<R>(tile * problem.depth);
    transposed = carver.take<R>(problem.depth * kTileLanes<R>);
    scores = carver.take<R>(round_up(problem.max_keys, kScoreKeys) * tile);
    out = carver.take<R>(tile * problem.depth);
    out_rows = carver.take<R*>(tile);
    max = carver.take<R>(kTileLanes<R>);
    sum = carver.take<R>(kTileLanes<R>);
  }
};

// Packs the tile's queries into ws.transposed.
template <class S>
void pack_queries(const Problem<S>& problem, ForwardWorkspace<S>& ws, int64_t b, int64_t t,
                  int64_t h, int64_t first, int64_t count) {
  using R = Arithmetic<S>;
  const StaParams& p = problem.params;
  const S* rows = row_of<const S>(p.q, b, t, first, h);
  if constexpr (sizeof(S) == sizeof(R)) {
    if (problem.direct_rows) {
      pack_transposed(rows, p.q.stride_n, count, p.D, problem.query_sign, ws.transposed);
      return;
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    load_row(rows + n * p.q.stride_n, p.D, ws.queries + n * problem.depth, problem.depth);
  }
  pack_transposed(ws.queries, problem.depth, count, problem.depth, problem.query_sign,
                  ws.transposed);
}

template <class S>
void forward_tile(const Problem<S>& problem, ForwardWorkspace<S>& ws, int64_t b, int64_t t,
                  int64_t h, int64_t tile) {
  using R = Arithmetic<S>;
  const StaParams& p = problem.params;
  const int64_t first = tile * problem.tile_queries;
  const int64_t count = min_of(problem.tile_queries, p.Nq - first);
  const int64_t lanes = used_lanes<R>(count);
  const ScoreTile<R> scores = {ws.scores, ws.keys.padded_count()};

  pack_queries(problem, ws, b, t, h, first, count);
  score_tile(ws.keys.k_rows(), ws.transposed, problem.depth, scores, lanes, StoreScores{});
  softmax_tile(scores, ws.keys.count(), lanes, problem.scale_log2e, ws.max, ws.sum);
  query_sums(scores, ws.keys.v_rows(), ws.keys.count(), count, problem.depth, ws.out_rows);

  for (int64_t n = 0; n < count; ++n) {
    store_row(ws.out_rows[n], R{1} / ws.sum[n], p.D, row_of<S>(p.out, b, t, first + n, h));
  }
  if (p.lse == nullptr) return;
  R* lse = static_cast<R*>(p.lse) + ((b * p.T + t) * p.H + h) * p.Nq + first;
  const R scale = static_cast<R>(__builtin_fabs(p.scale));
  for (int64_t n = 0; n < count; ++n) lse[n] = ws.max[n] * scale + natural_log(ws.sum[n]);
}

template <class S>
struct ForwardJob {
  const Problem<S>& problem;
  int error;
};

// Units are query tiles in the order (b, h, t, tile): neighbouring frames share most of their keys.
template <class S>
void forward_range(int64_t begin, int64_t end, void* context) {
  auto& job = *static_cast<ForwardJob<S>*>(context);
  const Problem<S>& problem = job.problem;
  const StaParams& p = problem.params;
  Carver measure(nullptr);
  ForwardWorkspace<S> sizes(problem, measure);
  const Block block(measure.used());
  if (block.data() == nullptr) {
    __atomic_store_n(&job.error, STA_ERROR_MEMORY, __ATOMIC_RELAXED);
    return;
  }
  Carver carver(block.data());
  ForwardWorkspace<S> ws(problem, carver);
  for (int64_t n = 0; n < problem.tile_queries; ++n) ws.out_rows[n] = ws.out + n * problem.depth;

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t tile = unit % problem.tiles;
    const int64_t frame = unit / problem.tiles;  // (b, h, t)
    const int64_t t = frame % p.T, h = frame / p.T % p.H, b = frame / p.T / p.H;
    if (unit == begin || tile == 0) ws.keys.bind(b, t, h);
    forward_tile(problem, ws, b, t, h, tile);
  }
}

template <class S>
int forward(const StaParams& params, StaParallelFor parallel_for) {
  const Problem<S> problem(params);
  ForwardJob<S> job = {problem, STA_OK};
  const int64_t units = params.B * params.T * params.H * problem.tiles;
  if (units == 0) return STA_OK;
  if (parallel_for(0, units, 1, forward_range<S>, &job) != 0) return STA_ERROR_PARALLEL;
  return job.error;
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_FORWARD_H_
