// elastic_deform's gradients: of image, grid and affine map.
//
// All are gathered.  A row of the image's looks for the pixels of the result that read it, by the
// bounds of what rows of the result, and boxes of them, have read.  That of the field is stored,
// and summed along y, then along x, with the grid's weights, or the affine map's.
#include "core/deformation.h"
#include "core/rows.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

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
      const Located<Acc> y = locate(at_y[i]), x = locate(at_x[i]);
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
        const Located<Acc> p = control.place(static_cast<Acc>(l));
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
      int64_t least = farthest, greatest = -1;
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
    const Located<Acc> on_y = locate(at[0]);
    bool reads = false;
    for (int k = 0; k < taps; ++k) {
      reads = reads || image.mapped(0, int64_t{on_y.at} - 1 + k) == row.y;
    }
    if (!reads) return;
    const Located<Acc> on_x = locate(at[height * width]);
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
  m.impl("elastic_deform_backward_image", TORCH_BOX(&elastic_deform_backward_image));
  m.impl("elastic_deform_backward_field", TORCH_BOX(&elastic_deform_backward_field));
}

}  // namespace segfuse::SEGFUSE_BACKEND
