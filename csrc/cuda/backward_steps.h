// Which frames a block of the backward kernel takes, the steps in which it takes them, and the keys
// that its strips of 16 rows hold at each step.
//
// Strips are *aligned* where that costs no additional warps: each holds keys of one part and, of
// the short keys, of one neighbour. The neighbours behind the frame rotate through one ring of
// strips, those ahead through another. The next frame then needs new keys in its own strips and in
// one neighbour's strips of each ring. All others keep their keys in shared memory and their
// gradients in registers. Otherwise a frame's keys are packed densely, in as many passes as they
// need.
#ifndef STA_CUDA_BACKWARD_STEPS_H_
#define STA_CUDA_BACKWARD_STEPS_H_

#include "cuda/key_gradients.h"

namespace sta {

constexpr int kSetStrips = 16;  // that a block has tables for

struct BackwardArguments {
  Problem p;
  Gradients grads;
  int frames;       // that a block takes
  int chunks;       // of frames in a clip
  int shared_rows;  // short and long keys that a chunk's frames can attend
  bool aligned;
  // With aligned strips: how many hold the frame's own keys, how many one neighbour's, and which is
  // the first of the long keys; the neighbours in each ring.
  int current_strips, short_strips, first_long_strip;
  int behind, ahead;
  bool spare;     // aligned, and the next frame's keys have rows of their own to arrive in
  int key_rows;   // of shared memory; values have as many
  float* grad_k;  // (B, chunks, H, shared_rows, D)
  float* grad_v;
  float* grad_q;  // (B, T, H, Nq, D) sums over the passes before the last; unused with one pass
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

  // Whether no earlier frame of the chunk has left sums in a shared key's float row, to which those
  // that are in registers after `frame` must be added.
  __device__ __forceinline__ bool writes_first(const BackwardArguments& a, const Row& row,
                                               int frame) const {
    if (row.part == Part::kLong)
      return a.aligned || frame == max(begin, row.token - a.p.long_lead + 1);
    const int first = first_to_attend(a.p, row.frame);
    if (!a.aligned) return frame == first;
    // Only a neighbour behind can have been written before: as one ahead, until its own turn came.
    return row.frame > frame + a.p.frame_offset || row.frame < first + a.p.frame_offset;
  }

  __device__ __forceinline__ bool attends(const Problem& p, int frame) const {
    const int first = first_to_attend(p, frame);
    return first < end && first <= frame + p.behind;
  }
};

// Which clip, chunk of frames and head a block works on.
struct Place {
  int b, h, chunk, end;  // end: the frame behind the chunk's last

  static __device__ __forceinline__ Place of(const BackwardArguments& a, int block) {
    const int chunk = block / a.p.H % a.chunks;
    return {block / a.p.H / a.chunks, block % a.p.H, chunk, min(a.p.T, (chunk + 1) * a.frames)};
  }
};

// One tile of queries against one set of keys: all of a frame, or those of one pass.
struct Step {
  int frame, begin, query, set;  // begin: first row of the pass; set: how many were before

  __device__ __forceinline__ Step next(const BackwardArguments& a) const {
    if (query + kTile < a.p.Nq) return {frame, begin, query + kTile, set};
    const int after = begin + warps() * kStrip;
    if (!a.aligned && after < FrameKeys(a.p, frame).count) return {frame, after, 0, set + 1};
    return {frame + 1, 0, 0, set + 1};
  }
};

// Tokens number `token` and on of `frame`, as many as are `present`, in rows `row` and on of the
// shared memory for keys. A dense strip can hold several parts; its frame is the number of the set,
// so that it differs from one set to the next.
struct Strip {
  int row, present, frame, token;

  // Strip number s at a step.
  static __device__ __forceinline__ Strip of(const BackwardArguments& a, const Step& step, int s) {
    const Problem& p = a.p;
    if (!a.aligned)
      return make(s, FrameKeys(p, step.frame).count - step.begin, s * kStrip, step.set);
    const int current = a.current_strips;
    if (s < current)
      return make(a.spare ? step.set % 2 * current + s : s, p.Nc, s * kStrip, step.frame);
    // With spare rows a ring has room for one neighbour more than it holds.
    const int ring_behind = a.behind + (a.spare && a.behind > 0);
    const int ring_ahead = a.ahead + (a.spare && a.ahead > 0);
    if (s >= a.first_long_strip) {
      const int nth = s - a.first_long_strip;
      const int first = 2 * current + (ring_behind + ring_ahead) * a.short_strips;
      return make(a.spare ? first + nth : s, p.L, nth * kStrip, 0);
    }
    const int slot = (s - current) / a.short_strips, nth = (s - current) % a.short_strips;
    const bool is_behind = slot < a.behind;
    // Neighbour j takes slot j modulo the ring's size: of a run of frames each has another one.
    const int own = step.frame + p.frame_offset;
    const int first = is_behind ? own - a.behind : own + 1;
    const int frame = first + (is_behind ? modulo(slot - first, a.behind)
                                         : modulo(slot - a.behind - first, a.ahead));
    const int place =
        is_behind ? modulo(frame, ring_behind) : ring_behind + modulo(frame, ring_ahead);
    return make(a.spare ? 2 * current + place * a.short_strips + nth : s,
                frame >= 0 && frame < p.S ? p.Ns : 0, nth * kStrip, frame);
  }

