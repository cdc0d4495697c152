// Where a deformation by a coarse grid of displacements and an affine map takes its pixels from,
// and how images are read there: what elastic_deform and its gradients share.
//
//   s(p) = M (p - c) + shift + c + sum over i, j of k_i(y) k_j(x) grid[i, j],   p = (y, x)
//
// with Keys' cubic k ("Cubic Convolution Interpolation for Digital Image Processing", 1981) at
// a = -3/4, which is torch's, between control points, the outermost repeated.
//
// The dense field is never stored: along a row of the result, control points are first interpolated
// vertically, a few values, then horizontally.
#pragma once

#include "core/border.h"
#include "core/dtype.h"
#include "core/math.h"
#include "core/reduce.h"

namespace segfuse::SEGFUSE_BACKEND {

constexpr int taps = 4;
constexpr int64_t longest_axis = int64_t{1} << 24;  // pixels, which float32 counts
constexpr int64_t farthest = int64_t{1} << 30;      // pixels; positions beyond count as there

// Weights of four neighbours, for a place that lies f behind the second of them; 0 <= f <= 1.
template <class Acc>
SEGFUSE_FUNCTOR void cubic(Acc f, Acc (&w)[taps]) {
  const Acc g = 1 - f;
  w[0] = Acc(-0.75) * f * (g * g);
  w[1] = (Acc(1.25) * f - Acc(2.25)) * (f * f) + 1;
  w[2] = (Acc(1.25) * g - Acc(2.25)) * (g * g) + 1;
  w[3] = Acc(-0.75) * g * (f * f);
}

// Their derivatives.
template <class Acc>
SEGFUSE_FUNCTOR void cubic_slope(Acc f, Acc (&w)[taps]) {
  const Acc g = 1 - f;
  w[0] = Acc(-0.75) * g * (g - 2 * f);
  w[1] = (Acc(3.75) * f - Acc(4.5)) * f;
  w[2] = (Acc(4.5) - Acc(3.75) * g) * g;
  w[3] = Acc(-0.75) * f * (2 * g - f);
}

// The integer below a position, and how far behind it: NaN unless that is finite.
template <class Acc>
struct Located {
  int at;
  Acc fraction;
};
template <class Acc>
SEGFUSE_FUNCTOR Located<Acc> locate(Acc position) {
  constexpr Acc far = farthest;
  const Acc above = position > -far ? position : -far, bounded = above < far ? above : far;
  const int toward_zero = static_cast<int>(bounded);
  const int at = toward_zero - (static_cast<Acc>(toward_zero) > bounded);
  return {at, (bounded - static_cast<Acc>(at)) + (position - position)};
}

// The nearest integer, of two the even one.
template <class Acc>
SEGFUSE_FUNCTOR int nearest(const Located<Acc>& p) {
  return p.at + (p.fraction > Acc(0.5) || (p.fraction == Acc(0.5) && p.at % 2 != 0));
}

// Control points along an axis, the outermost on its first and last pixel.
template <class Acc>
struct Control {
  int64_t count;
  Acc a_pixel;  // control points between neighbouring pixels

  Control(int64_t points, int64_t pixels)
      : count(points),
        a_pixel(pixels > 1 ? static_cast<Acc>(points - 1) / static_cast<Acc>(pixels - 1) : 0) {}

  // The one before pixel x.
  SEGFUSE_FUNCTOR Located<Acc> place(Acc x) const {
    const Acc t = x * a_pixel;
    const int at = static_cast<int>(t);
    return {at, t - static_cast<Acc>(at)};
  }
  SEGFUSE_FUNCTOR int64_t clamped(int64_t i) const { return i < 0 ? 0 : i < count ? i : count - 1; }
};

// Where the result's pixels lie in the image.
template <class Acc>
struct Field {
  static constexpr int most_columns = ReducePolicy::width + 7;

  const Acc *grid, *affine;  // contiguous; affine or nullptr
  Control<Acc> y, x;
  Acc centre_y, centre_x;

  Field(const Tensor& image, const Tensor& grid_, const std::optional<Tensor>& affine_)
      : grid(grid_.const_data_ptr<Acc>()),
        affine(affine_ ? affine_->const_data_ptr<Acc>() : nullptr),
        y(grid_.size(2), image.size(2)),
        x(grid_.size(3), image.size(3)),
        centre_y(static_cast<Acc>(image.size(2) - 1) / 2),
        centre_x(static_cast<Acc>(image.size(3) - 1) / 2) {}

