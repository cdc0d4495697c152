// elastic_deform: an image (N, C, H, W) and its labels (N, H, W), deformed in one pass by a coarse
// grid of displacements and an affine map; and the gradients of image, grid and affine.
//
//   s(p) = M (p - c) + shift + c + sum over i, j of k_i(y) k_j(x) grid[i, j],   p = (y, x)
//   out[p] = sum over the 4 x 4 pixels q around s(p) of w(s_y - q_y) w(s_x - q_x) image[m(q)]
//   labels_out[p] = labels[m(round(s(p)))]
//
// with Keys' cubic w ("Cubic Convolution Interpolation for Digital Image Processing", 1981) at
// a = -3/4, which is torch's; k the same between control points, the outermost repeated; and m the
// border's map (core/border.h).  Ronneberger, Fischer, Brox 2015, section 3.1, deform so.
//
// The dense field is never stored: along a row of the result, control points are first interpolated
// vertically, a few values, then horizontally.  Positions and weights are computed once for all
// channels and the labels.  The 4 x 4 pixels are summed vertically first, four neighbours at once.
//
// Gradients are gathered.  A row of the image's looks for the pixels of the result that read it, by
// the bounds of what rows of the result, and boxes of them, have read.  That of the field is
// stored, and summed along y, then along x, with the grid's weights, or the affine map's.
#include "core/border.h"
#include "core/dtype.h"
#include "core/four.h"
#include "core/math.h"
#include "core/out.h"
#include "core/reduce.h"
#include "core/rows.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

constexpr int taps = 4;
constexpr int64_t longest_axis = int64_t{1} << 30;  // pixels; positions beyond count as there

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
struct Place {
  int at;
  Acc fraction;
};
template <class Acc>
SEGFUSE_FUNCTOR Place<Acc> locate(Acc position) {
  constexpr Acc far = longest_axis;
  const Acc above = position > -far ? position : -far, bounded = above < far ? above : far;
  const int toward_zero = static_cast<int>(bounded);
  const int at = toward_zero - (static_cast<Acc>(toward_zero) > bounded);
  return {at, (bounded - static_cast<Acc>(at)) + (position - position)};
}

