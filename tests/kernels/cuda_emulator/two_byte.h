// float and the two-byte formats, rounding to nearest even as the device's cvt.rn does.
#ifndef STA_TESTS_TWO_BYTE_H_
#define STA_TESTS_TWO_BYTE_H_

#include <stdint.h>
#include <string.h>

namespace sta {
namespace emulator {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float bfloat16_to_float(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

inline uint16_t round_to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t bits) {
  // The exponents' biases differ by 112; the product is exact, subnormal halves included.
  const float x = float_of((bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t infinite = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return float_of(bits_of(x) | infinite | (bits & 0x8000u) << 16);
}

inline uint16_t round_to_half(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffff;
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  if (x != x) return 0x7fff;
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and more
  uint32_t rounded;
  if (magnitude < 0x38800000) {
    // Below 2^-14 a half counts in 2^-24, and so does the last place of a float between 0.5 and 1.
    rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    rounded = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  return static_cast<uint16_t>(sign | rounded);
}

}  // namespace emulator
}  // namespace sta

#endif  // STA_TESTS_TWO_BYTE_H_
