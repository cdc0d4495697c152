// deconv_upsample: a transposed convolution, depthwise, of which only what is asked for is
// computed, and a skip added in the same pass; and its gradients.
//
//   out[n, c, p] = sum over q of x[n, c, q] w[c, p + offset - q factor] + skip[n, c, p]
//   grad_x[n, c, q] = sum over p of grad[n, c, p] w[c, p + offset - q factor]
//   grad_w[c, t] = sum over n, q of x[n, c, q] grad[n, c, t - offset + q factor]
//
// FCN upsamples so (Long, Shelhamer, Darrell 2015, section 3.3).  All three gather, a row at a time
// (core/upsample.h).  Without a weight it is the bilinear kernel, whose sums along y, then x, take
// ceil(k / factor) products each instead of their square.  The page is long since it holds three
// functors, and the checks of each.
#include <optional>
#include <vector>

#include "core/dtype.h"
#include "core/out.h"
#include "core/upsample.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

using Pair = std::vector<int64_t>;  // one along y and one along x

// Elements between neighbours of a tensor of four axes.
struct Steps {
  int64_t n, c, y, x;
  explicit Steps(const Tensor& t)
      : n(t.stride(0)), c(t.stride(1)), y(t.stride(2)), x(t.stride(3)) {}
};

// What the three have in common.  A weight is of the arithmetic's dtype, contiguous.
template <class Acc>
struct Geometry {
  Deconvolution rows, columns;
  Weights<Acc> weights;  // of the first channel
  std::vector<Acc> taps;

  Geometry(const Pair& from, const Pair& to, int64_t factor, int64_t kernel, const Pair& offset,
           const std::optional<Tensor>& weight)
      : rows{from[0], to[0], factor, kernel, offset[0]},
        columns{from[1], to[1], factor, kernel, offset[1]},
        weights{nullptr, nullptr, BilinearKernel<Acc>(kernel), kernel} {
    if (weight) {
      weights.table = weight->const_data_ptr<Acc>();
    } else {
      for (int64_t t = 0; t < kernel; ++t) taps.push_back(weights.bilinear(t));
      weights.taps = taps.data();
    }
  }
};

template <class T>
struct Forward {
  using Acc = Wide<T>;
  using Value = T;
  struct Row {
    T* to;
    int64_t step, size;
    Plane<T> x;
    const T* skip;
    const Acc* table;
    int64_t y;
  };

  Deconvolution down, across;
  Weights<Acc> weights;
  int64_t batch, channels;
  const T *x, *skip;
  T* to;
  Steps x_step, skip_step, to_step;

  SEGFUSE_FUNCTOR int64_t rows() const { return batch * channels * down.size; }
  SEGFUSE_FUNCTOR int64_t longest() const { return across.size; }

  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const Split line = split(r, down.size), image = split(line.quotient, channels);
    const int64_t n = image.quotient, c = image.remainder, y = line.remainder;
    return {to + n * to_step.n + c * to_step.c + y * to_step.y,
            to_step.x,
            across.size,
            {x + n * x_step.n + c * x_step.c, x_step.y, x_step.x},
            skip ? skip + n * skip_step.n + c * skip_step.c + y * skip_step.y : nullptr,
            weights.table ? weights.table + c * weights.kernel * weights.kernel : nullptr,
            y};
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, T* values) const {
    Weights<Acc> w = weights;
    w.table = row.table;
    for_each_block(n, [&](int64_t begin, auto m) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<T, Acc>) {
        expand(down, across, row.x, w, row.y, x + begin, m, values + begin);
        if (!row.skip) return;
        const T* skip = row.skip + (x + begin) * skip_step.x;
        for (int64_t i = 0; i < m; ++i) values[begin + i] += skip[i * skip_step.x];
      } else {
        Acc sum[RowPolicy::width];
        expand(down, across, row.x, w, row.y, x + begin, m, sum);
        if (row.skip) {
          const T* skip = row.skip + (x + begin) * skip_step.x;
          for (int64_t i = 0; i < m; ++i) sum[i] += static_cast<Acc>(skip[i * skip_step.x]);
        }
        for (int64_t i = 0; i < m; ++i) values[begin + i] = static_cast<T>(sum[i]);
      }
    });
  }
};

template <class T>
struct BackwardX {
  using Acc = Wide<T>;
  using Value = T;
  struct Row {
    T* to;
    int64_t step, size;
    Plane<T> grad;
    const Acc* table;
    int64_t y;
  };

  Deconvolution down, across;
  Weights<Acc> weights;
  int64_t batch, channels;
  const T* grad;
  T* to;
  Steps grad_step;

