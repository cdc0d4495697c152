// weighted_cross_entropy: softmax cross-entropy a pixel, weighted by a map and by class, in one
// pass forward and one backward (core/cross_entropy.h has the equations).
//
// Of the forward pass a value a pixel is kept, log sum_k exp(x_k).  Some pixels at a time, some of
// their classes are brought into the cache, or on CUDA into registers, and the running sum is
// scaled whenever a larger logit is met (Milakov, Gimelshein 2018).  Neither log-probabilities nor
// an unweighted loss are stored.
#include "core/cross_entropy.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

// Logits, some pixels at a time.
template <class T>
struct Logits {
  using Acc = Wide<T>;

  Pixels pixels;
  PixelLoss<T> loss;
  const T* logits;
  Strides at_logit;

  // As many pixels as leave room for all their classes, and no fewer than fill a vector; half as
  // many where the tile is filled across and not along, which wants it in the nearest cache.
  SEGFUSE_FUNCTOR int64_t block() const {
    const int64_t room = ReducePolicy::values / (at_logit.step() == 1 ? 1 : 2);
    return std::clamp<int64_t>(room / loss.classes / 16 * 16, 16, ReducePolicy::width);
  }

  // Classes [k, k + some) of n pixels, class by class.
  template <class N>
  SEGFUSE_FUNCTOR void load(const Pixel& p, N n, int64_t k, int64_t some, Acc* tile) const {
    const int64_t step = at_logit.step(), channel = at_logit.channel;
    const T* from = logits + at_logit.offset(p) + k * channel;
    if (step == 1 || n == 1) {
      SEGFUSE_UNROLL
      for (int64_t j = 0; j < ReducePolicy::values / n && j < some; ++j) {
        for (int64_t i = 0; i < n; ++i) tile[j * n + i] = static_cast<Acc>(from[j * channel + i]);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < some; ++j) {
          tile[j * n + i] = static_cast<Acc>(from[i * step + j * channel]);
        }
      }
    }
  }
};

template <class T>
struct Forward : Logits<T> {
  using Acc = Wide<T>;
  using Sum = LossSum;

  LossOutput<T> output;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, Sum& sum) const {
    constexpr Acc lowest = -std::numeric_limits<Acc>::infinity();
    constexpr int width = ReducePolicy::width;
    alignas(64) Acc tile[ReducePolicy::values];
    alignas(64) Acc top[width], total[width], picked[width], smooth[width], base[width],
        scratch[width];
    int id[width];
    this->loss.target.read(p, n, id);
    for (int64_t i = 0; i < n; ++i) {
      top[i] = lowest;
      total[i] = picked[i] = smooth[i] = 0;
    }
    const int64_t room = ReducePolicy::values / n;
    for (int64_t k = 0; k < this->loss.classes; k += room) {
      const int64_t some = std::min(room, this->loss.classes - k);
      this->load(p, n, k, some, tile);
      for (int64_t i = 0; i < n; ++i) scratch[i] = top[i];
      SEGFUSE_UNROLL
      for (int64_t j = 0; j < room && j < some; ++j) {
        const Acc* x = tile + j * n;
        for (int64_t i = 0; i < n; ++i) top[i] = x[i] > top[i] ? x[i] : top[i];
      }
      for (int64_t i = 0; i < n; ++i) {
        const Acc scale = exp_below_one(scratch[i] - top[i]);
        total[i] *= scratch[i] == top[i] ? Acc(1) : scale;
        scratch[i] = top[i] == lowest ? Acc(0) : top[i];  // what is subtracted: finite, if all are
      }
      SEGFUSE_UNROLL
      for (int64_t j = 0; j < room && j < some; ++j) {
        const Acc* x = tile + j * n;
        const int now = static_cast<int>(k + j);
        for (int64_t i = 0; i < n; ++i) {
          total[i] += exp_below_one(x[i] - scratch[i]);
          picked[i] = id[i] == now ? x[i] : picked[i];
        }
      }
      if (this->loss.smoothing > 0) {
        for (int64_t i = 0; k == 0 && i < n; ++i) base[i] = scratch[i];
        SEGFUSE_UNROLL
        for (int64_t j = 0; j < room && j < some; ++j) {
          const Acc* x = tile + j * n;
          const Acc c = this->loss.share * this->loss.weight_of(k + j);
          for (int64_t i = 0; i < n; ++i) smooth[i] += c * (x[i] - base[i]);
        }
      }
    }
    output.template finish<width>(this->loss, p, n, id, top, total, picked, base, smooth, sum);
  }

  SEGFUSE_FUNCTOR void write(const Sum& total) const { output.write(total); }
};

template <class T>
struct Backward : Logits<T> {
  using Acc = Wide<T>;
  using Sum = Nothing;

