// What the bindings share: checks of tensors, torch's threads, the choice of an instruction set.
#ifndef STA_BINDING_H_
#define STA_BINDING_H_

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "cpu/sta_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kAny = -1;  // a size that is not prescribed

inline int32_t dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return STA_F32;
    case ScalarType::Double:
      return STA_F64;
    case ScalarType::Half:
      return STA_F16;
    case ScalarType::BFloat16:
      return STA_BF16;
    default:
      STD_TORCH_CHECK(false, "stat_kernels: no kernel has such a dtype");
  }
}

inline std::string shape_text(const int64_t* sizes, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i)
    text += (i > 0 ? ", " : "") + (sizes[i] == kAny ? std::string("*") : std::to_string(sizes[i]));
  return text + ")";
}

// Throws unless x has these sizes, of which kAny fits everything, and lies where q does.
inline void check(const char* name, const Tensor& x, const Tensor& q, ScalarType dtype,
                  std::initializer_list<int64_t> sizes) {
  const auto found = x.sizes();
  const int64_t count = static_cast<int64_t>(sizes.size());
  bool fits = x.dim() == count;
  for (int64_t i = 0; fits && i < count; ++i)
    fits = sizes.begin()[i] == kAny || sizes.begin()[i] == found[i];
  STD_TORCH_CHECK(fits, "stat_kernels: ", name, " must have the sizes ",
                  shape_text(sizes.begin(), count), ", got ", shape_text(found.data(), x.dim()));
  STD_TORCH_CHECK(x.scalar_type() == dtype, "stat_kernels: ", name, " must have the dtype ", dtype,
                  ", got ", x.scalar_type());
  STD_TORCH_CHECK(x.is_cuda() == q.is_cuda() && x.get_device_index() == q.get_device_index(),
                  "stat_kernels: ", name, " must be on q's device");
}

// The kernels run on torch's own threads, so torch.set_num_threads holds and no second pool exists.
inline int run_parallel(int64_t begin, int64_t end, int64_t grain, StaParallelBody body,
                        void* context) {
  return torch_parallel_for(begin, end, grain, body, context);
}

inline int isa_by_name(const std::string& name) {
  for (int isa = 0; isa < STA_ISA_COUNT; ++isa) {
    if (name == sta_cpu_isa_name(isa) && sta_cpu_isa_usable(isa)) return isa;
  }
  STD_TORCH_CHECK(false, "stat_kernels: this processor or build has no '", name,
                  "' kernel; the best it has is '", sta_cpu_isa_name(sta_cpu_best_isa()), "'");
}

inline void check_cpu(int code) {
  STD_TORCH_CHECK(code == 0, "stat_kernels: the CPU kernel failed: ", sta_cpu_error_string(code));
}

#endif  // STA_BINDING_H_