  SEGFUSE_FUNCTOR int64_t rows() const { return batch * channels * down.count; }
  SEGFUSE_FUNCTOR int64_t longest() const { return across.count; }
  int64_t work() const { return down.factor * across.factor; }

  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const Split line = split(r, down.count), image = split(line.quotient, channels);
    const int64_t n = image.quotient, c = image.remainder;
    return {to + r * across.count,
            1,
            across.count,
            {grad + n * grad_step.n + c * grad_step.c, grad_step.y, 1},
            weights.table ? weights.table + c * weights.kernel * weights.kernel : nullptr,
            line.remainder};
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, T* values) const {
    Weights<Acc> w = weights;
    w.table = row.table;
    for_each_block(n, [&](int64_t begin, auto m) __attribute__((always_inline)) {
      Acc sum[RowPolicy::width];
      correlate(down, across, row.grad, w, row.y, x + begin, m, sum);
      for (int64_t i = 0; i < m; ++i) values[begin + i] = static_cast<T>(sum[i]);
    });
  }
};

// The weight's gradient, (C, k, k), a channel a row: so a row of targets, which belongs to several
// taps, is still in the cache when it is read again.
template <class T, class To>
struct BackwardWeight {
  using Value = To;
  struct Row {
    To* to;
    int64_t step, size;
    const T *x, *grad;
  };

  Deconvolution down, across;
  int64_t batch;
  const T *x, *grad;
  To* to;
  int64_t channels;
  Steps x_step, grad_step;

  SEGFUSE_FUNCTOR int64_t rows() const { return channels; }
  SEGFUSE_FUNCTOR int64_t longest() const { return down.kernel * across.kernel; }
  int64_t work() const { return batch * down.count * across.count; }

  SEGFUSE_FUNCTOR Row row(int64_t c) const {
    return {to + c * longest(), 1, longest(), x + c * x_step.c, grad + c * grad_step.c};
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t first, N n, To* values) const {
    for_each_block(n, [&](int64_t begin, auto m) __attribute__((always_inline)) {
      double sum[RowPolicy::width];
      for (int64_t i = 0; i < m; ++i) sum[i] = 0;
      const int64_t from = first + begin, k = across.kernel;
      const Split start = split(from, k);
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t q = 0; q < down.count; ++q) {
          int64_t ty = start.quotient, tx = start.remainder;
          for (int64_t i = 0; i < m; ++ty, tx = 0) {
            const int64_t taps = k - tx < m - i ? k - tx : m - i;
            const int64_t p = q * down.factor + ty - down.offset;
            if (p >= 0 && p < down.size) {
              pair(across, row.x + b * x_step.n + q * x_step.y, x_step.x,
                   row.grad + b * grad_step.n + p * grad_step.y, tx, taps, sum + i);
            }
            i += taps;
          }
        }
      }
      for (int64_t i = 0; i < m; ++i) values[begin + i] = static_cast<To>(sum[i]);
    });
  }
};

std::optional<Tensor> wide(const std::optional<Tensor>& weight, ScalarType dtype) {
  if (!weight) return std::nullopt;
  const auto acc = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(torch::stable::to(*weight, acc));
}

// The gradient with neighbours along x, copied if need be.
Tensor in_rows(const Tensor& grad) {
  return grad.stride(3) == 1 ? grad : torch::stable::contiguous(grad);
}

// The wrapper in Python has said what is wrong in more words before.
void check_arguments(int64_t factor, int64_t kernel, const Pair& offset, const Pair& from,
                     const Pair& to) {
  const char* op = "deconv_upsample";
  check(factor > 0 && kernel > 0 && kernel <= longest_kernel, op, ": kernel_size: expected 1 to ",
        longest_kernel, ", and a factor above 0");
  check(offset.size() == 2 && from.size() == 2 && to.size() == 2, op,
        ": offset and size: expected one an axis");
  for (int a = 0; a < 2; ++a) {
    check(from[a] > 0 && to[a] >= 0 && offset[a] >= 0 &&
              to[a] <= (from[a] - 1) * factor + kernel - offset[a],
          op, ": offset and size: expected a range within the whole result");
  }
}

void check_weight(const Tensor& x, const std::optional<Tensor>& weight, int64_t kernel) {
  check(
      !weight || (weight->dim() == 3 && weight->size(0) == x.size(1) && weight->size(1) == kernel &&
                  weight->size(2) == kernel && weight->device() == x.device()),
      "deconv_upsample: weight: expected (C, kernel_size, kernel_size) on the device of x");
}

Pair plane(const Tensor& t) {
  check(t.dim() == 4, "deconv_upsample: expected tensors (N, C, H, W)");
  return {t.size(2), t.size(3)};
}