  // How many pixels of a row to take at once, so that their columns of control points fit.
  SEGFUSE_FUNCTOR int64_t block() const {
    const auto pixels = static_cast<int64_t>((most_columns - 6) / (x.a_pixel > 1 ? x.a_pixel : 1));
    return pixels < 1 ? 1 : pixels < ReducePolicy::width ? pixels : ReducePolicy::width;
  }

  // Positions of n pixels of image `image`, row `row`, from `column` on.
  template <class N>
  SEGFUSE_FUNCTOR void positions(int64_t image, int64_t row, int64_t column, N n, Acc* at_y,
                                 Acc* at_x) const {
    const Acc begin = static_cast<Acc>(column), below = static_cast<Acc>(row);
    int cell[ReducePolicy::width];
    Acc fraction[ReducePolicy::width];
    const int count = static_cast<int>(n);
    for (int i = 0; i < count; ++i) {
      const Located<Acc> p = x.place(begin + static_cast<Acc>(i));
      cell[i] = p.at;
      fraction[i] = p.fraction;
    }
    Acc columns[2][most_columns];
    interpolate_columns(image, below, cell[0], cell[count - 1] - cell[0] + taps, columns);
    Acc m[2][3] = {{1, 0, 0}, {0, 1, 0}};
    for (int j = 0; affine && j < 6; ++j) m[j / 3][j % 3] = affine[image * 6 + j];
    const Acc from_y = m[0][0] * (below - centre_y), from_x = m[1][0] * (below - centre_y);
    const Acc to_y = m[0][2] + centre_y, to_x = m[1][2] + centre_x;
    const Acc first = begin - centre_x;
    for (int i = 0; i < count;) {
      int end = i + 1;
      if (cell[count - 1] == cell[i]) end = count;
      while (end < count && cell[end] == cell[i]) ++end;
      const Acc* dy = columns[0] + (cell[i] - cell[0]);
      const Acc* dx = columns[1] + (cell[i] - cell[0]);
      for (; i < end; ++i) {
        Acc w[taps];
        cubic(fraction[i], w);
        const Acc right = first + static_cast<Acc>(i);
        at_y[i] = ((from_y + m[0][1] * right) + to_y) +
                  (((w[0] * dy[0] + w[1] * dy[1]) + w[2] * dy[2]) + w[3] * dy[3]);
        at_x[i] = ((from_x + m[1][1] * right) + to_x) +
                  (((w[0] * dx[0] + w[1] * dx[1]) + w[2] * dx[2]) + w[3] * dx[3]);
      }
    }
  }

 private:
  // `count` columns of control points from one before `first` on, at a row.
  SEGFUSE_FUNCTOR void interpolate_columns(int64_t image, Acc row, int first, int count,
                                           Acc (&columns)[2][most_columns]) const {
    const Located<Acc> p = y.place(row);
    Acc w[taps];
    cubic(p.fraction, w);
    for (int axis = 0; axis < 2; ++axis) {
      const Acc* from[taps];
      for (int k = 0; k < taps; ++k) {
        from[k] = grid + ((image * 2 + axis) * y.count + y.clamped(p.at - 1 + k)) * x.count;
      }
      for (int j = 0; j < count; ++j) {
        const int64_t c = x.clamped(int64_t{first} - 1 + j);
        columns[axis][j] =
            ((w[0] * from[0][c] + w[1] * from[1][c]) + w[2] * from[2][c]) + w[3] * from[3][c];
      }
    }
  }
};

// Sizes and strides of an image (N, C, H, W), or of labels (N, H, W) as an image of one channel.
struct Lattice {
  int64_t channels = 1, size[2] = {}, stride[4] = {};
  int64_t within[2] = {};  // places along an axis of which all taps lie on it

  Lattice() = default;
  explicit Lattice(const Tensor& t) {
    const int64_t first = t.dim() - 2;
    stride[0] = t.stride(0);
    if (first == 2) {
      channels = t.size(1);
      stride[1] = t.stride(1);
    }
    for (int64_t a = 0; a < 2; ++a) {
      size[a] = t.size(first + a);
      within[a] = size[a] > 3 ? size[a] - 3 : 0;
      stride[2 + a] = t.stride(first + a);
    }
  }

