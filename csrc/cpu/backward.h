// Backward: scores are recomputed tile by tile, then
//   dV = P^T dO    dS = P * (dP - delta), dP = dO V^T    dK = scale dS^T Q    dQ = scale dS K
// with delta = rowsum(P * dP) - grad_lse. P keeps the numerators e^(s - max); 1 / sum goes into dO,
// which is smaller. Neither out nor lse is read: both carry a rounding (in two-byte dtypes a coarse
// one; of lse one that large scores amplify), and a tile has all it takes to do without.
#ifndef STA_CPU_BACKWARD_H_
#define STA_CPU_BACKWARD_H_

#include "key_gradients.h"
#include "products.h"
#include "scores.h"
#include "softmax.h"
#include "sta_cpu.h"

namespace sta {
namespace STA_ISA {

// What a thread needs for its tiles.
template <class S>
struct BackwardWorkspace {
  using R = Arithmetic<S>;
  FrameKeys<S> keys;
  KeySumRows<S> sums;
  R* queries;     // [query][depth]
  R* grad_out;    // [query][depth], divided by the softmax's sum
  R* grad_q;      // [query][depth]
  R* spare;       // [query][depth], for query_sums
  R* transposed;  // [d][lane]: queries, then grad_out
  R* scores;      // [panel][key][lane]: S, then P, then dS
  R* grad_p;      // [panel][key][lane]
  R* max;         // [lane]
  R* sum;         // [lane]
  R* inverse;     // [lane], 1 / sum
  R* grad_lse;    // [lane], grad_lse / sum
  const R** query_rows;
  const R** grad_out_rows;
  R** grad_q_rows;
  R** spare_rows;

  BackwardWorkspace(const Problem<S>& problem, Carver& carver)
      : keys(problem, carver), sums(problem, carver) {
    const int64_t tile = problem.tile_queries;
    queries = carver.take<R>(tile * problem.depth);
    grad_out = carver.take<R>(tile * problem.depth);
    grad_q = carver.take<R>(tile * problem.depth);
    spare = carver.take<R>(problem.max_keys > kGroupBlocks * kBlockKeys ? tile * problem.depth : 0);
    transposed = carver.take<R>(problem.depth * kTileLanes<R>);
    scores = carver.take<R>(round_up(problem.max_keys, kScoreKeys) * tile);
    grad_p = carver.take<R>(round_up(problem.max_keys, kScoreKeys) * tile);
    max = carver.take<R>(kTileLanes<R>);
    sum = carver.take<R>(kTileLanes<R>);
    inverse = carver.take<R>(kTileLanes<R>);
    grad_lse = carver.take<R>(kTileLanes<R>);
    query_rows = carver.take<const R*>(tile);
    grad_out_rows = carver.take<const R*>(tile);
    grad_q_rows = carver.take<R*>(tile);
    spare_rows = carver.take<R*>(tile);
  }

