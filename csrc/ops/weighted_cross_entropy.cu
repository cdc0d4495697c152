// weighted_cross_entropy: softmax cross-entropy a pixel, weighted by a map and by class, in one
// pass forward and one backward.
//
//   L    = log sum_k exp(x_k)                                             kept: a value a pixel
//   loss = m [ (1 - e) c_t (L - x_t) + (e / K) sum_k c_k (L - x_k) ]
//   dloss / dx_k = m [ a exp(x_k - L) - b_k ],
//                  b_k = (1 - e) c_t [k = t] + (e / K) c_k,   a = sum_k b_k
//
// with logits x, target t, weight map m, class weights c, label smoothing e, K classes
// (Ronneberger, Fischer, Brox 2015, equation 1; e: Szegedy et al. 2016, section 7). Some pixels at
// a time, some of their classes are brought into the cache, or on CUDA into registers, and the
// running sum is scaled whenever a larger logit is met (Milakov, Gimelshein 2018). Neither
// log-probabilities nor an unweighted loss are stored. Pixels are summed in double, and the mean
// divides by sum m c_t.
#include "core/reduce.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

enum class Reduction : int64_t { none, mean, sum };

// What both directions know of their pixels.
template <class T>
struct Loss {
  using Acc = Wide<T>;

  Pixels pixels;
  const T* logits;
  Strides at_logit;
  int64_t classes;
  Classes target;
  Values<T> weight_map;
  const Acc* class_weight;  // or nullptr
  Acc smoothing;            // e
  Acc share;                // e / K
  Acc* log_sums;
  Strides at_pixel;  // of log_sums, and of losses

  // As many pixels as leave room for all their classes, and no fewer than fill a vector; half as
  // many where the tile is filled across and not along, which wants it in the nearest cache.
  SEGFUSE_FUNCTOR int64_t block() const {
    const int64_t room = ReducePolicy::values / (at_logit.step() == 1 ? 1 : 2);
    return std::clamp<int64_t>(room / classes / 16 * 16, 16, ReducePolicy::width);
  }
  SEGFUSE_FUNCTOR Acc weight_of(int64_t k) const { return class_weight ? class_weight[k] : Acc(1); }
  // (e / K) sum_k c_k
  SEGFUSE_FUNCTOR Acc shared() const {
    Acc sum = 0;
    if (smoothing > 0) {
      for (int64_t k = 0; k < classes; ++k) sum += weight_of(k);
    }
    return share * sum;
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
struct Forward : Loss<T> {
  using Acc = Wide<T>;
  struct Sum {
    double loss, weight;
    int64_t wrong;
    SEGFUSE_FUNCTOR Sum& operator+=(const Sum& other) {
      loss += other.loss;
      weight += other.weight;
      wrong += other.wrong;
      return *this;
    }
  };

  Reduction reduction;
  Acc* loss;  // a pixel, or one
  Acc* denominator;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, Sum& sum) const {
    constexpr Acc lowest = -std::numeric_limits<Acc>::infinity();
    constexpr int width = ReducePolicy::width;
    alignas(64) Acc tile[ReducePolicy::values];
    alignas(64) Acc top[width], total[width], picked[width], smooth[width], scratch[width];
    int id[width];
    this->target.read(p, n, id);
    for (int64_t i = 0; i < n; ++i) {
      top[i] = lowest;
      total[i] = picked[i] = smooth[i] = 0;
    }
    const int64_t room = ReducePolicy::values / n;
    for (int64_t k = 0; k < this->classes; k += room) {
      const int64_t some = std::min(room, this->classes - k);
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
      if (this->smoothing > 0) {
        SEGFUSE_UNROLL
        for (int64_t j = 0; j < room && j < some; ++j) {
          const Acc* x = tile + j * n;
          const Acc c = this->share * this->weight_of(k + j);
          for (int64_t i = 0; i < n; ++i) smooth[i] += c * x[i];
        }
      }
    }
    finish(p, n, id, top, total, picked, smooth, sum);
  }

  // From a pixel's largest logit, its sum of exponentials, its target's logit, and sum_k b_k x_k
  // but for the target's share.
  template <class N>
  SEGFUSE_FUNCTOR void finish(const Pixel& p, N n, const int* id, const Acc* top, const Acc* total,
                              const Acc* picked, const Acc* smooth, Sum& sum) const {
    constexpr int width = ReducePolicy::width;
    alignas(64) Acc log_total[width], weight[width], value[width];
    this->weight_map.read(p, n, weight);
    const int64_t at = this->at_pixel.offset(p);
    const Acc shared = this->shared();
    for (int64_t i = 0; i < n; ++i) log_total[i] = log_from_one(total[i]);
    for (int64_t i = 0; i < n; ++i) this->log_sums[at + i] = top[i] + log_total[i];
    for (int64_t i = 0; i < n; ++i) {
      const Acc c = this->class_weight && id[i] >= 0 ? this->class_weight[id[i]] : Acc(1);
      Acc of_pixel = (1 - this->smoothing) * c * (log_total[i] + (top[i] - picked[i]));
      if (this->smoothing > 0) of_pixel += shared * (top[i] + log_total[i]) - smooth[i];
      value[i] = id[i] < 0 ? Acc(0) : weight[i] * of_pixel;
      weight[i] = id[i] < 0 ? Acc(0) : weight[i] * c;
      sum.wrong += id[i] == Classes::wrong;
    }
    SEGFUSE_ASSERT(sum.wrong == 0, "weighted_cross_entropy: target: class id out of range");
    if (reduction == Reduction::none) {
      for (int64_t i = 0; i < n; ++i) loss[at + i] = value[i];
    } else {
      sum.loss += sum_of(value, n);
      sum.weight += sum_of(weight, n);
    }
  }

  SEGFUSE_FUNCTOR void write(const Sum& total) const {
    *denominator = static_cast<Acc>(total.weight);
    if (reduction == Reduction::sum) *loss = static_cast<Acc>(total.loss);
    if (reduction == Reduction::mean) {
      *loss = static_cast<Acc>(total.weight == 0 ? 0 : total.loss / total.weight);
    }
  }
};

template <class T>
struct Backward : Loss<T> {
  using Acc = Wide<T>;
  using Sum = Nothing;

