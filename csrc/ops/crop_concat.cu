// crop_concat: [skip, up] along the channels, skip centre-cropped to the size of up, in one pass
// and without a cropped copy; and the gradient of skip (that of up is a view of the output's).
//
//   out[n, c, p] = c < Cs ? skip[n, c, p + floor((S - s) / 2)] : up[n, c - Cs, p]
//   grad_skip[n, c, q] = grad[n, c, q - floor((S - s) / 2)], 0 outside
//
// All are one functor, Paste: a part of the output that holds a box of a source, with zeros around
// it.  Nothing is computed, so elements are moved by their size, whatever their dtype.  One to
// three spatial axes are brought to three.  A row runs along x, or along the channels where the
// output is channels_last.  Axes merge where no crop comes between, so that rows are long.  The
// page is long since it holds two directions, and the arithmetic of axes that both need.
#include "core/dtype.h"
#include "core/out.h"
#include "core/rows.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

constexpr int axes = 5;  // n, c, z, y, x

// Sizes and strides over the five axes; spatial axes that the tensor lacks have size 1.
struct View {
  int64_t size[axes], stride[axes];

  explicit View(const Tensor& t) {
    for (int64_t a = 0; a < axes; ++a) {
      const int64_t from = a < 2 ? a : a - axes + t.dim();
      const bool has = a < 2 || from >= 2;
      size[a] = has ? t.size(from) : 1;
      stride[a] = has ? t.stride(from) : 0;
    }
  }
};

template <class T>
struct Paste {
  using Value = T;
  struct Row {
    T* to;
    int64_t step, size;
    const T* from;
    int64_t lead, count;  // elements [lead, lead + count) come from the source
    int64_t alike;        // rows of the same box that follow
  };

  // By position in the loops: four outer axes, then the one along which a row runs.
  T* to;
  const T* from;
  int64_t to_stride[axes], from_stride[axes];
  int64_t size[axes], lead[axes], count[axes];
  int64_t to_next, from_next;  // to_stride[3] and from_stride[3]

  SEGFUSE_FUNCTOR int64_t rows() const { return size[0] * size[1] * size[2] * size[3]; }
  SEGFUSE_FUNCTOR int64_t longest() const { return size[4]; }

  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    int64_t at[4];
    for (int i = 3; i > 0; --i) {
      const Split s = split(r, size[i]);
      at[i] = s.remainder;
      r = s.quotient;
    }
    at[0] = r;
    Row row{to, to_stride[4], size[4], nullptr, lead[4], count[4], 0};
    int64_t offset = 0;
    for (int i = 0; i < 4; ++i) {
      const int64_t source = at[i] - lead[i];
      if (source < 0 || source >= count[i]) row.count = 0;
      row.to += at[i] * to_stride[i];
      offset += source * from_stride[i];
    }
    if (row.count > 0) {
      row.from = from + offset;
      row.alike = lead[3] + count[3] - 1 - at[3];
    }
    return row;
  }

  SEGFUSE_FUNCTOR const T* at(const Row& row, int64_t x, int64_t n) const {
    const bool inside = row.lead <= x && row.lead + row.count >= x + n;
    return inside && from_stride[4] == 1 ? row.from + (x - row.lead) : nullptr;
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, T* values) const {
    const int64_t begin = row.lead - x, end = begin + row.count;
    for (int64_t i = 0; i < n; ++i) {
      values[i] = i >= begin && i < end ? row.from[(i - begin) * from_stride[4]] : T{};
    }
  }

  // Merges the outer axis i with that of the row, if every row is full and the next follows it.
  void merge(int i) {
    if (lead[4] != 0 || count[4] != size[4] || to_stride[i] != to_stride[4] * size[4] ||
        from_stride[i] != from_stride[4] * size[4]) {
      return;
    }
    lead[4] = lead[i] * size[4];
    count[4] = count[i] * size[4];
    size[4] *= size[i];
    lead[i] = 0;
    count[i] = size[i] = 1;
  }
};

// A part of an output as Paste sees it: its channels [channel, channel + size[1]).
struct Part {
  const Tensor& from;
  int64_t channel;
  int64_t size[axes], lead[axes], count[axes];  // by axis
  int64_t offset;                               // of the box's first element in the source
};

template <class T>
Paste<T> paste(const Tensor& out, const Part& part) {
  const View to(out), from(part.from);
  int64_t pixel_step = INT64_MAX;
  for (int a = 2; a < axes; ++a) {
    if (to.size[a] > 1) pixel_step = std::min(pixel_step, to.stride[a]);
  }
  const bool along_channels = to.size[1] > 1 && to.stride[1] < pixel_step;
  constexpr int order[2][axes]{{0, 1, 2, 3, 4}, {0, 2, 3, 4, 1}};
  Paste<T> f;
  f.to = static_cast<T*>(out.mutable_data_ptr());
  f.from = static_cast<const T*>(part.from.const_data_ptr());
  if (out.numel() > 0) f.to += part.channel * to.stride[1];
  if (part.from.numel() > 0) f.from += part.offset;
  for (int i = 0; i < axes; ++i) {
    const int a = order[along_channels][i];
    f.to_stride[i] = to.stride[a];
    f.from_stride[i] = from.stride[a];
    f.size[i] = part.size[a];
    f.lead[i] = part.lead[a];
    f.count[i] = part.count[a];
  }
  if (!along_channels) {
    for (int i = 3; i > 0 && (i == 3 || f.size[i + 1] == 1); --i) f.merge(i);
  }
  f.to_next = f.to_stride[3];
  f.from_next = f.from_stride[3];
  return f;
}

// The channels_last rule: the result is as `like`, unless that is contiguous as well.
Tensor empty(const Tensor& like, const std::vector<int64_t>& size) {
  using torch::headeronly::MemoryFormat;
  const View v(like);
  bool channels_last = like.dim() >= 4 && !like.is_contiguous();
  int64_t dense = 1;
  for (const int a : {1, 4, 3, 2, 0}) {
    channels_last = channels_last && (v.size[a] == 1 || v.stride[a] == dense);
    dense *= v.size[a];
  }
  const auto format = !channels_last    ? MemoryFormat::Contiguous
                      : like.dim() == 4 ? MemoryFormat::ChannelsLast
                                        : MemoryFormat::ChannelsLast3d;
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format);
}

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

// Offset of a centre crop along an axis.
int64_t crop_offset(const View& large, const View& small, int axis) {
  return axis < 2 ? 0 : (large.size[axis] - small.size[axis]) / 2;
}

void concat_into(const Tensor& out, Memory memory, const Tensor& skip, const Tensor& up) {
  const View large(skip), small(up);
  Part first{skip, 0, {}, {}, {}, 0}, second{up, large.size[1], {}, {}, {}, 0};
  for (int a = 0; a < axes; ++a) {
    first.size[a] = first.count[a] = a == 1 ? large.size[a] : small.size[a];
    second.size[a] = second.count[a] = small.size[a];
    first.offset += crop_offset(large, small, a) * large.stride[a];
  }
  visit_size(out.element_size(), "crop_concat", [&]<class T>() {
    for_each_row(out, memory, std::array{paste<T>(out, first), paste<T>(out, second)});
  });
}

Tensor crop_concat(const Tensor& skip, const Tensor& up) {
  const Tensor out = empty(up, result_size(skip, up));
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
  const Tensor out = empty(grad, skip_size);
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
