// Tiles of rows in shared memory and the fragments that the matrix instruction takes from them.
//
// In every fragment g = lane / 4 and t = lane % 4, as the PTX ISA has it (see device.h).
#ifndef STA_CUDA_TILES_H_
#define STA_CUDA_TILES_H_

#include "cuda/device.h"
#include "cuda/frame_keys.h"

namespace sta {

constexpr int kStrip = 16;  // rows of one matrix instruction
constexpr int kLanesPerRow = 4;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Elements from one row of a tile to the next. The extra 16 bytes put eight consecutive rows into
// eight different groups of four banks, so ldmatrix meets no conflict.
template <int D>
constexpr int kPitch = D + 8;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }
__device__ __forceinline__ int warps() { return blockDim.x / 32; }

// The same value, of which the compiler knows nothing: what depends on it is computed where it is
// used and not kept in registers across a loop.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__host__ __device__ constexpr int ceil_div(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

// Starts copying one row of D elements by kLanesPerRow lanes, of which this is number `part`;
// zeros where the row is not `present`.
template <typename T, int D>
__device__ __forceinline__ void copy_row(T* shared, const T* global, int part, bool present) {
  constexpr int kVector = 8;
#pragma unroll
  for (int d = part * kVector; d < D; d += kLanesPerRow * kVector)
    copy_async(shared + d, global + d, present);
}

// Starts copying `rows` keys and values of a frame, from row `begin` of its sequence, by the whole
// block; rows past the last key become zeros.
template <typename T, int D>
__device__ __forceinline__ void copy_keys(T* keys, T* values, const Problem& p,
                                          const FrameKeys& frame, int b, int h, int begin,
                                          int rows) {
  const int thread = opaque(threadIdx.x);
  const int part = thread % kLanesPerRow;
#pragma unroll 1
  for (int r = thread / kLanesPerRow; r < rows; r += blockDim.x / kLanesPerRow) {
    const bool present = begin + r < frame.count;
    const Row row = frame.row(present ? begin + r : 0);
    copy_row<T, D>(keys + r * kPitch<D>, token<T>(p.k_cur, p.k_short, p.k_long, row, b, h), part,
                   present);
    copy_row<T, D>(values + r * kPitch<D>, token<T>(p.v_cur, p.v_short, p.v_long, row, b, h), part,
                   present);
  }
}

// Starts copying queries begin to begin + rows of a frame by `threads` threads, of which this is
// number `thread`; queries past the last become zeros.
template <typename T, int D>
__device__ __forceinline__ void copy_queries(T* shared, const Tensor& x, int queries, int b, int i,
                                             int h, int begin, int rows, int thread, int threads) {
#pragma unroll 1
  for (int r = thread / kLanesPerRow; r < rows; r += threads / kLanesPerRow) {
    const bool present = begin + r < queries;
    copy_row<T, D>(shared + r * kPitch<D>, token<T>(x, b, i, present ? begin + r : 0, h),
                   thread % kLanesPerRow, present);
  }
}

// Left operand, 16 x 16, from a tile [row][column] at its first element.
template <typename T, int P>
__device__ __forceinline__ void left(uint32_t (&a)[4], const T* tile) {
  load_matrices(a, tile + lane() % 16 * P + lane() / 16 * 8);
}

// Left operand, 16 x 16, from a tile kept as [column][row].
template <typename T, int P>
__device__ __forceinline__ void left_transposed(uint32_t (&a)[4], const T* tile) {
  load_matrices_transposed(a, tile + (lane() % 8 + lane() / 16 * 8) * P + lane() / 8 % 2 * 8);
}

// Right operands of two neighbouring 16 x 8 products, from a tile [row][column]: b[0], b[1] are
// columns 0 to 7, b[2], b[3] columns 8 to 15.
template <typename T, int P>
__device__ __forceinline__ void right(uint32_t (&b)[4], const T* tile) {
  load_matrices_transposed(b, tile + lane() % 16 * P + lane() / 16 * 8);
}

// The same from a tile kept as [column][row]: the product with a transposed matrix.
template <typename T, int P>
__device__ __forceinline__ void right_transposed(uint32_t (&b)[4], const T* tile) {
  load_matrices(b, tile + (lane() % 8 + lane() / 16 * 8) * P + lane() / 8 % 2 * 8);
}

// Two neighbouring accumulators, 16 x 16, as the left operand of the next product.
template <typename T>
__device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&c0)[4],
                                        const float (&c1)[4]) {
  a[0] = pack<T>(c0[0], c0[1]);
  a[1] = pack<T>(c0[2], c0[3]);
  a[2] = pack<T>(c1[0], c1[1]);
  a[3] = pack<T>(c1[2], c1[3]);
}

// Writes columns 0 to 15 of one row, of which this lane has the pairs `low` (of columns 0 to 7) and
// `high` (8 to 15). Lanes swap halves so that each writes 8 bytes and four lanes fill a sector. All
// lanes of the warp call this; those with write == false only swap.
__device__ __forceinline__ void store_pairs(void* row, uint32_t low, uint32_t high, bool write) {
  const bool odd = lane() % 2;
  const uint32_t other = shuffle_xor(odd ? low : high, 1);
  const uint2 four = odd ? uint2{other, high} : uint2{low, other};
  if (write) static_cast<uint2*>(row)[(odd ? 2 : 0) + lane() % 4 / 2] = four;
}

}  // namespace sta

#endif  // STA_CUDA_TILES_H_