  void bind_rows(const Problem<S>& problem) {
    for (int64_t n = 0; n < problem.tile_queries; ++n) {
      query_rows[n] = queries + n * problem.depth;
      grad_out_rows[n] = grad_out + n * problem.depth;
      grad_q_rows[n] = grad_q + n * problem.depth;
      spare_rows[n] = spare + n * problem.depth;
    }
  }
};

// ws.grad_out of the tile, divided by ws.sum, and ws.inverse and ws.grad_lse.
template <class S>
void prepare_grad_out(const Problem<S>& problem, BackwardWorkspace<S>& ws, const QueryTile& tile) {
  using R = Arithmetic<S>;
  const StaParams& p = problem.params;
  const R* grad_lse = static_cast<const R*>(p.grad_lse);
  if (grad_lse) grad_lse += ((tile.b * p.T + tile.t) * p.H + tile.h) * p.Nq + tile.first;
  for (int64_t n = 0; n < tile.count; ++n) {
    R* row = ws.grad_out + n * problem.depth;
    load_row(row_of<const S>(p.grad_out, tile.b, tile.t, tile.first + n, tile.h), p.D, row,
             problem.depth);
    const R inverse = R{1} / ws.sum[n];
    ws.inverse[n] = inverse;
    ws.grad_lse[n] = grad_lse ? grad_lse[n] * inverse : R{0};
    for (int64_t d = 0; d < problem.depth; ++d) row[d] *= inverse;
  }
  for (int64_t n = tile.count; n < used_lanes<R>(tile.count); ++n)
    ws.inverse[n] = ws.grad_lse[n] = 0;
}

template <class S>
void backward_tile(const Problem<S>& problem, BackwardWorkspace<S>& ws, const QueryTile& tile,
                   const QueryTile& next) {
  using R = Arithmetic<S>;
  const StaParams& p = problem.params;
  const int64_t depth = problem.depth, keys = ws.keys.count(), lanes = used_lanes<R>(tile.count);
  const ScoreTile<R> scores = {ws.scores, ws.keys.padded_count()};
  const ScoreTile<R> grad_p = {ws.grad_p, ws.keys.padded_count()};
  Prefetch this_tile(p.D * sizeof(S));
  this_tile.add<S>(p.grad_out, tile.b, tile.t, tile.first, tile.count, tile.h);
  Prefetch next_tile(p.D * sizeof(S));
  next_tile.add<S>(p.grad_q, tile.b, tile.t, tile.first, tile.count, tile.h);
  next_tile.add<S>(p.q, next.b, next.t, next.first, next.count, next.h);
  if (next.count > 0 && next.first == 0) {
    prefetch_new_keys(problem, next.b, next.t, next.h, next_tile);
  }

  for (int64_t n = 0; n < tile.count; ++n) {
    load_row(row_of<const S>(p.q, tile.b, tile.t, tile.first + n, tile.h), p.D,
             ws.queries + n * depth, depth);
  }
  pack_transposed(ws.queries, depth, tile.count, depth, problem.query_sign, ws.transposed);
  score_tile(ws.keys.k_rows(), ws.transposed, depth, scores, lanes, this_tile);
  softmax_tile(scores, keys, lanes, problem.scale_log2e, ws.max, ws.sum);

  prepare_grad_out(problem, ws, tile);
  key_sums(scores, ws.grad_out_rows, keys, tile.count, depth, ws.sums.dv);
  pack_transposed(ws.grad_out, depth, tile.count, depth, R{1}, ws.transposed);
  score_tile(ws.keys.v_rows(), ws.transposed, depth, grad_p, lanes, next_tile);
  softmax_gradient_tile(scores, grad_p, keys, lanes, ws.grad_lse, ws.inverse);
  key_sums(scores, ws.query_rows, keys, tile.count, depth, ws.sums.dk);
  query_sums(scores, ws.keys.k_rows(), keys, tile.count, depth, ws.grad_q_rows, ws.spare_rows);

  for (int64_t n = 0; n < tile.count; ++n) {
    store_row(ws.grad_q_rows[n], static_cast<R>(p.scale), p.D,
              row_of<S>(p.grad_q, tile.b, tile.t, tile.first + n, tile.h));
  }
}

template <class S>
struct BackwardJob {
  const Problem<S>& problem;
  const ChunkPlan& plan;
  Arithmetic<S>* slabs;  // [clip of the batch][H][chunk]
  int64_t first_clip;
  int error;

