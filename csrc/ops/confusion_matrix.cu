// confusion_matrix: how many pixels of class t were taken for class p, from class ids or straight
// from scores.
//
//   out[t, p] = | { i : target_i = t, prediction_i = p } |,  prediction_i = argmax_k scores_ik
//
// The largest score wins, of equal ones the lowest class, and the first NaN before all others, as
// in torch.argmax. Counts are integers, so their order does not matter.
#include "core/argmax.h"
#include "core/reduce.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

// Bins from two classes a pixel.
struct FromIds {
  Pixels pixels;
  Classes target, prediction;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, int* bin) const {
    int predicted[ReducePolicy::width];
    target.read(p, n, bin);
    prediction.read(p, n, predicted);
    join(target.count, n, predicted, bin);
  }

  // In place, from the target's classes.
  template <class N>
  SEGFUSE_FUNCTOR static void join(int64_t classes, N n, const int* predicted, int* bin) {
    const int k = static_cast<int>(classes), skipped = k * k, wrong = skipped + 1;
    for (int64_t i = 0; i < n; ++i) {
      const int known = bin[i] < 0 || predicted[i] < 0 ? wrong : bin[i] * k + predicted[i];
      bin[i] = bin[i] == Classes::ignored ? skipped : known;
      SEGFUSE_ASSERT(bin[i] != wrong, "confusion_matrix: class id out of range");
    }
  }
};

template <class T>
struct FromScores {
  using Acc = Wide<T>;

  Pixels pixels;
  Classes target;
  const T* scores;
  Strides strides;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, int* bin) const {
    Argmax<Acc, ReducePolicy::width> predicted;
    target.read(p, n, bin);
    predicted.take_all(scores + strides.offset(p), strides.step(), strides.channel,
                       static_cast<int>(target.count), n);
    FromIds::join(target.count, n, predicted.at, bin);
  }
};

Tensor confusion_matrix(const Tensor& prediction, const Tensor& target, int64_t classes,
                        std::optional<int64_t> ignore_index) {
  const bool scores = prediction.dim() == target.dim() + 1;
  check(target.dim() >= 2 && target.dim() <= 4 && classes > 0 && classes <= 32768,
        "confusion_matrix: expected target (N, *S) and 1 to 32768 classes");
  check(prediction.device() == target.device() && (scores || prediction.dim() == target.dim()) &&
            (!scores || prediction.size(1) == classes),
        "confusion_matrix: prediction: expected the device and shape of target, or a class axis "
        "more");
  for (int64_t a = 0; a < target.dim(); ++a) {
    check(prediction.size(a > 0 && scores ? a + 1 : a) == target.size(a),
          "confusion_matrix: prediction: expected the shape of target");
  }
  check_ids("confusion_matrix: target", target);
  const Tensor out = torch::stable::new_zeros(target, {classes, classes}, ScalarType::Long);
  int64_t wrong = 0;
  if (scores) {
    visit(Floating{}, prediction.scalar_type(), "confusion_matrix: prediction", [&]<class T>() {
      FromScores<T> f{Pixels(target), Classes(target, classes, ignore_index),
                      static_cast<const T*>(prediction.const_data_ptr()),
                      Strides(prediction, true)};
      f.pixels.merge({&f.target.strides, &f.strides});
      wrong = count(f, classes * classes, out);
    });
  } else {
    check_ids("confusion_matrix: prediction", prediction);
    FromIds f{Pixels(target), Classes(target, classes, ignore_index),
              Classes(prediction, classes, std::nullopt)};
    f.pixels.merge({&f.target.strides, &f.prediction.strides});
    wrong = count(f, classes * classes, out);
  }
  if (wrong > 0) {
    refuse_wrong("confusion_matrix: target", target, classes, target, ignore_index);
    refuse_wrong("confusion_matrix: prediction", prediction, classes, target, ignore_index);
  }
  return out;
}

}  // namespace

SEGFUSE_IMPL(m) { m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix)); }

}  // namespace segfuse::SEGFUSE_BACKEND
