// upsample_cross_entropy: the loss of weighted_cross_entropy, of scores that are upsampled
// bilinearly or by a transposed convolution; and the gradients of the coarse scores and of a
// learned kernel (core/cross_entropy.h and core/upsampled.h have the equations).
//
// The largest of a pixel's scores is found first, then its sum of exponentials: an interpolated
// score costs less to compute twice than a running sum does to scale.  Of the forward pass one
// value a pixel is kept, log sum_k exp(x_k), from which the gradient of a class follows without the
// other classes.
#include "core/upsampled.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

template <class T>
struct Forward {
  using Acc = T;
  using Sum = LossSum;

  Coarse<Acc> coarse;
  PixelLoss<Acc> loss;
  LossOutput<Acc> output;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, const auto& scores, Sum& sum) const {
    constexpr int width = UpsampledPolicy::width;
    constexpr Acc lowest = -std::numeric_limits<Acc>::infinity();
    Acc top[width], total[width], picked[width], smooth[width], base[width];
    int id[width];
    loss.target.read(p, n, id);
    for (int i = 0; i < width; ++i) {
      top[i] = lowest;
      total[i] = smooth[i] = 0;
    }
    for (int64_t k = 0; k < coarse.classes; ++k) {
      for (int i = 0; i < width; ++i) {
        const Acc x = scores(k, i);
        top[i] = x > top[i] ? x : top[i];
      }
    }
    for (int i = 0; i < width; ++i) base[i] = top[i] == lowest ? Acc(0) : top[i];
    for (int64_t k = 0; k < coarse.classes; ++k) {
      for (int i = 0; i < width; ++i) total[i] += exp_below_one(scores(k, i) - base[i]);
    }
    if (loss.smoothing > 0) {
      for (int64_t k = 0; k < coarse.classes; ++k) {
        const Acc c = loss.share * loss.weight_of(k);
        for (int i = 0; i < width; ++i) smooth[i] += c * (scores(k, i) - base[i]);
      }
    }
    for (int64_t i = 0; i < n; ++i) picked[i] = id[i] < 0 ? Acc(0) : scores(id[i], i);
    output.template finish<width>(loss, p, n, id, top, total, picked, base, smooth, sum);
  }

  SEGFUSE_FUNCTOR void write(const Sum& total) const { output.write(total); }
};

template <class T>
struct Backward {
  using Acc = T;

  Coarse<Acc> coarse;
  PixelLoss<Acc> loss;
  LossGradient<Acc> gradient;

  template <class N>
  SEGFUSE_FUNCTOR void read(const Pixel& p, N n, const PixelTerms<Acc>& to) const {
    gradient.read(loss, p, n, to);
  }
  template <class N>
  SEGFUSE_FUNCTOR void differentiate(int64_t k, N n, const PixelTerms<Acc>& terms, Acc* x) const {
    if (loss.smoothing > 0) {
      const Acc b = loss.share * loss.weight_of(k);
      for (int64_t i = 0; i < n; ++i) x[i] = terms.gradient(x[i], i, k, b);
    } else {
      for (int64_t i = 0; i < n; ++i) x[i] = terms.gradient(x[i], i, k);
    }
  }
};

struct Arguments {
  std::optional<Tensor> wide_map;  // in the arithmetic's dtype, or float
  UpsamplingArguments upsampling;
  LossArguments loss;
  std::vector<int64_t> size;