// The nearest integer, of two the even one.
template <class Acc>
SEGFUSE_FUNCTOR int nearest(const Place<Acc>& p) {
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
  SEGFUSE_FUNCTOR Place<Acc> place(Acc x) const {
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
      const Place<Acc> p = x.place(begin + static_cast<Acc>(i));
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
    const Place<Acc> p = y.place(row);
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

// The result's pixels.
template <class T>
struct Deform {
  using Acc = Wide<T>;
  using Sum = Nothing;
  static constexpr int width = ReducePolicy::width;

  Pixels pixels;
  Field<Acc> field;
  Source image;
  Lattice out;
  const T* from;
  T* to;
  Acc fill;
  Source labels{};
  Lattice labels_out{};
  const void* labels_from = nullptr;  // nullptr: there are none
  void* labels_to = nullptr;
  int64_t label_bytes = 0;
  uint64_t label_fill = 0;  // its bits

  SEGFUSE_FUNCTOR int64_t block() const { return field.block(); }
  void write(const Nothing&) const {}

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, Nothing&) const {
    Acc at_y[width], at_x[width], fraction_y[width], fraction_x[width];
    int y[width], x[width];
    const int count = static_cast<int>(n);
    field.positions(p.at[0], p.at[2], p.at[3], n, at_y, at_x);
    for (int i = 0; i < count; ++i) {
      const Place<Acc> on_y = locate(at_y[i]), on_x = locate(at_x[i]);
      y[i] = on_y.at;
      x[i] = on_x.at;
      fraction_y[i] = on_y.fraction;
      fraction_x[i] = on_x.fraction;
    }
    if (labels_from) {
      int near_y[width], near_x[width];
      for (int i = 0; i < count; ++i) {
        near_y[i] = nearest(Place<Acc>{y[i], fraction_y[i]});
        near_x[i] = nearest(Place<Acc>{x[i], fraction_x[i]});
      }
      if (label_bytes == 1) move_labels<uint8_t>(p, count, near_y, near_x);
      if (label_bytes == 2) move_labels<uint16_t>(p, count, near_y, near_x);
      if (label_bytes == 4) move_labels<uint32_t>(p, count, near_y, near_x);
      if (label_bytes == 8) move_labels<uint64_t>(p, count, near_y, near_x);
    }
    Acc weights[taps][width];
    for (int i = 0; i < count; ++i) {
      Acc w[taps];
      cubic(fraction_y[i], w);
      for (int k = 0; k < taps; ++k) weights[k][i] = w[k];
    }
    for (int64_t c = 0; c < image.channels; ++c) {
      const T* plane = from + image.offset(p.at[0], c, 0, 0);
      T* row = to + out.offset(p.at[0], c, p.at[2], p.at[3]);
      Acc sums[taps * width];
      using One = std::integral_constant<int64_t, 1>;
      if (image.step() == 1) {
        add_rows(plane, count, y, x, weights, One{}, sums, fraction_x);
      } else {
        add_rows(plane, count, y, x, weights, image.step(), sums, fraction_x);
      }
      if (out.step() == 1) {
        add_columns(sums, count, fraction_x, One{}, row);
      } else {
        add_columns(sums, count, fraction_x, out.step(), row);
      }
    }
  }

  template <class L>
  SEGFUSE_FUNCTOR void move_labels(const Pixel& p, int count, const int* y, const int* x) const {
    const Source source = labels;  // of its own, since bytes that are written may be anything's
    const L* plane = static_cast<const L*>(labels_from) + source.offset(p.at[0], 0, 0, 0);
    L* row = static_cast<L*>(labels_to) + labels_out.offset(p.at[0], 0, p.at[2], p.at[3]);
    const auto beyond = static_cast<L>(label_fill);
    const int64_t step = labels_out.step();
    for (int i = 0; i < count; ++i) {
      int64_t at_y = y[i], at_x = x[i];
      bool some = true;
      if (!source.holds(0, at_y) || !source.holds(1, at_x)) {
        at_y = source.mapped(0, at_y);
        at_x = source.mapped(1, at_x);
        some = at_y >= 0 && at_x >= 0;
      }
      row[i * step] = some ? plane[source.pixel(at_y, at_x)] : beyond;
    }
  }

  // Of each pixel's 4 x 4, the sums of the four columns.
  SEGFUSE_FUNCTOR void add_rows(const T* plane, int count, const int* y, const int* x,
                                const Acc (&weights)[taps][width], auto step, Acc* sums,
                                Acc* fraction_x) const {
    const int64_t below = image.stride[2];
    for (int i = 0; i < count; ++i) {
      const Acc w[taps] = {weights[0][i], weights[1][i], weights[2][i], weights[3][i]};
      Acc* sum = sums + taps * i;
      if (image.inside(0, y[i]) && image.inside(1, x[i])) {
        const T* first = plane + (int64_t{y[i]} - 1) * below + (int64_t{x[i]} - 1) * step;
        const T* rows[taps] = {first, first + below, first + 2 * below, first + 3 * below};
        if constexpr (std::is_same_v<decltype(step), int64_t>) {
          for (int k = 0; k < taps; ++k) {
            sum[k] = w[0] * static_cast<Acc>(rows[0][k * step]);
            for (int j = 1; j < taps; ++j) sum[k] += w[j] * static_cast<Acc>(rows[j][k * step]);
          }
        } else {
          Four<Acc> row[taps], total;
          for (int j = 0; j < taps; ++j) row[j].load(rows[j]);
          total.set(w[0], row[0]);
          for (int j = 1; j < taps; ++j) total.add(w[j], row[j]);
          total.store(sum);
        }
        continue;
      }
      Acc tap[taps][taps];
      if (image.read(plane, y[i], x[i], fill, tap)) {
        for (int k = 0; k < taps; ++k) {
          sum[k] = ((w[0] * tap[0][k] + w[1] * tap[1][k]) + w[2] * tap[2][k]) + w[3] * tap[3][k];
        }
      } else {  // exactly the fill
        fraction_x[i] = 0;
        for (int k = 0; k < taps; ++k) sum[k] = k == 1 ? fill : Acc(0);
      }
    }
  }

  SEGFUSE_FUNCTOR void add_columns(const Acc* sums, int count, const Acc* fraction_x, auto step,
                                   T* row) const {
    for (int i = 0; i < count; ++i) {
      Acc w[taps];
      cubic(fraction_x[i], w);
      const Acc* sum = sums + taps * i;
      row[i * step] =
          static_cast<T>(((w[0] * sum[0] + w[1] * sum[1]) + w[2] * sum[2]) + w[3] * sum[3]);
    }
  }
};

// The result's pixels' positions in the image, (N, 2, H, W).
template <class Acc>
struct Trace {
  using Sum = Nothing;

  Pixels pixels;
  Field<Acc> field;
  int64_t height, width;
  Acc* to;

  SEGFUSE_FUNCTOR int64_t block() const { return field.block(); }
  void write(const Nothing&) const {}

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, Nothing&) const {
    Acc* at_y = to + (p.at[0] * 2 * height + p.at[2]) * width + p.at[3];
    field.positions(p.at[0], p.at[2], p.at[3], n, at_y, at_y + height * width);
  }
};

