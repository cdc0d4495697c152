// elastic_deform: an image (N, C, H, W) and its labels (N, H, W), deformed in one pass by a coarse
// grid of displacements and an affine map, s (core/deformation.h).
//
//   out[p] = sum over the 4 x 4 pixels q around s(p) of w(s_y - q_y) w(s_x - q_x) image[m(q)]
//   labels_out[p] = labels[m(round(s(p)))]
//
// with Keys' cubic w, and m the border's map (core/border.h).  Ronneberger, Fischer, Brox 2015,
// section 3.1, deform so.
//
// Positions and weights are computed once for all channels and the labels.  The 4 x 4 pixels are
// summed vertically first, four neighbours at once.
#include <cstring>

#include "core/deformation.h"
#include "core/lanes.h"
#include "core/out.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

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
      const Located<Acc> on_y = locate(at_y[i]), on_x = locate(at_x[i]);
      y[i] = on_y.at;
      x[i] = on_x.at;
      fraction_y[i] = on_y.fraction;
      fraction_x[i] = on_x.fraction;
    }
    if (labels_from) {
      int near_y[width], near_x[width];
      for (int i = 0; i < count; ++i) {
        near_y[i] = nearest(Located<Acc>{y[i], fraction_y[i]});
        near_x[i] = nearest(Located<Acc>{x[i], fraction_x[i]});
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
          Lanes<Acc, taps> row[taps], total;
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

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("elastic_deform", TORCH_BOX(&elastic_deform));
  m.impl("elastic_deform_labels", TORCH_BOX(&elastic_deform_labels));
  m.impl("elastic_deform_out", TORCH_BOX(&elastic_deform_out));
  m.impl("elastic_deform_labels_out", TORCH_BOX(&elastic_deform_labels_out));
}

}  // namespace segfuse::SEGFUSE_BACKEND
