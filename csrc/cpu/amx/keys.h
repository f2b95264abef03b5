// The keys and values of one frame, packed for tile products a block at a time.
#ifndef STA_CPU_AMX_KEYS_H_
#define STA_CPU_AMX_KEYS_H_

#include "../frame_keys.h"
#include "pack.h"
#if defined(STA_TILES_AVX512_BF16)
#include "multiply_vectors.h"
#else
#include "multiply.h"
#endif

namespace sta {
namespace STA_ISA {

// A frame with more keys is worked on in blocks, so that scratch memory does not grow with them.
constexpr int64_t kTileBlockKeys = 512;
constexpr int64_t kStripQueries = kTileDepth;  // queries a step: two tiles of rows
// Floats between rows of scores: one cache line more than the keys, so that rows do not fall into
// the same cache sets.
constexpr int64_t kRowPadding = 16;

// A call as the tile kernels see it: rows padded to whole products, keys in blocks.
struct TileProblem : Problem<Bfloat16> {
  int64_t most_keys;  // of a block, padded
  bool blocked;       // some frame has more than one block
  float log2e_scale;  // scale_log2e, but never 0: the scores of the padding, -inf, need a sign

  explicit TileProblem(const StaParams& p) : Problem<Bfloat16>(p) {
    depth = round_up(p.D, kTileDepth);
    blocked = max_keys > kTileBlockKeys;
    log2e_scale =
        static_cast<float>(scale_log2e) > 1e-36f ? static_cast<float>(scale_log2e) : 1e-36f;
    most_keys = round_up(min_of(max_keys, kTileBlockKeys), kTileDepth);
    // Queries of a blocked frame share the packing of each block.
    tile_queries = blocked ? 4 * kStripQueries : kStripQueries;
    tiles = (p.Nq + tile_queries - 1) / tile_queries;
  }
  int64_t depth_steps() const { return depth / kTileDepth; }
  int64_t packed_bytes() const { return most_keys * depth * 2; }
};

// Keys first .. first + count - 1 of a frame.
struct KeyBlock {
  int64_t first, count;
  int64_t steps() const { return steps_of(count); }
  int64_t padded() const { return steps() * kTileDepth; }
  int64_t score_row() const { return padded() + kRowPadding; }
};

// Pointers to the rows of one frame's keys and values, in the order of for_keys.
class KeyTable {
 public:
  KeyTable(const TileProblem& problem, Carver& carver) : problem_(problem) {
    k_ = carver.take<const Bfloat16*>(problem.max_keys);
    v_ = carver.take<const Bfloat16*>(problem.max_keys);
    strip_ = carver.take<Bfloat16>(kTileDepth * problem.depth);
    nothing_ = carver.take<Bfloat16>(problem.depth);
  }

  void bind(int64_t b, int64_t t, int64_t h) {
    const StaParams& p = problem_.params;
    count_ = 0;
    for_keys(problem_, t, [&](KeyPart part, int64_t frame, int64_t n) {
      const bool current = part == KeyPart::kCurrent, near = part == KeyPart::kShort;
      const StaTensor& k = current ? p.k_cur : near ? p.k_short : p.k_long;
      const StaTensor& v = current ? p.v_cur : near ? p.v_short : p.v_long;
      k_[count_] = row_of<const Bfloat16>(k, b, frame, n, h);
      v_[count_] = row_of<const Bfloat16>(v, b, frame, n, h);
      ++count_;
    });
  }

  int64_t count() const { return count_; }

  // Calls body(block) for the frame's keys in order.
  template <class Body>
  void for_blocks(const Body& body) const {
    for (int64_t first = 0; first < count_; first += kTileBlockKeys) {
      body(KeyBlock{first, min_of(kTileBlockKeys, count_ - first)});
    }
  }

  // The block's keys and values in the forms asked for; a null pointer: not this one.
  void pack(const KeyBlock& block, char* k_words, char* k_pairs, char* v_words, char* v_pairs) {
    pack_table(k_ + block.first, block.count, k_words, k_pairs);
    pack_table(v_ + block.first, block.count, v_words, v_pairs);
  }

 private:
  void pack_table(const Bfloat16* const* table, int64_t count, char* words, char* pairs) {
    const int64_t strip_bytes = kTileDepth * problem_.depth * 2;
    const int64_t steps = steps_of(count);
    if (words == nullptr && pairs == nullptr) return;
    for (int64_t key = 0; key < count; key += kTileDepth) {
      const Bfloat16* rows[kTileDepth];
      find_strip(table + key, min_of(kTileDepth, count - key), rows);
      const int64_t strip = key / kTileDepth;
      if (words) pack_words(rows, problem_.depth, words + strip * strip_bytes);
      if (pairs) pack_pairs(rows, problem_.depth, steps, pairs + strip * 2 * kTileBytes);
    }
  }

  // The rows themselves where they are as long as `depth`, else padded copies.
  void find_strip(const Bfloat16* const* table, int64_t count, const Bfloat16** rows) {
    const bool direct = problem_.params.D == problem_.depth;
    if (!direct) {
      copy_rows([&](int64_t r) { return table[r]; }, count, problem_.params.D, problem_.depth,
                strip_);
    } else if (count < kTileDepth) {
      memset(nothing_, 0, problem_.depth * sizeof(Bfloat16));
    }
    for (int64_t r = 0; r < kTileDepth; ++r) {
      rows[r] = !direct ? strip_ + r * problem_.depth : r < count ? table[r] : nothing_;
    }
  }

  const TileProblem& problem_;
  const Bfloat16** k_;
  const Bfloat16** v_;
  Bfloat16* strip_;
  Bfloat16* nothing_;
  int64_t count_ = 0;
};

// Calls body(strip) for the strips of a tile, or a frame, of queries.
template <class Body>
STA_INLINE void for_strips(const QueryTile& tile, const Body& body) {
  for (int64_t n = 0; n < tile.count; n += kStripQueries) {
    body(QueryTile{tile.b, tile.t, tile.h, tile.first + n, min_of(kStripQueries, tile.count - n)});
  }
}

// Copies of a strip's rows of q or grad_out, and rows of zeros up to a whole strip.
inline void copy_strip(const TileProblem& problem, const StaTensor& x, const QueryTile& strip,
                       Bfloat16* out) {
  copy_rows(
      [&](int64_t r) {
        return row_of<const Bfloat16>(x, strip.b, strip.t, strip.first + r, strip.h);
      },
      strip.count, problem.params.D, problem.depth, out);
}

inline void add_row(const float* from, int64_t depth, float* to) {
  for (int64_t d = 0; d < depth; d += kLanes) {
    store_floats(to + d, load_floats(to + d) + load_floats(from + d));
  }
}

// out[0:n] = factor * sums[0:n] in bfloat16. sums is padded to depth.
inline void store_bfloat16(const float* sums, float factor, int64_t n, Bfloat16* out) {
  const Floats factors = set_floats(factor);
  for (int64_t d = 0; d < n; d += kTileDepth) {
    const Words rounded = round_to_bfloat16(load_floats(sums + d) * factors,
                                            load_floats(sums + d + kLanes) * factors);
    if (d + kTileDepth <= n) {
      store_words(out + d, rounded);
    } else {
      __builtin_memcpy(out + d, &rounded, (n - d) * sizeof(Bfloat16));
    }
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_KEYS_H_
