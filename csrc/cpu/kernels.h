// All kernels of one instruction set. An isa_*.cpp defines STA_ISA (its namespace) and
// STA_VECTOR_BYTES, includes this file, and is compiled with that instruction set's flags.
#ifndef STA_CPU_KERNELS_H_
#define STA_CPU_KERNELS_H_

#include "backward.h"
#include "forward.h"
#include "kernel_table.h"
#include "mlp.h"
#include "pool_backward.h"
#include "pool_forward.h"

namespace sta {
namespace STA_ISA {

constexpr KernelTable make_table() {
  return {
      {forward<float>, forward<double>, forward<Half>, forward<Bfloat16>},
      {backward<float>, backward<double>, backward<Half>, backward<Bfloat16>},
      {pool_forward<float>, pool_forward<double>, pool_forward<Half>, pool_forward<Bfloat16>},
      {pool_backward<float>, pool_backward<double>, pool_backward<Half>, pool_backward<Bfloat16>},
      {bias_gelu_forward<float>, bias_gelu_forward<double>, bias_gelu_forward<Half>,
       bias_gelu_forward<Bfloat16>},
      {bias_gelu_backward<float>, bias_gelu_backward<double>, bias_gelu_backward<Half>,
       bias_gelu_backward<Bfloat16>},
      {bias_residual_forward<float>, bias_residual_forward<double>, bias_residual_forward<Half>,
       bias_residual_forward<Bfloat16>},
      {bias_residual_backward<float>, bias_residual_backward<double>, bias_residual_backward<Half>,
       bias_residual_backward<Bfloat16>}};
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_KERNELS_H_
