// All seven gradients in one pass over the scores: five products, where separate kernels for the
// queries' and the keys' gradients would need seven.
//
// A block owns a few consecutive frames of one head and takes them one after another. Each pair of
// warps holds the gradients of 32 keys in registers while the queries stream past (see
// key_gradients.h). A tile's score gradients meet in shared memory, where the warps divide the
// queries' gradient among them. When a strip's keys are replaced (see backward_steps.h), its
// gradients are written: a frame's own keys are finished then. Short and long keys are shared
// between frames: the block adds what its frames contribute into float rows of its own (never T x
// (window - 1) x Ns of them), and `reduce_shared_keys` adds the rows of all blocks in the order of
// the frames. There are no atomics.
#ifndef STA_CUDA_BACKWARD_H_
#define STA_CUDA_BACKWARD_H_

#include "cuda/backward_steps.h"

namespace sta {

constexpr int kColumns = 32;  // channels of the queries' gradient that a warp sums

// Registers bound the warps of a block, an even number: D of them hold a gradient of 32 keys.
template <int D>
constexpr int kBackwardWarps = D > 96 ? 8 : 12;

// Starts copying the keys and values of step n's set: all, or those in strips that change.
template <typename T, int D>
__device__ __forceinline__ void copy_set(const BackwardArguments& a, int n, bool all) {
  using Memory = BackwardMemory<T, D>;
  const Problem& p = a.p;
  const int thread = opaque(threadIdx.x), part = thread % kLanesPerRow;
  const Place place = Memory::place();
  const Step step = Memory::step(n);
#pragma unroll 1
  for (int r = thread / kLanesPerRow; r < warps() * kStrip; r += blockDim.x / kLanesPerRow) {
    const int s = r / kStrip, nth = r % kStrip;
    const Strip strip = Memory::strip(step.set, s);
    if (!all && strip.frame == Memory::strip(step.set - 1, s).frame) continue;
    const bool present = nth < strip.present;
    const Row row = present ? strip.key(a, step, s, nth) : Row{Part::kCurrent, step.frame, 0};
    const int at = (strip.row + nth) * kPitch<D>;
    copy_row<T, D>(Memory::keys() + at,
                   token<T>(p.k_cur, p.k_short, p.k_long, row, place.b, place.h), part, present);
    copy_row<T, D>(Memory::values(a) + at,
                   token<T>(p.v_cur, p.v_short, p.v_long, row, place.b, place.h), part, present);
  }
}

// Starts copying queries and incoming gradients of step n.
template <typename T, int D>
__device__ __forceinline__ void copy_tile(const BackwardArguments& a, int n) {
  using Memory = BackwardMemory<T, D>;
  const Place at = Memory::place();
  const Step step = Memory::step(n);
  const int thread = opaque(threadIdx.x);
  T* queries = Memory::tile(n % 2);
  T* grads = queries + kTile * kPitch<D>;
  copy_queries<T, D>(queries, a.p.q, a.p.Nq, at.b, step.frame, at.h, step.query, kTile, thread,
                     blockDim.x);
  copy_queries<T, D>(grads, a.grads.out, a.p.Nq, at.b, step.frame, at.h, step.query, kTile, thread,
                     blockDim.x);
}

// For each query of step n its lse in base 2 and delta = sum(grad_out * out) - grad_lse. A query
// past the last gets lse = inf, so all its weights are 0.
template <typename T, int D>
__device__ __forceinline__ void read_statistics(const BackwardArguments& a, int n) {
  const Problem& p = a.p;
  float* lse = BackwardMemory<T, D>::statistics(n % 2);
  float* delta = lse + kTile;
  const Place place = BackwardMemory<T, D>::place();
  const Step step = BackwardMemory<T, D>::step(n);
  const int i = step.frame, begin = step.query;
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

// Which pair of strips a warp works on, and which of their two gradients it holds. Each of the four
// schedulers gets warps of both kinds.
struct Share {
  int pair;
  bool of_keys;  // not of values

  __device__ __forceinline__ Share() {
    const int pairs = warps() / 2, nth = opaque(warp());
    of_keys = nth >= pairs;
    pair = of_keys ? nth - pairs : nth;
  }
};

// Adds one half of step n's tile to this warp's gradients. A block without registers to spare:
// every phase finds its operands anew.
template <typename T, int D>
__device__ __forceinline__ void add_half(KeyGradients<T, D>& gradients, const BackwardArguments& a,
                                         int n, int half) {
  using Memory = BackwardMemory<T, D>;
  constexpr int P = kPitch<D>;
  const int q = half * kHalf;
  typename KeyGradients<T, D>::Products products;
  typename KeyGradients<T, D>::Operand operand;
  {
    const Share share;
    const Pair pair = Memory::pair(Memory::step(n).set, share.pair);
    if (pair.is_empty()) return;
    const T* rows = share.of_keys ? Memory::values(a) : Memory::keys();
    gradients.multiply(products, {rows + pair.row[0] * P, rows + pair.row[1] * P},
                       Memory::tile(n % 2) + (share.of_keys ? kTile + q : q) * P);
  }
  {
    const Share share;
    const float* lse = Memory::statistics(n % 2) + q;
    T* score_grads = Memory::score_grads() + share.pair * kPairKeys * kScorePitch + q;
    const int ready = 1 + share.pair * (kTile / kHalf) + half;  // barrier
    if (share.of_keys) {
      barrier_wait(ready, 2 * 32);
      gradients.take_weights(operand, products, lse + kTile, score_grads);
    } else {
      gradients.pass_weights(operand, products, lse, a.p.scale_log2,
                             Memory::pair(Memory::step(n).set, share.pair).present, score_grads);
      barrier_arrive(ready, 2 * 32);
    }
  }
  gradients.accumulate(operand, Memory::tile(n % 2) + (Share().of_keys ? q : kTile + q) * P);
}

// Writes the gradients of strip number s of step n: those of a frame's own keys as results, those
// of shared keys into the chunk's float rows.
template <typename T, int D>
__device__ __forceinline__ void write_gradients(const float (&sums)[D / 8][4],
                                                const BackwardArguments& a, bool of_keys, int n,
                                                int s) {
  using Memory = BackwardMemory<T, D>;
  const float scale = of_keys ? a.p.scale : 1.f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Place place = Memory::place();
    const Step step = Memory::step(n);
    const Strip strip = Memory::strip(step.set, s);
    const int r = half * 8 + lane() / 4;
    if (r >= strip.present) continue;
    const Row row = strip.key(a, step, s, r);
    if (row.part == Part::kCurrent) {
      const Tensor& current = of_keys ? a.grads.k_cur : a.grads.v_cur;
      uint32_t* to = reinterpret_cast<uint32_t*>(
          token<T>(current, place.b, step.frame, row.token, place.h) + lane() % 4 * 2);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        to[n * 4] = pack<T>(sums[n][2 * half] * scale, sums[n][2 * half + 1] * scale);
      continue;
    }
    const Chunk chunk(a, place.chunk);
    const int64_t at = chunk.row_of(a, row, blockIdx.x);
    float2* to = reinterpret_cast<float2*>((of_keys ? a.grad_k : a.grad_v) + at * D) + lane() % 4;
    if (chunk.writes_first(a, row, step.frame)) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        to[n * 4] = float2{sums[n][2 * half] * scale, sums[n][2 * half + 1] * scale};
    } else {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const float2 x = to[n * 4];
        to[n * 4] = float2{x.x + sums[n][2 * half] * scale, x.y + sums[n][2 * half + 1] * scale};
      }
    }
  }
}