// The gradient of the positions, (N, 2, H, W).
template <class T>
struct Slope {
  using Acc = Wide<T>;
  using Sum = Nothing;
  static constexpr int width = ReducePolicy::width;

  Pixels pixels;
  Field<Acc> field;
  Source image;
  Lattice grad;
  const T *from, *upstream;
  Acc* to;
  Acc fill;

  SEGFUSE_FUNCTOR int64_t block() const { return field.block(); }
  void write(const Nothing&) const {}

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, Nothing&) const {
    Acc at_y[width], at_x[width];
    field.positions(p.at[0], p.at[2], p.at[3], n, at_y, at_x);
    Acc* slope = to + (p.at[0] * 2 * image.size[0] + p.at[2]) * image.size[1] + p.at[3];
    for (int i = 0; i < static_cast<int>(n); ++i) {
      const Place<Acc> y = locate(at_y[i]), x = locate(at_x[i]);
      Acc wy[taps], wx[taps], slope_y[taps], slope_x[taps], of_y = 0, of_x = 0;
      cubic(y.fraction, wy);
      cubic(x.fraction, wx);
      cubic_slope(y.fraction, slope_y);
      cubic_slope(x.fraction, slope_x);
      for (int64_t c = 0; c < image.channels; ++c) {
        const Acc g = static_cast<Acc>(upstream[grad.offset(p.at[0], c, p.at[2], p.at[3] + i)]);
        Acc tap[taps][taps], down = 0, right = 0;
        if (!image.read(from + image.offset(p.at[0], c, 0, 0), y.at, x.at, fill, tap)) continue;
        for (int j = 0; j < taps; ++j) {
          const Acc* t = tap[j];
          down += slope_y[j] * (((wx[0] * t[0] + wx[1] * t[1]) + wx[2] * t[2]) + wx[3] * t[3]);
          right += wy[j] * (((slope_x[0] * t[0] + slope_x[1] * t[1]) + slope_x[2] * t[2]) +
                            slope_x[3] * t[3]);
        }
        of_y += g * down;
        of_x += g * right;
      }
      slope[i] = of_y;
      slope[image.size[0] * image.size[1] + i] = of_x;
    }
  }
};

// Sums along the middle axis of (outer, length, inner), weighted as control points are.
template <class From, class To, class Acc>
struct Project {
  using Value = To;
  struct Row {
    To* to;
    int64_t step, size;
    const From* from;
    int64_t point, first, last;  // pixels that the control point may reach
  };

  Control<Acc> control;
  int64_t outer, length, inner;
  const From* from;
  To* to;

  SEGFUSE_FUNCTOR int64_t rows() const { return outer * control.count; }
  SEGFUSE_FUNCTOR int64_t longest() const { return inner; }

  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const Split at = split(r, control.count);
    Row row{to + r * inner, 1, inner, from + at.quotient * length * inner, at.remainder, 0, length};
    if (control.a_pixel > 0) {
      const auto point = static_cast<double>(at.remainder), scale = double{control.a_pixel};
      const auto first = static_cast<int64_t>((point - 2) / scale) - 2;
      const auto last = static_cast<int64_t>((point + 2) / scale) + 3;
      row.first = first > 0 ? first : 0;
      row.last = last < length ? last : length;
    }
    return row;
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, To* values) const {
    for_each_block(n, [&](int64_t begin, auto m) {
      double sum[RowPolicy::width];
      for (int64_t i = 0; i < m; ++i) sum[i] = 0;
      for (int64_t l = row.first; l < row.last; ++l) {
        const Place<Acc> p = control.place(static_cast<Acc>(l));
        Acc w[taps], weight = 0;
        cubic(p.fraction, w);
        bool reaches = false;
        for (int k = 0; k < taps; ++k) {
          if (control.clamped(int64_t{p.at} - 1 + k) != row.point) continue;
          weight += w[k];
          reaches = true;
        }
        if (!reaches) continue;
        const From* line = row.from + l * inner + x + begin;
        for (int64_t i = 0; i < m; ++i) {
          sum[i] += static_cast<double>(weight) * static_cast<double>(line[i]);
        }
      }
      for (int64_t i = 0; i < m; ++i) values[begin + i] = static_cast<To>(sum[i]);
    });
  }
};

