// Rows of the caller's tensors in the forms that tile products read:
//   rows   [row][depth], zeros in the padding: the left operand A
//   words  B of rows^T: a transpose of 32-bit words (two channels each)
//   pairs  B of rows: two neighbouring rows, their elements alternating
// The latter two take a strip, pointers to kTileDepth rows of `depth` readable elements.
#ifndef STA_CPU_AMX_PACK_H_
#define STA_CPU_AMX_PACK_H_

#include "tiles.h"

namespace sta {
namespace STA_ISA {

// 16 bytes of each of rows row_at(k), row_at(k + 4), ... in one vector.
template <class RowAt>
STA_INLINE Words load_chunks(const RowAt& row_at, int k, int64_t byte) {
#if defined(__AVX512F__)
  const auto chunk = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row_at(k + 4 * i) + byte));
  };
  __m512i v = _mm512_castsi128_si512(chunk(0));
  v = _mm512_inserti32x4(v, chunk(1), 1);
  v = _mm512_inserti32x4(v, chunk(2), 2);
  return (Words)_mm512_inserti32x4(v, chunk(3), 3);
#else
  Words v;
  for (int i = 0; i < 4; ++i) {
    __builtin_memcpy(reinterpret_cast<char*>(&v) + 16 * i, row_at(k + 4 * i) + byte, 16);
  }
  return v;
#endif
}

STA_INLINE Words unpack_low(Words a, Words b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}
STA_INLINE Words unpack_high(Words a, Words b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
STA_INLINE Words unpack_low_doubles(Words a, Words b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}
STA_INLINE Words unpack_high_doubles(Words a, Words b) {
  return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// The transpose of 16 x 16 words: word i of every row_at(k) goes to out_row(i). Four rows meet in
// each vector, so half of a transpose is done by loads.
template <class RowAt, class OutRow>
STA_INLINE void transpose_words(const RowAt& row_at, const OutRow& out_row) {
  STA_UNROLL
  for (int chunk = 0; chunk < 4; ++chunk) {
    Words v[4];
    STA_UNROLL
    for (int k = 0; k < 4; ++k) v[k] = load_chunks(row_at, k, 16 * chunk);
    const Words low01 = unpack_low(v[0], v[1]), high01 = unpack_high(v[0], v[1]);
    const Words low23 = unpack_low(v[2], v[3]), high23 = unpack_high(v[2], v[3]);
    store_words(out_row(4 * chunk), unpack_low_doubles(low01, low23));
    store_words(out_row(4 * chunk + 1), unpack_high_doubles(low01, low23));
    store_words(out_row(4 * chunk + 2), unpack_low_doubles(high01, high23));
    store_words(out_row(4 * chunk + 3), unpack_high_doubles(high01, high23));
  }
}

// A strip's `words`: the two columns of tiles that a packed matrix has for its 32 rows.
STA_INLINE void pack_words(const Bfloat16* const* rows, int64_t depth, char* out) {
  for (int64_t d = 0; d < depth; d += kTileDepth, out += 2 * kTileBytes) {
    for (int64_t half = 0; half < 2; ++half) {
      transpose_words(
          [&](int64_t k) { return reinterpret_cast<const char*>(rows[half * kTileRows + k] + d); },
          [&](int64_t i) { return out + half * kTileBytes + i * 64; });
    }
  }
}

// A strip's `pairs`: one step of a packed matrix that has `steps`.
STA_INLINE void pack_pairs(const Bfloat16* const* rows, int64_t depth, int64_t steps, char* out) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    char* to = out + r * 64;
    for (int64_t d = 0; d < depth; d += kTileDepth, to += 2 * steps * kTileBytes) {
      const Words a = load_words(rows[2 * r] + d), b = load_words(rows[2 * r + 1] + d);
      const Words low = alternate_low(a, b), high = alternate_high(a, b);
      store_words(to, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20,
                                              21, 22, 23));
      store_words(to + kTileBytes, __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27,
                                                           12, 13, 14, 15, 28, 29, 30, 31));
    }
  }
}

// Copies of `count` rows row_at(0), ... of `width` elements, padded with zeros to a whole strip.
template <class RowAt>
STA_INLINE void copy_rows(const RowAt& row_at, int64_t count, int64_t width, int64_t depth,
                          Bfloat16* out) {
  const int64_t whole = width / kTileDepth * kTileDepth;
  for (int64_t r = 0; r < count; ++r, out += depth) {
    const Bfloat16* row = row_at(r);
    for (int64_t d = 0; d < whole; d += kTileDepth) store_words(out + d, load_words(row + d));
    if (whole < width) {
      Words rest = {};
      __builtin_memcpy(&rest, row + whole, (width - whole) * sizeof(Bfloat16));
      store_words(out + whole, rest);
    }
  }
  if (count < kTileDepth) __builtin_memset(out, 0, (kTileDepth - count) * depth * 2);
}

// Changes the sign of `count` elements, a multiple of 32.
STA_INLINE void negate(Bfloat16* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kTileDepth) {
    store_words(x + i, load_words(x + i) ^ static_cast<int32_t>(0x80008000));
  }
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_AMX_PACK_H_
