// Backward with tile products; the formulas and the sums of key gradients are those of
// ../backward.h.
//
// A strip of 32 queries gives S = Q K^T and dP = dO V^T, from which rows of P and dS are computed,
// rounded to bfloat16 and put into two forms: dS as rows for dQ = dS K, and both transposed for
// dK += dS^T Q, dV += P^T dO, which sum over the queries of a group of strips.
#ifndef STA_CPU_AMX_BACKWARD_H_
#define STA_CPU_AMX_BACKWARD_H_

#include "../backward.h"
#include "keys.h"
#include "softmax.h"

namespace sta {
namespace STA_ISA {

// The sums of dK and dV are loaded and stored once a group, so it should be long; P^T and dS^T of a
// group should fit into the second-level cache.
constexpr int64_t kGroupStrips = 4;

struct TileBackwardWorkspace {
  KeyTable keys;
  KeySumRows<Bfloat16> sums;
  char *k_words, *k_pairs, *v_words;
  float *dk, *dv;                      // [key of a block][depth]
  Bfloat16 *queries, *grad_out;        // [query of a strip][depth]
  char *query_pairs, *grad_out_pairs;  // [strip of a group], packed
  float *scores, *grad_weights;        // [query of a strip][key]: S, then e^(S - max); dP
  Bfloat16* grad_scores;               // [query of a strip][key]: dS
  char *p_pairs, *ds_pairs;            // [16 keys] tiles of a strip, pairs of queries
  char *p_columns, *ds_columns;        // [strip of a group][16 keys] tiles: P^T, dS^T
  float* grad_q;                       // [query][depth]: of a strip, or of a blocked frame
  float* maximum;                      // [query] of a blocked frame, as are the next
  RowSums* row_sums;

