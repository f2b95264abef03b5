// All tile kernels of one instruction set, as kernels.h is for the vector kernels. An isa_*.cpp
// also defines which tiles it has (tiles.h).
#ifndef STA_CPU_AMX_KERNELS_H_
#define STA_CPU_AMX_KERNELS_H_

#include "../kernel_table.h"
#include "../mlp.h"
#include "backward.h"
#include "forward.h"

namespace sta {
namespace STA_ISA {

// Calls run(workspace, registers) with a workspace of its own, or sets `error`.
template <class Workspace, class Run>
void with_workspace(const TileProblem& problem, int& error, const Run& run) {
  Carver measure(nullptr);
  Workspace sizes(problem, measure);
  const Block memory(measure.used());
  if (memory.data() == nullptr) {
    __atomic_store_n(&error, STA_ERROR_MEMORY, __ATOMIC_RELAXED);
    return;
  }
  Carver carver(memory.data());
  Workspace workspace(problem, carver);
  TileRegisters registers;
  run(workspace, registers);
}

struct TileForwardJob {
  const TileProblem& problem;
  int error;
};

inline void tile_forward_range(int64_t begin, int64_t end, void* context) {
  auto& job = *static_cast<TileForwardJob*>(context);
  const TileProblem& problem = job.problem;
  with_workspace<TileForwardWorkspace>(
      problem, job.error, [&](TileForwardWorkspace& workspace, TileRegisters& registers) {
        forward_units(problem, workspace, registers, begin, end);
      });
}

inline int tile_forward(const StaParams& params, StaParallelFor parallel_for) {
  const TileProblem problem(params);
  TileForwardJob job = {problem, STA_OK};
  const int64_t units = params.B * params.T * params.H * problem.tiles;
  if (units == 0) return STA_OK;
  if (parallel_for(0, units, 1, tile_forward_range, &job) != 0) return STA_ERROR_PARALLEL;
  return job.error;
}

inline void tile_backward_range(int64_t begin, int64_t end, void* context) {
  auto& job = *static_cast<BackwardJob<Bfloat16>*>(context);
  const TileProblem& problem = static_cast<const TileProblem&>(job.problem);
  with_workspace<TileBackwardWorkspace>(
      problem, job.error, [&](TileBackwardWorkspace& workspace, TileRegisters& registers) {
        for (int64_t task = begin; task < end; ++task) {
          for_chunk_frames(
              job, task,
              [&](const KeySums<Bfloat16>& sums, int64_t b, int64_t t, int64_t h, int64_t) {
                backward_frame(problem, workspace, registers, {b, t, h, 0, problem.params.Nq},
                               sums);
              });
        }
      });
}

inline int tile_backward(const StaParams& params, StaParallelFor parallel_for) {
  const TileProblem problem(params);
  return run_backward<Bfloat16>(problem, parallel_for, tile_backward_range);
}

constexpr KernelTable make_tile_table() {
  KernelTable table = {};
  table.forward[STA_BF16] = tile_forward;
  table.backward[STA_BF16] = tile_backward;
  // The same source as elsewhere, with this instruction set's conversion to bfloat16.
  table.bias_gelu_forward[STA_BF16] = bias_gelu_forward<Bfloat16>;
  table.bias_gelu_backward[STA_BF16] = bias_gelu_backward<Bfloat16>;
  table.bias_residual_forward[STA_BF16] = bias_residual_forward<Bfloat16>;
  table.bias_residual_backward[STA_BF16] = bias_residual_backward<Bfloat16>;
  return table;
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_KERNELS_H_