// Writes 16 queries by 32 channels of the queries' gradient. The passes before the last leave sums
// in a.grad_q; the same lane takes the same elements in every pass.
template <typename T, int D>
__device__ __forceinline__ void write_query_gradient(float (&sums)[kColumns / 8][4],
                                                     const BackwardArguments& a, const Step& step,
                                                     int q0, int d0) {
  const bool first = step.begin == 0;
  const bool last = a.aligned || FrameKeys(a.p, step.frame).count <= step.begin + warps() * kStrip;
  const Place place = BackwardMemory<T, D>::place();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int nth = step.query + q0 + half * 8 + lane() / 4;
    const bool present = nth < a.p.Nq;
    if (!(first && last)) {
      float* row =
          a.grad_q + (statistics_row(a.p, place.b, step.frame, place.h) + (present ? nth : 0)) * D;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        float2* at = reinterpret_cast<float2*>(row + d0 + n * 8) + lane() % 4;
        if (present && !first) {
          sums[n][2 * half] += at->x;
          sums[n][2 * half + 1] += at->y;
        }
        if (present && !last) *at = float2{sums[n][2 * half], sums[n][2 * half + 1]};
      }
    }
    if (!last) continue;
    T* row = token<T>(a.grads.q, place.b, step.frame, present ? nth : 0, place.h) + d0;
    const float scale = a.p.scale;
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n)
      store_pairs(row + n * 16,
                  pack<T>(sums[2 * n][2 * half] * scale, sums[2 * n][2 * half + 1] * scale),
                  pack<T>(sums[2 * n + 1][2 * half] * scale, sums[2 * n + 1][2 * half + 1] * scale),
                  present);
  }
}

// A piece of the queries' gradient: its first query of the tile and its first channel.
struct Piece {
  int q0, d0;

  __device__ __forceinline__ explicit Piece(int number) {
    q0 = opaque(number) % (kTile / kHalf) * kHalf;
    d0 = opaque(number) / (kTile / kHalf) * kColumns;
  }
};

