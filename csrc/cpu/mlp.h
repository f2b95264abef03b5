// What lies between the products of an MLP: bias and GELU, bias and residual, both directions.
//
//   gelu:      out = gelu(x + bias)                grad_x = grad_out * gelu'(x + bias)
//   residual:  out = skip + scale * (x + bias)     grad_x = scale * grad_out
//   both:      grad_bias = sum of grad_x over the rows, before it is rounded
//
// A backward's task owns a chunk of rows and sums their columns in a slab of its own. Chunks depend
// on the number of rows alone and the slabs are added in order, so threads do not change any bit.
#ifndef STA_CPU_MLP_H_
#define STA_CPU_MLP_H_

#include <string.h>

#include "../mlp_params.h"
#include "gelu.h"
#include "lanes.h"
#include "sta_cpu.h"
#include "tile.h"
#include "workspace.h"

namespace sta {
namespace STA_ISA {

// Each operation computes the vector at column d of a row. X: storage of x; Y: of skip and out.
template <class S>
struct BiasGelu {
  using X = S;
  using Y = S;
  const StaMlpParams& params;

  template <class V>
  STA_INLINE typename V::T biased(int64_t row, int64_t d) const {
    const S* x = static_cast<const S*>(params.x) + row * params.columns;
    return load_lanes<V>(x + d) + V::load(static_cast<const Arithmetic<S>*>(params.bias) + d);
  }
  template <class V>
  STA_INLINE typename V::T value(int64_t row, int64_t d) const {
    return gelu<V>(biased<V>(row, d));
  }
  template <class V>
  STA_INLINE typename V::T gradient(int64_t row, int64_t d, typename V::T grad_out) const {
    return grad_out * gelu_derivative<V>(biased<V>(row, d));
  }
};

template <class S, class Skip>
struct BiasResidual {
  using X = S;
  using Y = Skip;
  using R = Arithmetic<S>;
  const StaMlpParams& params;

