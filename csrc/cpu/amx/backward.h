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
constexpr int64_t kGroupStrips = 8;

struct TileBackwardWorkspace {
  KeyTable keys;
  char *k_words, *k_pairs, *v_words;
  float *dk, *dv;                      // [key of a block][depth]
  Bfloat16 *queries, *grad_out;        // [query of a strip][depth]
  char *query_pairs, *grad_out_pairs;  // [strip of a group], packed
  float *scores, *grad_weights;        // [query of a strip][key]: S, then e^(S - max); dP
  Bfloat16* grad_scores;               // a strip_matrix of queries and keys: dS
  char *p_columns, *ds_columns;        // [strip of a group][16 keys] tiles: P^T, dS^T
  float* grad_q;                       // [query][depth]: of a strip, or of a blocked frame
  float* maximum;                      // [query] of a blocked frame, as are the next
  RowSums* row_sums;

  TileBackwardWorkspace(const TileProblem& problem, Carver& carver) : keys(problem, carver) {
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
    grad_scores = carver.take<Bfloat16>(kStripQueries * problem.most_keys);
    p_columns = carver.take<char>(kGroupStrips * tile_row_bytes);
    ds_columns = carver.take<char>(kGroupStrips * tile_row_bytes);
    grad_q = carver.take<float>(max_of(kStripQueries, frame) * problem.depth);
    maximum = carver.take<float>(max_of(kStripQueries, frame));
    row_sums = carver.take<RowSums>(frame);
  }
};

inline void pack_strip_pairs(const Bfloat16* strip, int64_t depth, char* out) {
  const Bfloat16* rows[kStripQueries];
  for (int64_t r = 0; r < kStripQueries; ++r) rows[r] = strip + r * depth;
  pack_pairs(rows, depth, kGroupStrips, out);
}

// The strip's queries and incoming gradients, and its S and dP for the keys of a block.
inline void backward_products(const TileProblem& problem, TileBackwardWorkspace& ws,
                              TileRegisters& registers, const QueryTile& strip,
                              const KeyBlock& block, int64_t slot) {
  const StaParams& p = problem.params;
  const int64_t depth = problem.depth, packed = slot * 2 * kTileBytes;
  copy_strip(problem, p.q, strip, ws.queries);
  copy_strip(problem, p.grad_out, strip, ws.grad_out);
  pack_strip_pairs(ws.queries, depth, ws.query_pairs + packed);
  pack_strip_pairs(ws.grad_out, depth, ws.grad_out_pairs + packed);
  if (problem.query_sign < 0) negate(ws.queries, kStripQueries * depth);
  const auto product = [&](const Bfloat16* left, const char* right, float* out) {
    multiply(registers, rows_matrix(left, 2 * depth), strip.count,
             packed_matrix(right, problem.depth_steps()), block.padded(), depth, out,
             block.score_row(), false);
  };
  product(ws.queries, ws.k_words, ws.scores);
  product(ws.grad_out, ws.v_words, ws.grad_weights);
}

// First pass of a blocked frame: maxima and sums over all keys.
inline void find_row_sums(const TileProblem& problem, TileBackwardWorkspace& ws,
                          TileRegisters& registers, const QueryTile& frame) {
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
                                               block.count, maximum, problem.log2e_scale);
        const float shrunk = Exponential(maximum, problem.log2e_scale)(set_floats(before))[0];
        sums.weights = sums.weights * shrunk + found.weights;
        sums.weighted = sums.weighted * shrunk + found.weighted;
      }
    });
  });
}

