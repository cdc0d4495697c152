// Softmax cross-entropy a pixel, weighted by a map and by class: what becomes of a pixel once its
// largest logit and its sum of exponentials are known, and a logit's gradient.
//
//   L    = log sum_k exp(x_k)
//   loss = m [ (1 - e) c_t (L - x_t) + (e / K) sum_k c_k (L - x_k) ]
//   dloss / dx_k = m [ a exp(x_k - L) - b_k ],
//                  b_k = (1 - e) c_t [k = t] + (e / K) c_k,   a = sum_k b_k
//
// with logits x, target t, weight map m, class weights c, label smoothing e, K classes
// (Ronneberger, Fischer, Brox 2015, equation 1; e: Szegedy et al. 2016, section 7).  Pixels are
// summed in double, and the mean divides by sum m c_t.
#pragma once

#include "core/reduce.h"

namespace segfuse::SEGFUSE_BACKEND {

enum class Reduction : int64_t { none, mean, sum };

// What both directions know of their pixels.
template <class T>
struct PixelLoss {
  using Acc = Wide<T>;

  int64_t classes;
  Classes target;
  Values<T> weight_map;
  const Acc* class_weight;  // or nullptr
  Acc smoothing;            // e
  Acc share;                // e / K
  Acc* log_sums;
  Strides at_pixel;  // of log_sums, and of losses

  SEGFUSE_FUNCTOR Acc weight_of(int64_t k) const { return class_weight ? class_weight[k] : Acc(1); }
  // (e / K) sum_k c_k
  SEGFUSE_FUNCTOR Acc shared() const {
    Acc sum = 0;
    if (smoothing > 0) {
      for (int64_t k = 0; k < classes; ++k) sum += weight_of(k);
    }
    return share * sum;
  }
};

struct LossSum {
  double loss, weight;
  int64_t wrong;
  SEGFUSE_FUNCTOR LossSum& operator+=(const LossSum& other) {
    loss += other.loss;
    weight += other.weight;
    wrong += other.wrong;
    return *this;
  }
};

template <class T>
struct LossOutput {
  using Acc = Wide<T>;

  Reduction reduction;
  Acc* loss;  // a pixel, or one
  Acc* denominator;

  // From pixels' largest logits, their sums of exponentials less those, their targets' logits, and
  // sum_k (e / K) c_k (x_k - base), base a number near a pixel's logits; n is at most `width`.
  template <int width, class N>
  SEGFUSE_FUNCTOR void finish(const PixelLoss<T>& of, const Pixel& p, N n, const int* id,
                              const Acc* top, const Acc* total, const Acc* picked, const Acc* base,
                              const Acc* smooth, LossSum& sum) const {
    alignas(64) Acc log_total[width], weight[width], value[width];
    of.weight_map.read(p, n, weight);
    const int64_t at = of.at_pixel.offset(p);
    const Acc shared = of.shared();
    for (int64_t i = 0; i < n; ++i) log_total[i] = log_from_one(total[i]);
    for (int64_t i = 0; i < n; ++i) of.log_sums[at + i] = top[i] + log_total[i];
    for (int64_t i = 0; i < n; ++i) {
      const Acc c = of.class_weight && id[i] >= 0 ? of.class_weight[id[i]] : Acc(1);
      Acc of_pixel = (1 - of.smoothing) * c * (log_total[i] + (top[i] - picked[i]));
      if (of.smoothing > 0) of_pixel += shared * ((top[i] - base[i]) + log_total[i]) - smooth[i];
      value[i] = id[i] < 0 ? Acc(0) : weight[i] * of_pixel;
      weight[i] = id[i] < 0 ? Acc(0) : weight[i] * c;
      sum.wrong += id[i] == Classes::wrong;
    }
    SEGFUSE_ASSERT(sum.wrong == 0, "cross-entropy: target: class id out of range");
    if (reduction == Reduction::none) {
      for (int64_t i = 0; i < n; ++i) loss[at + i] = value[i];
    } else {
      sum.loss += sum_of(value, n);
      sum.weight += sum_of(weight, n);
    }
  }

  SEGFUSE_FUNCTOR void write(const LossSum& total) const {
    *denominator = static_cast<Acc>(total.weight);
    if (reduction == Reduction::sum) *loss = static_cast<Acc>(total.loss);
    if (reduction == Reduction::mean) {
      *loss = static_cast<Acc>(total.weight == 0 ? 0 : total.loss / total.weight);
    }
  }
};

// What gradients of a pixel's logits have in common; some pixels, in arrays.
template <class Acc>
struct PixelTerms {
  Acc *log_sum, *scale, *all, *hard;  // L, and m, m a, m (1 - e) c_t times the loss's gradient
  int* id;

  SEGFUSE_FUNCTOR PixelTerms from(int64_t i) const {
    return {log_sum + i, scale + i, all + i, hard + i, id + i};
  }
  // But for label smoothing's share.
  SEGFUSE_FUNCTOR Acc gradient(Acc logit, int64_t i, int64_t k) const {
    const Acc probability = exp_below_one(logit - log_sum[i]);
    const Acc own = hard[i];
    const Acc value = all[i] * probability - (id[i] == static_cast<int>(k) ? own : Acc(0));
    return id[i] < 0 ? Acc(0) : value;
  }
  // With it; `b` is (e / K) c_k.
  SEGFUSE_FUNCTOR Acc gradient(Acc logit, int64_t i, int64_t k, Acc b) const {
    return gradient(logit, i, k) - (id[i] < 0 ? Acc(0) : scale[i] * b);
  }
};

template <class T>
struct LossGradient {
  using Acc = Wide<T>;

