// Four values at once: on the CPU a vector of the processor's, on CUDA four registers.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/backend.h"

namespace segfuse::SEGFUSE_BACKEND {

template <class T>
struct Four {
#if SEGFUSE_CUDA_SOURCE
  T values[4];
#else
  typedef T Values [[gnu::vector_size(4 * sizeof(T))]];
  Values values;
#endif

  // From neighbours in memory, of any dtype.
  template <class From>
  SEGFUSE_FUNCTOR void load(const From* from) {
    [[maybe_unused]] T converted[4];
    for (int k = 0; k < 4; ++k) converted[k] = static_cast<T>(from[k]);
#if SEGFUSE_CUDA_SOURCE
    for (int k = 0; k < 4; ++k) values[k] = converted[k];
#else
    if constexpr (std::is_same_v<From, T>) {
      std::memcpy(&values, from, sizeof(values));
    } else {
      values = Values{converted[0], converted[1], converted[2], converted[3]};
    }
#endif
  }

  SEGFUSE_FUNCTOR void store(T* to) const {
#if !SEGFUSE_CUDA_SOURCE
    std::memcpy(to, &values, sizeof(values));
#else
    for (int k = 0; k < 4; ++k) to[k] = values[k];
#endif
  }

  // This = a weight's multiple of other four; and more of them, one by one.
  SEGFUSE_FUNCTOR void set(T weight, const Four& other) {
#if !SEGFUSE_CUDA_SOURCE
    values = weight * other.values;
#else
    for (int k = 0; k < 4; ++k) values[k] = weight * other.values[k];
#endif
  }
  SEGFUSE_FUNCTOR void add(T weight, const Four& other) {
#if !SEGFUSE_CUDA_SOURCE
    values = values + weight * other.values;
#else
    for (int k = 0; k < 4; ++k) values[k] = values[k] + weight * other.values[k];
#endif
  }
};

}  // namespace segfuse::SEGFUSE_BACKEND
