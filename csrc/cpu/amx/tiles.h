// Eight tile registers of 16 rows x 64 bytes and the instructions on them, in three kinds:
//   STA_TILES_AMX           the processor's own (Intel AMX)
//   STA_TILES_EMULATED      tiles in memory, products in plain C++: for tests, on any processor
//   STA_TILES_AVX512_BF16   none: operands lie in tiles, but multiply_vectors.h takes no registers
//
// dot<C, A, B> adds to the 16 x 16 floats C the product of A, 16 rows of 32 bfloat16, and B, in
// which row r holds rows 2r and 2r + 1 of a 32 x 16 matrix, their elements alternating.
#ifndef STA_CPU_AMX_TILES_H_
#define STA_CPU_AMX_TILES_H_

#include "lanes.h"

namespace sta {
namespace STA_ISA {

constexpr int64_t kTileRows = 16;     // and columns of floats
constexpr int64_t kTileDepth = 32;    // bfloat16 a row, summed by one product
constexpr int64_t kTileBytes = 1024;  // 16 x 64
constexpr int kTileRegisters = 8;

constexpr int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr int64_t steps_of(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }

#if defined(STA_TILES_AMX)

// The memory layout that ldtilecfg and sttilecfg define.
struct alignas(64) TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64, "ldtilecfg reads 64 bytes");

// Static: compilers have been seen to drop the stores to one on the stack.
constexpr TileConfiguration kTileConfiguration = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The thread's tile registers, configured while this object lives. Afterwards the thread has the
// configuration that it had before, usually none, so other users of tiles see no difference.
class TileRegisters {
 public:
  TileRegisters() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" ::"m"(kTileConfiguration));
  }
  ~TileRegisters() { asm volatile("ldtilecfg %0" ::"m"(before_)); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  template <int T>
  STA_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  STA_INLINE void load(const void* rows, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride_bytes), "i"(T) : "memory");
  }
  template <int T>
  STA_INLINE void store(void* rows, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride_bytes), "i"(T)
                 : "memory");
  }
  template <int C, int A, int B>
  STA_INLINE void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }

 private:
  TileConfiguration before_;
};

#elif defined(STA_TILES_AVX512_BF16)

class TileRegisters {};

#else

class TileRegisters {
 public:
  template <int T>
  STA_INLINE void zero() {
    __builtin_memset(tiles_[T], 0, kTileBytes);
  }
  template <int T>
  STA_INLINE void load(const void* rows, int64_t stride_bytes) {
    const char* row = static_cast<const char*>(rows);
    for (int r = 0; r < kTileRows; ++r) __builtin_memcpy(tiles_[T][r], row + r * stride_bytes, 64);
  }
  template <int T>
  STA_INLINE void store(void* rows, int64_t stride_bytes) {
    char* row = static_cast<char*>(rows);
    for (int r = 0; r < kTileRows; ++r) __builtin_memcpy(row + r * stride_bytes, tiles_[T][r], 64);
  }
  template <int C, int A, int B>
  STA_INLINE void dot() {
    multiply_add(tiles_[C], tiles_[A], tiles_[B]);
  }

 private:
  using Tile = char[kTileRows][64];

  static STA_NOINLINE void multiply_add(Tile& c, const Tile& a, const Tile& b) {
    for (int m = 0; m < kTileRows; ++m) {
      Floats sum = load_floats(c[m]);
      for (int k = 0; k < kTileRows; ++k) {
        uint32_t pair;
        __builtin_memcpy(&pair, a[m] + 4 * k, 4);
        const Words pairs = load_words(b[k]);
        const Floats even = (Floats)(pairs << 16) * float_of(pair << 16);
        const Floats odd =
            (Floats)(pairs & static_cast<int32_t>(0xffff0000)) * float_of(pair & 0xffff0000u);
        sum += even + odd;
      }
      store_floats(c[m], sum);
    }
  }

  alignas(64) Tile tiles_[kTileRegisters];
};

#endif

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_TILES_H_
