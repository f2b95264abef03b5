// GELU and its derivative in vectors, by the error function and not by tanh.
//
// With Phi the standard normal distribution's cumulative function and n = -|z|:
//
//   gelu(z)  = z * Phi(z)           = max(z, 0) + n * Phi(n)
//   gelu'(z) = Phi(z) + z * phi(z)  = m for z < 0, else 1 - m;   m = Phi(n) + n * phi(n)
//
// In float both Phi(n) and m are powers of two: Phi(n) = 2^P(n), m = exp(-n^2 / 2) * Q(n), P and Q
// polynomials. Their errors, before rounding, are below 3.5e-8 and 5.2e-8; PyTorch's are 1e-6 and
// 3e-7.
#ifndef STA_CPU_GELU_H_
#define STA_CPU_GELU_H_

#include <math.h>

#include "exp2.h"
#include "simd.h"

namespace sta {
namespace STA_ISA {

// -|z|, or `lowest` where that is below: Phi(-8) = 6e-16. So infinities do no harm. NaN stays NaN.
template <class V>
STA_INLINE typename V::T negative_magnitude(typename V::T z, typename V::Real lowest) {
  typedef typename Exp2Constants<typename V::Real>::Bits Bits
      __attribute__((vector_size(V::kBytes)));
  const typename V::T sign = V::set(typename V::Real{-0.0});
  return V::max(V::set(lowest), (typename V::T)((Bits)z | (Bits)sign));
}

template <class V, int size>
STA_INLINE typename V::T polynomial(typename V::T x, const typename V::Real (&coefficients)[size]) {
  typename V::T sum = V::set(coefficients[size - 1]);
  STA_UNROLL
  for (int k = size - 2; k >= 0; --k) sum = V::fma(sum, x, V::set(coefficients[k]));
  return sum;
}

template <class V>
STA_INLINE typename V::T gelu(typename V::T z) {
  const typename V::T positive = V::max(V::set(0), z);
  if constexpr (sizeof(typename V::Real) == 8) {
    const typename V::T n = negative_magnitude<V>(z, -40);
    typename V::T cumulative = n;
    for (int i = 0; i < V::W; ++i) cumulative[i] = 0.5 * erfc(-0.70710678118654752 * n[i]);
    return V::fma(n, cumulative, positive);
  } else {
    constexpr float kP[] = {-0.999999821f,   1.15111387f,      -0.459140092f,
                            0.052700486f,    0.0073608649f,    0.000367614499f,
                            -8.9277557e-05f, -1.86816815e-05f, -1.08242112e-06f};
    const typename V::T n = negative_magnitude<V>(z, -8);
    return V::fma(n, exp2_in_range<V>(polynomial<V>(n, kP)), positive);
  }
}

template <class V>
STA_INLINE typename V::T gelu_derivative(typename V::T z) {
  typename V::T m;
  if constexpr (sizeof(typename V::Real) == 8) {
    m = negative_magnitude<V>(z, -40);
    for (int i = 0; i < V::W; ++i) {
      const double density = 0.39894228040143268 * exp(-0.5 * m[i] * m[i]);
      m[i] = 0.5 * erfc(-0.70710678118654752 * m[i]) + m[i] * density;
    }
  } else {
    constexpr float kQ[] = {0.49999994f,     0.797879994f,    0.249933437f,    0.132602841f,
                            0.0613957681f,   0.0246880818f,   0.00829566736f,  0.00218880316f,
                            0.000421034900f, 5.40429974e-05f, 4.05616902e-06f, 1.32518764e-07f};
    const typename V::T n = negative_magnitude<V>(z, -8);
    m = exp2_in_range<V>(n * n * V::set(-0.721347520f)) * polynomial<V>(n, kQ);
  }
  return z < V::set(0) ? m : V::set(1) - m;
}

}  // namespace STA_ISA
}  // namespace sta

#endif  // STA_CPU_GELU_H_
