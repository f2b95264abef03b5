// The device, as the kernels see it: CUDA's own names, and one function for each PTX instruction
// that they use. Under STA_EMULATE the same names, and those of the CUDA runtime, come from an
// emulator that runs the kernels on a CPU; nothing else in this folder knows the difference.
#ifndef STA_CUDA_DEVICE_H_
#define STA_CUDA_DEVICE_H_

#include <stdint.h>

namespace sta {

// Two-byte storage; the kernels compute in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace sta

#ifdef STA_EMULATE
#include "cuda_emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace sta {

// The block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// cp.async: 16 bytes from global to shared memory; zeros where the source is not `present`, which
// is then not read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(present ? 16 : 0)
               : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most `Pending` groups of this thread's copies are still under way.
template <int Pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// 16 bytes of shared memory, read anew at each call: not kept in registers from one to the next.
__device__ __forceinline__ int4 read_shared(const int4* from) {
  int4 x;
  asm volatile("ld.volatile.shared.v4.b32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(shared_address(from))
               : "memory");
  return x;
}

// Barriers 1 to 15 of a block, for `threads` threads in whole warps: barrier_arrive goes on at
// once, barrier_wait once as many have come to either. What a thread wrote before it came is then
// seen by those that waited. __syncthreads is barrier 0.
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_wait(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// ldmatrix.x4: four 8x8 matrices of two-byte values. Lane l gives the address of row l % 8 of
// matrix l / 8 (16 bytes, aligned to 16); r[m] is then this lane's pair of matrix m: row lane / 4,
// columns 2 * (lane % 4) and the next. All 32 lanes together.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with every matrix transposed on the way.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// mma.sync m16n8k16: c (16 x 8, float) += a (16 x 16) b (16 x 8). Fragments as the PTX ISA gives
// them. With g = lane / 4 and t = lane % 4:
//   a[0] row g, columns 2t 2t+1;  a[1] row g+8;  a[2] row g, columns 2t+8 2t+9;  a[3] row g+8
//   b0 rows 2t 2t+1, column g;  b1 rows 2t+8 2t+9, column g
//   c[0] c[1] row g, columns 2t 2t+1;  c[2] c[3] row g+8
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<Half>(float (&c)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats, rounded to nearest even, in one register; `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<BFloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

template <>
__device__ __forceinline__ float2 unpack<Half>(uint32_t pair) {
  __half2 values;
  memcpy(&values, &pair, sizeof(values));
  return __half22float2(values);
}

// 2^x to about two units in the last place; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) to about one unit in the last place.
__device__ __forceinline__ float log2_fast(float x) { return __log2f(x); }

// The value of lane (this lane XOR mask), all 32 lanes together.
__device__ __forceinline__ float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

}  // namespace sta

#endif  // STA_EMULATE
#endif  // STA_CUDA_DEVICE_H_