// The factors of one row; its scores become exponentials.
STA_INLINE RowFactors row_factors(const TileProblem& problem, TileBackwardWorkspace& ws,
                                  const QueryTile& strip, int64_t n, const KeyBlock& block) {
  const StaParams& p = problem.params;
  const int64_t query = strip.first + n, row = n * block.score_row();
  RowSums sums = row_exponentials(ws.scores + row, ws.grad_weights + row, block.count,
                                  ws.maximum[problem.blocked ? query : n], problem.log2e_scale);
  if (problem.blocked) sums = ws.row_sums[query];
  const float* grad_lse = static_cast<const float*>(p.grad_lse);
  const int64_t at = ((strip.b * p.T + strip.t) * p.H + strip.h) * p.Nq + query;
  const float inverse = 1.0f / sums.weights;
  return {inverse, sums.weighted * inverse - (grad_lse ? grad_lse[at] : 0.0f)};
}

// Queries 2 * pair and the next: dS as rows; P and dS as alternating elements, which replace the
// first query's row of scores and of grad_weights. Queries of the padding give zeros.
template <int kQueries>
STA_INLINE void weigh_pair(const TileProblem& problem, TileBackwardWorkspace& ws,
                           const QueryTile& strip, const KeyBlock& block, int64_t pair) {
  const int64_t n = 2 * pair, score_row = block.score_row();
  RowFactors factors[2];
  for (int i = 0; i < kQueries; ++i) factors[i] = row_factors(problem, ws, strip, n + i, block);
  float* scores = ws.scores + n * score_row;
  float* grad_weights = ws.grad_weights + n * score_row;
  Bfloat16* grad_scores = ws.grad_scores + n * kTileDepth;
  for (int64_t key = 0; key < block.padded(); key += kTileDepth) {
    RowGradient g[2] = {};
    STA_UNROLL
    for (int i = 0; i < kQueries; ++i) {
      const int64_t at = i * score_row + key;
      g[i] = row_gradient(scores + at, grad_weights + at, factors[i]);
      store_words(grad_scores + i * kTileDepth + key * kStripQueries, g[i].grad_scores);
    }
    store_words(scores + key, alternate_low(g[0].weights, g[1].weights));
    store_words(scores + key + kLanes, alternate_high(g[0].weights, g[1].weights));
    store_words(grad_weights + key, alternate_low(g[0].grad_scores, g[1].grad_scores));
    store_words(grad_weights + key + kLanes, alternate_high(g[0].grad_scores, g[1].grad_scores));
  }
}

// P and dS of a strip.
inline void weigh_strip(const TileProblem& problem, TileBackwardWorkspace& ws,
                        const QueryTile& strip, const KeyBlock& block) {
  for (int64_t n = 0; n < strip.count && !problem.blocked; ++n) {
    ws.maximum[n] = row_maximum(ws.scores + n * block.score_row(), block.count);
  }
  for (int64_t pair = 0; pair < kTileRows; ++pair) {
    const int64_t queries = strip.count - 2 * pair;
    if (queries >= 2) {
      weigh_pair<2>(problem, ws, strip, block, pair);
    } else if (queries == 1) {
      weigh_pair<1>(problem, ws, strip, block, pair);
    } else {
      weigh_pair<0>(problem, ws, strip, block, pair);
    }
  }
}