  Values<Acc> upstream;    // a pixel, or one for all
  const Acc* denominator;  // or nullptr
  T* grad;
  Strides at_grad;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, Sum&) const {
    constexpr int width = ReducePolicy::width;
    alignas(64) Acc log_sum[width], weight[width], scale[width], all[width], hard[width];
    int id[width];
    this->target.read(p, n, id);
    this->weight_map.read(p, n, weight);
    upstream.read(p, n, scale);
    const Acc by = !denominator ? Acc(1) : *denominator == 0 ? Acc(0) : 1 / *denominator;
    const Acc shared = this->shared();
    const int64_t at = this->at_pixel.offset(p);
    for (int64_t i = 0; i < n; ++i) {
      const Acc c = this->class_weight && id[i] >= 0 ? this->class_weight[id[i]] : Acc(1);
      log_sum[i] = this->log_sums[at + i];
      scale[i] *= weight[i] * by;
      hard[i] = scale[i] * ((1 - this->smoothing) * c);
      all[i] = hard[i] + scale[i] * shared;
    }
    const int64_t x_step = this->at_logit.step(), to_step = at_grad.step();
    const int64_t x_channel = this->at_logit.channel, to_channel = at_grad.channel;
    const T* x = this->logits + this->at_logit.offset(p);
    T* to = grad + at_grad.offset(p);
    const auto gradient = [&](Acc logit, int64_t i, int64_t k) {
      const Acc probability = exp_below_one(logit - log_sum[i]);
      const Acc rest = id[i] == static_cast<int>(k) ? hard[i] : Acc(0);
      return id[i] < 0 ? Acc(0) : all[i] * probability - rest;
    };
    const auto fill = [&](int64_t k, int64_t some, const auto& at_x, const auto& at_to) {
      for (int64_t j = 0; j < some; ++j) {
        const auto* from = at_x(j);
        auto* into = at_to(j);
        if (this->smoothing > 0) {
          const Acc b = this->share * this->weight_of(k + j);
          for (int64_t i = 0; i < n; ++i) {
            into[i] = gradient(from[i], i, k + j) - (id[i] < 0 ? Acc(0) : scale[i] * b);
          }
        } else {
          for (int64_t i = 0; i < n; ++i) into[i] = gradient(from[i], i, k + j);
        }
      }
    };
    if (n == 1 || (x_step == 1 && to_step == 1)) {
      fill(
          0, this->classes, [&](int64_t j) { return x + j * x_channel; },
          [&](int64_t j) { return to + j * to_channel; });
    } else {
      alignas(64) Acc tile[ReducePolicy::values];
      const int64_t room = ReducePolicy::values / n;
      for (int64_t k = 0; k < this->classes; k += room) {
        const int64_t some = std::min(room, this->classes - k);
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

// What both directions check; the wrapper in Python has said what is wrong in more words.
void check_pixels(const Tensor& logits, const Tensor& pixels, const char* name) {
  bool good = pixels.dim() == logits.dim() - 1 && pixels.device() == logits.device();
  for (int64_t a = 0; good && a < pixels.dim(); ++a) {
    good = pixels.size(a) == logits.size(a == 0 ? 0 : a + 1);
  }
  check(good, "weighted_cross_entropy: ", name,
        ": expected the device, batch and spatial size of logits");
}

ScalarType wide_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct Arguments {
  const Tensor &logits, &target;
  const std::optional<Tensor>&weight_map, &class_weight;
  std::optional<int64_t> ignore_index;
  double smoothing;
};

template <class T>
Loss<T> loss_of(const Arguments& of, const Tensor& log_sums) {
  using Acc = Wide<T>;
  const int64_t classes = of.logits.size(1);
  return {Pixels(of.target),
          static_cast<const T*>(of.logits.const_data_ptr()),
          Strides(of.logits, true),
          classes,
          Classes(of.target, classes, of.ignore_index),
          of.weight_map ? Values<T>(*of.weight_map) : Values<T>(),
          of.class_weight ? static_cast<const Acc*>(of.class_weight->const_data_ptr()) : nullptr,
          static_cast<Acc>(of.smoothing),
          static_cast<Acc>(of.smoothing) / static_cast<Acc>(classes),
          static_cast<Acc*>(log_sums.mutable_data_ptr()),
          Strides(log_sums, false)};
}

void check_arguments(const Arguments& of) {
  const int64_t dims = of.logits.dim();
  check(dims >= 3 && dims <= 5 && of.logits.size(1) > 0,
        "weighted_cross_entropy: logits: expected (N, C, *S) with one to three spatial axes");
  check_pixels(of.logits, of.target, "target");
  check_ids("weighted_cross_entropy: target", of.target);
  const auto wide = wide_of(of.logits);
  if (of.weight_map) {
    const auto dtype = of.weight_map->scalar_type();
    check_pixels(of.logits, *of.weight_map, "weight_map");
    check(dtype == of.logits.scalar_type() || dtype == ScalarType::Float,
          "weighted_cross_entropy: weight_map: expected the dtype of logits or float32");
  }
  if (of.class_weight) {
    check(of.class_weight->dim() == 1 && of.class_weight->size(0) == of.logits.size(1) &&
              of.class_weight->is_contiguous() && of.class_weight->scalar_type() == wide &&
              of.class_weight->device() == of.logits.device(),
          "weighted_cross_entropy: class_weight: expected a contiguous weight a class, float32 "
          "(float64 for float64)");
  }
}

std::tuple<Tensor, Tensor, Tensor> weighted_cross_entropy(const Tensor& logits,
                                                          const Tensor& target,
                                                          const std::optional<Tensor>& weight_map,
                                                          const std::optional<Tensor>& class_weight,
                                                          std::optional<int64_t> ignore_index,
                                                          int64_t reduction, double smoothing) {
  const Arguments of{logits, target, weight_map, class_weight, ignore_index, smoothing};
  check_arguments(of);
  const auto wide = wide_of(logits);
  const bool each = Reduction{reduction} == Reduction::none;
  const Tensor log_sums = torch::stable::new_empty(logits, target.sizes(), wide);
  const Tensor loss = each ? torch::stable::new_empty(logits, target.sizes(), wide)
                           : torch::stable::new_empty(logits, {}, wide);
  const Tensor denominator = torch::stable::new_empty(logits, {}, wide);
  int64_t wrong = 0;
  visit(Floating{}, logits.scalar_type(), "weighted_cross_entropy", [&]<class T>() {
    using Acc = Wide<T>;
    Forward<T> f{loss_of<T>(of, log_sums), Reduction{reduction},
                 static_cast<Acc*>(loss.mutable_data_ptr()),
                 static_cast<Acc*>(denominator.mutable_data_ptr())};
    f.pixels.merge({&f.at_logit, &f.target.strides, &f.weight_map.strides, &f.at_pixel});
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
  const Arguments of{logits, target, weight_map, class_weight, ignore_index, smoothing};
  check_arguments(of);
  check_pixels(logits, log_sums, "log_sums");
  const auto wide = wide_of(logits);
  const bool each = Reduction{reduction} == Reduction::none;
  if (each) check_pixels(logits, grad, "grad");
  check(log_sums.is_contiguous() && log_sums.scalar_type() == wide &&
            denominator.scalar_type() == wide && grad.scalar_type() == wide &&
            (each || grad.dim() == 0),
        "weighted_cross_entropy_backward: expected what the forward pass returned");
  const Tensor out = torch::stable::empty_like(logits);
  ask_for_large_pages(out);
  visit(Floating{}, logits.scalar_type(), "weighted_cross_entropy", [&]<class T>() {
    using Acc = Wide<T>;
    Backward<T> f{loss_of<T>(of, log_sums),
                  {},
                  nullptr,
                  static_cast<T*>(out.mutable_data_ptr()),
                  Strides(out, true)};
    if (each) {
      f.upstream = Values<Acc>(grad);
    } else {
      f.upstream.own = static_cast<const Acc*>(grad.const_data_ptr());
    }
    if (Reduction{reduction} == Reduction::mean) {
      f.denominator = static_cast<const Acc*>(denominator.const_data_ptr());
    }
    f.pixels.merge({&f.at_logit, &f.target.strides, &f.weight_map.strides, &f.at_pixel,
                    &f.upstream.strides, &f.at_grad});
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
