// All seven gradients in one pass over the scores: five products, where separate kernels for the
// queries' and the keys' gradients would need seven.
//
// A block owns a few consecutive frames of one head and takes them one after another. Each warp
// holds 16 keys and their gradients in registers while the frame's queries stream past; a tile's
// score gradients meet in shared memory, from where the warps share out the queries' gradient. A
// frame's own keys are finished then. Short and long keys are shared between frames: the block adds
// what its frames give them into float rows of its own (never T x (window - 1) x Ns of them), and
// `reduce_shared_keys` adds the rows of all blocks in the order of the frames. No atomics.
#ifndef STA_CUDA_BACKWARD_H_
#define STA_CUDA_BACKWARD_H_

#include "cuda/tiles.h"

namespace sta {

constexpr int kTile = 64;  // queries
constexpr int kHalf = 32;  // of them at a time in registers
constexpr int kScorePitch = kTile + 8;
constexpr int kTurns = kTile / kHalf + 1;  // before, between and after the two halves

// Registers bound the warps of a block: 2 * D / 2 of them hold the gradients of 16 keys.
template <int D>
constexpr int kBackwardWarps = D > 96 ? 8 : 12;

struct BackwardArguments {
  Problem p;
  Gradients grads;
  int frames;       // that a block takes
  int chunks;       // of frames in a clip
  int shared_rows;  // short and long keys that a chunk's frames can attend
  int passes;       // over the keys of a frame: 1 where the warps can hold them all
  float* grad_k;    // (B, chunks, H, shared_rows, D)
  float* grad_v;
  float* grad_q;  // (B, T, H, Nq, D) sums over the passes before the last; unused where passes == 1
};

// The frames of one chunk, and where its rows for shared keys lie: those of the short keys that a
// window of its frames can hold, then those of the long keys.
struct Chunk {
  int begin, end, first_short, per_frame, longs;

  __device__ __forceinline__ Chunk(const BackwardArguments& a, int index) {
    begin = index * a.frames;
    end = min(a.p.T, begin + a.frames);
    first_short = begin - a.p.behind;  // frame; may lie before the clip
    per_frame = a.p.Ns;
    longs = (a.frames + a.p.behind + a.p.ahead) * per_frame;
  }

  // The float row for a key that is not a frame's own, of the chunk that block `block` takes.
  __device__ __forceinline__ int64_t row_of(const BackwardArguments& a, const Row& row,
                                            int block) const {
    const int of_chunk = row.part == Part::kLong
                             ? longs + row.token
                             : (row.frame - first_short) * per_frame + row.token;
    return static_cast<int64_t>(block) * a.shared_rows + of_chunk;
  }

  // The first frame of the chunk that attends short keys of `frame`; end or more where none does.
  __device__ __forceinline__ int first_to_attend(const Problem& p, int frame) const {
    const int first = max(begin, frame - p.ahead);
    return first == frame - p.frame_offset ? first + 1 : first;
  }

  __device__ __forceinline__ bool attends(const Problem& p, int frame) const {
    const int first = first_to_attend(p, frame);
    return first < end && first <= frame + p.behind;
  }
};

// Which clip, chunk of frames and head this block works on. Computed anew wherever it is needed:
// the gradients in registers leave no room to keep it.
struct BackwardPlace {
  int h, chunk, b;

  __device__ __forceinline__ explicit BackwardPlace(const BackwardArguments& a) {
    const int n = opaque(blockIdx.x);
    h = n % a.p.H;
    chunk = n / a.p.H % a.chunks;
    b = n / a.p.H / a.chunks;
  }

  __device__ __forceinline__ int first_frame(const BackwardArguments& a) const {
    return chunk * a.frames;
  }
  __device__ __forceinline__ int end_frame(const BackwardArguments& a) const {
    return min(a.p.T, (chunk + 1) * a.frames);
  }
};

// The keys that a block holds at a time: 16 for each warp, from row `begin` of frame i's sequence.
struct Pass {
  int keys, rows;  // up to the frame's last key; in shared memory
  bool last;       // of the frame

