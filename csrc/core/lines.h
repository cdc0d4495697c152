// Operators that go along whole lines, each step depending on those before it.
//
// sweep(outer, inner, f, like): lines side by side, `inner` of them in each of `outer` groups.  A
// functor takes a strip of adjacent ones, so that the CPU reads whole cache lines and does many
// lines at once, and the threads of a warp read side by side:
//
//   void operator()(int64_t group, int64_t first, N n) const;
//                                         lines first .. first + n - 1; n is an int64_t, or a
//                                         constant: at most LinePolicy::strip, on CUDA 1
//
// for_each_band(lines, length, f, like): lines that may be cut into bands, where a functor finds
// out by itself what a band must know of the rest of its line; on the CPU none is cut.
//
//   static constexpr int room;            bytes of scratch an element of a band
//   void operator()(int64_t line, int64_t begin, int64_t end, char* room) const;
//                                         elements begin .. end - 1; room is aligned to 8 bytes
//                                         and for LinePolicy::block elements more
#pragma once

#include <memory>

#include "core/split.h"

namespace segfuse::SEGFUSE_BACKEND {

#if SEGFUSE_CUDA_SOURCE

struct LinePolicy {
  static constexpr int64_t strip = 1;
  static constexpr int64_t band = 32;  // elements; their scratch is a thread's local memory
  static constexpr int block = 1;
  static constexpr unsigned threads = 64;  // a block
};

template <class F>
__global__ void sweep_strips(const __grid_constant__ F f, int64_t inner, int64_t lines) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < lines; i += stride) {
    const Split at = split(i, inner);
    f(at.quotient, at.remainder, std::integral_constant<int, 1>{});
  }
}

// Neighbouring threads take neighbouring lines.
template <class F>
__global__ void fill_bands(const __grid_constant__ F f, int64_t lines, int64_t length,
                           int64_t bands) {
  alignas(8) char room[F::room * (LinePolicy::band + LinePolicy::block)];
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < lines * bands; i += stride) {
    const Split at = split(i, lines);
    const int64_t begin = at.quotient * LinePolicy::band;
    f(at.remainder, begin, std::min(begin + LinePolicy::band, length), room);
  }
}

inline unsigned line_blocks(int64_t count) {
  constexpr int64_t threads = LinePolicy::threads;
  return std::min<int64_t>((count + threads - 1) / threads, int64_t{1} << 30);
}

template <class F>
void sweep(int64_t outer, int64_t inner, const F& f, const Tensor& like) {
  if (outer * inner == 0) return;
  const Launch launch(like);
  SEGFUSE_LAUNCH((sweep_strips<F>), dim3(line_blocks(outer * inner)), LinePolicy::threads, 0,
                 launch.stream, f, inner, outer * inner);
  launch.done();
}

template <class F>
void for_each_band(int64_t lines, int64_t length, const F& f, const Tensor& like) {
  if (lines * length == 0) return;
  const int64_t bands = (length + LinePolicy::band - 1) / LinePolicy::band;
  const Launch launch(like);
  SEGFUSE_LAUNCH((fill_bands<F>), dim3(line_blocks(lines * bands)), LinePolicy::threads, 0,
                 launch.stream, f, lines, length, bands);
  launch.done();
}

#else

struct LinePolicy {
  static constexpr int64_t strip = 64;    // a cache line of bytes, and of vectors enough
  static constexpr int64_t grain = 8192;  // elements a thread works on at least
  static constexpr int block = 8;         // elements that are written at once
};

template <class F>
void sweep(int64_t outer, int64_t inner, const F& f, const Tensor& like) {
  if (outer * inner == 0) return;
  constexpr int64_t strip = LinePolicy::strip;
  const int64_t strips = (inner + strip - 1) / strip, count = outer * strips;
  const int64_t grain = LinePolicy::grain * count / std::max<int64_t>(like.numel(), 1);
  parallel(count, grain, [=](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) {
      const Split at = split(i, strips);
      const int64_t first = at.remainder * strip, n = std::min(strip, inner - first);
      if (n == strip) {
        f(at.quotient, first, std::integral_constant<int, strip>{});
      } else {
        f(at.quotient, first, n);
      }
    }
  });
}

template <class F>
void for_each_band(int64_t lines, int64_t length, const F& f, const Tensor&) {
  if (lines * length == 0) return;
  parallel(lines, LinePolicy::grain / length,
           [=](int64_t begin, int64_t end) __attribute__((always_inline)) {
             const auto room =
                 std::make_unique_for_overwrite<char[]>(F::room * (length + LinePolicy::block));
             for (int64_t line = begin; line < end; ++line) {
               f(line, 0, length, room.get());
             }
           });
}

#endif

}  // namespace segfuse::SEGFUSE_BACKEND
