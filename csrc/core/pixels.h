// Tensors seen pixel by pixel: where each pixel's values lie, and class ids and weights of any
// dtype, read some at a time.
//
// The pixels of (N, *S), one to three spatial axes, are brought to four axes n, z, y, x. Axes merge
// where no tensor of an operator steps between them, so that runs of pixels along x are long.
#pragma once

#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "core/dtype.h"
#include "core/math.h"
#include "core/split.h"

namespace segfuse::SEGFUSE_BACKEND {

constexpr int pixel_axes = 4;  // n, z, y, x

// A pixel by its place along the axes.
struct Pixel {
  int64_t at[pixel_axes];
};

// Elements between neighbours along the axes, and between channels.
struct Strides {
  int64_t pixel[pixel_axes] = {};
  int64_t channel = 0;

  Strides() = default;
  // Of (N, *S), or with channels of (N, C, *S).
  Strides(const Tensor& t, bool channels) {
    const int64_t first = channels ? 2 : 1, spatial = t.dim() - first;
    pixel[0] = t.stride(0);
    if (channels) channel = t.stride(1);
    for (int64_t a = 0; a < spatial; ++a) pixel[pixel_axes - spatial + a] = t.stride(first + a);
  }

  SEGFUSE_FUNCTOR int64_t offset(const Pixel& p) const {
    return p.at[0] * pixel[0] + p.at[1] * pixel[1] + p.at[2] * pixel[2] + p.at[3] * pixel[3];
  }
  SEGFUSE_FUNCTOR int64_t step() const { return pixel[pixel_axes - 1]; }
};

struct Pixels {
  int64_t size[pixel_axes] = {1, 1, 1, 1};

  explicit Pixels(const Tensor& like) {  // (N, *S)
    const int64_t spatial = like.dim() - 1;
    size[0] = like.size(0);
    for (int64_t a = 0; a < spatial; ++a) size[pixel_axes - spatial + a] = like.size(1 + a);
  }

  SEGFUSE_FUNCTOR int64_t count() const { return size[0] * size[1] * size[2] * size[3]; }
  SEGFUSE_FUNCTOR int64_t width() const { return size[pixel_axes - 1]; }

  SEGFUSE_FUNCTOR Pixel pixel(int64_t index) const {
    Pixel p;
    for (int a = pixel_axes - 1; a > 0; --a) {
      const Split s = size[a] == 1 ? Split{index, 0} : split(index, size[a]);
      p.at[a] = s.remainder;
      index = s.quotient;
    }
    p.at[0] = index;
    return p;
  }

  // Merges into x every axis that all the tensors pass through evenly.
  void merge(std::initializer_list<Strides*> tensors) {
    constexpr int x = pixel_axes - 1;
    for (int a = x - 1; a >= 0; --a) {
      if (size[a] == 1) continue;
      for (const Strides* s : tensors) {
        if (size[x] != 1 && s->pixel[a] != s->pixel[x] * size[x]) return;
      }
      for (Strides* s : tensors) {
        if (size[x] == 1) s->pixel[x] = s->pixel[a];
      }
      size[x] *= size[a];
      size[a] = 1;
    }
  }
};

inline void check_ids(const char* name, const Tensor& t) {
  const auto dtype = t.scalar_type();
  check(dtype == ScalarType::Byte || dtype == ScalarType::Char || dtype == ScalarType::Short ||
            dtype == ScalarType::Int || dtype == ScalarType::Long,
        name, ": expected uint8, int8, int16, int32 or int64, got ",
        torch::headeronly::toString(dtype));
}

// Class ids of a pixel, in one of those dtypes.

struct Classes {
  enum : int { ignored = -1, wrong = -2 };  // beside 0 ... count - 1

  const void* data;
  ScalarType dtype;
  Strides strides;
  int64_t count;
  bool ignores;    // whether an id is ignored, even where it is a class,
  int64_t ignore;  // and which