  TileBackwardWorkspace(const TileProblem& problem, Carver& carver)
      : keys(problem, carver), sums(problem, carver) {
    const int64_t strip_bytes = kStripQueries * problem.depth * 2;
    const int64_t tile_row_bytes = problem.most_keys / kTileRows * kTileBytes;
    const int64_t score_row = problem.most_keys + kRowPadding;
    const int64_t frame = problem.blocked ? round_up(problem.params.Nq, kStripQueries) : 0;
    k_words = carver.take<char>(problem.packed_bytes());
    k_pairs = carver.take<char>(problem.packed_bytes());
    v_words = carver.take<char>(problem.packed_bytes());
    dk = carver.take<float>(problem.most_keys * problem.depth);
    dv = carver.take<float>(problem.most_keys * problem.depth);
    queries = carver.take<Bfloat16>(kStripQueries * problem.depth);
    grad_out = carver.take<Bfloat16>(kStripQueries * problem.depth);
    query_pairs = carver.take<char>(kGroupStrips * strip_bytes);
    grad_out_pairs = carver.take<char>(kGroupStrips * strip_bytes);
    scores = carver.take<float>(kStripQueries * score_row);
    grad_weights = carver.take<float>(kStripQueries * score_row);
    grad_scores = carver.take<Bfloat16>(kStripQueries * (score_row + kRowPadding));
    p_pairs = carver.take<char>(tile_row_bytes);
    ds_pairs = carver.take<char>(tile_row_bytes);
    p_columns = carver.take<char>(kGroupStrips * tile_row_bytes);
    ds_columns = carver.take<char>(kGroupStrips * tile_row_bytes);
    grad_q = carver.take<float>(max_of(kStripQueries, frame) * problem.depth);
    maximum = carver.take<float>(frame);
    row_sums = carver.take<RowSums>(frame);
  }
};

// The strip's queries and incoming gradients, and its S and dP for the keys of a block.
inline void backward_products(const TileProblem& problem, TileBackwardWorkspace& ws,
                              TileRegisters& registers, const QueryTile& strip,
                              const KeyBlock& block, int64_t slot) {
  const StaParams& p = problem.params;
  const int64_t depth = problem.depth, packed = slot * kStripQueries * depth * 2;
  copy_strip(problem, p.q, strip, ws.queries);
  copy_strip(problem, p.grad_out, strip, ws.grad_out);
  pack_pairs(ws.queries, depth, ws.query_pairs + packed);
  pack_pairs(ws.grad_out, depth, ws.grad_out_pairs + packed);
  if (problem.query_sign < 0) negate(ws.queries, kStripQueries * depth);
  const int64_t rows = query_tiles(strip.count), columns = 2 * block.steps();
  multiply(registers, rows_operand(ws.queries, depth), rows, words_operand(problem, ws.k_words),
           columns, problem.depth_steps(), ws.scores, block.score_row(), false);
  multiply(registers, rows_operand(ws.grad_out, depth), rows, words_operand(problem, ws.v_words),
           columns, problem.depth_steps(), ws.grad_weights, block.score_row(), false);
}

// First pass of a blocked frame: maxima and sums over all keys.
inline void find_row_sums(const TileProblem& problem, TileBackwardWorkspace& ws,
                          TileRegisters& registers, const QueryTile& frame) {
  const float scale = static_cast<float>(problem.scale_log2e);
  for (int64_t n = 0; n < frame.count; ++n) {
    ws.maximum[n] = -__builtin_inff();
    ws.row_sums[n] = {};
  }
  ws.keys.for_blocks([&](const KeyBlock& block) {
    ws.keys.pack(block, ws.k_words, nullptr, ws.v_words, nullptr);
    for_strips(frame, [&](const QueryTile& strip) {
      backward_products(problem, ws, registers, strip, block, 0);
      for (int64_t n = 0; n < strip.count; ++n) {
        float* scores = ws.scores + n * block.score_row();
        float& maximum = ws.maximum[strip.first + n];
        RowSums& sums = ws.row_sums[strip.first + n];
        const float top = row_maximum(scores, block.count);
        if (top == -__builtin_inff()) continue;  // weights of zero, whatever the maximum will be
        const float before = maximum;
        maximum = top > before ? top : before;
        const RowSums found = row_exponentials(scores, ws.grad_weights + n * block.score_row(),
                                               block.count, maximum, scale);
        const float shrunk =
            before == maximum ? 1.0f : exp2_weight(set_floats((before - maximum) * scale))[0];
        sums.weights = sums.weights * shrunk + found.weights;
        sums.weighted = sums.weighted * shrunk + found.weighted;
      }
    });
  });
}

// The factors of one row; its scores become exponentials.
inline RowFactors row_factors(const TileProblem& problem, TileBackwardWorkspace& ws,
                              const QueryTile& strip, int64_t n, const KeyBlock& block) {
  const StaParams& p = problem.params;
  const int64_t query = strip.first + n, row = n * block.score_row();
  const float scale = static_cast<float>(problem.scale_log2e);
  const float maximum =
      problem.blocked ? ws.maximum[query] : row_maximum(ws.scores + row, block.count);
  RowSums sums =
      row_exponentials(ws.scores + row, ws.grad_weights + row, block.count, maximum, scale);
  if (problem.blocked) sums = ws.row_sums[query];
  const float* grad_lse = static_cast<const float*>(p.grad_lse);
  const int64_t at = ((strip.b * p.T + strip.t) * p.H + strip.h) * p.Nq + query;
  const float inverse = 1.0f / sums.weights;
  return {inverse, sums.weighted * inverse - (grad_lse ? grad_lse[at] : 0.0f)};
}

// P and dS of a strip: dS as rows, both as pairs of queries.
inline void weigh_strip(const TileProblem& problem, TileBackwardWorkspace& ws,
                        const QueryTile& strip, const KeyBlock& block) {
  for (int64_t pair = 0; pair < kTileRows; ++pair) {
    const int64_t n = 2 * pair, row = n * block.score_row();
    const int64_t used = max_of(0, min_of(2, strip.count - n));
    RowFactors factors[2] = {};
    for (int64_t i = 0; i < used; ++i) factors[i] = row_factors(problem, ws, strip, n + i, block);
    for (int64_t step = 0; step < block.steps(); ++step) {
      RowGradient gradient[2] = {};
      for (int64_t i = 0; i < used; ++i) {
        const int64_t at = row + i * block.score_row() + step * kTileDepth;
        gradient[i] = row_gradient(ws.scores + at, ws.grad_weights + at, factors[i]);
        store_words(ws.grad_scores + (n + i) * block.weight_row() + step * kTileDepth,
                    gradient[i].grad_scores);
      }
      const int64_t tile = 2 * step * kTileBytes + pair * 64;
      const auto store = [&](char* pairs, Words a, Words b) {
        store_words(pairs + tile, alternate_low(a, b));
        store_words(pairs + tile + kTileBytes, alternate_high(a, b));
      };
      store(ws.p_pairs, gradient[0].weights, gradient[1].weights);
      store(ws.ds_pairs, gradient[0].grad_scores, gradient[1].grad_scores);
    }
  }
}

// Tiles of pairs of queries become tiles whose rows are keys, 32 queries each.
inline void transpose_pairs(const char* pairs, int64_t tiles, char* columns) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    char* rows = columns + tile / 2 * 2 * kTileBytes + tile % 2 * 4 * 64;
    transpose_words(pairs + tile * kTileBytes, 64,
                    [&](int64_t i) { return rows + alternated(i) * 64; });
  }
}

inline void write_grad_q(const TileProblem& problem, const float* grad_q, const QueryTile& strip) {
  const StaParams& p = problem.params;
  for (int64_t n = 0; n < strip.count; ++n) {
    store_bfloat16(grad_q + n * problem.depth, static_cast<float>(p.scale), p.D,
                   row_of<Bfloat16>(p.grad_q, strip.b, strip.t, strip.first + n, strip.h));
  }
}