  STA_INLINE R scale(int64_t row) const {
    const R* scale = static_cast<const R*>(params.scale);
    return scale != nullptr ? scale[row / params.scale_rows] : R{1};
  }
  template <class V>
  STA_INLINE typename V::T value(int64_t row, int64_t d) const {
    const S* x = static_cast<const S*>(params.x) + row * params.columns;
    const Skip* skip = static_cast<const Skip*>(params.skip) + row * params.columns;
    const typename V::T biased =
        load_lanes<V>(x + d) + V::load(static_cast<const R*>(params.bias) + d);
    return V::fma(V::set(scale(row)), biased, load_lanes<V>(skip + d));
  }
  template <class V>
  STA_INLINE typename V::T gradient(int64_t row, int64_t, typename V::T grad_out) const {
    return V::set(scale(row)) * grad_out;
  }
};

template <class Operation>
void mlp_forward_range(int64_t begin, int64_t end, void* context) {
  const Operation operation = {*static_cast<const StaMlpParams*>(context)};
  using R = Arithmetic<typename Operation::X>;
  const int64_t columns = operation.params.columns;
  for (int64_t row = begin; row < end; ++row) {
    auto* out = static_cast<typename Operation::Y*>(operation.params.out) + row * columns;
    over_lanes<R>(columns, [&](int64_t d, auto vector, auto number) {
      using V = decltype(vector);
      for (int64_t i = d; i < d + decltype(number)::value * V::W; i += V::W) {
        store_lanes<V>(operation.template value<V>(row, i), out + i);
      }
    });
  }
}

template <class Operation>
int mlp_forward(const StaMlpParams& params, StaParallelFor parallel_for) {
  constexpr int64_t kElements = 32768;  // of a task, enough to be worth a thread
  if (params.rows * params.columns == 0) return STA_OK;
  const int64_t grain = max_of(1, kElements / params.columns);
  void* context = const_cast<StaMlpParams*>(&params);
  return parallel_for(0, params.rows, grain, mlp_forward_range<Operation>, context) == 0
             ? STA_OK
             : STA_ERROR_PARALLEL;
}

template <class R>
struct MlpBackwardJob {
  const StaMlpParams& params;
  R* slabs;  // [chunk][columns]
  int64_t chunk_rows;
};

template <class Operation>
void mlp_backward_range(int64_t begin, int64_t end, void* context) {
  using X = typename Operation::X;
  using Y = typename Operation::Y;
  using R = Arithmetic<X>;
  constexpr int64_t kRows = 4;  // added up in registers before their sum goes to the slab
  const auto& job = *static_cast<const MlpBackwardJob<R>*>(context);
  const Operation operation = {job.params};
  const int64_t columns = job.params.columns;
  const Y* grad_out = static_cast<const Y*>(job.params.grad_out);
  X* grad_x = static_cast<X*>(job.params.grad_x);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    R* slab = job.slabs + chunk * columns;
    memset(slab, 0, columns * sizeof(R));
    const int64_t last = min_of((chunk + 1) * job.chunk_rows, job.params.rows);
    for (int64_t first = chunk * job.chunk_rows; first < last; first += kRows) {
      const int64_t stop = min_of(first + kRows, last);
      over_lanes<R>(columns, [&](int64_t d, auto vector, auto number) {
        using V = decltype(vector);
        for (int64_t i = d; i < d + decltype(number)::value * V::W; i += V::W) {
          typename V::T sum = V::set(0);
          for (int64_t row = first; row < stop; ++row) {
            const typename V::T grad =
                operation.template gradient<V>(row, i, load_lanes<V>(grad_out + row * columns + i));
            if (grad_x != nullptr) store_lanes<V>(grad, grad_x + row * columns + i);
            sum += grad;
          }
          V::store(slab + i, V::load(slab + i) + sum);
        }
      });
    }
  }
}

template <class Operation>
int mlp_backward(const StaMlpParams& params, StaParallelFor parallel_for) {
  using R = Arithmetic<typename Operation::X>;
  constexpr int64_t kChunks = 64;  // enough for as many threads
  MlpBackwardJob<R> job = {params, nullptr, max_of(1, (params.rows + kChunks - 1) / kChunks)};
  const int64_t chunks = (params.rows + job.chunk_rows - 1) / job.chunk_rows;
  const Block slabs(chunks * params.columns * sizeof(R));
  if (slabs.data() == nullptr) return STA_ERROR_MEMORY;
  job.slabs = reinterpret_cast<R*>(slabs.data());
  if (chunks > 0 && parallel_for(0, chunks, 1, mlp_backward_range<Operation>, &job) != 0) {
    return STA_ERROR_PARALLEL;
  }
  R* grad_bias = static_cast<R*>(params.grad_bias);
  for (int64_t d = 0; d < params.columns; ++d) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += job.slabs[chunk * params.columns + d];
    grad_bias[d] = sum;
  }
  return STA_OK;
}

template <class S>
int bias_gelu_forward(const StaMlpParams& params, StaParallelFor parallel_for) {
  return mlp_forward<BiasGelu<S>>(params, parallel_for);
}
template <class S>
int bias_gelu_backward(const StaMlpParams& params, StaParallelFor parallel_for) {
  return mlp_backward<BiasGelu<S>>(params, parallel_for);
}

// The residual stream may be float32 beside 16-bit branches, as under autocast.
template <class S>
int bias_residual_forward(const StaMlpParams& params, StaParallelFor parallel_for) {
  if (params.skip_dtype == params.dtype) {
    return mlp_forward<BiasResidual<S, S>>(params, parallel_for);
  }
  return mlp_forward<BiasResidual<S, Arithmetic<S>>>(params, parallel_for);
}
template <class S>
int bias_residual_backward(const StaMlpParams& params, StaParallelFor parallel_for) {
  if (params.skip_dtype == params.dtype) {
    return mlp_backward<BiasResidual<S, S>>(params, parallel_for);
  }
  return mlp_backward<BiasResidual<S, Arithmetic<S>>>(params, parallel_for);
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_MLP_H_
