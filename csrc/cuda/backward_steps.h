// What the backward's blocks do and where: the frames of a block, the steps that it takes through
// them, and which keys its strips of 16 rows hold at each.
//
// Strips are *aligned* where they can be: each belongs to one part and one frame of the short keys,
// the neighbours behind and ahead taking turns in a ring each. From frame to frame only the frame's
// own strips and one neighbour of each ring change; all others keep their keys in shared memory and
// their gradients in registers. Otherwise a frame's keys lie dense, over as many passes as needed.
#ifndef STA_CUDA_BACKWARD_STEPS_H_
#define STA_CUDA_BACKWARD_STEPS_H_

#include "cuda/key_gradients.h"

namespace sta {

constexpr int kStripsOfSet = 16;

struct BackwardArguments {
  Problem p;
  Gradients grads;
  int frames;       // that a block takes
  int chunks;       // of frames in a clip
  int shared_rows;  // short and long keys that a chunk's frames can attend
  bool aligned;
  // Of aligned strips: those of the frame itself, of one neighbour, and the first of the long keys.
  int current_strips, short_strips, first_long_strip;
  int behind, ahead;  // neighbours in the two rings
  bool spare;         // aligned, with room for the next frame's keys while one is computed
  int key_rows;       // in shared memory, and again for values
  float* grad_k;      // (B, chunks, H, shared_rows, D)
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

  // Whether the block writes a shared key's sums for the first time, which lie in registers since
  // then or, of an aligned strip, since the strip took in the key.
  __device__ __forceinline__ bool writes_first(const BackwardArguments& a, const Row& row,
                                               int frame) const {
    if (row.part == Part::kLong)
      return a.aligned || frame == max(begin, row.token - a.p.long_lead + 1);
    const int first = first_to_attend(a.p, row.frame);
    if (!a.aligned) return frame == first;
    // A neighbour that has become one behind may have been one ahead before.
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

// What a strip holds: `present` tokens from number `token` of `frame`, at row `row` of the shared
// memory for keys. A dense strip may hold several parts; its frame only tells one set from another.
struct Strip {
  int row, present, frame, token;

  static __device__ __forceinline__ int modulo(int x, int n) { return (x % n + n) % n; }

  static __device__ __forceinline__ Strip of(const BackwardArguments& a, const Step& step, int s) {
    const Problem& p = a.p;
    const auto strip = [](int row, int tokens, int token, int frame) {
      return Strip{row * kStrip, max(0, min(tokens - token, kStrip)), frame, token};
    };
    if (!a.aligned)
      return strip(s, FrameKeys(p, step.frame).count - step.begin, s * kStrip, step.set);
    const int currents = a.current_strips;
    if (s < currents)
      return strip(a.spare ? step.set % 2 * currents + s : s, p.Nc, s * kStrip, step.frame);
    // With spare rows a ring has room for one more neighbour than it holds.
    const int ring_behind = a.behind + (a.spare && a.behind > 0);
    const int ring_ahead = a.ahead + (a.spare && a.ahead > 0);
    if (s >= a.first_long_strip) {
      const int row = 2 * currents + (ring_behind + ring_ahead) * a.short_strips;
      return strip(a.spare ? row + s - a.first_long_strip : s, p.L,
                   (s - a.first_long_strip) * kStrip, 0);
    }
    const int slot = (s - currents) / a.short_strips, nth = (s - currents) % a.short_strips;
    const bool is_behind = slot < a.behind;
    const int own = step.frame + p.frame_offset;
    const int first = is_behind ? own - a.behind : own + 1;
    const int frame = first + (is_behind ? modulo(slot - first, a.behind)
                                         : modulo(slot - a.behind - first, a.ahead));
    const int place =
        is_behind ? modulo(frame, ring_behind) : ring_behind + modulo(frame, ring_ahead);
    const int row = a.spare ? 2 * currents + place * a.short_strips + nth : s;
    return strip(row, frame >= 0 && frame < p.S ? p.Ns : 0, nth * kStrip, frame);
  }

  // The key in row r of strip number s, which must be present.
  __device__ __forceinline__ Row key(const BackwardArguments& a, const Step& step, int s,
                                     int r) const {
    if (!a.aligned) return FrameKeys(a.p, step.frame).row(step.begin + s * kStrip + r);
    if (s < a.current_strips) return {Part::kCurrent, frame, token + r};
    return {s < a.first_long_strip ? Part::kShort : Part::kLong, frame, token + r};
  }
};

struct Pair {
  int row[kPairStrips], present[kPairStrips];

  __device__ __forceinline__ bool is_empty() const { return present[0] + present[1] == 0; }
};

// A block's shared memory. Place, steps and strips lie there too and are read anew wherever they
// are used, because the gradients leave no registers to keep them or what follows from them.
template <typename T, int D>
struct BackwardMemory {
  static constexpr int P = kPitch<D>;
  static constexpr int kRing = 4;  // steps and sets: the current one, the next, the one after it

  struct Tables {
    int4 place, steps[kRing], strips[kRing][kStripsOfSet];
    int4 pairs[kRing][kStripsOfSet / kPairStrips];
  };

  // Bytes for sets of `strips` strips and key_rows rows.
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
  // Row and number of keys of a pair's strips, in one read.
  static __device__ __forceinline__ Pair pair(int set, int number) {
    const int4 x = read_shared(&tables()->pairs[set % kRing][number]);
    return {{x.x, x.y}, {x.z, x.w}};
  }

  // Fills in step number n; called by all threads, of which the first few write.
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