// Sums of rows of the positions' gradient g, (N, 2, H, 3): of g times the row, the column and 1.
template <class Acc>
struct RowMoments {
  using Value = double;
  struct Row {
    double* to;
    int64_t step, size;
    const Acc* from;
    Acc y;
  };

  int64_t outer, height, width;
  Acc centre_y, centre_x;
  const Acc* from;
  double* to;

  SEGFUSE_FUNCTOR int64_t rows() const { return outer * height; }
  SEGFUSE_FUNCTOR int64_t longest() const { return 3; }
  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const auto y = static_cast<Acc>(split(r, height).remainder) - centre_y;
    return {to + r * 3, 1, 3, from + r * width, y};
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, double* values) const {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < width; ++j) {
        const Acc by = x + i == 0 ? row.y : x + i == 1 ? static_cast<Acc>(j) - centre_x : Acc(1);
        sum += static_cast<double>(row.from[j]) * static_cast<double>(by);
      }
      values[i] = sum;
    }
  }
};

// And the rows' sums.
template <class Acc>
struct Moments {
  using Value = Acc;
  struct Row {
    Acc* to;
    int64_t step, size;
    const double* from;
  };

  int64_t outer, height;
  const double* from;
  Acc* to;

  SEGFUSE_FUNCTOR int64_t rows() const { return outer; }
  SEGFUSE_FUNCTOR int64_t longest() const { return 3; }
  SEGFUSE_FUNCTOR Row row(int64_t r) const { return {to + r * 3, 1, 3, from + r * height * 3}; }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, Acc* values) const {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t y = 0; y < height; ++y) sum += row.from[y * 3 + x + i];
      values[i] = static_cast<Acc>(sum);
    }
  }
};

// Which rows and columns of the image the result's rows read, in boxes of `width` pixels: least and
// greatest row, least and greatest column.
template <class Acc>
struct Bounds {
  using Value = int32_t;
  struct Row {
    int32_t* to;
    int64_t step, size;
    const Acc* at[2];
  };

  Source image;
  int64_t images, width, boxes;
  const Acc* positions;
  int32_t* to;

  SEGFUSE_FUNCTOR int64_t rows() const { return images * image.size[0]; }
  SEGFUSE_FUNCTOR int64_t longest() const { return boxes * 4; }
  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const Split at = split(r, image.size[0]);
    const Acc* y = positions + (at.quotient * 2 * image.size[0] + at.remainder) * image.size[1];
    return {to + r * boxes * 4, 1, boxes * 4, {y, y + image.size[0] * image.size[1]}};
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, int32_t* values) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t begin = (x + i) / 4 * width, end = begin + width;
      const int axis = (x + i) / 2 % 2;
      int64_t least = longest_axis, greatest = -1;
      for (int64_t j = begin; j < end && j < image.size[1]; ++j) {
        const int at = locate(row.at[axis][j]).at;
        for (int k = 0; k < taps; ++k) {
          const int64_t tap = image.mapped(axis, int64_t{at} - 1 + k);
          if (tap < 0) continue;
          least = tap < least ? tap : least;
          greatest = tap > greatest ? tap : greatest;
        }
      }
      values[i] = static_cast<int32_t>((x + i) % 2 == 0 ? least : greatest);
    }
  }
};

// Rows of the image's gradient.
template <class T>
struct Collect {
  using Value = T;
  using Acc = Wide<T>;
  static constexpr int64_t box = 64;  // pixels
  struct Row {
    T* to;
    int64_t step, size, image, channel, y;
  };

  Source image;
  Lattice grad;
  int64_t images, boxes;
  const Acc* positions;
  const int32_t *row_bounds, *box_bounds;
  const T* upstream;
  T* to;

