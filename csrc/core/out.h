// What every `out=` must satisfy that only its memory can tell; the wrapper in Python has checked
// shape, dtype and device, and may have run on tensors without memory (when it was traced).
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "core/backend.h"

namespace segfuse {

// Whether two indices may mean one element: not where axes nest, as in all views of dense memory.
inline bool overlaps_itself(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride and size
  for (int64_t a = 0; a < t.dim(); ++a) {
    if (t.size(a) == 0) return false;
    if (t.size(a) > 1) axes.emplace_back(t.stride(a), t.size(a));
  }
  std::sort(axes.begin(), axes.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : axes) {
    if (stride < reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

// The bytes from the first element to behind the last.
inline std::pair<const char*, const char*> span(const Tensor& t) {
  const auto* begin = static_cast<const char*>(t.const_data_ptr());
  int64_t last = 0;
  for (int64_t a = 0; a < t.dim(); ++a) last += t.stride(a) * (t.size(a) - 1);
  return {begin, begin + (last + 1) * t.element_size()};
}

// Refuses an output in which elements coincide, or whose span meets that of an input.
inline void check_memory(const char* op, const Tensor& out,
                         std::initializer_list<std::pair<const char*, const Tensor*>> inputs) {
  if (out.numel() == 0) return;
  check(!overlaps_itself(out), op, ": out: expected distinct elements, got strides that overlap");
  const auto [begin, end] = span(out);
  for (const auto& [name, input] : inputs) {
    if (input->numel() == 0) continue;
    const auto [from, to] = span(*input);
    check(end <= from || to <= begin, op, ": out: expected memory apart from ", name,
          "'s, got shared memory");
  }
}

}  // namespace segfuse
