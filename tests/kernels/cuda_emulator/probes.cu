// Small kernels for test_cuda_emulator*.py: every primitive on its own, a pipeline of copies with
// and without bugs, and what a device does not allow.
#include "cuda/runtime.h"

namespace sta {
namespace {

struct Probe {
  const void* in;
  const void* in2;
  void* out;
  int count, variant;
};

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

// 32 rows of 8 values at a pitch of `count` bytes -> r[4] of every lane.
template <bool Transposed>
__global__ void load_rows(const __grid_constant__ Probe p) {
  const uint4 row = static_cast<const uint4*>(p.in)[lane()];
  char* mine = shared_memory() + lane() * p.count;
  *reinterpret_cast<uint4*>(mine) = row;
  __syncwarp();
  uint32_t r[4];
  if (Transposed)
    load_matrices_transposed(r, mine);
  else
    load_matrices(r, mine);
  for (int m = 0; m < 4; ++m) static_cast<uint32_t*>(p.out)[lane() * 4 + m] = r[m];
}

// in: a[4], b[2] of every lane; out: c[4] of every lane, added to.
template <typename T>
__global__ void multiply(const __grid_constant__ Probe p) {
  const uint32_t* in = static_cast<const uint32_t*>(p.in) + lane() * 6;
  float* out = static_cast<float*>(p.out) + lane() * 4;
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  float c[4] = {out[0], out[1], out[2], out[3]};
  multiply_add<T>(c, a, in[4], in[5]);
  for (int e = 0; e < 4; ++e) out[e] = c[e];
}

__global__ void shuffle(const __grid_constant__ Probe p) {
  static_cast<float*>(p.out)[lane()] =
      shuffle_xor(static_cast<const float*>(p.in)[lane()], p.variant);
}

// Pairs of floats -> the packed pair and its two values again.
template <typename T>
__global__ void convert(const __grid_constant__ Probe p) {
  struct Converted {
    uint32_t pair;
    float low, high;
  };
  for (int i = lane(); i < p.count; i += 32) {
    const float* x = static_cast<const float*>(p.in) + 2 * i;
    const uint32_t pair = pack<T>(x[0], x[1]);
    const float2 back = unpack<T>(pair);
    static_cast<Converted*>(p.out)[i] = {pair, back.x, back.y};
  }
}

__global__ void logarithms(const __grid_constant__ Probe p) {
  for (int i = lane(); i < p.count; i += 32) {
    const float x = static_cast<const float*>(p.in)[i];
    static_cast<float*>(p.out)[2 * i] = exp2_fast(x);
    static_cast<float*>(p.out)[2 * i + 1] = log2_fast(x);
  }
}

__global__ void untouched_memory(const __grid_constant__ Probe p) {
  for (int i = threadIdx.x; i < p.count; i += blockDim.x)
    static_cast<char*>(p.out)[i] = shared_memory()[i];
}

// Every thread of every block reports where it is.
__global__ void places(const __grid_constant__ Probe p) {
  unsigned* out = static_cast<unsigned*>(p.out) + 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  out[0] = threadIdx.x;
  out[1] = blockIdx.x;
  out[2] = blockDim.x;
  out[3] = gridDim.x;
}

// What a copy has brought at three moments: after its issue, after the wait for all but `variant`
// groups of two, after the wait for all. The source changes right after the issue.
__global__ void one_copy(const __grid_constant__ Probe p) {
  uint32_t* first = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* out = static_cast<uint32_t*>(p.out) + 4 * blockIdx.x;
  uint32_t* source = static_cast<uint32_t*>(const_cast<void*>(p.in)) + 4 * blockIdx.x;
  if (threadIdx.x != 0) return;
  copy_async(first, source, true);
  copy_commit();
  copy_async(first + 4, source, false);
  copy_commit();
  out[0] = first[0];
  source[0] = 7;
  if (p.variant == 0) copy_wait<0>();
  if (p.variant == 1) copy_wait<1>();
  if (p.variant == 2) copy_wait<2>();
  out[1] = first[0];
  out[2] = first[4];
  copy_wait<0>();
  out[3] = first[0];
}

// A thread's value goes through shared memory to a thread `variant` away, without or (count
// 1) with a barrier in between.
__global__ void exchange(const __grid_constant__ Probe p) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  if (p.count == 1) __syncthreads();
  const int from = (threadIdx.x + blockDim.x - p.variant) % blockDim.x;
  static_cast<int*>(p.out)[threadIdx.x] = shared[from];
}

// Half of the warps pass their threads' values to the other half, pair by pair, through a barrier
// of two warps or (count 0) none, and go on at once.
__global__ void hand_over(const __grid_constant__ Probe p) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int half = blockDim.x / 2, thread = threadIdx.x % half;
  const bool gives = threadIdx.x < half;
  const int barrier = 1 + thread / 32;
  if (gives) {
    shared[thread] = thread;
    if (p.count == 1) barrier_arrive(barrier, 64);
  } else {
    if (p.count == 1) barrier_wait(barrier, 64);
    static_cast<int*>(p.out)[thread] = shared[thread ^ 5];
  }
}

// One warp's copy and another's load of a matrix, with no barrier in between.
__global__ void race(const __grid_constant__ Probe p) {
  if (threadIdx.x == 0) {
    copy_async(shared_memory(), p.in, true);
    copy_commit();
    copy_wait<0>();
  }
  uint32_t r[4];
  if (threadIdx.x >= 32) load_matrices(r, shared_memory());
}

