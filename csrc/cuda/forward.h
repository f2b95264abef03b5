// out and lse. A warp owns a band of queries from the scores to the output; keys and values lie in
// shared memory. Two kernels around the same inner step: where all keys of a frame fit, they are
// loaded once and queries stream past them; otherwise they stream past a tile of queries.
#ifndef STA_CUDA_FORWARD_H_
#define STA_CUDA_FORWARD_H_

#include "cuda/tiles.h"

namespace sta {

constexpr int kForwardWarps = 8;  // at most

struct ForwardArguments {
  Problem p;
  int rows;    // key rows in shared memory (of one stage, where there are two)
  int splits;  // blocks that share a frame and head
  int bands;   // of queries, in each of them
};

// The keys that one step of the online softmax takes. What bounds it is registers: scores and
// outputs of all the band's rows are held at once.
template <int D, int Strips>
constexpr int kStep = D * Strips > 128 ? 32 : 64;

// Scores, softmax and outputs of a band of 16 * Strips queries, over keys as they come.
template <typename T, int D, int Strips>
struct Band {
  static constexpr int P = kPitch<D>;

  float out[Strips][D / 8][4];
  float largest[Strips][2];  // of the scores so far, in base 2; rows g and g + 8
  float sum[Strips][2];      // this lane's share of sum of 2^(score - largest)

  __device__ __forceinline__ Band() {
#pragma unroll
    for (int s = 0; s < Strips; ++s) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[s][n][e] = 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest[s][half] = -INFINITY;
        sum[s][half] = 0.f;
      }
    }
  }

  // `Keys` rows of shared memory, of which the first `present` are keys.
  template <int Keys>
  __device__ __forceinline__ void attend(const T* queries, const T* keys, const T* values,
                                         float scale_log2, int present) {
    float scores[Strips][Keys / 8][4];
    multiply_queries<Keys>(scores, queries, keys);
    if (present < Keys) {
      mask<Keys>(scores, scale_log2, present);
      scale_log2 = 1.f;
    }
    exponentiate<Keys>(scores, scale_log2);
    multiply_values<Keys>(scores, values);
  }

  template <int Keys>
  __device__ __forceinline__ void multiply_queries(float (&scores)[Strips][Keys / 8][4],
                                                   const T* queries, const T* keys) {
#pragma unroll
    for (int s = 0; s < Strips; ++s)
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[s][n][e] = 0.f;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      uint32_t a[Strips][4];
#pragma unroll
      for (int s = 0; s < Strips; ++s) left<T, P>(a[s], queries + s * kStrip * P + d);
#pragma unroll
      for (int n = 0; n < Keys / 16; ++n) {
        uint32_t b[4];
        right_transposed<T, P>(b, keys + n * 16 * P + d);
#pragma unroll
        for (int s = 0; s < Strips; ++s) {
          multiply_add<T>(scores[s][2 * n], a[s], b[0], b[1]);
          multiply_add<T>(scores[s][2 * n + 1], a[s], b[2], b[3]);
        }
      }
    }
  }

  // Scales, and gives rows past the last key a score of -inf: after the scale, whatever its sign.
  template <int Keys>
  __device__ __forceinline__ void mask(float (&scores)[Strips][Keys / 8][4], float scale_log2,
                                       int present) {
#pragma unroll
    for (int s = 0; s < Strips; ++s)
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = n * 8 + lane() % 4 * 2 + e % 2;
          scores[s][n][e] = key < present ? scores[s][n][e] * scale_log2 : -INFINITY;
        }
  }

  // Scores become 2^(scale * score - largest); what was summed before is brought to the new
  // largest.
  template <int Keys>
  __device__ __forceinline__ void exponentiate(float (&scores)[Strips][Keys / 8][4],
                                               float scale_log2) {
#pragma unroll
    for (int s = 0; s < Strips; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float before = largest[s][half];
        float now = fmaxf(before, largest_of<Keys>(scores[s], half, scale_log2));
        largest[s][half] = now;
        if (now == -INFINITY) now = 0.f;  // weights of 0, where -inf - -inf would be NaN
        const float shrink = exp2_fast(before - now);
        float total = sum[s][half] * shrink;
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[s][n][e] = exp2_fast(scores[s][n][e] * scale_log2 - now);
            total += scores[s][n][e];
          }
        sum[s][half] = total;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          out[s][n][2 * half] *= shrink;
          out[s][n][2 * half + 1] *= shrink;
        }
      }
  }

  // The largest scaled score of row g (half 0) or g + 8 (half 1). A negative scale turns the order
  // around, so the sign decides which extreme is looked for, not a product for every score.
  template <int Keys>
  __device__ __forceinline__ float largest_of(const float (&scores)[Keys / 8][4], int half,
                                              float scale_log2) {
    float extreme = scores[0][2 * half];
    if (scale_log2 >= 0.f) {
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
        extreme = fmaxf(extreme, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    } else {
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
        extreme = fminf(extreme, fminf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    extreme *= scale_log2;
    extreme = fmaxf(extreme, shuffle_xor(extreme, 1));
    return fmaxf(extreme, shuffle_xor(extreme, 2));
  }

  template <int Keys>
  __device__ __forceinline__ void multiply_values(const float (&weights)[Strips][Keys / 8][4],
                                                  const T* values) {
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k) {
      uint32_t a[Strips][4];
#pragma unroll
      for (int s = 0; s < Strips; ++s) as_left<T>(a[s], weights[s][2 * k], weights[s][2 * k + 1]);
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        right<T, P>(b, values + k * 16 * P + n * 16);
#pragma unroll
        for (int s = 0; s < Strips; ++s) {
          multiply_add<T>(out[s][2 * n], a[s], b[0], b[1]);
          multiply_add<T>(out[s][2 * n + 1], a[s], b[2], b[3]);
        }
      }
    }
  }

  // Divides by the sums and writes out and lse of queries begin, begin + 1, ...
  __device__ __forceinline__ void write(const Problem& p, int b, int i, int h, int begin) {
#pragma unroll
    for (int s = 0; s < Strips; ++s)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[s][half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const int query = begin + s * kStrip + half * 8 + lane() / 4;
        const bool present = query < p.Nq;
        const float inverse = 1.f / total;
        T* row = token<T>(p.out, b, i, present ? query : 0, h);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          const float (&x)[4] = out[s][2 * n];
          const float (&y)[4] = out[s][2 * n + 1];
          store_pairs(row + n * 16, pack<T>(x[2 * half] * inverse, x[2 * half + 1] * inverse),
                      pack<T>(y[2 * half] * inverse, y[2 * half + 1] * inverse), present);
        }
        if (present && lane() % 4 == 0 && p.lse != nullptr) {
          // A score of +inf is its own logsumexp, although the softmax has no value there.
          const float log = largest[s][half] == INFINITY ? 0.f : log2_fast(total);
          p.lse[statistics_row(p, b, i, h) + query] = (largest[s][half] + log) * kLn2;
        }
      }
  }
};