  Classes(const Tensor& t, int64_t count, std::optional<int64_t> ignore)
      : data(t.const_data_ptr()),
        dtype(t.scalar_type()),
        strides(t, false),
        count(count),
        ignores(ignore.has_value()),
        ignore(ignore.value_or(0)) {}

  template <class N>
  SEGFUSE_FUNCTOR void read(const Pixel& p, N n, int* to) const {
    const int64_t offset = strides.offset(p);
    switch (dtype) {
      case ScalarType::Byte:
        return convert(static_cast<const uint8_t*>(data) + offset, n, to);
      case ScalarType::Char:
        return convert(static_cast<const int8_t*>(data) + offset, n, to);
      case ScalarType::Short:
        return convert(static_cast<const int16_t*>(data) + offset, n, to);
      case ScalarType::Int:
        return convert(static_cast<const int32_t*>(data) + offset, n, to);
      default:
        return convert(static_cast<const int64_t*>(data) + offset, n, to);
    }
  }

 private:
  template <class T, class N>
  SEGFUSE_FUNCTOR void convert(const T* from, N n, int* to) const {
    // As unsigned numbers, negative ids are beyond the end too.
    using Compared = std::conditional_t<sizeof(T) < 4, uint32_t, std::make_unsigned_t<T>>;
    const auto skipped = static_cast<T>(ignore);
    const bool skips = ignores && skipped == ignore;  // else no value of T is ignored
    const auto end = static_cast<Compared>(count);
    const int64_t step = strides.step();
    const auto one = [&](T value) {
      const int known = static_cast<Compared>(value) < end ? static_cast<int>(value) : wrong;
      return skips && value == skipped ? ignored : known;
    };
    if (step == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = one(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = one(from[i * step]);
    }
  }
};

// Says which id is the first that is no class, and where; of those that `target` does not ignore.
inline void refuse_wrong(const char* name, const Tensor& ids_, int64_t classes,
                         const Tensor& target_, std::optional<int64_t> ignore) {
  const auto as_int64 = [](const Tensor& t) {
    return torch::stable::contiguous(torch::stable::to(t, ScalarType::Long));
  };
  const Tensor ids = as_int64(ids_), target = as_int64(target_);
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  const auto* of = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t i = 0, inner = ids.numel(); i < ids.numel(); ++i) {
    if ((id[i] >= 0 && id[i] < classes) || of[i] == ignore) continue;
    std::ostringstream place;
    for (int64_t a = 0, rest = i; a < ids.dim(); ++a) {
      inner /= ids.size(a);
      place << (a > 0 ? ", " : "") << rest / inner;
      rest %= inner;
    }
    const bool names = ignore && &ids_ == &target_;
    const std::string or_ignored = names ? " or ignore_index " + std::to_string(*ignore) : "";
    check(false, name, ": expected class ids 0 to ", classes - 1, or_ignored, ", got ", id[i],
          " at (", place.str(), ")");
  }
}

// A weight or gradient of a pixel, in T or in float; 1 where there is none.
template <class T>
struct Values {
  const T* own = nullptr;
  const float* single = nullptr;
  Strides strides;

  Values() = default;
  explicit Values(const Tensor& t) : strides(t, false) {
    const bool as_own = t.element_size() == sizeof(T);
    own = as_own ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
    single = as_own ? nullptr : static_cast<const float*>(t.const_data_ptr());
  }

  template <class N>
  SEGFUSE_FUNCTOR void read(const Pixel& p, N n, Wide<T>* to) const {
    if (own) {
      copy(own + strides.offset(p), n, to);
    } else if (single) {
      copy(single + strides.offset(p), n, to);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = 1;
    }
  }

 private:
  template <class From, class N>
  SEGFUSE_FUNCTOR void copy(const From* from, N n, Wide<T>* to) const {
    const int64_t step = strides.step();
    if (step == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Wide<T>>(from[i]);
    } else if (step == 0) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Wide<T>>(*from);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Wide<T>>(from[i * step]);
    }
  }
};

}  // namespace segfuse::SEGFUSE_BACKEND