  SEGFUSE_FUNCTOR int64_t rows() const { return images * image.channels * image.size[0]; }
  SEGFUSE_FUNCTOR int64_t longest() const { return image.size[1]; }
  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const Split y = split(r, image.size[0]), c = split(y.quotient, image.channels);
    return {to + r * image.size[1], 1, image.size[1], c.quotient, c.remainder, y.remainder};
  }

  SEGFUSE_FUNCTOR bool meets(const int32_t* bounds, int64_t y, int64_t x, int64_t n) const {
    return bounds[0] <= y && y <= bounds[1] && bounds[2] < x + n && x <= bounds[3];
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, T* values) const {
    const int64_t height = image.size[0], width = image.size[1];
    for_each_block(n, [&](int64_t begin, auto m) {
      double sum[RowPolicy::width];
      for (int64_t i = 0; i < m; ++i) sum[i] = 0;
      for (int64_t y = 0; y < height; ++y) {
        const int64_t line = row.image * height + y;
        if (!meets(row_bounds + line * 4, row.y, x + begin, m)) continue;
        for (int64_t b = 0; b < boxes; ++b) {
          if (!meets(box_bounds + (line * boxes + b) * 4, row.y, x + begin, m)) continue;
          const int64_t end = (b + 1) * box < width ? (b + 1) * box : width;
          for (int64_t j = b * box; j < end; ++j) add(row, y, j, x + begin, m, sum);
        }
      }
      for (int64_t i = 0; i < m; ++i) values[begin + i] = static_cast<T>(sum[i]);
    });
  }

  // Adds what pixel (y, j) of the result has read of n pixels of the row, from x on.
  template <class N>
  SEGFUSE_FUNCTOR void add(const Row& row, int64_t y, int64_t j, int64_t x, N n,
                           double* sum) const {
    const int64_t height = image.size[0], width = image.size[1];
    const Acc* at = positions + (row.image * 2 * height + y) * width + j;
    const Place<Acc> on_y = locate(at[0]);
    bool reads = false;
    for (int k = 0; k < taps; ++k) {
      reads = reads || image.mapped(0, int64_t{on_y.at} - 1 + k) == row.y;
    }
    if (!reads) return;
    const Place<Acc> on_x = locate(at[height * width]);
    Acc wy[taps], wx[taps], weight = 0;
    cubic(on_y.fraction, wy);
    cubic(on_x.fraction, wx);
    for (int k = 0; k < taps; ++k) {
      if (image.mapped(0, int64_t{on_y.at} - 1 + k) == row.y) weight += wy[k];
    }
    weight *= static_cast<Acc>(upstream[grad.offset(row.image, row.channel, y, j)]);
    for (int k = 0; k < taps; ++k) {
      const int64_t column = image.mapped(1, int64_t{on_x.at} - 1 + k);
      if (column < 0) continue;
      for_each_within(n, column - x, column - x + 1, [&](int64_t i) { sum[i] += weight * wx[k]; });
    }
  }
};

Pixels pixels_of(const Tensor& image) {
  Pixels pixels(image);
  pixels.size[1] = 1;  // in place of the channels
  return pixels;
}

