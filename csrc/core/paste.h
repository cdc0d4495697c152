// Boxes of a tensor, moved into an output as they are; and tensors of one to three spatial axes,
// seen as of three.
//
//   for_each_row(out, memory, std::array{paste<T>(out, part), ...});    T: of the elements' size
//
// A part is a run of the output's channels that holds a box of a source, with zeros around it.  A
// row runs along x, or along the channels where the output is channels_last.  Axes merge where no
// crop comes between, so that rows are long.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "core/rows.h"

namespace segfuse::SEGFUSE_BACKEND {

using torch::headeronly::MemoryFormat;

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

// Whether rows of an output run along its channels, since those lie closest.
inline bool along_channels(const View& to) {
  int64_t pixel_step = INT64_MAX;
  for (int a = 2; a < axes; ++a) {
    if (to.size[a] > 1) pixel_step = std::min(pixel_step, to.stride[a]);
  }
  return to.size[1] > 1 && to.stride[1] < pixel_step;
}

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
  const bool channels = along_channels(to);
  constexpr int order[2][axes]{{0, 1, 2, 3, 4}, {0, 2, 3, 4, 1}};
  Paste<T> f;
  f.to = static_cast<T*>(out.mutable_data_ptr());
  f.from = static_cast<const T*>(part.from.const_data_ptr());
  if (out.numel() > 0) f.to += part.channel * to.stride[1];
  if (part.from.numel() > 0) f.from += part.offset;
  for (int i = 0; i < axes; ++i) {
    const int a = order[channels][i];
    f.to_stride[i] = to.stride[a];
    f.from_stride[i] = from.stride[a];
    f.size[i] = part.size[a];
    f.lead[i] = part.lead[a];
    f.count[i] = part.count[a];
  }
  if (!channels) {
    for (int i = 3; i > 0 && (i == 3 || f.size[i + 1] == 1); --i) f.merge(i);
  }
  f.to_next = f.to_stride[3];
  f.from_next = f.from_stride[3];
  return f;
}

// The channels_last rule: a result is as `like`, unless that is contiguous as well.
inline MemoryFormat format_of(const Tensor& like) {
  const View v(like);
  bool channels_last = like.dim() >= 4 && !like.is_contiguous();
  int64_t dense = 1;
  for (const int a : {1, 4, 3, 2, 0}) {
    channels_last = channels_last && (v.size[a] == 1 || v.stride[a] == dense);
    dense *= v.size[a];
  }
  return !channels_last    ? MemoryFormat::Contiguous
         : like.dim() == 4 ? MemoryFormat::ChannelsLast
                           : MemoryFormat::ChannelsLast3d;
}

// A tensor of the dtype, the device and the format of `like`, not yet filled.
inline Tensor empty_as(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format_of(like));
}

// Offset of a centre crop along an axis.
inline int64_t crop_offset(const View& large, const View& small, int axis) {
  return axis < 2 ? 0 : (large.size[axis] - small.size[axis]) / 2;
}

// The centre of a tensor, of the spatial size of `small`, as the first channels of an output.
inline Part centre(const Tensor& from, const View& small) {
  const View large(from);
  Part part{from, 0, {}, {}, {}, 0};
  for (int a = 0; a < axes; ++a) {
    part.size[a] = part.count[a] = a == 1 ? large.size[a] : small.size[a];
    part.offset += crop_offset(large, small, a) * large.stride[a];
  }
  return part;
}

}  // namespace segfuse::SEGFUSE_BACKEND
