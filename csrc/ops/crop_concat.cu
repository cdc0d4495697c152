// crop_concat: [skip, up] along the channels, skip centre-cropped to the size of up, in one pass
// and without a cropped copy; and the gradient of skip (that of up is a view of the output's).
//
//   out[n, c, p] = c < Cs ? skip[n, c, p + floor((S - s) / 2)] : up[n, c - Cs, p]
//   grad_skip[n, c, q] = grad[n, c, q - floor((S - s) / 2)], 0 outside
//
// Nothing is computed: both move boxes (core/paste.h), by the size of the elements, whatever their
// dtype.
#include "core/dtype.h"
#include "core/out.h"
#include "core/paste.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

// The size of the result; the wrapper in Python has said what is wrong in more words before.
std::vector<int64_t> result_size(const Tensor& skip, const Tensor& up) {
  check(up.dim() >= 3 && up.dim() <= axes && skip.dim() == up.dim(),
        "crop_concat: skip and up: expected 3, 4 or 5 dimensions alike, got ", skip.dim(), " and ",
        up.dim());
  check(skip.scalar_type() == up.scalar_type(), "crop_concat: up: expected the dtype of skip");
  check(skip.device() == up.device(), "crop_concat: up: expected the device of skip");
  check(skip.size(0) == up.size(0), "crop_concat: up: expected the batch size of skip, ",
        skip.size(0), ", got ", up.size(0));
  std::vector<int64_t> size(up.sizes().begin(), up.sizes().end());
  size[1] += skip.size(1);
  for (int64_t a = 2; a < up.dim(); ++a) {
    check(skip.size(a) >= up.size(a), "crop_concat: skip: expected at least ", up.size(a),
          " along dimension ", a, ", got ", skip.size(a));
  }
  return size;
}

void concat_into(const Tensor& out, Memory memory, const Tensor& skip, const Tensor& up) {
  const View small(up);
  const Part first = centre(skip, small);
  Part second{up, skip.size(1), {}, {}, {}, 0};
  for (int a = 0; a < axes; ++a) second.size[a] = second.count[a] = small.size[a];
  visit_size(out.element_size(), "crop_concat", [&]<class T>() {
    for_each_row(out, memory, std::array{paste<T>(out, first), paste<T>(out, second)});
  });
}

Tensor crop_concat(const Tensor& skip, const Tensor& up) {
  const Tensor out = empty_as(up, result_size(skip, up));
  concat_into(out, Memory::fresh, skip, up);
  return out;
}

void crop_concat_out(const Tensor& skip, const Tensor& up, const Tensor& out) {
  const auto size = result_size(skip, up);
  check(out.scalar_type() == up.scalar_type() && out.device() == up.device() &&
            std::equal(size.begin(), size.end(), out.sizes().begin(), out.sizes().end()),
        "crop_concat: out: expected the shape, dtype and device of the result");
  check_memory("crop_concat", out, {{"skip", &skip}, {"up", &up}});
  concat_into(out, Memory::reused, skip, up);
}

Tensor crop_concat_backward(const Tensor& grad, const std::vector<int64_t>& skip_size) {
  check(
      grad.dim() >= 3 && grad.dim() <= axes && static_cast<int64_t>(skip_size.size()) == grad.dim(),
      "crop_concat_backward: grad and skip_size: expected 3, 4 or 5 dimensions alike");
  check(skip_size[0] == grad.size(0) && skip_size[1] <= grad.size(1),
        "crop_concat_backward: skip_size: expected the batch size of grad and no more channels");
  for (int64_t a = 2; a < grad.dim(); ++a) {
    check(skip_size[a] >= grad.size(a), "crop_concat_backward: skip_size: smaller than grad");
  }
  const Tensor out = empty_as(grad, skip_size);
  const View large(out), small(grad);
  Part whole{grad, 0, {}, {}, {}, 0};
  for (int a = 0; a < axes; ++a) {
    whole.size[a] = large.size[a];
    whole.count[a] = a == 1 ? large.size[a] : small.size[a];
    whole.lead[a] = crop_offset(large, small, a);
  }
  visit_size(out.element_size(), "crop_concat_backward", [&]<class T>() {
    for_each_row(out, Memory::fresh, std::array{paste<T>(out, whole)});
  });
  return out;
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("crop_concat", TORCH_BOX(&crop_concat));
  m.impl("crop_concat_out", TORCH_BOX(&crop_concat_out));
  m.impl("crop_concat_backward", TORCH_BOX(&crop_concat_backward));
}

}  // namespace segfuse::SEGFUSE_BACKEND
