// From a dtype at run time to a type at compile time, by templates.
//
//   visit(Floating{}, x.scalar_type(), "softmax", [&]<class T>() { ... });
//
// calls the lambda with the element type; the list of types is the operator's contract.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "core/backend.h"

namespace segfuse {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

template <class... Ts>
struct Types {};

using Floating = Types<float, double, Half, BFloat16>;
using Integers = Types<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>;
using Numbers = Types<float, double, Half, BFloat16, bool, uint8_t, int8_t, uint16_t, int16_t,
                      uint32_t, int32_t, uint64_t, int64_t>;

template <class... Ts, class F>
void visit(Types<Ts...>, ScalarType dtype, const char* op, const F& f) {
  const auto matches = [&]<class T>() {
    if (dtype != torch::headeronly::CppTypeToScalarType<T>::value) return false;
    f.template operator()<T>();
    return true;
  };
  check((matches.template operator()<Ts>() || ...), op, ": dtype ",
        torch::headeronly::toString(dtype), " is not supported");
}

// The same within a functor, for a dtype that was checked before.
template <class... Ts, class F>
SEGFUSE_FUNCTOR void visit_known(Types<Ts...>, ScalarType dtype, const F& f) {
  const auto matches = [&]<class T>() {
    if (dtype != torch::headeronly::CppTypeToScalarType<T>::value) return false;
    f.template operator()<T>();
    return true;
  };
  (void)(matches.template operator()<Ts>() || ...);
}

// For operators that only move elements: an unsigned type of the element's size.
struct Bytes16 {
  uint64_t low, high;
};

template <class F>
void visit_size(size_t bytes, const char* op, const F& f) {
  switch (bytes) {
    case 1:
      return f.template operator()<uint8_t>();
    case 2:
      return f.template operator()<uint16_t>();
    case 4:
      return f.template operator()<uint32_t>();
    case 8:
      return f.template operator()<uint64_t>();
    case 16:
      return f.template operator()<Bytes16>();
    default:
      check(false, op, ": elements of ", bytes, " bytes are not supported");
  }
}

}  // namespace segfuse
