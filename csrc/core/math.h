// exp and log that vectorise, for the CPU; on CUDA, CUDA's own.
//
// The CPU's are of multiplications and additions alone, so that the compiler vectorises loops over
// them and every instruction set gives the same bits. Both reduce their argument to a short
// interval and sum a series there: errors stay below 2 ulp.
#pragma once

#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/backend.h"

namespace segfuse {

// In what values of a dtype are computed and summed.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

namespace SEGFUSE_BACKEND {

// a b + c, rounded twice on CUDA as well, whose compiler would fuse the two.
template <class T>
SEGFUSE_FUNCTOR T multiply_add(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, double>) {
    return __dadd_rn(__dmul_rn(a, b), c);
  } else {
    return __fadd_rn(__fmul_rn(a, b), c);
  }
#else
  return a * b + c;
#endif
}

#if SEGFUSE_CUDA_SOURCE

template <class T, int terms = 0>
SEGFUSE_FUNCTOR T exp_below_one(T x) {
  return exp(x);
}
template <class T>
SEGFUSE_FUNCTOR T log_from_one(T x) {
  return log(x);
}

#else

template <class T>
struct Format;
template <>
struct Format<float> {
  using Bits = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float round = 0x1.8p23f;  // x + round holds the integer nearest to x
  static constexpr float smallest = -87;     // exp(smallest) is still a normal number
  static constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;
  static constexpr int exp_terms = 8, log_terms = 5;
};
template <>
struct Format<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 0x1.8p52;
  static constexpr double smallest = -708;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int exp_terms = 14, log_terms = 11;
};

template <class T>
SEGFUSE_FUNCTOR constexpr T inverse_factorial(int n) {
  T product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return 1 / product;
}

// exp(x) for x <= 1, NaN for NaN; what would be denormal is 0.
//
// x = n ln 2 + r with |r| <= ln 2 / 2: 2^n times the series of exp(r), of so many terms; fewer
// where less than T's precision will do.
template <class T, int terms = Format<T>::exp_terms>
SEGFUSE_FUNCTOR T exp_below_one(T x) {
  using F = Format<T>;
  using Bits = std::make_unsigned_t<typename F::Bits>;
  const T bounded = x < F::smallest ? F::smallest : x;
  const T shifted = bounded * T(0x1.71547652b82fep0) + F::round;
  const T n = shifted - F::round;
  const T r = (bounded - n * F::ln2_high) - n * F::ln2_low;
  T sum = inverse_factorial<T>(terms - 1);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) sum = sum * r + inverse_factorial<T>(i);
  const auto scale = std::bit_cast<T>((std::bit_cast<Bits>(shifted) + F::bias) << F::mantissa);
  return x < F::smallest ? T(0) : sum * scale;
}

// log(x) for normal x, infinity and NaN for themselves, -infinity for 0.
//
// x = 2^n m with m from sqrt(1/2) to sqrt(2): n ln 2 + 2 artanh((m - 1) / (m + 1)).
template <class T>
SEGFUSE_FUNCTOR T log_from_one(T x) {
  using F = Format<T>;
  using Bits = typename F::Bits;
  constexpr auto root = std::bit_cast<Bits>(T(0x1.6a09e667f3bcdp-1));
  constexpr Bits fraction = (Bits{1} << F::mantissa) - 1;
  const Bits bits = std::bit_cast<Bits>(x) - root;
  const T m = std::bit_cast<T>((bits & fraction) + root);
  // The exponent as a float, without an integer conversion, which 64 bits lack before x86-64-v4.
  const T n = std::bit_cast<T>((bits >> F::mantissa) + std::bit_cast<Bits>(F::round)) - F::round;
  const T z = (m - 1) / (m + 1), square = z * z;
  T sum = T(1) / (2 * F::log_terms - 1);
#pragma GCC unroll 16
  for (int i = F::log_terms - 2; i > 0; --i) sum = sum * square + T(1) / (2 * i + 1);
  const T series = 2 * z + 2 * z * square * sum;
  const T result = n * F::ln2_high + (n * F::ln2_low + series);
  constexpr T infinity = std::numeric_limits<T>::infinity();
  return x < infinity ? (x > 0 ? result : -infinity) : x;
}

#endif

}  // namespace SEGFUSE_BACKEND
}  // namespace segfuse