  Arithmetic<S>* slab(int64_t task) const { return slabs + task * KeySums<S>::size(problem, plan); }
};

// The gradients of frame t's own keys: complete once all its queries went through.
template <class S>
void write_current(const Problem<S>& problem, const KeySumRows<S>& sums, int64_t b, int64_t t,
                   int64_t h) {
  using R = Arithmetic<S>;
  const StaParams& p = problem.params;
  for (int64_t n = 0; n < p.Nc; ++n) {
    store_row(sums.dk[n], static_cast<R>(p.scale), p.D, row_of<S>(p.grad_k_cur, b, t, n, h));
    store_row(sums.dv[n], R{1}, p.D, row_of<S>(p.grad_v_cur, b, t, n, h));
  }
}

// Clears the task's sums and calls body(sums, b, t, h, end) for its frames t < end: one chunk of
// one head.
template <class S, class Body>
void for_chunk_frames(const BackwardJob<S>& job, int64_t task, const Body& body) {
  const Problem<S>& problem = job.problem;
  const StaParams& p = problem.params;
  const int64_t chunk = task % job.plan.chunks, h = task / job.plan.chunks % p.H;
  const int64_t b = job.first_clip + task / job.plan.chunks / p.H;
  memset(job.slab(task), 0, KeySums<S>::size(problem, job.plan) * sizeof(Arithmetic<S>));
  const KeySums<S> sums(problem, job.plan, chunk, job.slab(task));
  const int64_t begin = job.plan.first_frame(chunk);
  const int64_t end = min_of(begin + job.plan.frames, p.T);
  for (int64_t t = begin; t < end; ++t) body(sums, b, t, h, end);
}

template <class S>
void backward_chunk(const BackwardJob<S>& job, BackwardWorkspace<S>& ws, int64_t task) {
  const Problem<S>& problem = job.problem;
  const StaParams& p = problem.params;
  for_chunk_frames(
      job, task, [&](const KeySums<S>& sums, int64_t b, int64_t t, int64_t h, int64_t end) {
        ws.keys.bind(b, t, h);
        ws.sums.bind(problem, sums, t);
        QueryTile tile = {b, t, h, 0, min_of(problem.tile_queries, p.Nq)};
        while (tile.count > 0) {
          const int64_t first = tile.first + tile.count;
          QueryTile next = {b, t, h, first, min_of(problem.tile_queries, p.Nq - first)};
          const QueryTile next_frame = {b, t + 1, h, 0,
                                        t + 1 < end ? min_of(problem.tile_queries, p.Nq) : 0};
          backward_tile(problem, ws, tile, next.count > 0 ? next : next_frame);
          tile = next;
        }
        write_current(problem, ws.sums, b, t, h);
      });
}

template <class S>
void backward_range(int64_t begin, int64_t end, void* context) {
  auto& job = *static_cast<BackwardJob<S>*>(context);
  Carver measure(nullptr);
  BackwardWorkspace<S> sizes(job.problem, measure);
  const Block block(measure.used());
  if (block.data() == nullptr) {
    __atomic_store_n(&job.error, STA_ERROR_MEMORY, __ATOMIC_RELAXED);
    return;
  }
  Carver carver(block.data());
  BackwardWorkspace<S> ws(job.problem, carver);
  ws.bind_rows(job.problem);
  for (int64_t task = begin; task < end; ++task) backward_chunk(job, ws, task);
}

// Units are short and long keys in the order (clip, key): the heads of a key lie next to each
// other.
template <class S>
void reduce_range(int64_t begin, int64_t end, void* context) {
  using R = Arithmetic<S>;
  auto& job = *static_cast<BackwardJob<S>*>(context);
  const Problem<S>& problem = job.problem;
  const StaParams& p = problem.params;
  const ChunkPlan& plan = job.plan;
  const Block total(2 * problem.depth * sizeof(R));
  if (total.data() == nullptr) {
    __atomic_store_n(&job.error, STA_ERROR_MEMORY, __ATOMIC_RELAXED);
    return;
  }
  R* sums = reinterpret_cast<R*>(total.data());
  const int64_t short_keys = p.S * p.Ns;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t clip = unit / (short_keys + p.L), key = unit % (short_keys + p.L);
    const int64_t b = job.first_clip + clip;
    for (int64_t h = 0; h < p.H; ++h) {
      R* slabs = job.slab((clip * p.H + h) * plan.chunks);
      if (key < short_keys) {
        const int64_t frame = key / p.Ns, n = key % p.Ns;
        const FrameRange readers = problem.readers(frame);
        reduce_key(
            problem, plan, slabs, readers.begin / plan.frames,
            (readers.end + plan.frames - 1) / plan.frames,
            [&](const KeySums<S>& chunk) { return chunk.short_row(frame, n); }, sums,
            row_of<S>(p.grad_k_short, b, frame, n, h), row_of<S>(p.grad_v_short, b, frame, n, h));
      } else {
        const int64_t n = key - short_keys;
        reduce_key(
            problem, plan, slabs, 0, plan.chunks,
            [&](const KeySums<S>& chunk) { return chunk.long_row(n); }, sums,
            row_of<S>(p.grad_k_long, b, 0, n, h), row_of<S>(p.grad_v_long, b, 0, n, h));
      }
    }
  }
}

// Clips go through in batches, so that the slabs do not grow with B. chunks: a range of tasks.
template <class S>
int run_backward(const Problem<S>& problem, StaParallelFor parallel_for, StaParallelBody chunks) {
  const StaParams& params = problem.params;
  const ChunkPlan plan(problem);
  const int64_t clip_tasks = params.H * plan.chunks;
  const int64_t clip_keys = params.S * params.Ns + params.L;
  const int64_t batch = min_of(plan.batch, params.B);
  const int64_t slab_bytes = KeySums<S>::size(problem, plan) * sizeof(Arithmetic<S>);
  const Block slabs(batch * clip_tasks * slab_bytes);
  if (slabs.data() == nullptr) return STA_ERROR_MEMORY;
  for (int64_t clip = 0; clip < params.B; clip += batch) {
    const int64_t clips = min_of(batch, params.B - clip);
    BackwardJob<S> job = {problem, plan, reinterpret_cast<Arithmetic<S>*>(slabs.data()), clip,
                          STA_OK};
    if (clips * clip_tasks > 0 && parallel_for(0, clips * clip_tasks, 1, chunks, &job) != 0) {
      return STA_ERROR_PARALLEL;
    }
    if (job.error != STA_OK) return job.error;
    if (clips * clip_keys > 0 &&
        parallel_for(0, clips * clip_keys, 16, reduce_range<S>, &job) != 0) {
      return STA_ERROR_PARALLEL;
    }
    if (job.error != STA_OK) return job.error;
  }
  return STA_OK;
}

template <class S>
int backward(const StaParams& params, StaParallelFor parallel_for) {
  return run_backward(Problem<S>(params), parallel_for, backward_range<S>);
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_BACKWARD_H_
