// The pybind11 module stat_kernels._introspection: how the library was built, and what compiler and
// driver say of its CUDA kernels. For reports alone; operators never come through here.

#include "introspection.h"

#include <pybind11/pybind11.h>

#include "build_info.h"

namespace py = pybind11;

namespace {

py::dict build_information() {
  py::dict found;
  for (const auto& entry : STA_BUILD_INFO) found[entry[0]] = entry[1];
  found["CUDA architectures"] = STA_CUDA_ARCHITECTURES;
  return found;
}

py::list cuda_kernels() {
  py::list found;
  StaCudaKernel kernel{};
  const char* error = nullptr;
  int code = 0;
  for (int i = 0; (code = stat_kernels_cuda_kernel(i, &kernel, &error)) == 0; ++i) {
    py::dict row;
    row["name"] = kernel.name;
    row["dtype"] = kernel.dtype == STA_F16 ? "float16" : "bfloat16";
    row["head_dim"] = kernel.head_dim;
    row["registers"] = kernel.registers;
    row["spilled_bytes"] = kernel.spilled_bytes;
    row["static_shared_bytes"] = kernel.static_shared;
    row["dynamic_shared_bytes"] = kernel.dynamic_shared;
    row["threads"] = kernel.threads;
    row["blocks_resident"] = kernel.blocks_resident;
    found.append(row);
  }
  if (code != STA_CUDA_NO_SUCH_KERNEL) throw std::runtime_error(error);
  return found;
}

}  // namespace

PYBIND11_MODULE(_introspection, m) {
  m.doc() = "How libstat_kernels.so was built, and its CUDA kernels' registers and memory.";
  m.def("build_information", &build_information,
        "Compiler, flags, versions and CUDA architectures, all text.");
  m.def("cuda_kernels", &cuda_kernels,
        "One dict a CUDA kernel of the library: name, dtype, head_dim, registers and\n"
        "spilled_bytes a thread, "
        "static_shared_bytes and dynamic_shared_bytes a block,\n"
        "threads a block, blocks_resident on a multiprocessor, the last three at STAT's 64-frame\n"
        "shapes. [] without CUDA kernels.\n"
        "Raises RuntimeError with the driver's reason where there is no device.");
}
