// What csrc/cuda/device.h promises, on a CPU. Included by device.h alone, under STA_EMULATE.
//
// A CUDA thread is a fiber. What a warp does together is done by the last of its lanes to arrive,
// and copies into shared memory land when the seed says so; worker.h has the rules.
#ifndef STA_TESTS_CUDA_EMULATOR_H_
#define STA_TESTS_CUDA_EMULATOR_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "two_byte.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
};
struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
struct __align__(8) int2 {
  int x, y;
};
struct __align__(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the fiber that runs; __thread, not thread_local, for it needs no initialisation.
extern __thread dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

namespace sta {
namespace emulator {

enum class Operation {
  kSyncWarp,
  kShuffle,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMultiplyAddHalf,
  kMultiplyAddBFloat16,
};

// One lane's part in what its warp does together; returns when all 32 lanes have come.
void collective(Operation operation, const void* in, void* out);

struct Shuffle {
  uint32_t value;
  int mask;
};
struct MatrixOperands {
  const uint32_t* a;
  uint32_t b0, b1;
};

void barrier();
void named_barrier(int number, int threads, bool waits);
char* block_shared_memory();
void issue_copy(void* shared, const void* global, bool present);
void commit_copies();
void wait_for_copies(int pending);

}  // namespace emulator
}  // namespace sta

inline uint32_t __float_as_uint(float x) { return sta::emulator::bits_of(x); }
inline float __uint_as_float(uint32_t bits) { return sta::emulator::float_of(bits); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline void __syncthreads() { sta::emulator::barrier(); }
inline void __syncwarp() {
  sta::emulator::collective(sta::emulator::Operation::kSyncWarp, nullptr, nullptr);
}

namespace sta {

inline char* shared_memory() { return emulator::block_shared_memory(); }

inline void copy_async(void* shared, const void* global, bool present) {
  emulator::issue_copy(shared, global, present);
}
inline void copy_commit() { emulator::commit_copies(); }
template <int Pending>
inline void copy_wait() {
  emulator::wait_for_copies(Pending);
}

inline int4 read_shared(const int4* from) { return *from; }
inline void barrier_arrive(int barrier, int threads) {
  emulator::named_barrier(barrier, threads, false);
}
inline void barrier_wait(int barrier, int threads) {
  emulator::named_barrier(barrier, threads, true);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::collective(emulator::Operation::kLoadMatrices, row, r);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::collective(emulator::Operation::kLoadMatricesTransposed, row, r);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
inline void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  const emulator::MatrixOperands operands{a, b0, b1};
  emulator::collective(emulator::Operation::kMultiplyAddBFloat16, &operands, c);
}
template <>
inline void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::MatrixOperands operands{a, b0, b1};
  emulator::collective(emulator::Operation::kMultiplyAddHalf, &operands, c);
}

template <typename T>
uint32_t pack(float low, float high);

template <>
inline uint32_t pack<BFloat16>(float low, float high) {
  return emulator::round_to_bfloat16(low) | uint32_t{emulator::round_to_bfloat16(high)} << 16;
}
template <>
inline uint32_t pack<Half>(float low, float high) {
  return emulator::round_to_half(low) | uint32_t{emulator::round_to_half(high)} << 16;
}

template <typename T>
float2 unpack(uint32_t pair);

template <>
inline float2 unpack<BFloat16>(uint32_t pair) {
  return {emulator::float_of(pair << 16), emulator::float_of(pair & 0xffff0000u)};
}
template <>
inline float2 unpack<Half>(uint32_t pair) {
  return {emulator::half_to_float(static_cast<uint16_t>(pair)),
          emulator::half_to_float(static_cast<uint16_t>(pair >> 16))};
}

// Results below the smallest normal float are zero, as ex2.approx.ftz gives them.
inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float log2_fast(float x) { return log2f(x); }

inline uint32_t shuffle_xor(uint32_t value, int mask) {
  const emulator::Shuffle in{value, mask};
  uint32_t out;
  emulator::collective(emulator::Operation::kShuffle, &in, &out);
  return out;
}
inline float shuffle_xor(float value, int mask) {
  return emulator::float_of(shuffle_xor(emulator::bits_of(value), mask));
}

}  // namespace sta

#include "fake_runtime.h"

#endif  // STA_TESTS_CUDA_EMULATOR_H_
