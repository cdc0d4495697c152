// Index arithmetic.
#pragma once

#include "core/backend.h"

namespace segfuse::SEGFUSE_BACKEND {

// Quotient and remainder.  Most counts fit into 32 bits, where a division costs a quarter.
struct Split {
  int64_t quotient, remainder;
};
SEGFUSE_FUNCTOR constexpr Split split(int64_t n, int64_t by) {
  if (((n | by) >> 32) == 0) {
    const auto a = static_cast<uint32_t>(n), b = static_cast<uint32_t>(by);
    return {a / b, a % b};
  }
  return {n / by, n % by};
}
static_assert(split((int64_t{1} << 32) - 1, 2).quotient == (int64_t{1} << 31) - 1);
static_assert(split((int64_t{1} << 32) + 5, 3).remainder == 0);
static_assert(split(5, (int64_t{1} << 32) + 1).remainder == 5);

}  // namespace segfuse::SEGFUSE_BACKEND
