// Matrix products by torch's BLAS, on pieces of tensors; and bands, by which a product that is
// needed once need not be stored as a whole.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "core/split.h"

namespace segfuse::SEGFUSE_BACKEND {

struct BandPolicy {
#if defined(SEGFUSE_EMULATED)  // several bands, blocks and sums in the tests' small tensors
  static constexpr int64_t bytes = 8192, pixels = 4, block = 8, sums = 3, sums_bytes = 1 << 14;
#elif SEGFUSE_CUDA_SOURCE
  static constexpr int64_t bytes = 1 << 25;    // of a band's product, which stays in the cache
  static constexpr int64_t pixels = 1;         // that a band may have, at least
  static constexpr int64_t block = INT64_MAX;  // rows of a matrix that are multiplied at once
  static constexpr int64_t sums = 1;           // partial sums of a product over all bands, at most
  static constexpr int64_t sums_bytes = 0;     // and their size, if there are several
#else
  static constexpr int64_t bytes = 1 << 20, pixels = 256, block = 256, sums = 16,
                           sums_bytes = 1 << 24;
#endif
};

// A matrix within memory that a tensor owns.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_step, column_step;

  Matrix transposed() const { return {data, columns, rows, column_step, row_step}; }
  Matrix block(int64_t row, int64_t count) const {
    return {data + row * row_step, count, columns, row_step, column_step};
  }

  Tensor tensor(const torch::stable::Device& device) const {
    return torch::stable::from_blob(const_cast<T*>(data), {rows, columns}, {row_step, column_step},
                                    device, torch::headeronly::CppTypeToScalarType<T>::value);
  }
};

// Runs an overload of torch's mm that writes its result.
template <size_t n>
void call_mm(const char* overload, std::array<StableIValue, n> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // releases the handle
}

// out = a b.  Of halves either is a product of halves, or it is of floats, so that it can be summed
// before it is rounded.
template <class T, class Out>
void multiply(const Matrix<T>& a, const Matrix<T>& b, const Matrix<Out>& out,
              const torch::stable::Device& device) {
  using torch::stable::detail::from;
  const Tensor left = a.tensor(device), right = b.tensor(device), to = out.tensor(device);
  if constexpr (std::is_same_v<T, Out>) {
    call_mm("out", std::array{from(left), from(right), from(to)});
  } else {
    const auto wide = torch::headeronly::CppTypeToScalarType<Out>::value;
#if defined(__CUDACC__)  // the only place where BLAS can do this by itself
    call_mm("dtype_out", std::array{from(left), from(right), from(wide), from(to)});
#else
    call_mm("out", std::array{from(torch::stable::to(left, wide)),
                              from(torch::stable::to(right, wide)), from(to)});
#endif
  }
}

// Pixels [x, x + width) of `rows` neighbouring rows of an image; one row, if not of its full width.
struct Band {
  int64_t image, row, rows, x, width;
  int64_t pixels() const { return rows * width; }
};

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Cuts images into bands, by their size alone.
class Bands {
 public:
  // Of a pixel, `bytes` are stored.
  Bands(int64_t images, int64_t rows, int64_t width, int64_t bytes) : rows_(rows), width_(width) {
    if (images * rows * width == 0) return;
    const int64_t most = std::max(BandPolicy::bytes / bytes, BandPolicy::pixels);
    down_ = divide_up(rows, std::max<int64_t>(most / width, 1));
    across_ = divide_up(width, most);
    count_ = images * down_ * across_;
  }

  int64_t count() const { return count_; }
  int64_t most_pixels() const {
    return count_ > 0 ? divide_up(rows_, down_) * divide_up(width_, across_) : 0;
  }

  Band operator[](int64_t b) const {
    const Split at = split(b, across_), of = split(at.quotient, down_);
    const int64_t row = rows_ * of.remainder / down_, x = width_ * at.remainder / across_;
    return {of.quotient, row, rows_ * (of.remainder + 1) / down_ - row, x,
            width_ * (at.remainder + 1) / across_ - x};
  }

 private:
  int64_t rows_, width_, down_ = 1, across_ = 1, count_ = 0;
};

// Calls body(begin, end) for pieces of [0, n).  On the CPU each of torch's threads takes a piece,
// in which BLAS runs on that thread alone: so its results do not depend on their number.
template <class Body>
void in_pieces(int64_t n, const Body& body) {
#if SEGFUSE_CUDA_SOURCE
  body(int64_t{0}, n);
#else
  torch::stable::parallel_for(0, std::max<int64_t>(n, 2), 1,  // one by itself would be no piece
                              [&](int64_t begin, int64_t end) { body(begin, std::min(end, n)); });
#endif
}

}  // namespace segfuse::SEGFUSE_BACKEND