inline void backward_strip(const TileProblem& problem, TileBackwardWorkspace& ws,
                           TileRegisters& registers, const QueryTile& strip, const KeyBlock& block,
                           int64_t slot) {
  const int64_t tiles = 2 * block.steps();
  backward_products(problem, ws, registers, strip, block, slot);
  weigh_strip(problem, ws, strip, block);
  transpose_pairs(ws.p_pairs, tiles, ws.p_columns + slot * tiles * kTileBytes);
  transpose_pairs(ws.ds_pairs, tiles, ws.ds_columns + slot * tiles * kTileBytes);
  float* grad_q = problem.blocked ? ws.grad_q + strip.first * problem.depth : ws.grad_q;
  multiply(registers, rows_operand(ws.grad_scores, block.weight_row()), query_tiles(strip.count),
           pairs_operand(problem, ws.k_pairs), problem.depth_tiles(), block.steps(), grad_q,
           problem.depth, block.first > 0);
  if (!problem.blocked) write_grad_q(problem, grad_q, strip);
}

// ws.dk and ws.dv of a block of keys, over all queries of the frame.
inline void backward_block(const TileProblem& problem, TileBackwardWorkspace& ws,
                           TileRegisters& registers, const QueryTile& frame,
                           const KeyBlock& block) {
  const int64_t tiles = 2 * block.steps(), depth = problem.depth;
  ws.keys.pack(block, ws.k_words, ws.k_pairs, ws.v_words, nullptr);
  memset(ws.dk, 0, tiles * kTileRows * depth * sizeof(float));
  memset(ws.dv, 0, tiles * kTileRows * depth * sizeof(float));
  int64_t slot = 0;
  const auto add_group = [&] {
    const auto columns = [&](const char* data) {
      return TileMatrix{data, 64, kTileBytes, tiles * kTileBytes};
    };
    multiply(registers, columns(ws.ds_columns), block.tiles(),
             pairs_operand(problem, ws.query_pairs), problem.depth_tiles(), slot, ws.dk, depth,
             true);
    multiply(registers, columns(ws.p_columns), block.tiles(),
             pairs_operand(problem, ws.grad_out_pairs), problem.depth_tiles(), slot, ws.dv, depth,
             true);
    slot = 0;
  };
  for_strips(frame, [&](const QueryTile& strip) {
    backward_strip(problem, ws, registers, strip, block, slot);
    if (++slot == kGroupStrips) add_group();
  });
  if (slot > 0) add_group();
  for (int64_t key = 0; key < block.count; ++key) {
    add_row(ws.dk + key * depth, depth, ws.sums.dk[block.first + key]);
    add_row(ws.dv + key * depth, depth, ws.sums.dv[block.first + key]);
  }
}

inline void backward_frame(const TileProblem& problem, TileBackwardWorkspace& ws,
                           TileRegisters& registers, const QueryTile& frame) {
  ws.keys.bind(frame.b, frame.t, frame.h);
  if (problem.blocked) find_row_sums(problem, ws, registers, frame);
  ws.keys.for_blocks(
      [&](const KeyBlock& block) { backward_block(problem, ws, registers, frame, block); });
  if (!problem.blocked) return;
  for_strips(frame, [&](const QueryTile& strip) {
    write_grad_q(problem, ws.grad_q + strip.first * problem.depth, strip);
  });
}

inline void tile_backward_range(int64_t begin, int64_t end, void* context) {
  auto& job = *static_cast<BackwardJob<Bfloat16>*>(context);
  const TileProblem& problem = static_cast<const TileProblem&>(job.problem);
  Carver measure(nullptr);
  TileBackwardWorkspace sizes(problem, measure);
  const Block block(measure.used());
  if (block.data() == nullptr) {
    __atomic_store_n(&job.error, STA_ERROR_MEMORY, __ATOMIC_RELAXED);
    return;
  }
  Carver carver(block.data());
  TileBackwardWorkspace ws(problem, carver);
  TileRegisters registers;
  for (int64_t task = begin; task < end; ++task) {
    for_chunk_frames(job, task,
                     [&](const KeySums<Bfloat16>& sums, int64_t b, int64_t t, int64_t h, int64_t) {
                       ws.sums.bind(problem, sums, t);
                       backward_frame(problem, ws, registers, {b, t, h, 0, problem.params.Nq});
                       write_current(problem, ws.sums, b, t, h);
                     });
  }
}

inline int tile_backward(const StaParams& params, StaParallelFor parallel_for) {
  const TileProblem problem(params);
  return run_backward<Bfloat16>(problem, parallel_for, tile_backward_range);
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_BACKWARD_H_