// The queries' gradient of step n: score_grads^T times keys, divided into pieces of 32 queries by
// 32 channels. Pieces of 16 queries would give every warp one, but read half as much again from
// shared memory.
template <typename T, int D>
__device__ __forceinline__ void query_gradient(const BackwardArguments& a, int n) {
  using Memory = BackwardMemory<T, D>;
  constexpr int P = kPitch<D>;
  constexpr int kPieces = kTile / kHalf * (D / kColumns);
  constexpr int kStrips = kHalf / kStrip;
#pragma unroll 1
  for (int number = warp(); number < kPieces; number += warps()) {
    if (Memory::step(n).query + Piece(number).q0 >= a.p.Nq) continue;
    float sums[kStrips][kColumns / 8][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s)
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[s][n][e] = 0.f;
    const int set = Memory::step(n).set;
    const T* score_grads = Memory::score_grads() + Piece(number).q0;
    const T* keys = Memory::keys() + Piece(number).d0;
    Pair pair = Memory::pair(set, 0);
#pragma unroll 1
    for (int nth = 0; nth < warps() / 2; ++nth, score_grads += kPairKeys * kScorePitch) {
      const Pair present = pair;
      pair = Memory::pair(set, nth + 1 < warps() / 2 ? nth + 1 : 0);
      if (present.is_empty()) continue;
#pragma unroll
      for (int k = 0; k < kPairStrips; ++k) {
        uint32_t left_side[kStrips][4];
#pragma unroll
        for (int q = 0; q < kStrips; ++q)
          left_transposed<T, kScorePitch>(left_side[q],
                                          score_grads + k * kStrip * kScorePitch + q * kStrip);
#pragma unroll
        for (int d = 0; d < kColumns / 16; ++d) {
          uint32_t right_side[4];
          right<T, P>(right_side, keys + present.row[k] * P + d * 16);
#pragma unroll
          for (int q = 0; q < kStrips; ++q) {
            multiply_add<T>(sums[q][2 * d], left_side[q], right_side[0], right_side[1]);
            multiply_add<T>(sums[q][2 * d + 1], left_side[q], right_side[2], right_side[3]);
          }
        }
      }
    }
    const Piece piece(number);
#pragma unroll
    for (int q = 0; q < kStrips; ++q)
      write_query_gradient<T, D>(sums[q], a, Memory::step(n), piece.q0 + q * kStrip, piece.d0);
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kBackwardWarps<D> * 32)
    backward(const __grid_constant__ BackwardArguments a) {
  static_assert(kBackwardWarps<D> <= kSetStrips);
  using Memory = BackwardMemory<T, D>;
  {
    const Place place = Place::of(a, blockIdx.x);
    const int first = place.chunk * a.frames;
    if (threadIdx.x == 0) Memory::tables()->place = int4{place.b, place.h, place.chunk, place.end};
    // Step 0 has no queries: it fetches what the first one needs.
    Memory::prepare(a, 0, {first, 0, a.p.Nq, 0});
    Memory::prepare(a, 1, {first, 0, 0, 1});
  }
  KeyGradients<T, D> gradients;
#pragma unroll
  for (int s = 0; s < kPairStrips; ++s) gradients.clear(s, true);
  for (int n = 0;; ++n) {
    copy_wait<0>();
    __syncthreads();  // this step's tile and keys are there; the last one's are done with
    const auto goes_on = [&] { return Memory::step(n + 1).frame < Memory::place().end; };
    const auto new_set = [&] { return Memory::step(n + 1).query == 0; };
    if (goes_on()) {
      copy_tile<T, D>(a, n + 1);
      if (new_set() && (a.spare || n == 0)) copy_set<T, D>(a, n + 1, n == 0);
      copy_commit();
      Memory::prepare(a, n + 2, Memory::step(n + 1).next(a));
    }
#pragma unroll 1
    for (int half = 0; half < kTile / kHalf; ++half) {
      // The next step's statistics are a wait for memory. Warps of one scheduler, which are four
      // apart, take turns at it, so that the others keep multiplying.
      if (half == opaque(warp()) / 4 % (kTile / kHalf) && goes_on())
        read_statistics<T, D>(a, n + 1);
      if (Memory::step(n).query + half * kHalf < a.p.Nq) add_half<T, D>(gradients, a, n, half);
    }
    __syncthreads();  // the tile's score gradients are complete
    query_gradient<T, D>(a, n);
    if (n == 0 || !new_set()) continue;
    const Share share;
    const int set = Memory::step(n).set;
#pragma unroll
    for (int i = 0; i < kPairStrips; ++i) {
      const int s = share.pair * kPairStrips + i;
      const bool done =
          !goes_on() || Memory::strip(set, s).frame != Memory::strip(set + 1, s).frame;
      if (done) write_gradients<T, D>(gradients.sums[i], a, share.of_keys, n, s);
      gradients.clear(i, done);
    }
    if (!goes_on()) break;
    if (a.spare) continue;
    __syncthreads();  // nobody reads the last set's keys any more
    copy_set<T, D>(a, n + 1, !a.aligned);
    copy_commit();
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
