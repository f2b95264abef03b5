// Forward with tile products: 32 queries a step against all keys of a frame,
//   S = Q K^T by tiles, softmax along the rows of S, O = P V by tiles.
// Keys and values are packed once a frame and head. Frames with more than kTileBlockKeys keys go in
// blocks, after a first pass over all blocks has found the maxima.
#ifndef STA_CPU_AMX_FORWARD_H_
#define STA_CPU_AMX_FORWARD_H_

#include "../forward.h"
#include "keys.h"
#include "softmax.h"

namespace sta {
namespace STA_ISA {

struct TileForwardWorkspace {
  KeyTable keys;
  char* k_words;
  char* v_pairs;
  Bfloat16* queries;  // [query][depth]
  float* scores;      // [query of a strip][key]
  Bfloat16* weights;  // a strip_matrix of queries and keys
  float* out;         // [query][depth], not yet divided by the softmax's sum
  float* maximum;     // [query]
  float* sum;         // [query]

  TileForwardWorkspace(const TileProblem& problem, Carver& carver) : keys(problem, carver) {
    k_words = carver.take<char>(problem.packed_bytes());
    v_pairs = carver.take<char>(problem.packed_bytes());
    queries = carver.take<Bfloat16>(problem.tile_queries * problem.depth);
    const int64_t score_row = problem.most_keys + kRowPadding;
    scores = carver.take<float>(kStripQueries * score_row);
    weights = carver.take<Bfloat16>(kStripQueries * problem.most_keys);
    out = carver.take<float>(problem.tile_queries * problem.depth);
    maximum = carver.take<float>(problem.tile_queries);
    sum = carver.take<float>(problem.tile_queries);
  }
};

// ws.scores of the strip that begins with query n of the tile.
inline void strip_scores(const TileProblem& problem, TileForwardWorkspace& ws,
                         TileRegisters& registers, int64_t n, int64_t count,
                         const KeyBlock& block) {
  multiply(registers, rows_matrix(ws.queries + n * problem.depth, 2 * problem.depth), count,
           packed_matrix(ws.k_words, problem.depth_steps()), block.count, problem.depth, ws.scores,
           block.score_row(), false);
}

// First pass of a blocked frame.
inline void find_maxima(const TileProblem& problem, TileForwardWorkspace& ws,
                        TileRegisters& registers, const QueryTile& tile) {
  for (int64_t n = 0; n < tile.count; ++n) ws.maximum[n] = -__builtin_inff();
  ws.keys.for_blocks([&](const KeyBlock& block) {
    ws.keys.pack(block, ws.k_words, nullptr, nullptr, nullptr);
    for_strips(tile, [&](const QueryTile& strip) {
      strip_scores(problem, ws, registers, strip.first - tile.first, strip.count, block);
      for (int64_t n = 0; n < strip.count; ++n) {
        float& maximum = ws.maximum[strip.first - tile.first + n];
        const float top = row_maximum(ws.scores + n * block.score_row(), block.count);
        maximum = top > maximum ? top : maximum;
      }
    });
  });
}

// Adds the block's keys to the output of the strip that begins with query `first` of the tile.
inline void forward_strip(const TileProblem& problem, TileForwardWorkspace& ws,
                          TileRegisters& registers, int64_t first, int64_t count,
                          const KeyBlock& block, Prefetch& prefetch) {
  strip_scores(problem, ws, registers, first, count, block);
  // Maxima first: products by tiles slow 512-bit arithmetic down for some hundred cycles, which
  // then pass with loads.
  for (int64_t n = 0; n < count && !problem.blocked; ++n) {
    ws.maximum[n] = row_maximum(ws.scores + n * block.score_row(), block.count);
  }
  for (int64_t n = 0; n < count; ++n) {
    const float sum =
        row_weights(ws.scores + n * block.score_row(), block.count, ws.maximum[first + n],
                    problem.log2e_scale, ws.weights + n * kTileDepth);
    ws.sum[first + n] = block.first > 0 ? ws.sum[first + n] + sum : sum;
    prefetch.step();
  }
  multiply(registers, strip_matrix(ws.weights), count, packed_matrix(ws.v_pairs, block.steps()),
           problem.depth, block.count, ws.out + first * problem.depth, problem.depth,
           block.first > 0);
}

inline void write_tile(const TileProblem& problem, const TileForwardWorkspace& ws,
                       const QueryTile& tile) {
  const StaParams& p = problem.params;
  for (int64_t n = 0; n < tile.count; ++n) {
    store_bfloat16(ws.out + n * problem.depth, 1.0f / ws.sum[n], p.D,
                   row_of<Bfloat16>(p.out, tile.b, tile.t, tile.first + n, tile.h));
  }
  if (p.lse == nullptr) return;
  float* lse =
      static_cast<float*>(p.lse) + ((tile.b * p.T + tile.t) * p.H + tile.h) * p.Nq + tile.first;
  const float scale = static_cast<float>(__builtin_fabs(p.scale));
  for (int64_t n = 0; n < tile.count; ++n) {
    lse[n] = ws.maximum[n] * scale;
    if (!__builtin_isinf(ws.maximum[n])) lse[n] += natural_log(ws.sum[n]);
  }
}

inline void forward_queries(const TileProblem& problem, TileForwardWorkspace& ws,
                            TileRegisters& registers, const QueryTile& tile,
                            const QueryTile& next) {
  const StaParams& p = problem.params;
  Prefetch prefetch(p.D * sizeof(Bfloat16));
  prefetch.add<Bfloat16>(p.out, tile.b, tile.t, tile.first, tile.count, tile.h);
  prefetch.add<Bfloat16>(p.q, next.b, next.t, next.first, next.count, next.h);
  if (next.count > 0 && next.first == 0) {
    prefetch_new_keys(problem, next.b, next.t, next.h, prefetch);
  }
  prefetch.spread(tile.count);
  for_strips(tile, [&](const QueryTile& strip) {
    copy_strip(problem, p.q, strip, ws.queries + (strip.first - tile.first) * problem.depth);
  });
  if (problem.query_sign < 0) negate(ws.queries, problem.tile_queries * problem.depth);
  if (problem.blocked) find_maxima(problem, ws, registers, tile);
  ws.keys.for_blocks([&](const KeyBlock& block) {
    if (problem.blocked) ws.keys.pack(block, ws.k_words, nullptr, nullptr, ws.v_pairs);
    for_strips(tile, [&](const QueryTile& strip) {
      forward_strip(problem, ws, registers, strip.first - tile.first, strip.count, block, prefetch);
    });
  });
  write_tile(problem, ws, tile);
}

inline void bind_frame(const TileProblem& problem, TileForwardWorkspace& ws,
                       const QueryTile& tile) {
  ws.keys.bind(tile.b, tile.t, tile.h);
  if (problem.blocked) return;
  ws.keys.for_blocks([&](const KeyBlock& block) {
    ws.keys.pack(block, ws.k_words, nullptr, nullptr, ws.v_pairs);
  });
}

// Units as forward_unit counts them.
inline void forward_units(const TileProblem& problem, TileForwardWorkspace& ws,
                          TileRegisters& registers, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const QueryTile tile = forward_unit(problem, unit);
    const QueryTile next = unit + 1 < end ? forward_unit(problem, unit + 1) : QueryTile{};
    if (unit == begin || tile.first == 0) bind_frame(problem, ws, tile);
    forward_queries(problem, ws, registers, tile, next);
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_FORWARD_H_
