// Classifies clips with an exported model, without Python.
//
// Compile it against the torch that the model was exported with:
//
//   TORCH=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O2 classify.cpp -o classify -I$TORCH/include \
//       -I$TORCH/include/torch/csrc/api/include -L$TORCH/lib -Wl,-rpath,$TORCH/lib \
//       -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
//
// Usage: classify LIBRARY MODEL CLIPS FRAMES SIZE
//   LIBRARY  stat_kernels/libstat_kernels.so, which has the kernels
//   MODEL    an AOTInductor package (.pt2), or TorchScript (any other suffix)
//   CLIPS    a file of float32, (B, 3, FRAMES, SIZE, SIZE), normalised as MODEL.json says
//
// Prints a line a clip: its class, then its logits.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

torch::Tensor read_clips(const char* path, int64_t frames, int64_t size) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const int64_t clip_bytes = 3 * frames * size * size * sizeof(float);
  if (bytes.empty() || bytes.size() % clip_bytes != 0)
    throw std::runtime_error(std::string(path) + " does not hold whole clips of " +
                             std::to_string(clip_bytes) + " bytes");
  const int64_t batch = bytes.size() / clip_bytes;
  void* data = const_cast<char*>(bytes.data());
  return torch::from_blob(data, {batch, 3, frames, size, size}).clone();
}

torch::Tensor run(const std::string& model, const torch::Tensor& clips) {
  const bool package = model.size() > 4 && model.compare(model.size() - 4, 4, ".pt2") == 0;
  if (package) return torch::inductor::AOTIModelPackageLoader(model).run({clips}).at(0);
  return torch::jit::load(model).forward({clips}).toTensor();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: %s LIBRARY MODEL CLIPS FRAMES SIZE\n", argv[0]);
    return 2;
  }
  try {
    // Loading the library registers the operators that the model's graph calls.
    if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
    const c10::InferenceMode guard;
    const torch::Tensor logits =
        run(argv[2], read_clips(argv[3], std::atoll(argv[4]), std::atoll(argv[5]))).cpu();
    for (int64_t clip = 0; clip < logits.size(0); ++clip) {
      std::printf("%lld", static_cast<long long>(logits[clip].argmax().item<int64_t>()));
      for (int64_t label = 0; label < logits.size(1); ++label)
        std::printf(" %.9g", logits[clip][label].item<float>());
      std::printf("\n");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
