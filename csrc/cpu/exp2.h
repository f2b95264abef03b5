// 2^t in vectors, for t <= 0 as softmax needs it.
#ifndef STA_CPU_EXP2_H_
#define STA_CPU_EXP2_H_

#include "simd.h"

namespace sta {
namespace STA_ISA {

template <class R>
struct Exp2Constants;

template <>
struct Exp2Constants<float> {
  using Bits = int32_t;
  // Minimax for 2^f on [-1/2, 1/2] in relative error: 1.9e-9 before rounding.
  static constexpr float kPolynomial[] = {1.0f,           0.693147206f,   0.240226469f,
                                          0.0555032878f,  0.00961848896f, 0.00133999311f,
                                          0.000153458120f};
  static constexpr float kLowest = -127.0f;  // 2^t becomes an exact zero from here down
  static constexpr float kMagic = 12582912.0f + 127.0f;
  static constexpr int kMantissaBits = 23;
};

template <>
struct Exp2Constants<double> {
  using Bits = int64_t;
  // ln(2)^k / k!: the remainder at |f| = 1/2 is 2e-16 of the value.
  static constexpr double kPolynomial[] = {1.0,
                                           0.6931471805599453,
                                           0.24022650695910072,
                                           0.05550410866482158,
                                           0.009618129107628477,
                                           0.0013333558146428443,
                                           0.0001540353039338161,
                                           1.5252733804059841e-05,
                                           1.321548679014431e-06,
                                           1.0178086009239699e-07,
                                           7.054911620801123e-09,
                                           4.4455382718708115e-10,
                                           2.5678435993488202e-11};
  static constexpr double kLowest = -1023.0;
  static constexpr double kMagic = 6755399441055744.0 + 1023.0;
  static constexpr int kMantissaBits = 52;
};

// For t from kLowest to 0, or NaN.
template <class V>
STA_INLINE typename V::T exp2_in_range(typename V::T t) {
  using R = typename V::Real;
  using C = Exp2Constants<R>;
  typedef typename C::Bits Bits __attribute__((vector_size(V::kBytes)));
  // Adding 1.5 * 2^mantissa rounds t to an integer; the bias added with it leaves the biased
  // exponent in the low bits, where one shift makes it the number 2^round(t).
  const typename V::T shifted = t + V::set(C::kMagic);
  const typename V::T fraction = t - (shifted - V::set(C::kMagic));
  constexpr int kDegree = sizeof(C::kPolynomial) / sizeof(R) - 1;
  typename V::T power = V::set(C::kPolynomial[kDegree]);
  STA_UNROLL
  for (int k = kDegree - 1; k >= 0; --k) {
    power = V::fma(power, fraction, V::set(C::kPolynomial[k]));
  }
  return power * (typename V::T)((Bits)shifted << C::kMantissaBits);
}

// NaN stays NaN; -inf gives 0.
template <class V>
STA_INLINE typename V::T exp2_nonpositive(typename V::T t) {
  return exp2_in_range<V>(V::max(V::set(Exp2Constants<typename V::Real>::kLowest), t));
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_EXP2_H_