// Which clip, frame, head and share of its queries a block works on. Neighbouring blocks are heads
// of one frame, whose rows lie side by side, then frames, which share most of their keys.
struct ForwardPlace {
  int split, h, i, b;

  __device__ __forceinline__ explicit ForwardPlace(const ForwardArguments& a) {
    int n = blockIdx.x;
    split = n % a.splits;
    n /= a.splits;
    h = n % a.p.H;
    n /= a.p.H;
    i = n % a.p.T;
    b = n / a.p.T;
  }
};

// All keys of the frame in shared memory; each warp takes bands of queries without meeting the
// others again.
template <typename T, int D, int Strips>
__global__ void __launch_bounds__(kForwardWarps * 32, 1)
    forward_resident(const __grid_constant__ ForwardArguments a) {
  constexpr int P = kPitch<D>;
  constexpr int kQueries = kStrip * Strips;
  constexpr int Keys = kStep<D, Strips>;
  const ForwardPlace at(a);
  const Problem& p = a.p;
  const FrameKeys frame(p, at.i);
  T* keys = reinterpret_cast<T*>(shared_memory());
  T* values = keys + a.rows * P;
  T* queries = values + a.rows * P + warp() * kQueries * P;

  const int last = min(ceil_div(p.Nq, kQueries), (at.split + 1) * a.bands);
  int band = at.split * a.bands + warp();
  const int rows = ceil_div(frame.count, kStrip) * kStrip;
  copy_keys<T, D>(keys, values, p, frame, at.b, at.h, 0, rows);
  if (band < last)
    copy_queries<T, D>(queries, p.q, p.Nq, at.b, at.i, at.h, band * kQueries, kQueries, lane(), 32);
  copy_commit();
  copy_wait<0>();
  __syncthreads();

  while (band < last) {
    Band<T, D, Strips> work;
    int k = 0;
    for (; k + Keys <= rows; k += Keys)
      work.template attend<Keys>(queries, keys + k * P, values + k * P, p.scale_log2,
                                 frame.count - k);
    for (; k < rows; k += kStrip)
      work.template attend<kStrip>(queries, keys + k * P, values + k * P, p.scale_log2,
                                   frame.count - k);
    const int done = band;
    band += warps();
    __syncwarp();  // every lane has read the band's queries
    if (band < last)
      copy_queries<T, D>(queries, p.q, p.Nq, at.b, at.i, at.h, band * kQueries, kQueries, lane(),
                         32);
    copy_commit();
    work.write(p, at.b, at.i, at.h, done * kQueries);  // while the next band's queries arrive
    copy_wait<0>();
    __syncwarp();
  }
}

// Keys and values pass through two stages of shared memory; the block's warps hold one band each.
template <typename T, int D, int Strips>
__global__ void __launch_bounds__(kForwardWarps * 32, 1)
    forward_streamed(const __grid_constant__ ForwardArguments a) {
  constexpr int P = kPitch<D>;
  constexpr int kQueries = kStrip * Strips;
  constexpr int Keys = kStep<D, Strips>;
  const ForwardPlace at(a);
  const Problem& p = a.p;
  const FrameKeys frame(p, at.i);
  T* stages = reinterpret_cast<T*>(shared_memory());  // keys, values of the one, of the other
  T* queries = stages + 4 * Keys * P + warp() * kQueries * P;
  const int begin = (at.split * warps() + warp()) * kQueries;
  const int steps = ceil_div(frame.count, Keys);

  copy_queries<T, D>(queries, p.q, p.Nq, at.b, at.i, at.h, begin, kQueries, lane(), 32);
  copy_keys<T, D>(stages, stages + Keys * P, p, frame, at.b, at.h, 0, Keys);
  copy_commit();
  Band<T, D, Strips> work;
  for (int step = 0; step < steps; ++step) {
    copy_wait<0>();
    __syncthreads();  // this step's keys are there, the last step's are done with
    T* next = stages + (step + 1) % 2 * 2 * Keys * P;
    if (step + 1 < steps)
      copy_keys<T, D>(next, next + Keys * P, p, frame, at.b, at.h, (step + 1) * Keys, Keys);
    copy_commit();
    const T* keys = stages + step % 2 * 2 * Keys * P;
    work.template attend<Keys>(queries, keys, keys + Keys * P, p.scale_log2,
                               frame.count - step * Keys);
  }
  if (begin < p.Nq) work.write(p, at.b, at.i, at.h, begin);
}

}  // namespace sta

#endif  // STA_CUDA_FORWARD_H_