ScalarType wide(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The wrapper in Python has said what is wrong in more words before.
void check_arguments(const Tensor& image, const Tensor& grid, const std::optional<Tensor>& affine,
                     int64_t border) {
  const char* op = "elastic_deform";
  const auto dtype = wide(image.scalar_type());
  check(image.dim() == 4, op, ": image: expected (N, C, H, W)");
  check(image.size(2) <= longest_axis && image.size(3) <= longest_axis, op,
        ": image: expected axes of at most 2^30 pixels");
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

bool alike(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device() && a.dim() == b.dim() &&
         std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

void check_labels(const Tensor& labels, const Tensor& image) {
  check(labels.dim() == 3 && labels.size(0) == image.size(0) && labels.size(1) == image.size(2) &&
            labels.size(2) == image.size(3) && labels.device() == image.device(),
        "elastic_deform: labels: expected (N, H, W) of image, on its device");
}

struct LabelArguments {
  const Tensor &from, &to;
  double fill;
};

void deform_into(const Tensor& out, const Tensor& image, const Tensor& grid,
                 const std::optional<Tensor>& affine, int64_t border, double fill,
                 const std::optional<LabelArguments>& labels) {
  visit(Floating{}, image.scalar_type(), "elastic_deform", [&]<class T>() {
    using Acc = Wide<T>;
    Deform<T> f{pixels_of(image),      Field<Acc>(image, grid, affine), Source(image, border),
                Lattice(out),          image.const_data_ptr<T>(),       out.mutable_data_ptr<T>(),
                static_cast<Acc>(fill)};
    if (labels) {
      f.labels = Source(labels->from, border);
      f.labels_out = Lattice(labels->to);
      f.labels_from = labels->from.const_data_ptr();
      f.labels_to = labels->to.mutable_data_ptr();
      f.label_bytes = labels->from.element_size();
      visit(Numbers{}, labels->from.scalar_type(), "elastic_deform: labels", [&]<class L>() {
        const auto value = static_cast<L>(labels->fill);
        uint64_t bits = 0;
        std::memcpy(&bits, &value, sizeof(L));
        f.label_fill = bits;
      });
    }
    if (f.pixels.count() > 0) reduce(f, image);
  });
}

Tensor elastic_deform(const Tensor& image, const Tensor& grid, const std::optional<Tensor>& affine,
                      int64_t border, double fill) {
  check_arguments(image, grid, affine, border);
  const Tensor out = torch::stable::new_empty(image, image.sizes());
  ask_for_large_pages(out);
  deform_into(out, image, grid, affine, border, fill, std::nullopt);
  return out;
}

std::tuple<Tensor, Tensor> elastic_deform_labels(const Tensor& image, const Tensor& grid,
                                                 const std::optional<Tensor>& affine,
                                                 const Tensor& labels, int64_t border, double fill,
                                                 double labels_fill) {
  check_arguments(image, grid, affine, border);
  check_labels(labels, image);
  const Tensor out = torch::stable::new_empty(image, image.sizes());
  const Tensor labels_out = torch::stable::new_empty(labels, labels.sizes());
  ask_for_large_pages(out);
  ask_for_large_pages(labels_out);
  deform_into(out, image, grid, affine, border, fill,
              LabelArguments{labels, labels_out, labels_fill});
  return {out, labels_out};
}

void elastic_deform_out(const Tensor& image, const Tensor& grid,
                        const std::optional<Tensor>& affine, int64_t border, double fill,
                        const Tensor& out) {
  check_arguments(image, grid, affine, border);
  check(alike(out, image), "elastic_deform: out: expected the shape, dtype and device of image");
  check_memory("elastic_deform", out, {{"image", &image}, {"grid", &grid}});
  if (affine) check_memory("elastic_deform", out, {{"affine", &*affine}});
  deform_into(out, image, grid, affine, border, fill, std::nullopt);
}

void elastic_deform_labels_out(const Tensor& image, const Tensor& grid,
                               const std::optional<Tensor>& affine, const Tensor& labels,
                               int64_t border, double fill, double labels_fill, const Tensor& out,
                               const Tensor& labels_out) {
  check_arguments(image, grid, affine, border);
  check_labels(labels, image);
  check(alike(out, image) && alike(labels_out, labels),
        "elastic_deform: out: expected the shapes, dtypes and device of image and labels");
  for (const Tensor* to : {&out, &labels_out}) {
    check_memory("elastic_deform", *to, {{"image", &image}, {"grid", &grid}, {"labels", &labels}});
    if (affine) check_memory("elastic_deform", *to, {{"affine", &*affine}});
  }
  check_memory("elastic_deform", labels_out, {{"out", &out}});
  deform_into(out, image, grid, affine, border, fill,
              LabelArguments{labels, labels_out, labels_fill});
}

// The gradient of the image, which its values do not touch.
Tensor elastic_deform_backward_image(const Tensor& grad, const Tensor& grid,
                                     const std::optional<Tensor>& affine, int64_t border) {
  check_arguments(grad, grid, affine, border);
  const Tensor out = torch::stable::new_empty(grad, grad.sizes());
  if (out.numel() == 0) return out;
  const int64_t images = grad.size(0), height = grad.size(2), width = grad.size(3);
  const Tensor positions =
      torch::stable::new_empty(grad, {images, 2, height, width}, wide(grad.scalar_type()));
  visit(Floating{}, grad.scalar_type(), "elastic_deform_backward", [&]<class T>() {
    using Acc = Wide<T>;
    reduce(Trace<Acc>{pixels_of(grad), Field<Acc>(grad, grid, affine), height, width,
                      positions.mutable_data_ptr<Acc>()},
           grad);
    const int64_t boxes = (width + Collect<T>::box - 1) / Collect<T>::box;
    const Source image(out, border);
    const auto bounds = [&](int64_t box, int64_t count) {
      const Tensor found =
          torch::stable::new_empty(grad, {images, height, count, 4}, ScalarType::Int);
      for_each_row(
          found, Memory::fresh,
          std::array{Bounds<Acc>{image, images, box, count, positions.const_data_ptr<Acc>(),
                                 found.mutable_data_ptr<int32_t>()}});
      return found;
    };
    const Tensor of_rows = bounds(width, 1), of_boxes = bounds(Collect<T>::box, boxes);
    for_each_row(
        out, Memory::fresh,
        std::array{Collect<T>{image, Lattice(grad), images, boxes, positions.const_data_ptr<Acc>(),
                              of_rows.const_data_ptr<int32_t>(), of_boxes.const_data_ptr<int32_t>(),
                              grad.const_data_ptr<T>(), out.mutable_data_ptr<T>()}});
  });
  return out;
}

// The gradients of grid and affine; the latter empty where there is none.
std::tuple<Tensor, Tensor> elastic_deform_backward_field(const Tensor& grad, const Tensor& image,
                                                         const Tensor& grid,
                                                         const std::optional<Tensor>& affine,
                                                         int64_t border, double fill) {
  check_arguments(image, grid, affine, border);
  check(alike(grad, image), "elastic_deform_backward: grad: expected the shape of image");
  const int64_t images = image.size(0), height = image.size(2), width = image.size(3);
  const Tensor of_grid = torch::stable::new_empty(grid, grid.sizes());
  const Tensor of_affine = torch::stable::new_empty(grid, {affine ? images : 0, 2, 3});
  const Tensor slopes = torch::stable::new_empty(grid, {images, 2, height, width});
  visit(Floating{}, image.scalar_type(), "elastic_deform_backward", [&]<class T>() {
    using Acc = Wide<T>;
    const Field<Acc> field(image, grid, affine);
    if (slopes.numel() > 0) {
      reduce(Slope<T>{pixels_of(image), field, Source(image, border), Lattice(grad),
                      image.const_data_ptr<T>(), grad.const_data_ptr<T>(),
                      slopes.mutable_data_ptr<Acc>(), static_cast<Acc>(fill)},
             image);
    }
    const Acc* slope = slopes.const_data_ptr<Acc>();
    const auto scratch = [&](int64_t rows, int64_t columns) {
      return torch::stable::new_empty(grid, {images, 2, rows, columns}, ScalarType::Double);
    };
    const Tensor sums = scratch(field.y.count, width);
    for_each_row(sums, Memory::fresh,
                 std::array{Project<Acc, double, Acc>{field.y, images * 2, height, width, slope,
                                                      sums.mutable_data_ptr<double>()}});
    for_each_row(of_grid, Memory::fresh,
                 std::array{Project<double, Acc, Acc>{field.x, images * 2 * field.y.count, width, 1,
                                                      sums.const_data_ptr<double>(),
                                                      of_grid.mutable_data_ptr<Acc>()}});
    if (!affine) return;
    const Tensor moments = scratch(height, 3);
    for_each_row(
        moments, Memory::fresh,
        std::array{RowMoments<Acc>{images * 2, height, width, field.centre_y, field.centre_x, slope,
                                   moments.mutable_data_ptr<double>()}});
    for_each_row(of_affine, Memory::fresh,
                 std::array{Moments<Acc>{images * 2, height, moments.const_data_ptr<double>(),
                                         of_affine.mutable_data_ptr<Acc>()}});
  });
  return {of_grid, of_affine};
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("elastic_deform", TORCH_BOX(&elastic_deform));
  m.impl("elastic_deform_labels", TORCH_BOX(&elastic_deform_labels));
  m.impl("elastic_deform_out", TORCH_BOX(&elastic_deform_out));
  m.impl("elastic_deform_labels_out", TORCH_BOX(&elastic_deform_labels_out));
  m.impl("elastic_deform_backward_image", TORCH_BOX(&elastic_deform_backward_image));
  m.impl("elastic_deform_backward_field", TORCH_BOX(&elastic_deform_backward_field));
}

}  // namespace segfuse::SEGFUSE_BACKEND