enum PipelineBug {
  kNoBug,
  kNoBarrierAfterTheWait,
  kNoBarrierBeforeTheNextCopy,
  kWaitTooShallow,
  kNoWait,
};

// out (64 x 16) = x (64 x count) y (count x 16)^T, 16 columns a step, two stages of shared memory;
// y is kept as (16 x count), so both come in rows.
__global__ void pipeline(const __grid_constant__ Probe p) {
  constexpr int kRows = 80, kPitch = 24;  // 64 rows of x, 16 of y
  uint16_t* stages = reinterpret_cast<uint16_t*>(shared_memory());
  const int steps = p.count / 16;
  const auto fetch = [&](int step) {
    uint16_t* stage = stages + step % 2 * kRows * kPitch;
    for (int i = threadIdx.x; i < kRows * 2; i += blockDim.x) {
      const int row = i / 2, column = i % 2 * 8;
      const void* from = row < 64 ? p.in : p.in2;
      copy_async(stage + row * kPitch + column,
                 static_cast<const uint16_t*>(from) + row % 64 * p.count + step * 16 + column,
                 true);
    }
  };
  float sums[2][4] = {};
  fetch(0);
  copy_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) fetch(step + 1);
    copy_commit();
    if (p.variant == kWaitTooShallow)
      copy_wait<2>();
    else if (p.variant != kNoWait)
      copy_wait<1>();
    if (p.variant != kNoBarrierAfterTheWait) __syncthreads();
    const uint16_t* stage = stages + step % 2 * kRows * kPitch;
    const int row = threadIdx.x / 32 * 16 + lane() % 16;
    uint32_t a[4], b[4];
    load_matrices(a, stage + row * kPitch + lane() / 16 * 8);
    load_matrices(b, stage + (64 + lane() % 8 + lane() / 16 * 8) * kPitch + lane() / 8 % 2 * 8);
    multiply_add<BFloat16>(sums[0], a, b[0], b[1]);
    multiply_add<BFloat16>(sums[1], a, b[2], b[3]);
    if (p.variant != kNoBarrierBeforeTheNextCopy) __syncthreads();
  }
  for (int n = 0; n < 2; ++n)
    for (int e = 0; e < 4; ++e) {
      const int row = threadIdx.x / 32 * 16 + lane() / 4 + e / 2 * 8;
      const int column = n * 8 + lane() % 4 * 2 + e % 2;
      static_cast<float*>(p.out)[row * 16 + column] = sums[n][e];
    }
}

__device__ __attribute__((noinline)) void use_much_stack() {
  volatile char large[63 * 1024];
  large[0] = 0;
  __syncwarp();
}

// What no device allows, one thing a variant.
__global__ void forbidden(const __grid_constant__ Probe p) {
  char* shared = shared_memory();
  uint32_t r[4];
  float c[4] = {};
  switch (p.variant) {
    case 0:
      if (lane() < 16) shuffle_xor(1.f, 1);
      break;
    case 1:
      if (lane() < 16)
        load_matrices(r, shared + lane() * 16);
      else
        shuffle_xor(1.f, 1);
      break;
    case 2:
      if (lane() < 16) __syncthreads();
      shuffle_xor(1.f, 1);
      break;
    case 3:
      if (threadIdx.x == 0) return;
      __syncthreads();
      break;
    case 4:
      load_matrices(r, shared + lane() * 16 + 8);
      break;
    case 5:
      load_matrices(r, shared + (lane() + 1) * 16);
      break;
    case 6:
      copy_async(shared - 16, p.in, true);
      break;
    case 7:
      copy_async(shared, static_cast<const char*>(p.in) + 4, true);
      break;
    case 8:
      shuffle_xor(1.f, lane() < 16 ? 1 : 2);
      break;
    case 9:
      multiply_add<Half>(c, {0, 0, 0, 0}, 0, 0);
      if (lane() > 30) return;
      __syncwarp();
      break;
    case 10:
      shared[p.count] = 0;
      break;
    case 11:
      shared[(p.count + 127) / 128 * 128] = 0;
      break;
    case 12:
      use_much_stack();
      break;
    case 13:
      if (threadIdx.x < 32) barrier_wait(3, 64);
      break;
    case 14:
      if (threadIdx.x < 32) barrier_arrive(3, 64);
      break;
    case 15:
      barrier_wait(16, 64);
      break;
  }
}

}  // namespace
}  // namespace sta

extern "C" int probe(const char* name, const void* in, const void* in2, void* out, int count,
                     int variant, int64_t blocks, int threads, int shared_bytes) {
  using namespace sta;
  const struct {
    const char* name;
    void (*kernel)(Probe);
  } kernels[] = {
      {"load", load_rows<false>},
      {"load_transposed", load_rows<true>},
      {"multiply_half", multiply<Half>},
      {"multiply_bfloat16", multiply<BFloat16>},
      {"shuffle", shuffle},
      {"convert_half", convert<Half>},
      {"convert_bfloat16", convert<BFloat16>},
      {"logarithms", logarithms},
      {"untouched_memory", untouched_memory},
      {"places", places},
      {"one_copy", one_copy},
      {"exchange", exchange},
      {"hand_over", hand_over},
      {"race", race},
      {"pipeline", pipeline},
      {"forbidden", forbidden},
  };
  for (const auto& known : kernels)
    if (strcmp(known.name, name) == 0)
      return launch(known.kernel, blocks, threads, shared_bytes, nullptr,
                    Probe{in, in2, out, count, variant});
  return -1;
}
