// Products that leave the score tile for the head dim:
//   query_sums   out[query] = sum over keys of p[key][query] * rows[key]         O = P V, dQ = dS K
//   key_sums     out[key] += sum over queries of p[key][query] * rows[query]     dV = P^T dO,
//                                                                                dK = dS^T Q
// Both broadcast single scores against vectors of the rows' head dim. They differ in which axis of
// the score tile is summed: kSumStride and kOutStride are its steps inside a panel.
#ifndef STA_CPU_PRODUCTS_H_
#define STA_CPU_PRODUCTS_H_

#include "tile.h"

namespace sta {
namespace STA_ISA {

template <class V, int M, int N>
struct Accumulators {
  typename V::T v[M][N];
};

// acc[m] += sum over s < count of p[s * kSumStride + m * kOutStride] * rows[s][d : d + N * W]
template <class V, int M, int N, int kSumStride, int kOutStride>
STA_INLINE void add_products(Accumulators<V, M, N>& acc, const typename V::Real* p,
                             const typename V::Real* const* rows, int64_t count, int64_t d) {
  for (int64_t s = 0; s < count; ++s, p += kSumStride) {
    const typename V::Real* row = rows[s] + d;
    typename V::T values[N];
    STA_UNROLL
    for (int n = 0; n < N; ++n) values[n] = V::load(row + n * V::W);
    STA_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename V::T score = V::set(p[m * kOutStride]);
      STA_UNROLL
      for (int n = 0; n < N; ++n) acc.v[m][n] = V::fma(score, values[n], acc.v[m][n]);
    }
  }
}

// out[m][d : d + N * W] = acc[m], or += acc[m].
template <class V, int M, int N>
STA_INLINE void flush(const Accumulators<V, M, N>& acc, typename V::Real* const* out, int64_t d,
                      bool add) {
  STA_UNROLL
  for (int m = 0; m < M; ++m) {
    typename V::Real* row = out[m] + d;
    STA_UNROLL
    for (int n = 0; n < N; ++n) {
      typename V::Real* p = row + n * V::W;
      V::store(p, add ? V::load(p) + acc.v[m][n] : acc.v[m][n]);
    }
  }
}

// A register tile's extent along one axis, as a type.
template <int M>
struct GroupSize {
  static constexpr int value = M;
};

// Calls body(row, GroupSize<M>) over `count` rows in groups of kRowGroup, then 4, 2, 1.
template <class Body>
STA_INLINE void for_row_groups(int64_t count, const Body& body) {
  int64_t row = 0;
  for (; row + kRowGroup <= count; row += kRowGroup) body(row, GroupSize<kRowGroup>{});
  if (kRowGroup > 4 && row + 4 <= count) {
    body(row, GroupSize<4>{});
    row += 4;
  }
  if (row + 2 <= count) {
    body(row, GroupSize<2>{});
    row += 2;
  }
  if (row < count) body(row, GroupSize<1>{});
}

// Calls body(d, GroupSize<N>) over slices of the head dim of nearly equal width, N <= kRowVectors
// vectors each.
template <class R, class Body>
STA_INLINE void for_depth_slices(int64_t depth, const Body& body) {
  constexpr int64_t kWidth = Vector<R>::W;
  const int64_t vectors = depth / kWidth;
  const int64_t slices = (vectors + kRowVectors - 1) / kRowVectors;
  int64_t done = 0;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t end = (slice + 1) * vectors / slices;
    switch (end - done) {
      case 1:
        body(done * kWidth, GroupSize<1>{});
        break;
      case 2:
        body(done * kWidth, GroupSize<2>{});
        break;
      default:
        body(done * kWidth, GroupSize<3>{});
    }
    done = end;
  }
}

// total[query][0:depth] += part[query][0:depth], query < queries.
template <class R>
void add_rows(const R* const* part, int64_t queries, int64_t depth, R* const* total) {
  using V = Vector<R>;
  for (int64_t n = 0; n < queries; ++n)
    for (int64_t d = 0; d < depth; d += V::W)
      V::store(total[n] + d, V::load(total[n] + d) + V::load(part[n] + d));
}

// total[query][0:depth] = sum over keys of p[key][query] * rows[key][0:depth], query < queries.
// Keys go in blocks whose rows stay in the first-level cache while all queries pass over them. Many
// blocks would round too much in one sum: those after the first kGroupBlocks are summed in `spare`
// (rows as out's; may be null for fewer keys), a group at a time.
constexpr int64_t kBlockKeys = 96;
constexpr int64_t kGroupBlocks = 8;

template <class R>
void query_sums(const ScoreTile<R>& p, const R* const* rows, int64_t keys, int64_t queries,
                int64_t depth, R* const* total, R* const* spare) {
  using V = Vector<R>;
  constexpr int kLanes = kPanelLanes<R>;
  const int64_t blocks = (keys + kBlockKeys - 1) / kBlockKeys;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * keys / blocks;
    const int64_t count = (block + 1) * keys / blocks - begin;
    const bool first = block % kGroupBlocks == 0;
    const bool last = block % kGroupBlocks == kGroupBlocks - 1 || block == blocks - 1;
    R* const* out = block < kGroupBlocks ? total : spare;
    for_depth_slices<R>(depth, [&](int64_t d, auto n) {
      for (int64_t lane = 0; lane < queries; lane += kLanes) {
        const int64_t rest = min_of(kLanes, queries - lane);
        for_row_groups(rest, [&](int64_t row, auto m) {
          Accumulators<V, decltype(m)::value, decltype(n)::value> acc = {};
          add_products<V, decltype(m)::value, decltype(n)::value, kLanes, 1>(
              acc, p.at(begin, lane) + row, rows + begin, count, d);
          flush(acc, out + lane + row, d, !first);
        });
      }
    });
    if (out != total && last) add_rows(spare, queries, depth, total);
  }
}

// out[key][0:depth] += sum over queries of p[key][query] * rows[query][0:depth], key < keys.
template <class R>
void key_sums(const ScoreTile<R>& p, const R* const* rows, int64_t keys, int64_t queries,
              int64_t depth, R* const* out) {
  using V = Vector<R>;
  constexpr int kLanes = kPanelLanes<R>;
  for_depth_slices<R>(depth, [&](int64_t d, auto n) {
    for_row_groups(keys, [&](int64_t key, auto m) {
      Accumulators<V, decltype(m)::value, decltype(n)::value> acc = {};
      for (int64_t first = 0; first < queries; first += kLanes) {
        add_products<V, decltype(m)::value, decltype(n)::value, 1, kLanes>(
            acc, p.at(key, first), rows + first, min_of(kLanes, queries - first), d);
      }
      flush(acc, out + key, d, true);
    });
  });
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_PRODUCTS_H_
