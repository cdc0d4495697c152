// separate_touching: background between labels that touch.
//
//   out[p] = 0 where a neighbour q of p, one of 8 or 26, has 0 != labels[q] < labels[p],
//            labels[p] elsewhere
//
// A row of the result looks at the rows around its own, and at the same row to either side.
#include "core/nearest.h"
#include "core/rows.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

template <class T>
struct Separate {
  using Value = T;
  struct Row {
    T* to;
    int64_t step, size;
    Place at;
  };

  Labels labels;
  Frame frame;
  const T* from;
  T* to;

  SEGFUSE_FUNCTOR int64_t rows() const { return frame.n * frame.z * frame.y; }
  SEGFUSE_FUNCTOR int64_t longest() const { return frame.x; }
  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const Place at = frame.line_along_x(r);
    return {to + r * frame.x, 1, frame.x, at};
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, T* values) const {
    const Place& p = row.at;
    for_each_block(n, [&](int64_t begin, auto m) {
      const int64_t first = x + begin;
      const T* here = from + labels.offset({p.n, p.z, p.y, first});
      T own[RowPolicy::width], kept[RowPolicy::width];
      for (int64_t i = 0; i < m; ++i) own[i] = kept[i] = here[i * labels.x];
      for (int64_t z = std::max<int64_t>(p.z - 1, 0); z <= p.z + 1 && z < frame.z; ++z) {
        for (int64_t y = std::max<int64_t>(p.y - 1, 0); y <= p.y + 1 && y < frame.y; ++y) {
          const T* row_beside = from + labels.offset({p.n, z, y, first});
          for (int64_t dx = -1; dx <= 1; ++dx) look(row_beside, first, dx, m, own, kept);
        }
      }
      for (int64_t i = 0; i < m; ++i) values[begin + i] = kept[i];
    });
  }

  // Drops pixels that have a smaller label dx beside them in a row.
  template <class N>
  SEGFUSE_FUNCTOR void look(const T* row, int64_t first, int64_t dx, N n, const T* own,
                            T* kept) const {
    const int64_t begin = -(first + dx), end = frame.x - (first + dx);
    const auto one = [&](int64_t i, T other) {
      kept[i] = other != 0 && other < own[i] ? T(0) : kept[i];
    };
    if (labels.x == 1) {
      for_each_within(n, begin, end, [&](int64_t i) { one(i, row[i + dx]); });
    } else {
      for_each_within(n, begin, end, [&](int64_t i) { one(i, row[(i + dx) * labels.x]); });
    }
  }
};

Tensor separate_touching(const Tensor& labels) {
  check_labels("separate_touching", labels);
  const Tensor out = torch::stable::new_empty(labels, labels.sizes());
  visit(Integers{}, labels.scalar_type(), "separate_touching: labels", [&]<class T>() {
    for_each_row(out, Memory::fresh,
                 std::array{Separate<T>{Labels(labels), Frame(labels),
                                        static_cast<const T*>(labels.const_data_ptr()),
                                        static_cast<T*>(out.mutable_data_ptr())}});
  });
  return out;
}

}  // namespace

SEGFUSE_IMPL(m) { m.impl("separate_touching", TORCH_BOX(&separate_touching)); }

}  // namespace segfuse::SEGFUSE_BACKEND
