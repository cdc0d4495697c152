// Tiles (T, C, *S) and where they lie in an image (C, *S); one to three spatial axes, brought to
// three.
#pragma once

#include <algorithm>
#include <vector>

#include "core/split.h"

namespace segfuse::SEGFUSE_BACKEND {

constexpr int tile_axes = 3;  // z, y, x

// Sizes, and elements between neighbours, of tiles, or of an image as if it were one.
struct Tiles {
  int64_t count = 1, channels = 1, size[tile_axes] = {1, 1, 1};
  int64_t tile = 0, channel = 0, stride[tile_axes] = {};

  // The last `dims` axes of t are spatial, the one before them is the channels', then the tiles'.
  Tiles(const Tensor& t, int64_t dims) {
    for (int64_t a = 0; a < t.dim(); ++a) {
      const int64_t spatial = a - t.dim() + dims;
      if (spatial >= 0) {
        size[tile_axes - dims + spatial] = t.size(a);
        stride[tile_axes - dims + spatial] = t.stride(a);
      } else if (spatial == -1) {
        channels = t.size(a);
        channel = t.stride(a);
      } else {
        count = t.size(a);
        tile = t.stride(a);
      }
    }
  }

  SEGFUSE_FUNCTOR int64_t width() const { return size[tile_axes - 1]; }
  SEGFUSE_FUNCTOR int64_t step() const { return stride[tile_axes - 1]; }

  // A row along x by its place, and how many there are.
  struct Place {
    int64_t tile, channel, z, y;
  };
  SEGFUSE_FUNCTOR int64_t rows() const { return count * channels * size[0] * size[1]; }
  SEGFUSE_FUNCTOR Place place(int64_t row) const {
    const Split y = split(row, size[1]), z = split(y.quotient, size[0]);
    const Split c = split(z.quotient, channels);
    return {c.quotient, c.remainder, z.remainder, y.remainder};
  }
  // The same, the channels of a row following each other.
  SEGFUSE_FUNCTOR Place pixels_place(int64_t row) const {
    const Split c = split(row, channels), y = split(c.quotient, size[1]);
    const Split z = split(y.quotient, size[0]);
    return {z.quotient, c.remainder, z.remainder, y.remainder};
  }
  SEGFUSE_FUNCTOR int64_t offset(const Place& p) const {
    return p.tile * tile + p.channel * channel + p.z * stride[0] + p.y * stride[1];
  }
};

// Places of the tiles' first elements in the image: (T, D) int64, contiguous, on its device.
struct Corners {
  const int64_t* at;
  int64_t count, dims;

  explicit Corners(const Tensor& t)
      : at(static_cast<const int64_t*>(t.const_data_ptr())), count(t.size(0)), dims(t.size(1)) {}

  // Along an axis of three; bounded, so that sums do not overflow.
  SEGFUSE_FUNCTOR int64_t operator()(int64_t tile, int axis) const {
    constexpr int64_t most = int64_t{1} << 60;
    const int64_t value = unbounded(tile, axis);
    return value < -most ? -most : value > most ? most : value;
  }

  // Whether a tile of a size covers a place along an axis.
  SEGFUSE_FUNCTOR bool covers(int64_t tile, int axis, int64_t size, int64_t place) const {
    const auto corner = static_cast<uint64_t>(unbounded(tile, axis));
    return static_cast<uint64_t>(place) - corner < static_cast<uint64_t>(size);
  }

 private:
  SEGFUSE_FUNCTOR int64_t unbounded(int64_t tile, int axis) const {
    const int64_t own = axis - tile_axes + dims;
    return own < 0 ? 0 : at[tile * dims + own];
  }
};

// The wrapper in Python has said what is wrong in more words before.
inline void check_corners(const char* op, const Tensor& corners, const Tensor& like, int64_t dims) {
  using torch::headeronly::ScalarType;
  check(dims >= 1 && dims <= tile_axes, op, ": expected one to three spatial axes, got ", dims);
  check(corners.scalar_type() == ScalarType::Long && corners.dim() == 2 && corners.size(1) == dims,
        op, ": corners: expected (T, ", dims, ") int64");
  check(corners.device() == like.device(), op, ": corners: expected the device of the tensor");
}

inline void check_size(const char* op, const std::vector<int64_t>& size, int64_t dims) {
  check(static_cast<int64_t>(size.size()) == dims, op, ": size: expected ", dims, " numbers");
  for (const int64_t s : size) check(s >= 0, op, ": size: expected no negative number, got ", s);
}

}  // namespace segfuse::SEGFUSE_BACKEND
