// gather_tiles: tiles cut out of an image at any place, with what lies beyond its border made up,
// and converted in the same pass; and the gradient of the image.
//
//   out[t, c, i] = image[c, m(corner_t + i)] scale_c + shift_c,   m the border's map, axis by axis
//   grad_image[c, q] = scale_c sum over t, i with m(corner_t + i) = q of grad[t, c, i]
//
// No padded image is stored.  Along an axis, m is made of pieces in which it counts up, counts down
// or stands still (core/border.h).  A row of a tile is a run a piece: those within the image are
// copied or converted whole.  The gradient is gathered too: a row of the image looks at the tiles
// that read it, and adds their pieces in the order of the tiles, without atomics.
#include "core/border.h"
#include "core/dtype.h"
#include "core/math.h"
#include "core/out.h"
#include "core/rows.h"
#include "core/tiles.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

struct Geometry {
  Tiles image, tiles;
  Corners corners;
  Border border;
};

// Rows of tiles, and the runs that they are made of.
template <class T>
struct Gather : Geometry {
  using Value = T;
  struct Row {
    T* to;
    int64_t step, size, corner, channel;
    int64_t from;   // where the image's row begins; -1: none
    int64_t alike;  // rows of the same kind that follow
  };
  struct Run {
    int64_t end, begin, from, step, channel;
    static constexpr bool skip = false;
  };

  T* to;
  T fill;
  int64_t to_next, from_next;

  Gather(const Geometry& g, const Tensor& out, double fill_)
      : Geometry(g),
        to(static_cast<T*>(out.mutable_data_ptr())),
        to_next(tiles.stride[1]),
        from_next(image.stride[1]) {
    visit(Numbers{}, out.scalar_type(), "gather_tiles: out", [&]<class Own>() {
      const auto own = static_cast<Own>(fill_);
      if constexpr (sizeof(Own) == sizeof(T)) std::memcpy(&fill, &own, sizeof(T));
    });
  }

  SEGFUSE_FUNCTOR int64_t rows() const { return tiles.rows(); }
  SEGFUSE_FUNCTOR int64_t longest() const { return tiles.width(); }

  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const auto at = tiles.place(r);
    const Piece z = piece(border, image.size[0], corners(at.tile, 0) + at.z);
    const int64_t y_place = corners(at.tile, 1) + at.y;
    const Piece y = piece(border, image.size[1], y_place);
    Row row{
        to + tiles.offset(at), tiles.step(), tiles.width(), corners(at.tile, 2), at.channel, -1, 0};
    if (z.at >= 0 && y.at >= 0) row.from = image.offset({0, at.channel, z.at, y.at});
    if (y.sign == 1) row.alike = std::min(y.end - y_place, tiles.size[1] - at.y) - 1;
    return row;
  }

  SEGFUSE_FUNCTOR Run run(const Row& row, int64_t x) const {
    const Piece p = piece(border, image.width(), row.corner + x);
    Run run{p.end - row.corner, x, -1, p.sign * image.step(), row.channel};
    if (row.from < 0) run.end = row.size;
    if (row.from >= 0 && p.at >= 0) run.from = row.from + p.at * image.step();
    return run;
  }
};

// Moves elements as they are, by their size.
template <class T>
struct Move : Gather<T> {
  using typename Gather<T>::Run;
  const T* from;

  SEGFUSE_FUNCTOR const T* at(const Run& run, int64_t x, int64_t) const {
    return run.from >= 0 && run.step == 1 ? from + run.from + (x - run.begin) : nullptr;
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Run& run, int64_t x, N n, T* values) const {
    const int64_t first = run.from + (x - run.begin) * run.step;
    for (int64_t i = 0; i < n; ++i) {
      values[i] = run.from >= 0 ? from[first + i * run.step] : this->fill;
    }
  }
};

// From any dtype to T.
template <class T>
struct Convert : Gather<T> {
  using typename Gather<T>::Run;
  using Acc = Wide<T>;
  const void* from;
  ScalarType dtype;
  const Acc *scale, *shift;  // a channel, or nullptr

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Run& run, int64_t x, N n, T* values) const {
    if (run.from < 0) {
      for (int64_t i = 0; i < n; ++i) values[i] = this->fill;
      return;
    }
    const Acc a = scale ? scale[run.channel] : Acc(1);
    const Acc b = shift ? shift[run.channel] : Acc(-0.0);  // which changes no zero's sign
    visit_known(Numbers{}, dtype, [&]<class From>() {
      const auto* source = static_cast<const From*>(from) + run.from + (x - run.begin) * run.step;
      const auto one = [&](From value) {
        return static_cast<T>(multiply_add(static_cast<Acc>(value), a, b));
      };
      if (run.step == 1) {
        for (int64_t i = 0; i < n; ++i) values[i] = one(source[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) values[i] = one(source[i * run.step]);
      }
    });
  }
};

