// exp and log that vectorise, for the CPU; on CUDA, CUDA's own.
//
// The CPU's are of multiplications and additions alone, so that the compiler vectorises loops over
// them and every instruction set gives the same bits. Both reduce their argument to a short
// interval and sum a series there: errors stay below 2 ulp.
#pragma once

#include <array>
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
  static constexpr float smallest = -88;     // from there on exp is 0
  static constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;
  static constexpr int exp_terms = 7, log_terms = 5;
};
template <>
struct Format<double> {
  using Bits = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 0x1.8p52;
  static constexpr double smallest = -709;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int exp_terms = 12, log_terms = 11;
};

// exp(r)'s Chebyshev series on |r| <= h = ln 2 / 2, cut after so many terms, by powers of r:
// I_0(h) + 2 sum_n I_n(h) T_n(r / h), with I_n the modified Bessel functions.
template <int terms>
constexpr std::array<long double, terms> exp_series() {
  constexpr long double h = 0.34657359027997265471L;
  std::array<long double, terms> sum{}, now{1}, next{0, 1 / h};  // T_n and T_n+1 of r / h
  for (int n = 0; n < terms; ++n) {
    long double term = n > 0 ? 2 : 1, bessel = 0;
    for (int i = 1; i <= n; ++i) term *= h / 2 / i;
    for (int j = 1; j < 12; ++j) {
      bessel += term;
      term *= h / 2 * (h / 2) / (j * (j + n));
    }
    std::array<long double, terms> after{};
    for (int i = 0; i < terms; ++i) {
      sum[i] += bessel * now[i];
      after[i] = (i > 0 ? 2 / h * next[i - 1] : 0) - now[i];
    }
    now = next;
    next = after;
  }
  return sum;
}

template <int n, class T>
SEGFUSE_FUNCTOR T power_of_two(T r) {  // r^n
  if constexpr (n == 1) {
    return r;
  } else {
    const T root = power_of_two<n / 2>(r);
    return root * root;
  }
}

// sum_i c[first + i] r^i, `count` terms; of halves (Estrin 1960), since processors wait for the
// last of a chain of sums longer than they compute.
template <int first, int count, class T>
SEGFUSE_FUNCTOR T sum_of_powers(const auto& c, T r) {
  if constexpr (count == 1) {
    return static_cast<T>(c[first]);
  } else {
    constexpr int half = std::bit_ceil(unsigned{count}) / 2;
    return sum_of_powers<first, half>(c, r) +
           sum_of_powers<first + half, count - half>(c, r) * power_of_two<half>(r);
  }
}

// exp(x) for x <= 1, NaN for NaN; what would be denormal is 0, or all but.
//
// x = n ln 2 + r with |r| <= ln 2 / 2: 2^n times the series of exp(r), of so many terms; fewer
// where less than T's precision will do.
template <class T, int terms = Format<T>::exp_terms>
SEGFUSE_FUNCTOR T exp_below_one(T x) {
  using F = Format<T>;
  using Bits = std::make_unsigned_t<typename F::Bits>;
  constexpr auto series = exp_series<terms>();
  constexpr T round = F::round + F::bias;  // so that what is added to it is an exponent's bits
  const T bounded = x < F::smallest ? F::smallest : x;
  const T shifted = bounded * T(0x1.71547652b82fep0) + round;
  const T n = shifted - round;
  const T r = (bounded - n * F::ln2_high) - n * F::ln2_low;
  const T power = std::bit_cast<T>(std::bit_cast<Bits>(shifted) << F::mantissa);
  return (static_cast<T>(series[0]) + sum_of_powers<1, terms - 1>(series, r) * r) * power;
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