  Arguments(const Tensor& scores, const Tensor& target, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& weight_map, const std::optional<Tensor>& class_weight,
            int64_t factor, int64_t kernel, const std::vector<int64_t>& offset, bool corners,
            std::optional<int64_t> ignore_index, double smoothing)
      : wide_map(weight_map && scores.scalar_type() != ScalarType::Double
                     ? std::optional(torch::stable::to(*weight_map, ScalarType::Float))
                     : weight_map),
        upsampling{"upsample_cross_entropy", scores, weight, factor, kernel, offset, corners},
        loss{upsampling.op, scores, target, wide_map, class_weight, ignore_index, smoothing} {
    check(target.dim() == 3, loss.op, ": target: expected (N, *S) with two spatial axes");
    size = {target.size(1), target.size(2)};
    upsampling.check_all(size);
    loss.check_all();
  }
};

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy(
    const Tensor& scores, const Tensor& target, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& weight_map, const std::optional<Tensor>& class_weight,
    int64_t factor, int64_t kernel, const std::vector<int64_t>& offset, bool corners,
    std::optional<int64_t> ignore_index, int64_t reduction, double smoothing) {
  const Arguments of(scores, target, weight, weight_map, class_weight, factor, kernel, offset,
                     corners, ignore_index, smoothing);
  const auto results = of.loss.results(Reduction{reduction});
  const Tensor &loss = std::get<0>(results), &log_sums = std::get<1>(results),
               &denominator = std::get<2>(results);
  int64_t wrong = 0;
  of.upsampling.with(of.size, [&]<class Acc>(const Coarse<Acc>& coarse) {
    const Forward<Acc> f{coarse,
                         of.loss.pixels<Acc>(log_sums),
                         {Reduction{reduction}, static_cast<Acc*>(loss.mutable_data_ptr()),
                          static_cast<Acc*>(denominator.mutable_data_ptr())}};
    wrong = for_each_pixel(f, target);
  });
  if (wrong > 0) {
    refuse_wrong("upsample_cross_entropy: target", target, scores.size(1), target, ignore_index);
  }
  return results;
}

// Calls body with the functor of both gradients.
void differentiate(const Arguments& of, const Tensor& grad, const Tensor& log_sums,
                   const Tensor& denominator, int64_t reduction, const auto& body) {
  of.loss.check_forward(grad, log_sums, denominator, Reduction{reduction} == Reduction::none);
  of.upsampling.with(of.size, [&]<class Acc>(const Coarse<Acc>& coarse) {
    body(Backward<Acc>{coarse, of.loss.pixels<Acc>(log_sums),
                       of.loss.gradient<Acc>(grad, denominator, Reduction{reduction})});
  });
}

Tensor upsample_cross_entropy_backward(
    const Tensor& grad, const Tensor& scores, const Tensor& target,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& weight_map,
    const std::optional<Tensor>& class_weight, const Tensor& log_sums, const Tensor& denominator,
    int64_t factor, int64_t kernel, const std::vector<int64_t>& offset, bool corners,
    std::optional<int64_t> ignore_index, int64_t reduction, double smoothing) {
  const Arguments of(scores, target, weight, weight_map, class_weight, factor, kernel, offset,
                     corners, ignore_index, smoothing);
  const Tensor out = torch::stable::new_empty(scores, scores.sizes(), of.loss.wide());
  ask_for_large_pages(out);
  differentiate(of, grad, log_sums, denominator, reduction,
                [&](const auto& f) { gradient_of_scores(f, out); });
  return torch::stable::to(out, scores.scalar_type());
}

Tensor upsample_cross_entropy_backward_weight(
    const Tensor& grad, const Tensor& scores, const Tensor& target,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& weight_map,
    const std::optional<Tensor>& class_weight, const Tensor& log_sums, const Tensor& denominator,
    int64_t factor, int64_t kernel, const std::vector<int64_t>& offset, bool corners,
    std::optional<int64_t> ignore_index, int64_t reduction, double smoothing) {
  const Arguments of(scores, target, weight, weight_map, class_weight, factor, kernel, offset,
                     corners, ignore_index, smoothing);
  check(weight.has_value(), of.loss.op, ": weight: expected a tensor");
  const Tensor out = torch::stable::new_empty(*weight, weight->sizes(), of.loss.wide());
  differentiate(of, grad, log_sums, denominator, reduction,
                [&](const auto& f) { gradient_of_weight(f, out); });
  return torch::stable::to(out, weight->scalar_type());
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&upsample_cross_entropy));
  m.impl("upsample_cross_entropy_backward", TORCH_BOX(&upsample_cross_entropy_backward));
  m.impl("upsample_cross_entropy_backward_weight",
         TORCH_BOX(&upsample_cross_entropy_backward_weight));
}

}  // namespace segfuse::SEGFUSE_BACKEND