  __device__ __forceinline__ Pass(const Problem& p, int i, int begin) {
    const int capacity = warps() * kStrip;
    keys = FrameKeys(p, opaque(i)).count - begin;
    rows = min(capacity, ceil_div(keys, kStrip) * kStrip);
    last = keys <= capacity;
  }
};

// Starts copying the keys and values of a pass.
template <typename T, int D>
__device__ __forceinline__ void copy_pass(T* keys, T* values, const BackwardArguments& a, int i,
                                          int begin) {
  const BackwardPlace at(a);
  copy_keys<T, D>(keys, values, a.p, FrameKeys(a.p, opaque(i)), at.b, at.h, begin,
                  Pass(a.p, i, begin).rows);
}

// Starts copying a tile of queries and incoming gradients.
template <typename T, int D>
__device__ __forceinline__ void copy_tile(T* queries, T* grads, const BackwardArguments& a, int i,
                                          int begin) {
  const BackwardPlace at(a);
  const int thread = opaque(threadIdx.x);
  copy_queries<T, D>(queries, a.p.q, a.p.Nq, at.b, i, at.h, begin, kTile, thread, blockDim.x);
  copy_queries<T, D>(grads, a.grads.out, a.p.Nq, at.b, i, at.h, begin, kTile, thread, blockDim.x);
}

// For each query of a tile its lse in base 2 and delta = sum(grad_out * out) - grad_lse. A query
// past the last gets lse = inf, so all its weights are 0.
template <typename T, int D>
__device__ __forceinline__ void read_statistics(float* lse, float* delta,
                                                const BackwardArguments& a, int i, int begin) {
  const Problem& p = a.p;
  const BackwardPlace place(a);
  const int thread = opaque(threadIdx.x);
#pragma unroll 1
  for (int r = thread / kLanesPerRow; r < kTile; r += blockDim.x / kLanesPerRow) {
    const int query = begin + r;
    float sum = 0.f;
    if (query < p.Nq) {
      const T* out = token<T>(p.out, place.b, i, query, place.h);
      const T* grad = token<T>(a.grads.out, place.b, i, query, place.h);
#pragma unroll
      for (int d = thread % kLanesPerRow * 8; d < D; d += kLanesPerRow * 8) {
        const uint4 x = *reinterpret_cast<const uint4*>(out + d);
        const uint4 y = *reinterpret_cast<const uint4*>(grad + d);
        const uint32_t xs[4] = {x.x, x.y, x.z, x.w};
        const uint32_t ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 u = unpack<T>(xs[e]);
          const float2 v = unpack<T>(ys[e]);
          sum += u.x * v.x + u.y * v.y;
        }
      }
    }
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (thread % kLanesPerRow == 0) {
      const int64_t at = statistics_row(p, place.b, i, place.h) + query;
      const bool present = query < p.Nq;
      const float incoming = present && a.grads.lse != nullptr ? a.grads.lse[at] : 0.f;
      lse[r] = present ? p.lse[at] * kLog2E : INFINITY;
      delta[r] = sum - incoming;
    }
  }
}

// 16 keys of one warp and what half a tile of queries does to their gradients.
template <typename T, int D>
struct Strip {
  static constexpr int P = kPitch<D>;

  float grad_k[D / 8][4], grad_v[D / 8][4];

  __device__ __forceinline__ Strip() {
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) grad_k[n][e] = grad_v[n][e] = 0.f;
  }

  // keys, values: this warp's rows; queries, grads, lse, delta: of half a tile; score_grads: this
  // warp's rows of [key][query], at the half tile's first column. Rows from `present` on are no
  // keys.
  __device__ __forceinline__ void step(const T* keys, const T* values, const T* queries,
                                       const T* grads, const float* lse, const float* delta,
                                       float scale_log2, int present, T* score_grads) {
    float weights[kHalf / 8][4];
    multiply(weights, keys, queries);
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float score = weights[n][e] * scale_log2 - lse[n * 8 + lane() % 4 * 2 + e % 2];
        weights[n][e] = lane() / 4 + e / 2 * 8 < present ? exp2_fast(score) : 0.f;
      }
    accumulate(grad_v, weights, grads);

    float gradients[kHalf / 8][4];  // of the scaled scores
    multiply(gradients, values, grads);
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        gradients[n][e] = weights[n][e] * (gradients[n][e] - delta[n * 8 + lane() % 4 * 2 + e % 2]);
    accumulate(grad_k, gradients, queries);

