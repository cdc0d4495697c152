// upsample_argmax: each pixel's class of the largest score, of scores that are upsampled bilinearly
// or by a transposed convolution; and that score's probability.
//
//   label[n, p] = argmax_k x[n, k, p],   confidence[n, p] = 1 / sum_k exp(x[n, k, p] - max_j ...)
//
// with x the upsampled scores, of which core/upsampled.h has some pixels at a time.
#include "core/argmax.h"
#include "core/out.h"
#include "core/upsampled.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

template <class T>
struct Label {
  using Acc = T;
  using Sum = Nothing;

  Coarse<Acc> coarse;
  void* to;
  ScalarType dtype;
  Acc* confidence;  // or nullptr
  Strides at_label, at_confidence;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, const auto& scores, Nothing&) const {
    constexpr int width = UpsampledPolicy::width;
    const int classes = static_cast<int>(coarse.classes);
    Argmax<Acc, width> found;
    for (int i = 0; i < width; ++i) found.start(i, scores(0, i));
    for (int k = 1; k < classes; ++k) {
      for (int i = 0; i < width; ++i) found.take(i, k, scores(k, i));
    }
    visit_known(Types<uint8_t, int16_t, int32_t>{}, dtype, [&]<class To>() {
      To* labels = static_cast<To*>(to) + at_label.offset(p);
      for (int64_t i = 0; i < n; ++i) labels[i * at_label.step()] = static_cast<To>(found.at[i]);
    });
    if (!confidence) return;
    Acc total[width];
    for (int i = 0; i < width; ++i) total[i] = 0;
    for (int k = 0; k < classes; ++k) {
      for (int i = 0; i < width; ++i) total[i] += exp_below_one(scores(k, i) - found.best[i]);
    }
    Acc* shares = confidence + at_confidence.offset(p);
    for (int64_t i = 0; i < n; ++i) shares[i * at_confidence.step()] = 1 / total[i];
  }
  SEGFUSE_FUNCTOR void write(const Nothing&) const {}
};

ScalarType label_dtype(int64_t classes) {
  return classes <= 256 ? ScalarType::Byte : classes <= 32768 ? ScalarType::Short : ScalarType::Int;
}

ScalarType wide_of(const Tensor& scores) {
  return scores.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void label(const UpsamplingArguments& of, const Tensor& labels,
           const std::optional<Tensor>& confidence) {
  const std::vector<int64_t> size{labels.size(1), labels.size(2)};
  of.with(size, [&]<class Acc>(const Coarse<Acc>& coarse) {
    const Label<Acc> f{coarse,
                       labels.mutable_data_ptr(),
                       labels.scalar_type(),
                       confidence ? static_cast<Acc*>(confidence->mutable_data_ptr()) : nullptr,
                       Strides(labels, false),
                       confidence ? Strides(*confidence, false) : Strides()};
    for_each_pixel(f, labels);
  });
}

std::tuple<Tensor, Tensor> upsample_argmax(const Tensor& scores,
                                           const std::optional<Tensor>& weight, int64_t factor,
                                           int64_t kernel, const std::vector<int64_t>& offset,
                                           bool corners, const std::vector<int64_t>& size,
                                           bool confidence) {
  const UpsamplingArguments of{"upsample_argmax", scores, weight, factor, kernel, offset, corners};
  of.check_all(size);
  using torch::stable::new_empty;
  const std::vector<int64_t> shape{scores.size(0), size[0], size[1]};
  const Tensor labels = new_empty(scores, shape, label_dtype(scores.size(1)));
  const Tensor share =
      new_empty(scores, confidence ? shape : std::vector<int64_t>{0}, wide_of(scores));
  ask_for_large_pages(labels);
  label(of, labels, confidence ? std::optional(share) : std::nullopt);
  return {labels, share};
}

void upsample_argmax_out(const Tensor& scores, const std::optional<Tensor>& weight, int64_t factor,
                         int64_t kernel, const std::vector<int64_t>& offset, bool corners,
                         const Tensor& labels, const std::optional<Tensor>& confidence) {
  const UpsamplingArguments of{"upsample_argmax", scores, weight, factor, kernel, offset, corners};
  check(labels.dim() == 3, of.op, ": out: expected (N, *size)");
  of.check_all({labels.size(1), labels.size(2)});
  check(labels.size(0) == scores.size(0) && labels.scalar_type() == label_dtype(scores.size(1)) &&
            labels.device() == scores.device(),
        of.op, ": out: expected the shape, dtype and device of the labels");
  check_memory(of.op, labels, {{"scores", &scores}});
  if (weight) check_memory(of.op, labels, {{"weight", &*weight}});
  if (confidence) {
    check(std::equal(labels.sizes().begin(), labels.sizes().end(), confidence->sizes().begin(),
                     confidence->sizes().end()) &&
              confidence->scalar_type() == wide_of(scores) &&
              confidence->device() == scores.device(),
          of.op, ": out: expected the shape, dtype and device of the confidence");
    check_memory(of.op, *confidence, {{"scores", &scores}, {"labels", &labels}});
    if (weight) check_memory(of.op, *confidence, {{"weight", &*weight}});
  }
  label(of, labels, confidence);
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
  m.impl("upsample_argmax_out", TORCH_BOX(&upsample_argmax_out));
}

}  // namespace segfuse::SEGFUSE_BACKEND