  Values<Acc> upstream;    // a pixel, or one for all
  const Acc* denominator;  // or nullptr

  template <class N>
  SEGFUSE_FUNCTOR void read(const PixelLoss<T>& of, const Pixel& p, N n,
                            const PixelTerms<Acc>& to) const {
    of.target.read(p, n, to.id);
    of.weight_map.read(p, n, to.hard);
    upstream.read(p, n, to.scale);
    const Acc by = !denominator ? Acc(1) : *denominator == 0 ? Acc(0) : 1 / *denominator;
    const Acc shared = of.shared(), hard = 1 - of.smoothing;
    const Acc* log_sums = of.log_sums + of.at_pixel.offset(p);
    for (int64_t i = 0; i < n; ++i) to.log_sum[i] = log_sums[i];
    for (int64_t i = 0; i < n; ++i) to.scale[i] *= to.hard[i] * by;
    for (int64_t i = 0; i < n; ++i) to.hard[i] = to.scale[i] * hard;
    for (int64_t i = 0; of.class_weight && i < n; ++i) {
      if (to.id[i] >= 0) to.hard[i] *= of.class_weight[to.id[i]];
    }
    for (int64_t i = 0; i < n; ++i) to.all[i] = to.hard[i] + to.scale[i] * shared;
  }
};

// The arguments of both directions, checked; the wrapper in Python has said what is wrong in more
// words.
struct LossArguments {
  const char* op;
  const Tensor &scores, &target;  // (N, K, ...), (N, *S)
  const std::optional<Tensor>&weight_map, &class_weight;
  std::optional<int64_t> ignore_index;
  double smoothing;

  ScalarType wide() const {
    return scores.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  void check_pixels(const Tensor& pixels, const char* name) const {
    const bool good = pixels.device() == scores.device() &&
                      std::equal(pixels.sizes().begin(), pixels.sizes().end(),
                                 target.sizes().begin(), target.sizes().end());
    check(good, op, ": ", name, ": expected the device and shape of target");
  }

  void check_all() const {
    check_ids((std::string(op) + ": target").c_str(), target);
    check_pixels(target, "target");
    check(target.size(0) == scores.size(0), op, ": target: expected the batch of the scores");
    if (weight_map) {
      const auto dtype = weight_map->scalar_type();
      check_pixels(*weight_map, "weight_map");
      check(dtype == scores.scalar_type() || dtype == ScalarType::Float, op,
            ": weight_map: expected the dtype of the scores or float32");
    }
    if (class_weight) {
      check(class_weight->dim() == 1 && class_weight->size(0) == scores.size(1) &&
                class_weight->is_contiguous() && class_weight->scalar_type() == wide() &&
                class_weight->device() == scores.device(),
            op,
            ": class_weight: expected a contiguous weight a class, float32 (float64 for float64)");
    }
  }

  void check_forward(const Tensor& grad, const Tensor& log_sums, const Tensor& denominator,
                     bool each) const {
    check_pixels(log_sums, "log_sums");
    if (each) check_pixels(grad, "grad");
    check(log_sums.is_contiguous() && log_sums.scalar_type() == wide() &&
              denominator.scalar_type() == wide() && grad.scalar_type() == wide() &&
              (each || grad.dim() == 0),
          op, ": expected what the forward pass returned");
  }

  template <class T>
  PixelLoss<T> pixels(const Tensor& log_sums) const {
    using Acc = Wide<T>;
    const int64_t classes = scores.size(1);
    return {classes,
            Classes(target, classes, ignore_index),
            weight_map ? Values<T>(*weight_map) : Values<T>(),
            class_weight ? static_cast<const Acc*>(class_weight->const_data_ptr()) : nullptr,
            static_cast<Acc>(smoothing),
            static_cast<Acc>(smoothing) / static_cast<Acc>(classes),
            static_cast<Acc*>(log_sums.mutable_data_ptr()),
            Strides(log_sums, false)};
  }

  // Loss, log_sums and denominator, not yet written.
  std::tuple<Tensor, Tensor, Tensor> results(Reduction reduction) const {
    using torch::stable::new_empty;
    const bool each = reduction == Reduction::none;
    return {each ? new_empty(scores, target.sizes(), wide()) : new_empty(scores, {}, wide()),
            new_empty(scores, target.sizes(), wide()), new_empty(scores, {}, wide())};
  }

  template <class T>
  LossGradient<T> gradient(const Tensor& grad, const Tensor& denominator,
                           Reduction reduction) const {
    using Acc = Wide<T>;
    LossGradient<T> of{{}, nullptr};
    if (reduction == Reduction::none) {
      of.upstream = Values<Acc>(grad);
    } else {
      of.upstream.own = static_cast<const Acc*>(grad.const_data_ptr());
    }
    if (reduction == Reduction::mean) {
      of.denominator = static_cast<const Acc*>(denominator.const_data_ptr());
    }
    return of;
  }
};

}  // namespace segfuse::SEGFUSE_BACKEND