// Rows of the image's gradient.
template <class T>
struct Collect : Geometry {
  using Value = T;
  using Acc = Wide<T>;
  struct Row {
    T* to;
    int64_t step, size;
    Tiles::Place at;
    int64_t first, last;  // the tiles that read it are among these
  };

  T* to;
  const T* grad;
  const Acc* scale;

  SEGFUSE_FUNCTOR int64_t rows() const { return image.rows(); }
  SEGFUSE_FUNCTOR int64_t longest() const { return image.width(); }

  // Calls body(i, n, piece) for each piece of a tile's axis: from its element i on, n of them.
  SEGFUSE_FUNCTOR void for_each_piece(int64_t tile, int axis, const auto& body) const {
    const int64_t corner = corners(tile, axis), size = tiles.size[axis];
    for (int64_t i = 0; i < size;) {
      const Piece p = piece(border, image.size[axis], corner + i);
      const int64_t n = std::min(p.end - corner, size) - i;
      body(i, n, p);
      i += n;
    }
  }

  // Calls body(i) for each element of a tile's axis that reads element q of the image's.
  SEGFUSE_FUNCTOR void for_each_reader(int64_t tile, int axis, int64_t q, const auto& body) const {
    for_each_piece(tile, axis, [&](int64_t first, int64_t n, const Piece& p) {
      const int64_t at = (q - p.at) * p.sign;
      if (p.sign == 0 ? p.at != q : at < 0 || at >= n) return;
      for (int64_t i = at; i < (p.sign == 0 ? n : at + 1); ++i) body(first + i);
    });
  }

  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const auto at = image.place(r);
    Row row{to + image.offset(at), image.step(), image.width(), at, corners.count, 0};
    for (int64_t t = 0; t < corners.count; ++t) {
      bool z = false, y = false;
      for_each_reader(t, 0, at.z, [&](int64_t) { z = true; });
      for_each_reader(t, 1, at.y, [&](int64_t) { y = true; });
      if (!z || !y) continue;
      row.first = std::min(row.first, t);
      row.last = t + 1;
    }
    return row;
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, T* values) const {
    const Acc a = scale ? scale[row.at.channel] : Acc(1);
    for_each_block(n, [&](int64_t begin, auto m) {
      Acc sum[RowPolicy::width];
      for (int64_t i = 0; i < m; ++i) sum[i] = 0;
      for (int64_t t = row.first; t < row.last; ++t) add_tile(row, t, x + begin, m, sum);
      for (int64_t i = 0; i < m; ++i) values[begin + i] = static_cast<T>(sum[i] * a);
    });
  }

  // Adds the rows of a tile that read this one.
  template <class N>
  SEGFUSE_FUNCTOR void add_tile(const Row& row, int64_t t, int64_t x, N n, Acc* sum) const {
    for_each_reader(t, 0, row.at.z, [&](int64_t z) {
      for_each_reader(t, 1, row.at.y, [&](int64_t y) {
        const Tiles::Place at{t, row.at.channel, z, y};  // nvcc 13 loses it as an argument
        add(t, grad + tiles.offset(at), x, n, sum);
      });
    });
  }

  // Adds a row of a tile to n elements from x on.
  template <class N>
  SEGFUSE_FUNCTOR void add(int64_t tile, const T* from, int64_t x, N n, Acc* sum) const {
    for_each_piece(tile, tile_axes - 1, [&](int64_t first, int64_t count, const Piece& p) {
      if (p.at < 0) return;
      const int64_t lowest = p.sign < 0 ? p.at - count + 1 : p.at;
      const int64_t begin = lowest - x, end = begin + (p.sign == 0 ? 1 : count);
      const int64_t step = tiles.step();
      const T* source = from + first * step;
      if (p.sign == 0) {
        for (int64_t i = 0; i < count; ++i) {
          for_each_within(n, begin, end,
                          [&](int64_t j) { sum[j] += static_cast<Acc>(source[i * step]); });
        }
      } else if (p.sign * step == 1) {
        for_each_within(n, begin, end,
                        [&](int64_t j) { sum[j] += static_cast<Acc>(source[j + x - p.at]); });
      } else {
        for_each_within(n, begin, end, [&](int64_t j) {
          sum[j] += static_cast<Acc>(source[(j + x - p.at) * p.sign * step]);
        });
      }
    });
  }
};

Geometry geometry(const Tensor& image, const Tensor& tiles, const Tensor& corners, int64_t border) {
  const int64_t dims = corners.size(1);
  return {Tiles(image, dims), Tiles(tiles, dims), Corners(corners), static_cast<Border>(border)};
}

template <class Acc>
const Acc* a_channel(const std::optional<Tensor>& values) {
  return values ? values->const_data_ptr<Acc>() : nullptr;
}

void check_channels(const char* name, const std::optional<Tensor>& values, int64_t channels,
                    ScalarType result, const Tensor& image) {
  if (!values) return;
  const auto wide = result == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(values->scalar_type() == wide && values->dim() == 1 && values->size(0) == channels &&
            values->is_contiguous() && values->device() == image.device(),
        "gather_tiles: ", name, ": expected one number a channel, in the arithmetic's dtype");
}

