// A few values at once: on the CPU a vector of the processor's, on CUDA registers.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/backend.h"

namespace segfuse::SEGFUSE_BACKEND {

template <class T, int count>
struct Lanes {
#if SEGFUSE_CUDA_SOURCE
  T values[count];
#else
  typedef T Values [[gnu::vector_size(count * sizeof(T))]];
  Values values;
#endif

  // From neighbours in memory, of any dtype.
  template <class From>
  SEGFUSE_FUNCTOR void load(const From* from) {
#if SEGFUSE_CUDA_SOURCE
    for (int k = 0; k < count; ++k) values[k] = static_cast<T>(from[k]);
#else
    if constexpr (std::is_same_v<From, T>) {
      std::memcpy(&values, from, sizeof(values));
    } else {
      T converted[count];
      for (int k = 0; k < count; ++k) converted[k] = static_cast<T>(from[k]);
      std::memcpy(&values, converted, sizeof(values));
    }
#endif
  }

  SEGFUSE_FUNCTOR void store(T* to) const {
#if !SEGFUSE_CUDA_SOURCE
    std::memcpy(to, &values, sizeof(values));
#else
    for (int k = 0; k < count; ++k) to[k] = values[k];
#endif
  }

  SEGFUSE_FUNCTOR void clear() {
#if !SEGFUSE_CUDA_SOURCE
    values = Values{};
#else
    for (int k = 0; k < count; ++k) values[k] = 0;
#endif
  }

  // This = a weight's multiple of others; and more of them, one by one.
  SEGFUSE_FUNCTOR void set(T weight, const Lanes& other) {
#if !SEGFUSE_CUDA_SOURCE
    values = weight * other.values;
#else
    for (int k = 0; k < count; ++k) values[k] = weight * other.values[k];
#endif
  }
  SEGFUSE_FUNCTOR void add(T weight, const Lanes& other) {
#if !SEGFUSE_CUDA_SOURCE
    values = values + weight * other.values;
#else
    for (int k = 0; k < count; ++k) values[k] = values[k] + weight * other.values[k];
#endif
  }
  SEGFUSE_FUNCTOR void add(const Lanes& one, const Lanes& other) {
#if !SEGFUSE_CUDA_SOURCE
    values = values + one.values * other.values;
#else
    for (int k = 0; k < count; ++k) values[k] = values[k] + one.values[k] * other.values[k];
#endif
  }

#if !SEGFUSE_CUDA_SOURCE
  // Integers as wide as the values: places among them, or masks.
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Index Indices [[gnu::vector_size(count * sizeof(T))]];
  struct Places {
    Indices values;
    SEGFUSE_FUNCTOR void load(const Index* from) { std::memcpy(&values, from, sizeof(values)); }
  };

  // Those at some places of another.
  SEGFUSE_FUNCTOR void pick(const Lanes& from, const Places& at) {
#if defined(__clang__)
    for (int k = 0; k < count; ++k) values[k] = from.values[at.values[k]];
#else
    values = __builtin_shuffle(from.values, at.values);
#endif
  }
  // Times others, and 0 where the mask is 0, whatever the product.
  SEGFUSE_FUNCTOR void weigh(const Lanes& weight, const Places& mask) {
    values =
        reinterpret_cast<Values>(reinterpret_cast<Indices>(values * weight.values) & mask.values);
  }
  SEGFUSE_FUNCTOR void add(const Lanes& other) { values = values + other.values; }
#endif

  // The sum of all, of halves, so that errors stay small.
  SEGFUSE_FUNCTOR T total() const {
    T part[count];
    store(part);
    for (int half = count / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) part[k] += part[k + half];
    }
    return part[0];
  }
};

#if !SEGFUSE_CUDA_SOURCE

// The sums of eight, one a lane.
template <class T>
SEGFUSE_FUNCTOR Lanes<T, 8> totals(const Lanes<T, 8> (&of)[8]) {
  Lanes<T, 8> sum;
#if defined(__clang__)
  for (int k = 0; k < 8; ++k) sum.values[k] = of[k].total();
#else
  using Places = typename Lanes<T, 8>::Indices;
  typename Lanes<T, 8>::Values two[4], four[2];
  for (int k = 0; k < 4; ++k) {  // neighbours of two in turns
    const auto &a = of[2 * k].values, &b = of[2 * k + 1].values;
    two[k] = __builtin_shuffle(a, b, Places{0, 8, 2, 10, 4, 12, 6, 14}) +
             __builtin_shuffle(a, b, Places{1, 9, 3, 11, 5, 13, 7, 15});
  }
  for (int k = 0; k < 2; ++k) {  // of four, a half each
    const auto &a = two[2 * k], &b = two[2 * k + 1];
    four[k] = __builtin_shuffle(a, b, Places{0, 1, 8, 9, 4, 5, 12, 13}) +
              __builtin_shuffle(a, b, Places{2, 3, 10, 11, 6, 7, 14, 15});
  }
  sum.values = __builtin_shuffle(four[0], four[1], Places{0, 1, 2, 3, 8, 9, 10, 11}) +
               __builtin_shuffle(four[0], four[1], Places{4, 5, 6, 7, 12, 13, 14, 15});
#endif
  return sum;
}

#endif

}  // namespace segfuse::SEGFUSE_BACKEND
