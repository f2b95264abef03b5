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
  R* spare;       // [query][depth], for query_sums
  R** out_rows;
  R** spare_rows;
  R* max;  // [lane]
  R* sum;  // [lane]

  ForwardWorkspace(const Problem<S>& problem, Carver& carver) : keys(problem, carver) {
    const int64_t tile = problem.tile_queries;
    queries = problem.direct_rows ? nullptr : carver.take<R>(tile * problem.depth);
    transposed = carver.take<R>(problem.depth * kTileLanes<R>);
    scores = carver.take<R>(round_up(problem.max_keys, kScoreKeys) * tile);
    out = carver.take<R>(tile * problem.depth);
    spare = carver.take<R>(problem.max_keys > kGroupBlocks * kBlockKeys ? tile * problem.depth : 0);
    out_rows = carver.take<R*>(tile);
    spare_rows = carver.take<R*>(tile);
    max = carver.take<R>(kTileLanes<R>);
    sum = carver.take<R>(kTileLanes<R>);
  }
};

// Packs the tile's queries into ws.transposed.
template <class S>
void pack_queries(const Problem<S>& problem, ForwardWorkspace<S>& ws, const QueryTile& tile) {
  using R = Arithmetic<S>;
  const StaParams& p = problem.params;
  const S* rows = row_of<const S>(p.q, tile.b, tile.t, tile.first, tile.h);
  if constexpr (sizeof(S) == sizeof(R)) {
    if (problem.direct_rows) {
      pack_transposed(rows, p.q.stride_n, tile.count, p.D, problem.query_sign, ws.transposed);
      return;
    }
  }
  for (int64_t n = 0; n < tile.count; ++n) {
    load_row(rows + n * p.q.stride_n, p.D, ws.queries + n * problem.depth, problem.depth);
  }
  pack_transposed(ws.queries, problem.depth, tile.count, problem.depth, problem.query_sign,
                  ws.transposed);
}

// Divides by the softmax's sum and writes out and lse.
template <class S>
void write_out(const Problem<S>& problem, const ForwardWorkspace<S>& ws, const QueryTile& tile) {
  using R = Arithmetic<S>;
  const StaParams& p = problem.params;
  for (int64_t n = 0; n < tile.count; ++n) {
    store_row(ws.out_rows[n], R{1} / ws.sum[n], p.D,
              row_of<S>(p.out, tile.b, tile.t, tile.first + n, tile.h));
  }
  if (p.lse == nullptr) return;
  R* lse = static_cast<R*>(p.lse) + ((tile.b * p.T + tile.t) * p.H + tile.h) * p.Nq + tile.first;
  const R scale = static_cast<R>(__builtin_fabs(p.scale));
  for (int64_t n = 0; n < tile.count; ++n) {
    // An infinite score is its own logsumexp, although the softmax has no value there.
    lse[n] = ws.max[n] * scale;
    if (!__builtin_isinf(ws.max[n])) lse[n] += natural_log(ws.sum[n]);
  }
}

template <class S>
void forward_tile(const Problem<S>& problem, ForwardWorkspace<S>& ws, const QueryTile& tile,
                  const QueryTile& next) {
  using R = Arithmetic<S>;
  const StaParams& p = problem.params;
  const int64_t lanes = used_lanes<R>(tile.count);
  const ScoreTile<R> scores = {ws.scores, ws.keys.padded_count()};
  Prefetch prefetch(p.D * sizeof(S));
  prefetch.add<S>(p.out, tile.b, tile.t, tile.first, tile.count, tile.h);
  prefetch.add<S>(p.q, next.b, next.t, next.first, next.count, next.h);
  if (next.count > 0 && next.first == 0) {
    prefetch_new_keys(problem, next.b, next.t, next.h, prefetch);
  }

  pack_queries(problem, ws, tile);
  score_tile(ws.keys.k_rows(), ws.transposed, problem.depth, scores, lanes, prefetch);
  softmax_tile(scores, ws.keys.count(), lanes, problem.scale_log2e, ws.max, ws.sum);
  query_sums(scores, ws.keys.v_rows(), ws.keys.count(), tile.count, problem.depth, ws.out_rows,
             ws.spare_rows);
  write_out(problem, ws, tile);
}

template <class S>
struct ForwardJob {
  const Problem<S>& problem;
  int error;
};

// Units are query tiles in the order (b, h, t, tile): neighbouring frames share most of their keys.
template <class S>
QueryTile forward_unit(const Problem<S>& problem, int64_t unit) {
  const StaParams& p = problem.params;
  const int64_t first = unit % problem.tiles * problem.tile_queries;
  const int64_t frame = unit / problem.tiles;  // (b, h, t)
  return {frame / p.T / p.H, frame % p.T, frame / p.T % p.H, first,
          min_of(problem.tile_queries, p.Nq - first)};
}

template <class S>
void forward_range(int64_t begin, int64_t end, void* context) {
  auto& job = *static_cast<ForwardJob<S>*>(context);
  const Problem<S>& problem = job.problem;
  Carver measure(nullptr);
  ForwardWorkspace<S> sizes(problem, measure);
  const Block block(measure.used());
  if (block.data() == nullptr) {
    __atomic_store_n(&job.error, STA_ERROR_MEMORY, __ATOMIC_RELAXED);
    return;
  }
  Carver carver(block.data());
  ForwardWorkspace<S> ws(problem, carver);
  for (int64_t n = 0; n < problem.tile_queries; ++n) {
    ws.out_rows[n] = ws.out + n * problem.depth;
    ws.spare_rows[n] = ws.spare + n * problem.depth;
  }

  QueryTile tile = forward_unit(problem, begin);
  ws.keys.bind(tile.b, tile.t, tile.h);
  for (int64_t unit = begin; unit < end; ++unit) {
    const QueryTile next = unit + 1 < end ? forward_unit(problem, unit + 1) : QueryTile{};
    forward_tile(problem, ws, tile, next);
    if (next.count > 0 && next.first == 0) ws.keys.bind(next.b, next.t, next.h);
    tile = next;
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