// The wrapper in Python has said what is wrong in more words before.
void check_arguments(const Tensor& image, const Tensor& corners, const std::vector<int64_t>& size,
                     int64_t border, ScalarType dtype, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift) {
  const int64_t dims = image.dim() - 1;
  check_corners("gather_tiles", corners, image, dims);
  check_size("gather_tiles", size, dims);
  check(border >= 0 && border <= static_cast<int64_t>(Border::constant),
        "gather_tiles: border: expected a number that stands for one, got ", border);
  for (int64_t a = 1; a <= dims; ++a) {
    check(image.size(a) > 0 || static_cast<Border>(border) == Border::constant,
          "gather_tiles: image: expected elements along each axis, for this border");
  }
  check_channels("scale", scale, image.size(0), dtype, image);
  check_channels("shift", shift, image.size(0), dtype, image);
}

void gather_into(const Tensor& out, Memory memory, const Tensor& image, const Tensor& corners_,
                 int64_t border, double fill, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& shift) {
  if (out.numel() == 0) return;
  const Tensor corners = torch::stable::contiguous(corners_);
  const Geometry g = geometry(image, out, corners, border);
  if (out.scalar_type() == image.scalar_type() && !scale && !shift) {
    visit_size(out.element_size(), "gather_tiles", [&]<class T>() {
      if constexpr (sizeof(T) <= 8) {
        const auto* from = static_cast<const T*>(image.const_data_ptr());
        for_each_row(out, memory, std::array{Move<T>{Gather<T>(g, out, fill), from}});
      }
    });
    return;
  }
  visit(Floating{}, out.scalar_type(), "gather_tiles: dtype", [&]<class T>() {
    using Acc = Wide<T>;
    for_each_row(
        out, memory,
        std::array{Convert<T>{Gather<T>(g, out, fill), image.const_data_ptr(), image.scalar_type(),
                              a_channel<Acc>(scale), a_channel<Acc>(shift)}});
  });
}

Tensor gather_tiles(const Tensor& image, const Tensor& corners, const std::vector<int64_t>& size,
                    int64_t border, double fill, ScalarType dtype,
                    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
  check_arguments(image, corners, size, border, dtype, scale, shift);
  std::vector<int64_t> shape{corners.size(0), image.size(0)};
  shape.insert(shape.end(), size.begin(), size.end());
  const Tensor out = torch::stable::new_empty(image, shape, dtype);
  gather_into(out, Memory::fresh, image, corners, border, fill, scale, shift);
  return out;
}

void gather_tiles_out(const Tensor& image, const Tensor& corners, int64_t border, double fill,
                      const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                      const Tensor& out) {
  check(out.dim() == image.dim() + 1, "gather_tiles: out: expected an axis more than image");
  const std::vector<int64_t> size(out.sizes().begin() + 2, out.sizes().end());
  check_arguments(image, corners, size, border, out.scalar_type(), scale, shift);
  check(out.size(0) == corners.size(0) && out.size(1) == image.size(0) &&
            out.device() == image.device(),
        "gather_tiles: out: expected the shape and device of the result");
  check_memory("gather_tiles", out, {{"image", &image}, {"corners", &corners}});
  gather_into(out, Memory::reused, image, corners, border, fill, scale, shift);
}

Tensor gather_tiles_backward(const Tensor& grad, const Tensor& corners_,
                             const std::vector<int64_t>& size, int64_t border,
                             const std::optional<Tensor>& scale) {
  const int64_t dims = grad.dim() - 2;
  check_corners("gather_tiles_backward", corners_, grad, dims);
  check_size("gather_tiles_backward", size, dims);
  check(border >= 0 && border <= static_cast<int64_t>(Border::constant) &&
            grad.size(0) == corners_.size(0),
        "gather_tiles_backward: expected a border and a corner a tile");
  check_channels("scale", scale, grad.size(1), grad.scalar_type(), grad);
  std::vector<int64_t> shape{grad.size(1)};
  shape.insert(shape.end(), size.begin(), size.end());
  const Tensor out = torch::stable::new_empty(grad, shape);
  const Tensor corners = torch::stable::contiguous(corners_);
  visit(Floating{}, grad.scalar_type(), "gather_tiles_backward", [&]<class T>() {
    for_each_row(out, Memory::fresh,
                 std::array{Collect<T>{
                     geometry(out, grad, corners, border), static_cast<T*>(out.mutable_data_ptr()),
                     static_cast<const T*>(grad.const_data_ptr()), a_channel<Wide<T>>(scale)}});
  });
  return out;
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("gather_tiles", TORCH_BOX(&gather_tiles));
  m.impl("gather_tiles_out", TORCH_BOX(&gather_tiles_out));
  m.impl("gather_tiles_backward", TORCH_BOX(&gather_tiles_backward));
}

}  // namespace segfuse::SEGFUSE_BACKEND
