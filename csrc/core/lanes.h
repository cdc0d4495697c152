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

}  // namespace segfuse::SEGFUSE_BACKEND