void upsample_into(const Tensor& out, Memory memory, const Tensor& x,
                   const std::optional<Tensor>& weight_, const std::optional<Tensor>& skip,
                   int64_t factor, int64_t kernel, const Pair& offset) {
  check_arguments(factor, kernel, offset, plane(x), plane(out));
  check_weight(x, weight_, kernel);
  check(!skip || (skip->scalar_type() == x.scalar_type() && skip->device() == x.device() &&
                  skip->dim() == 4 &&
                  std::equal(skip->sizes().begin(), skip->sizes().end(), out.sizes().begin())),
        "deconv_upsample: skip: expected the result's shape, dtype and device");
  const auto weight = wide(weight_, x.scalar_type());
  visit(Floating{}, x.scalar_type(), "deconv_upsample", [&]<class T>() {
    const Geometry<Wide<T>> g(plane(x), plane(out), factor, kernel, offset, weight);
    const Forward<T> f{g.rows,
                       g.columns,
                       g.weights,
                       x.size(0),
                       x.size(1),
                       x.const_data_ptr<T>(),
                       skip ? skip->const_data_ptr<T>() : nullptr,
                       out.mutable_data_ptr<T>(),
                       Steps(x),
                       Steps(skip ? *skip : x),
                       Steps(out)};
    for_each_row(out, memory, std::array{f});
  });
}

Tensor deconv_upsample(const Tensor& x, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& skip, int64_t factor, int64_t kernel,
                       const Pair& offset, const Pair& size) {
  check_arguments(factor, kernel, offset, plane(x), size);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), size[0], size[1]});
  upsample_into(out, Memory::fresh, x, weight, skip, factor, kernel, offset);
  return out;
}

void deconv_upsample_out(const Tensor& x, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& skip, int64_t factor, int64_t kernel,
                         const Pair& offset, const Tensor& out) {
  const char* op = "deconv_upsample";
  check(out.dim() == 4 && out.size(0) == x.size(0) && out.size(1) == x.size(1) &&
            out.scalar_type() == x.scalar_type() && out.device() == x.device(),
        op, ": out: expected the shape, dtype and device of the result");
  check_memory(op, out, {{"x", &x}});
  if (weight) check_memory(op, out, {{"weight", &*weight}});
  if (skip) check_memory(op, out, {{"skip", &*skip}});
  upsample_into(out, Memory::reused, x, weight, skip, factor, kernel, offset);
}

Tensor deconv_upsample_backward_x(const Tensor& grad_, const std::optional<Tensor>& weight_,
                                  int64_t factor, int64_t kernel, const Pair& offset,
                                  const Pair& size) {
  check_arguments(factor, kernel, offset, size, plane(grad_));
  check_weight(grad_, weight_, kernel);
  const Tensor grad = in_rows(grad_);
  const Tensor out = torch::stable::new_empty(grad, {grad.size(0), grad.size(1), size[0], size[1]});
  const auto weight = wide(weight_, grad.scalar_type());
  visit(Floating{}, grad.scalar_type(), "deconv_upsample_backward_x", [&]<class T>() {
    const Geometry<Wide<T>> g(size, plane(grad), factor, kernel, offset, weight);
    const BackwardX<T> f{g.rows,
                         g.columns,
                         g.weights,
                         grad.size(0),
                         grad.size(1),
                         grad.const_data_ptr<T>(),
                         out.mutable_data_ptr<T>(),
                         Steps(grad)};
    for_each_row(out, Memory::fresh, std::array{f});
  });
  return out;
}

Tensor deconv_upsample_backward_weight(const Tensor& grad_, const Tensor& x, int64_t factor,
                                       int64_t kernel, const Pair& offset, ScalarType dtype) {
  const char* op = "deconv_upsample_backward_weight";
  check(x.dim() == 4 && grad_.dim() == 4 && x.size(0) == grad_.size(0) &&
            x.size(1) == grad_.size(1) && x.scalar_type() == grad_.scalar_type() &&
            x.device() == grad_.device(),
        op, ": grad: expected the batch, channels, dtype and device of x");
  check_arguments(factor, kernel, offset, plane(x), plane(grad_));
  const Tensor grad = in_rows(grad_);
  const Tensor out = torch::stable::new_empty(x, {x.size(1), kernel, kernel}, dtype);
  const Deconvolution down{x.size(2), grad.size(2), factor, kernel, offset[0]};
  const Deconvolution across{x.size(3), grad.size(3), factor, kernel, offset[1]};
  const auto fill = [&]<class T, class To>() {
    const BackwardWeight<T, To> f{down,
                                  across,
                                  x.size(0),
                                  x.const_data_ptr<T>(),
                                  grad.const_data_ptr<T>(),
                                  out.mutable_data_ptr<To>(),
                                  x.size(1),
                                  Steps(x),
                                  Steps(grad)};
    for_each_row(out, Memory::fresh, std::array{f});
  };
  visit(Floating{}, x.scalar_type(), op, [&]<class T>() {
    if (dtype == x.scalar_type()) return fill.template operator()<T, T>();
    check(dtype == ScalarType::Float, op, ": dtype: expected that of x or float32");
    fill.template operator()<T, float>();
  });
  return out;
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("deconv_upsample", TORCH_BOX(&deconv_upsample));
  m.impl("deconv_upsample_out", TORCH_BOX(&deconv_upsample_out));
  m.impl("deconv_upsample_backward_x", TORCH_BOX(&deconv_upsample_backward_x));
  m.impl("deconv_upsample_backward_weight", TORCH_BOX(&deconv_upsample_backward_weight));
}

}  // namespace segfuse::SEGFUSE_BACKEND