#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* row = score_grads + (half * 8 + lane() / 4) * kScorePitch;
        reinterpret_cast<uint32_t*>(row + n * 8)[lane() % 4] =
            pack<T>(gradients[n][2 * half], gradients[n][2 * half + 1]);
      }
  }

  // products = rows (16 x D) times the transpose of columns (kHalf x D).
  __device__ __forceinline__ void multiply(float (&products)[kHalf / 8][4], const T* rows,
                                           const T* columns) {
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) products[n][e] = 0.f;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t a[4];
      left<T, P>(a, rows + d);
#pragma unroll
      for (int n = 0; n < kHalf / 16; ++n) {
        uint32_t b[4];
        right_transposed<T, P>(b, columns + n * 16 * P + d);
        multiply_add<T>(products[2 * n], a, b[0], b[1]);
        multiply_add<T>(products[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // sums (16 x D) += weights (16 x kHalf) rows (kHalf x D).
  __device__ __forceinline__ void accumulate(float (&sums)[D / 8][4],
                                             const float (&weights)[kHalf / 8][4], const T* rows) {
#pragma unroll
    for (int k = 0; k < kHalf / 16; ++k) {
      uint32_t a[4];
      as_left<T>(a, weights[2 * k], weights[2 * k + 1]);
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        right<T, P>(b, rows + k * 16 * P + n * 16);
        multiply_add<T>(sums[2 * n], a, b[0], b[1]);
        multiply_add<T>(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // Writes the gradients of rows `begin` and on of the frame's sequence: own keys for good, shared
  // ones into the chunk's rows.
  __device__ __forceinline__ void write(const BackwardArguments& a, int i, int begin) {
    const FrameKeys frame(a.p, opaque(i));
    const BackwardPlace place(a);
    const Chunk chunk(a, place.chunk);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = begin + half * 8 + lane() / 4;
      const bool present = r < frame.count;
      const Row row = frame.row(present ? r : 0);
      const bool own = present && row.part == Part::kCurrent;
      T* own_k = token<T>(a.grads.k_cur, place.b, i, own ? row.token : 0, place.h);
      T* own_v = token<T>(a.grads.v_cur, place.b, i, own ? row.token : 0, place.h);
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        const float (&x)[4] = grad_k[2 * n];
        const float (&y)[4] = grad_k[2 * n + 1];
        store_pairs(own_k + n * 16, pack<T>(x[2 * half] * a.p.scale, x[2 * half + 1] * a.p.scale),
                    pack<T>(y[2 * half] * a.p.scale, y[2 * half + 1] * a.p.scale), own);
        const float (&u)[4] = grad_v[2 * n];
        const float (&v)[4] = grad_v[2 * n + 1];
        store_pairs(own_v + n * 16, pack<T>(u[2 * half], u[2 * half + 1]),
                    pack<T>(v[2 * half], v[2 * half + 1]), own);
      }
      if (own || !present) continue;
      const int first = row.part == Part::kLong ? max(chunk.begin, row.token - a.p.long_lead + 1)
                                                : chunk.first_to_attend(a.p, row.frame);
      const int64_t at =
          chunk.row_of(a, row, (place.b * a.chunks + place.chunk) * a.p.H + place.h) * D;
      add(a.grad_k + at, grad_k, half, a.p.scale, i == first);
      add(a.grad_v + at, grad_v, half, 1.f, i == first);
    }
  }

  __device__ __forceinline__ void add(float* row, const float (&sums)[D / 8][4], int half,
                                      float factor, bool first) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      float2* at = reinterpret_cast<float2*>(row + n * 8) + lane() % 4;
      const float2 before = first ? float2{0.f, 0.f} : *at;
      *at =
          float2{before.x + sums[n][2 * half] * factor, before.y + sums[n][2 * half + 1] * factor};
    }
  }
};

// The queries' gradient of a tile: score_grads^T (kTile x rows) times keys (rows x D), in pieces of
// 16 queries by kColumns channels shared out to the warps.
template <typename T, int D>
__device__ __forceinline__ void query_gradient(const BackwardArguments& a, const T* score_grads,
                                               const T* keys, int i, int begin, int query) {
  constexpr int P = kPitch<D>;
  constexpr int kColumns = 32;
  constexpr int kPieces = kTile / kStrip * (D / kColumns);
#pragma unroll 1
  for (int piece = opaque(warp()); piece < kPieces; piece += warps()) {
    const BackwardPlace place(a);
    const Pass pass(a.p, i, begin);
    const bool first = begin == 0;
    const int q0 = piece % (kTile / kStrip) * kStrip;
    const int d0 = piece / (kTile / kStrip) * kColumns;
    if (query + q0 >= a.p.Nq) continue;
    float sums[kColumns / 8][4];
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[n][e] = 0.f;
#pragma unroll 1
    for (int k = 0; k < pass.rows; k += 16) {
      uint32_t left_side[4];
      left_transposed<T, kScorePitch>(left_side, score_grads + k * kScorePitch + q0);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t right_side[4];
        right<T, P>(right_side, keys + k * P + d0 + n * 16);
        multiply_add<T>(sums[2 * n], left_side, right_side[0], right_side[1]);
        multiply_add<T>(sums[2 * n + 1], left_side, right_side[2], right_side[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int nth = query + q0 + half * 8 + lane() / 4;
      const bool present = nth < a.p.Nq;
      if (!(first && pass.last)) {
        // The same lane takes the same elements in every pass.
        float* row =
            a.grad_q + (statistics_row(a.p, place.b, i, place.h) + (present ? nth : 0)) * D;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
          float2* at = reinterpret_cast<float2*>(row + d0 + n * 8) + lane() % 4;
          if (present && !first) {
            sums[n][2 * half] += at->x;
            sums[n][2 * half + 1] += at->y;
          }
          if (present && !pass.last) *at = float2{sums[n][2 * half], sums[n][2 * half + 1]};
        }
      }
      if (!pass.last) continue;
      T* row = token<T>(a.grads.q, place.b, i, present ? nth : 0, place.h) + d0;
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n)
        store_pairs(
            row + n * 16,
            pack<T>(sums[2 * n][2 * half] * a.p.scale, sums[2 * n][2 * half + 1] * a.p.scale),
            pack<T>(sums[2 * n + 1][2 * half] * a.p.scale,
                    sums[2 * n + 1][2 * half + 1] * a.p.scale),
            present);
    }
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kBackwardWarps<D> * 32)
    backward(const __grid_constant__ BackwardArguments a) {
  constexpr int P = kPitch<D>;
  const Problem& p = a.p;
  const int capacity = warps() * kStrip;  // keys of one pass
  T* keys = reinterpret_cast<T*>(shared_memory());
  T* values = keys + capacity * P;
  T* stages = values + capacity * P;  // queries and incoming gradients of one tile, of the next
  T* score_grads = stages + 4 * kTile * P;
  float* statistics = reinterpret_cast<float*>(score_grads + capacity * kScorePitch);

  for (int i = BackwardPlace(a).first_frame(a); i < BackwardPlace(a).end_frame(a); ++i) {
    for (int begin = 0; begin < FrameKeys(p, opaque(i)).count; begin += capacity) {
      __syncthreads();  // the last frame's keys, tiles and statistics are done with
      copy_pass<T, D>(keys, values, a, i, begin);
      copy_tile<T, D>(stages, stages + kTile * P, a, i, 0);
      copy_commit();
      read_statistics<T, D>(statistics, statistics + kTile, a, i, 0);
      Strip<T, D> strip;
      for (int query = 0; query < p.Nq; query += kTile) {
        const int stage = query / kTile % 2;
        const T* queries = stages + stage * 2 * kTile * P;
        const T* grads = queries + kTile * P;
        const float* lse = statistics + stage * 2 * kTile;
        copy_wait<0>();
        __syncthreads();  // this tile is there; the last one and its score gradients are done with
        if (query + kTile < p.Nq) {
          T* next = stages + (stage ^ 1) * 2 * kTile * P;
          copy_tile<T, D>(next, next + kTile * P, a, i, query + kTile);
        }
        copy_commit();
#pragma unroll 1
        for (int turn = 0; turn < kTurns; ++turn) {
          // The next tile's statistics are a wait for memory. Warps of one scheduler, which are
          // four apart, take turns at it, so that the others keep multiplying.
          if (turn == warp() / 4 % kTurns && query + kTile < p.Nq) {
            float* next_lse = statistics + (stage ^ 1) * 2 * kTile;
            read_statistics<T, D>(next_lse, next_lse + kTile, a, i, query + kTile);
          }
          const int q = turn * kHalf;
          const int present = Pass(p, i, begin).keys - warp() * kStrip;
          if (q < kTile && present > 0)
            strip.step(keys + warp() * kStrip * P, values + warp() * kStrip * P, queries + q * P,
                       grads + q * P, lse + q, lse + kTile + q, p.scale_log2, present,
                       score_grads + warp() * kStrip * kScorePitch + q);
        }
        __syncthreads();  // the tile's score gradients are complete
        query_gradient<T, D>(a, score_grads, keys, i, begin, query);
      }
      copy_wait<0>();  // without queries nobody has waited for the keys
      strip.write(a, i, begin + warp() * kStrip);
    }
  }
}

// Adds the chunks' rows in the order of the frames: grad_k and grad_v of short and long keys, four
// channels a thread.
template <typename T, int D>
__global__ void __launch_bounds__(256)
    reduce_shared_keys(const __grid_constant__ BackwardArguments a) {
  const Problem& p = a.p;
  int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t heads = static_cast<int64_t>(p.B) * p.H * (D / 4);
  const int64_t shorts = heads * p.S * p.Ns;
  if (n >= shorts + heads * p.L) return;
  const bool is_long = n >= shorts;
  if (is_long) n -= shorts;
  const int d = static_cast<int>(n % (D / 4)) * 4;
  n /= D / 4;
  const int h = static_cast<int>(n % p.H);
  n /= p.H;
  const int64_t tokens = is_long ? p.L : p.Ns;
  const int of_frame = static_cast<int>(n % tokens);
  n /= tokens;
  const int frames = p.S;
  const int j = is_long ? 0 : static_cast<int>(n % frames);
  const int b = static_cast<int>(is_long ? n : n / frames);
  const Row row = {is_long ? Part::kLong : Part::kShort, j, of_frame};

  const int first = max(0, is_long ? of_frame - p.long_lead + 1 : j - p.ahead) / a.frames;
  const int last = is_long ? a.chunks - 1 : min(a.chunks - 1, (j + p.behind) / a.frames);
  float4 sum_k = {0.f, 0.f, 0.f, 0.f}, sum_v = {0.f, 0.f, 0.f, 0.f};
  for (int c = first; c <= last; ++c) {
    const Chunk chunk(a, c);
    if (!is_long && !chunk.attends(p, j)) continue;
    const int64_t at = chunk.row_of(a, row, (b * a.chunks + c) * p.H + h) * D + d;
    const float4 k = *reinterpret_cast<const float4*>(a.grad_k + at);
    const float4 v = *reinterpret_cast<const float4*>(a.grad_v + at);
    sum_k.x += k.x, sum_k.y += k.y, sum_k.z += k.z, sum_k.w += k.w;
    sum_v.x += v.x, sum_v.y += v.y, sum_v.z += v.z, sum_v.w += v.w;
  }
  const Tensor& grad_k = is_long ? a.grads.k_long : a.grads.k_short;
  const Tensor& grad_v = is_long ? a.grads.v_long : a.grads.v_short;
  *reinterpret_cast<uint2*>(token<T>(grad_k, b, j, of_frame, h) + d) =
      uint2{pack<T>(sum_k.x, sum_k.y), pack<T>(sum_k.z, sum_k.w)};
  *reinterpret_cast<uint2*>(token<T>(grad_v, b, j, of_frame, h) + d) =
      uint2{pack<T>(sum_v.x, sum_v.y), pack<T>(sum_v.z, sum_v.w)};
}

}  // namespace sta

#endif  // STA_CUDA_BACKWARD_H_