  // The key in row r of strip number s, which must be present.
  __device__ __forceinline__ Row key(const BackwardArguments& a, const Step& step, int s,
                                     int r) const {
    if (!a.aligned) return FrameKeys(a.p, step.frame).row(step.begin + s * kStrip + r);
    if (s < a.current_strips) return {Part::kCurrent, frame, token + r};
    return {s < a.first_long_strip ? Part::kShort : Part::kLong, frame, token + r};
  }

 private:
  static __device__ __forceinline__ int modulo(int x, int n) { return (x % n + n) % n; }

  static __device__ __forceinline__ Strip make(int place, int tokens, int token, int frame) {
    return {place * kStrip, max(0, min(tokens - token, kStrip)), frame, token};
  }
};

// What the products need to know of two strips.
struct Pair {
  int row[kPairStrips], present[kPairStrips];

  __device__ __forceinline__ bool is_empty() const { return present[0] + present[1] == 0; }
};

// A block's shared memory. Place, steps and strips are kept there and read again wherever they are
// needed: the gradients leave no registers for them or for what is computed from them.
template <typename T, int D>
struct BackwardMemory {
  static constexpr int P = kPitch<D>;
  static constexpr int kRing = 4;  // steps and sets at least: the current one and the next two

  struct Tables {
    int4 place, steps[kRing], strips[kRing][kSetStrips];
    int4 pairs[kRing][kSetStrips / kPairStrips];
  };

  // Bytes of a block with `strips` strips, one a warp.
  static constexpr int bytes(int strips, int key_rows) {
    return (4 * kTile * P + strips * kStrip * kScorePitch + 2 * key_rows * P) * 2 + 16 * kTile +
           static_cast<int>(sizeof(Tables));
  }

  static __device__ __forceinline__ T* start() { return reinterpret_cast<T*>(shared_memory()); }

  // Queries of a tile, stage 0 or 1; incoming gradients kTile rows behind them.
  static __device__ __forceinline__ T* tile(int stage) { return start() + stage * 2 * kTile * P; }
  // lse of a tile's queries; delta kTile behind.
  static __device__ __forceinline__ float* statistics(int stage) {
    return reinterpret_cast<float*>(tile(2)) + stage * 2 * kTile;
  }
  static __device__ __forceinline__ Tables* tables() {
    return reinterpret_cast<Tables*>(statistics(2));
  }
  static __device__ __forceinline__ T* score_grads() { return reinterpret_cast<T*>(tables() + 1); }
  static __device__ __forceinline__ T* keys() {
    return score_grads() + warps() * kStrip * kScorePitch;
  }
  static __device__ __forceinline__ T* values(const BackwardArguments& a) {
    return keys() + a.key_rows * P;
  }

  static __device__ __forceinline__ Place place() {
    const int4 x = read_shared(&tables()->place);
    return {x.x, x.y, x.z, x.w};
  }
  static __device__ __forceinline__ Step step(int n) {
    const int4 x = read_shared(&tables()->steps[opaque(n) % kRing]);
    return {x.x, x.y, x.z, x.w};
  }
  static __device__ __forceinline__ Strip strip(int set, int s) {
    const int4 x = read_shared(&tables()->strips[set % kRing][s]);
    return {x.x, x.y, x.z, x.w};
  }
  static __device__ __forceinline__ Pair pair(int set, int number) {
    const int4 x = read_shared(&tables()->pairs[set % kRing][number]);
    return {{x.x, x.y}, {x.z, x.w}};
  }

  // Writes the tables of step number n. All threads call it; the first few write.
  static __device__ __forceinline__ void prepare(const BackwardArguments& a, int n,
                                                 const Step& step) {
    const int thread = threadIdx.x;
    if (thread == 0)
      tables()->steps[n % kRing] = int4{step.frame, step.begin, step.query, step.set};
    if (step.query != 0 || thread >= warps()) return;
    const Strip x = Strip::of(a, step, thread);
    tables()->strips[step.set % kRing][thread] = int4{x.row, x.present, x.frame, x.token};
    int4& pair = tables()->pairs[step.set % kRing][thread / kPairStrips];
    (thread % kPairStrips == 0 ? pair.x : pair.y) = x.row;
    (thread % kPairStrips == 0 ? pair.z : pair.w) = x.present;
  }
};

}  // namespace sta

#endif  // STA_CUDA_BACKWARD_STEPS_H_