  SEGFUSE_FUNCTOR int64_t step() const { return stride[3]; }
  SEGFUSE_FUNCTOR int64_t pixel(int64_t y, int64_t x) const {
    return y * stride[2] + x * stride[3];
  }
  SEGFUSE_FUNCTOR int64_t offset(int64_t image, int64_t channel, int64_t y, int64_t x) const {
    return image * stride[0] + channel * stride[1] + pixel(y, x);
  }
  SEGFUSE_FUNCTOR bool holds(int axis, int64_t at) const {
    return static_cast<uint64_t>(at) < static_cast<uint64_t>(size[axis]);
  }
  // Whether the taps of a place lie within an axis.
  SEGFUSE_FUNCTOR bool inside(int axis, int at) const {
    return static_cast<uint64_t>(int64_t{at} - 1) < static_cast<uint64_t>(within[axis]);
  }
};

// The same, to be read from at any place.
struct Source : Lattice {
  Border border = Border::constant;

  Source() = default;
  Source(const Tensor& t, int64_t border_) : Lattice(t), border(static_cast<Border>(border_)) {}

  // Which element of an axis stands at a place; -1: none.
  SEGFUSE_FUNCTOR int64_t mapped(int axis, int64_t at) const {
    return holds(axis, at) ? at : piece(border, size[axis], at).at;
  }

  // The 4 x 4 pixels around a place; false where none of them is of the image.
  template <class T, class Acc>
  SEGFUSE_FUNCTOR bool read(const T* from, int y, int x, Acc fill, Acc (&tap)[taps][taps]) const {
    int64_t row[taps], column[taps];
    bool some_y = false, some_x = false;
    for (int k = 0; k < taps; ++k) {
      row[k] = mapped(0, int64_t{y} - 1 + k);
      column[k] = mapped(1, int64_t{x} - 1 + k);
      some_y = some_y || row[k] >= 0;
      some_x = some_x || column[k] >= 0;
    }
    for (int j = 0; j < taps; ++j) {
      for (int k = 0; k < taps; ++k) {
        tap[j][k] =
            row[j] >= 0 && column[k] >= 0 ? static_cast<Acc>(from[pixel(row[j], column[k])]) : fill;
      }
    }
    return some_y && some_x;
  }
};

inline Pixels pixels_of(const Tensor& image) {
  Pixels pixels(image);
  pixels.size[1] = 1;  // in place of the channels
  return pixels;
}

inline ScalarType wide(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The wrapper in Python has said what is wrong in more words before.
inline void check_arguments(const Tensor& image, const Tensor& grid,
                            const std::optional<Tensor>& affine, int64_t border) {
  const char* op = "elastic_deform";
  const auto dtype = wide(image.scalar_type());
  check(image.dim() == 4, op, ": image: expected (N, C, H, W)");
  check(image.size(2) <= longest_axis && image.size(3) <= longest_axis, op,
        ": image: expected axes of at most 2^24 pixels");
  check(grid.dim() == 4 && grid.size(0) == image.size(0) && grid.size(1) == 2 && grid.size(2) > 0 &&
            grid.size(3) > 0 && grid.size(2) <= longest_axis && grid.size(3) <= longest_axis,
        op, ": grid: expected (N, 2, gh, gw), with control points");
  check(grid.scalar_type() == dtype && grid.device() == image.device() && grid.is_contiguous(), op,
        ": grid: expected the arithmetic's dtype, the device of image, contiguous");
  check(
      !affine || (affine->dim() == 3 && affine->size(0) == image.size(0) && affine->size(1) == 2 &&
                  affine->size(2) == 3 && affine->scalar_type() == dtype &&
                  affine->device() == image.device() && affine->is_contiguous()),
      op, ": affine: expected (N, 2, 3), in the arithmetic's dtype, contiguous");
  check(border >= 0 && border <= static_cast<int64_t>(Border::constant), op,
        ": border: expected a number that stands for one, got ", border);
}

inline bool alike(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device() && a.dim() == b.dim() &&
         std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

}  // namespace segfuse::SEGFUSE_BACKEND