  LossGradient<T> gradient;
  T* grad;
  Strides at_grad;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, Sum&) const {
    constexpr int width = ReducePolicy::width;
    alignas(64) Acc log_sum[width], scale[width], all[width], hard[width];
    int id[width];
    const PixelTerms<Acc> terms{log_sum, scale, all, hard, id};
    gradient.read(this->loss, p, n, terms);
    const int64_t x_step = this->at_logit.step(), to_step = at_grad.step();
    const int64_t x_channel = this->at_logit.channel, to_channel = at_grad.channel;
    const T* x = this->logits + this->at_logit.offset(p);
    T* to = grad + at_grad.offset(p);
    const auto fill = [&](int64_t k, int64_t some, const auto& at_x, const auto& at_to) {
      for (int64_t j = 0; j < some; ++j) {
        const auto* from = at_x(j);
        auto* into = at_to(j);
        if (this->loss.smoothing > 0) {
          const Acc b = this->loss.share * this->loss.weight_of(k + j);
          for (int64_t i = 0; i < n; ++i) into[i] = terms.gradient(from[i], i, k + j, b);
        } else {
          for (int64_t i = 0; i < n; ++i) into[i] = terms.gradient(from[i], i, k + j);
        }
      }
    };
    if (n == 1 || (x_step == 1 && to_step == 1)) {
      fill(
          0, this->loss.classes, [&](int64_t j) { return x + j * x_channel; },
          [&](int64_t j) { return to + j * to_channel; });
    } else {
      alignas(64) Acc tile[ReducePolicy::values];
      const int64_t room = ReducePolicy::values / n;
      for (int64_t k = 0; k < this->loss.classes; k += room) {
        const int64_t some = std::min(room, this->loss.classes - k);
        this->load(p, n, k, some, tile);
        const auto row = [&](int64_t j) { return tile + j * n; };
        fill(k, some, row, row);
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = 0; j < some; ++j) {
            to[i * to_step + (k + j) * to_channel] = static_cast<T>(tile[j * n + i]);
          }
        }
      }
    }
  }
};

LossArguments arguments(const Tensor& logits, const Tensor& target,
                        const std::optional<Tensor>& weight_map,
                        const std::optional<Tensor>& class_weight,
                        std::optional<int64_t> ignore_index, double smoothing) {
  const LossArguments of{
      "weighted_cross_entropy", logits, target, weight_map, class_weight, ignore_index, smoothing};
  check(logits.dim() >= 3 && logits.dim() <= 5 && logits.size(1) > 0 &&
            target.dim() == logits.dim() - 1,
        of.op, ": logits: expected (N, C, *S) with one to three spatial axes");
  for (int64_t a = 1; a < target.dim(); ++a) {
    check(target.size(a) == logits.size(a + 1), of.op, ": target: expected the size of logits");
  }
  of.check_all();
  return of;
}

template <class T>
Logits<T> logits_of(const LossArguments& of, const Tensor& log_sums) {
  return {Pixels(of.target), of.pixels<T>(log_sums),
          static_cast<const T*>(of.scores.const_data_ptr()), Strides(of.scores, true)};
}

std::tuple<Tensor, Tensor, Tensor> weighted_cross_entropy(const Tensor& logits,
                                                          const Tensor& target,
                                                          const std::optional<Tensor>& weight_map,
                                                          const std::optional<Tensor>& class_weight,
                                                          std::optional<int64_t> ignore_index,
                                                          int64_t reduction, double smoothing) {
  const auto of = arguments(logits, target, weight_map, class_weight, ignore_index, smoothing);
  const auto [loss, log_sums, denominator] = of.results(Reduction{reduction});
  int64_t wrong = 0;
  visit(Floating{}, logits.scalar_type(), of.op,
        [&, &loss = loss, &log_sums = log_sums, &denominator = denominator]<class T>() {
          using Acc = Wide<T>;
          Forward<T> f{logits_of<T>(of, log_sums),
                       {Reduction{reduction}, static_cast<Acc*>(loss.mutable_data_ptr()),
                        static_cast<Acc*>(denominator.mutable_data_ptr())}};
          f.pixels.merge(
              {&f.at_logit, &f.loss.target.strides, &f.loss.weight_map.strides, &f.loss.at_pixel});
          wrong = reduce(f, logits);
        });
  if (wrong > 0) {
    refuse_wrong("weighted_cross_entropy: target", target, logits.size(1), target, ignore_index);
  }
  return {loss, log_sums, denominator};
}

Tensor weighted_cross_entropy_backward(const Tensor& grad, const Tensor& logits,
                                       const Tensor& target,
                                       const std::optional<Tensor>& weight_map,
                                       const std::optional<Tensor>& class_weight,
                                       const Tensor& log_sums, const Tensor& denominator,
                                       std::optional<int64_t> ignore_index, int64_t reduction,
                                       double smoothing) {
  const auto of = arguments(logits, target, weight_map, class_weight, ignore_index, smoothing);
  of.check_forward(grad, log_sums, denominator, Reduction{reduction} == Reduction::none);
  const Tensor out = torch::stable::empty_like(logits);
  ask_for_large_pages(out);
  visit(Floating{}, logits.scalar_type(), of.op, [&]<class T>() {
    Backward<T> f{logits_of<T>(of, log_sums),
                  of.gradient<T>(grad, denominator, Reduction{reduction}),
                  static_cast<T*>(out.mutable_data_ptr()), Strides(out, true)};
    f.pixels.merge({&f.at_logit, &f.loss.target.strides, &f.loss.weight_map.strides,
                    &f.loss.at_pixel, &f.gradient.upstream.strides, &f.at_grad});
    reduce(f, logits);
  });
  return out;
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("weighted_cross_entropy", TORCH_BOX(&weighted_cross_entropy));
  m.impl("weighted_cross_entropy_backward", TORCH_BOX(&weighted_cross_entropy_backward));
}

}  // namespace segfuse::SEGFUSE_BACKEND