// Alternating elements, one pair of queries in every other row of a score tile, become tiles whose
// rows are keys, 32 queries each.
inline void transpose_pairs(const float* pairs, const KeyBlock& block, char* columns) {
  for (int64_t half = 0; half < 2 * block.steps(); ++half) {
    char* rows = columns + half / 2 * 2 * kTileBytes + half % 2 * 4 * 64;
    transpose_words(
        [&](int64_t k) {
          return reinterpret_cast<const char*>(pairs + 2 * k * block.score_row() + half * kLanes);
        },
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
  transpose_pairs(ws.scores, block, ws.p_columns + slot * tiles * kTileBytes);
  transpose_pairs(ws.grad_weights, block, ws.ds_columns + slot * tiles * kTileBytes);
  float* grad_q = problem.blocked ? ws.grad_q + strip.first * problem.depth : ws.grad_q;
  multiply(registers, strip_matrix(ws.grad_scores), strip.count,
           packed_matrix(ws.k_pairs, block.steps()), problem.depth, block.count, grad_q,
           problem.depth, block.first > 0);
  if (!problem.blocked) write_grad_q(problem, grad_q, strip);
}

// ws.dk and ws.dv from a group of `queries` in strips, added to those of the groups before.
inline void add_group(const TileProblem& problem, TileBackwardWorkspace& ws,
                      TileRegisters& registers, const KeyBlock& block, int64_t queries, bool add) {
  const auto columns = [&](const char* tiles) {
    return TileMatrix{tiles, 64, kTileBytes, kTileBytes, 2 * block.steps() * kTileBytes};
  };
  const auto product = [&](const char* left, const char* right, float* sums) {
    multiply(registers, columns(left), block.count, packed_matrix(right, kGroupStrips),
             problem.depth, queries, sums, problem.depth, add);
  };
  product(ws.ds_columns, ws.query_pairs, ws.dk);
  product(ws.p_columns, ws.grad_out_pairs, ws.dv);
}

// The frame's own keys are finished; those of other frames' keys are added to the task's sums.
inline void hand_over(const TileProblem& problem, const TileBackwardWorkspace& ws,
                      const QueryTile& frame, const KeyBlock& block,
                      const KeySums<Bfloat16>& sums) {
  const StaParams& p = problem.params;
  int64_t key = -block.first;
  for_keys(problem, frame.t, [&](KeyPart part, int64_t t, int64_t n) {
    const int64_t row = key++;
    if (row < 0 || row >= block.count) return;
    const float* dk = ws.dk + row * problem.depth;
    const float* dv = ws.dv + row * problem.depth;
    if (part == KeyPart::kCurrent) {
      store_bfloat16(dk, static_cast<float>(p.scale), p.D,
                     row_of<Bfloat16>(p.grad_k_cur, frame.b, frame.t, n, frame.h));
      store_bfloat16(dv, 1.0f, p.D, row_of<Bfloat16>(p.grad_v_cur, frame.b, frame.t, n, frame.h));
    } else {
      const int64_t to = part == KeyPart::kShort ? sums.short_row(t, n) : sums.long_row(n);
      add_row(dk, problem.depth, sums.dk(to));
      add_row(dv, problem.depth, sums.dv(to));
    }
  });
}

// The gradients of a block of keys, over all queries of the frame.
inline void backward_block(const TileProblem& problem, TileBackwardWorkspace& ws,
                           TileRegisters& registers, const QueryTile& frame, const KeyBlock& block,
                           const KeySums<Bfloat16>& sums) {
  ws.keys.pack(block, ws.k_words, ws.k_pairs, ws.v_words, nullptr);
  int64_t strips = 0;
  bool add = false;
  for_strips(frame, [&](const QueryTile& strip) {
    backward_strip(problem, ws, registers, strip, block, strips++);
    const bool last = strip.first + strip.count == frame.count;
    if (strips < kGroupStrips && !last) return;
    add_group(problem, ws, registers, block, (strips - 1) * kStripQueries + strip.count, add);
    strips = 0;
    add = true;
  });
  if (frame.count == 0) {
    memset(ws.dk, 0, block.count * problem.depth * sizeof(float));
    memset(ws.dv, 0, block.count * problem.depth * sizeof(float));
  }
  hand_over(problem, ws, frame, block, sums);
}

inline void backward_frame(const TileProblem& problem, TileBackwardWorkspace& ws,
                           TileRegisters& registers, const QueryTile& frame,
                           const KeySums<Bfloat16>& sums) {
  ws.keys.bind(frame.b, frame.t, frame.h);
  if (problem.blocked) find_row_sums(problem, ws, registers, frame);
  ws.keys.for_blocks(
      [&](const KeyBlock& block) { backward_block(problem, ws, registers, frame, block, sums); });
  if (!problem.blocked) return;
  for_strips(frame, [&](const QueryTile& strip) {
    write_grad_q(problem, ws.grad_q + strip.first * problem.depth, strip);
  });
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_BACKWARD_H_
