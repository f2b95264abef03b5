// Where the gradients of keys and values are summed.
//
// A backward task owns one head of a chunk of consecutive frames. The gradients of a frame's own
// keys are finished inside the task. Short and long keys are read by other chunks too, so each task
// sums them in a slab of its own, and the slabs are added up in a fixed order afterwards.
#ifndef STA_CPU_KEY_GRADIENTS_H_
#define STA_CPU_KEY_GRADIENTS_H_

#include <string.h>

#include "frame_keys.h"

namespace sta {
namespace STA_ISA {

// How the frames of a clip are cut into chunks. Depends on the shapes alone, never on the threads.
struct ChunkPlan {
  int64_t frames;  // a chunk
  int64_t chunks;  // a clip
  int64_t span;    // frames whose short keys a chunk may read
  int64_t batch;   // clips worked on at once

  template <class S>
  explicit ChunkPlan(const Problem<S>& problem) {
    constexpr int64_t kTasks = 32;      // enough for load balance on 16 threads and more
    constexpr int64_t kMaxFrames = 16;  // of a chunk
    const StaParams& p = problem.params;
    const int64_t reach = problem.left + problem.right;
    const int64_t wanted = (p.B * p.T * p.H + kTasks - 1) / kTasks;
    // Chunks much shorter than the window would mostly hold sums for other chunks' frames.
    frames = max_of(max_of(1, min_of(wanted, kMaxFrames)), (reach / 2 + 1) / 2);
    chunks = (p.T + frames - 1) / frames;
    frames = chunks > 0 ? (p.T + chunks - 1) / chunks : frames;
    span = min_of(p.S, frames + reach);
    batch = max_of(1, 2 * kTasks / max_of(1, p.H * chunks));
  }

  int64_t first_frame(int64_t chunk) const { return chunk * frames; }
};

// The sums of one task: rows of `depth` for each short key in its span and each long key.
template <class S>
class KeySums {
 public:
  using R = Arithmetic<S>;

  static int64_t size(const Problem<S>& problem, const ChunkPlan& plan) {
    return 2 * rows(problem, plan) * problem.depth;
  }

  KeySums(const Problem<S>& problem, const ChunkPlan& plan, int64_t chunk, R* slab)
      : problem_(problem),
        first_(max_of(0, problem.own(plan.first_frame(chunk)) - problem.left)),
        long_(plan.span * problem.params.Ns),
        dk_(slab),
        dv_(slab + rows(problem, plan) * problem.depth) {}

  int64_t short_row(int64_t frame, int64_t n) const {
    return (frame - first_) * problem_.params.Ns + n;
  }
  int64_t long_row(int64_t n) const { return long_ + n; }
  R* dk(int64_t row) const { return dk_ + row * problem_.depth; }
  R* dv(int64_t row) const { return dv_ + row * problem_.depth; }

 private:
  static int64_t rows(const Problem<S>& problem, const ChunkPlan& plan) {
    return plan.span * problem.params.Ns + problem.params.L;
  }

  const Problem<S>& problem_;
  int64_t first_, long_;
  R *dk_, *dv_;
};

// Row pointers to the sums of every key of one frame, in the order of FrameKeys.
template <class S>
struct KeySumRows {
  using R = Arithmetic<S>;
  R* dk_current;  // [Nc][depth] of the frame at hand
  R* dv_current;
  R** dk;  // [key]
  R** dv;

  KeySumRows(const Problem<S>& problem, Carver& carver) {
    dk_current = carver.take<R>(problem.params.Nc * problem.depth);
    dv_current = carver.take<R>(problem.params.Nc * problem.depth);
    dk = carver.take<R*>(problem.max_keys);
    dv = carver.take<R*>(problem.max_keys);
  }

  // Points at the sums for frame t and clears those of its own keys.
  void bind(const Problem<S>& problem, const KeySums<S>& sums, int64_t t) {
    const int64_t current_bytes = problem.params.Nc * problem.depth * sizeof(R);
    memset(dk_current, 0, current_bytes);
    memset(dv_current, 0, current_bytes);
    int64_t key = 0;
    for_keys(problem, t, [&](KeyPart part, int64_t frame, int64_t n) {
      if (part == KeyPart::kCurrent) {
        dk[key] = dk_current + n * problem.depth;
        dv[key] = dv_current + n * problem.depth;
      } else {
        const int64_t row = part == KeyPart::kShort ? sums.short_row(frame, n) : sums.long_row(n);
        dk[key] = sums.dk(row);
        dv[key] = sums.dv(row);
      }
      ++key;
    });
  }
};

// Adds up one short or long key's sums over chunks [begin, end) and writes both gradients.
// row_in(sums): the key's row in a chunk's slab. slabs: of one (clip, head), chunk after chunk.
template <class S, class RowIn>
void reduce_key(const Problem<S>& problem, const ChunkPlan& plan, Arithmetic<S>* slabs,
                int64_t begin, int64_t end, const RowIn& row_in, Arithmetic<S>* total, S* grad_k,
                S* grad_v) {
  using R = Arithmetic<S>;
  using V = Vector<R>;
  const int64_t depth = problem.depth;
  R* dk = total;
  R* dv = total + depth;
  memset(total, 0, 2 * depth * sizeof(R));
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const KeySums<S> sums(problem, plan, chunk, slabs + chunk * KeySums<S>::size(problem, plan));
    const int64_t row = row_in(sums);
    for (int64_t d = 0; d < depth; d += V::W) {
      V::store(dk + d, V::load(dk + d) + V::load(sums.dk(row) + d));
      V::store(dv + d, V::load(dv + d) + V::load(sums.dv(row) + d));
    }
  }
  store_row(dk, static_cast<R>(problem.params.scale), problem.params.D, grad_k);
  store_row(dv, R{1}, problem.params.D, grad_v);
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_KEY_GRADIENTS_H_
