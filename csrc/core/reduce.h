// Operators that go over pixels and sum or count what they find.
//
// reduce(f, like): f has
//
//   Pixels pixels;
//   using Sum = ...;                      what is summed: Sum{} is zero, += adds; or Nothing
//   int64_t block() const;                CPU: pixels that it takes at once, at most
//   void operator()(const Pixel&, N n, Sum&) const;
//                                         n pixels along x; n is an int64_t, or 1 on CUDA
//   void write(const Sum& total) const;   called once, at the end; Nothing needs none
//
// The order of additions follows from the number of pixels alone, so that sums have the same bits
// on every run and for any number of threads; there are no floating-point atomics.
//
// count(f, bins, out): f writes each pixel's bin, `bins` where it is skipped, `bins` + 1 where it
// is wrong; out, int64, is added to.
//
// Both return how many pixels were wrong, reduce by its Sum's `wrong`; on CUDA 0, since there the
// functor stops by SEGFUSE_ASSERT.
#pragma once

#include <type_traits>
#include <vector>

#include "core/pixels.h"

#if !SEGFUSE_CUDA_SOURCE
#include <atomic>
#endif

namespace segfuse::SEGFUSE_BACKEND {

struct Nothing {};

#if SEGFUSE_CUDA_SOURCE

struct ReducePolicy {
  static constexpr unsigned threads = 256;  // a block
  static constexpr int64_t blocks = 1024;   // at most; more pixels are a thread's further ones
  static constexpr int64_t shared_bins = 48 * 256;  // 48 KiB of counters; more are counted globally
  static constexpr int width = 1;                   // pixels that a functor has at once
  static constexpr int values = 8;                  // that it may hold for them, in registers
};

template <class T, class N>
SEGFUSE_FUNCTOR double sum_of(const T* x, N) {
  return x[0];
}

// Adds up a block's sums in the order of a tree; the total is thread 0's.
template <class Sum>
__device__ void sum_block(Sum& sum) {
  __shared__ Sum sums[ReducePolicy::threads];
  sums[threadIdx.x] = sum;
  for (unsigned half = ReducePolicy::threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  sum = sums[threadIdx.x];
}

template <class F>
__global__ void reduce_pixels(const __grid_constant__ F f, typename F::Sum* partial) {
  typename F::Sum sum{};
  const int64_t count = f.pixels.count(), stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t p = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; p < count; p += stride) {
    f(f.pixels.pixel(p), std::integral_constant<int, 1>{}, sum);
  }
  if constexpr (!std::is_empty_v<typename F::Sum>) {
    sum_block(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  }
}

template <class F>
__global__ void reduce_partial(const __grid_constant__ F f, const typename F::Sum* partial,
                               int blocks) {
  typename F::Sum sum{};
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += partial[i];
  sum_block(sum);
  if (threadIdx.x == 0) f.write(sum);
}

inline unsigned blocks_for(int64_t pixels) {
  constexpr int64_t threads = ReducePolicy::threads;
  return std::clamp<int64_t>((pixels + threads - 1) / threads, 1, ReducePolicy::blocks);
}

template <class F>
int64_t reduce(const F& f, const Tensor& like) {
  using Sum = typename F::Sum;
  const unsigned blocks = blocks_for(f.pixels.count());
  const Launch launch(like);
  if constexpr (std::is_empty_v<Sum>) {
    SEGFUSE_LAUNCH((reduce_pixels<F>), dim3(blocks), ReducePolicy::threads, 0, launch.stream, f,
                   nullptr);
  } else {
    const Tensor scratch = torch::stable::new_empty(
        like, {static_cast<int64_t>(blocks * sizeof(Sum))}, ScalarType::Byte);
    auto* partial = static_cast<Sum*>(scratch.mutable_data_ptr());
    SEGFUSE_LAUNCH((reduce_pixels<F>), dim3(blocks), ReducePolicy::threads, 0, launch.stream, f,
                   partial);
    launch.done();
    SEGFUSE_LAUNCH((reduce_partial<F>), dim3(1), ReducePolicy::threads, 0, launch.stream, f,
                   partial, static_cast<int>(blocks));
  }
  launch.done();
  return 0;
}

// Threads of a warp mostly meet the same bin, in pictures; one of them then adds for all.
template <class F>
__global__ void count_pixels(const __grid_constant__ F f, int bins, bool shared, int64_t* out) {
  SEGFUSE_DYNAMIC_SHARED(unsigned, counts);
  using Count = unsigned long long;
  auto* total = reinterpret_cast<Count*>(out);
  if (shared) {
    for (int i = threadIdx.x; i < bins; i += blockDim.x) counts[i] = 0;
    __syncthreads();
  }
  const int64_t count = f.pixels.count(), stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.x; first < count; first += stride) {
    int bin = bins;
    if (first + threadIdx.x < count) {
      f(f.pixels.pixel(first + threadIdx.x), std::integral_constant<int, 1>{}, &bin);
    }
    const bool alike = __all_sync(~0u, bin == __shfl_sync(~0u, bin, 0));
    const unsigned by = alike ? 32 : 1;
    if (bin < bins && (!alike || threadIdx.x % 32 == 0)) {
      shared ? atomicAdd(&counts[bin], by) : atomicAdd(&total[bin], Count{by});
    }
  }
  if (shared) {
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += blockDim.x) {
      if (counts[i] > 0) atomicAdd(&total[i], Count{counts[i]});
    }
  }
}

template <class F>
int64_t count(const F& f, int64_t bins, const Tensor& out) {
  const bool shared = bins <= ReducePolicy::shared_bins;
  const Launch launch(out);
  SEGFUSE_LAUNCH((count_pixels<F>), dim3(blocks_for(f.pixels.count())), ReducePolicy::threads,
                 shared ? bins * sizeof(unsigned) : 0, launch.stream, f, static_cast<int>(bins),
                 shared, static_cast<int64_t*>(out.mutable_data_ptr()));
  launch.done();
  return 0;
}

#else

struct ReducePolicy {
  static constexpr int64_t piece = 8192;  // pixels of a partial sum
  static constexpr int width = 256;       // pixels that a functor has at once, at most
  static constexpr int values = 16384;  // that it may hold for them: 64 KiB of floats, in the cache
  static constexpr int64_t grain = 4096;  // pixels a thread counts at least
  static constexpr int64_t tables = 4;  // so that equal bins in a row need not wait for each other
  static constexpr int64_t table = 1024;  // bins; more are counted in the result itself
};

// The sum of n values, in an order that vectorises.
template <class T>
SEGFUSE_FUNCTOR double sum_of(const T* x, int64_t n) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) lane[j] += x[i + j];
  }
  for (; i < n; ++i) lane[0] += x[i];
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// Calls body(pixel, n) for runs along x of at most `block` pixels, over pixels [begin, end).
SEGFUSE_FUNCTOR void for_each_run(const Pixels& pixels, int64_t block, int64_t begin, int64_t end,
                                  const auto& body) {
  while (begin < end) {
    Pixel p = pixels.pixel(begin);
    int64_t& x = p.at[pixel_axes - 1];
    const int64_t stop = std::min(pixels.width(), x + end - begin);
    while (x < stop) {
      const int64_t n = std::min(block, stop - x);
      body(p, n);
      x += n;
      begin += n;
    }
  }
}

template <class F>
int64_t reduce(const F& f, const Tensor&) {
  using Sum = typename F::Sum;
  const int64_t count = f.pixels.count();
  const int64_t pieces = (count + ReducePolicy::piece - 1) / ReducePolicy::piece;
  std::vector<Sum> partial(std::is_empty_v<Sum> ? 0 : pieces);
  parallel(pieces, 1,
           [&f, count, partial = partial.data()](int64_t begin, int64_t end)
               __attribute__((always_inline)) {
                 for (int64_t piece = begin; piece < end; ++piece) {
                   const int64_t first = piece * ReducePolicy::piece;
                   const int64_t last = std::min(first + ReducePolicy::piece, count);
                   Sum sum{};
                   for_each_run(f.pixels, f.block(), first, last,
                                [&](const Pixel& p, int64_t n)
                                    __attribute__((always_inline)) { f(p, n, sum); });
                   if constexpr (!std::is_empty_v<Sum>) partial[piece] = sum;
                 }
               });
  if constexpr (!std::is_empty_v<Sum>) {
    Sum total{};
    for (const Sum& sum : partial) total += sum;
    f.write(total);
    return total.wrong;
  }
  return 0;
}

template <class F>
int64_t count(const F& f, int64_t bins, const Tensor& out) {
  auto* total = static_cast<int64_t*>(out.mutable_data_ptr());
  std::atomic<int64_t> wrong = 0;
  const auto add = [=, &wrong](int64_t bin, int64_t counted) {
    if (bin < bins) std::atomic_ref(total[bin]).fetch_add(counted, std::memory_order_relaxed);
    if (bin > bins) wrong.fetch_add(counted, std::memory_order_relaxed);
  };
  parallel(f.pixels.count(), ReducePolicy::grain,
           [&f, &add, bins](int64_t begin, int64_t end) __attribute__((always_inline)) {
             constexpr int tables = ReducePolicy::tables;
             int64_t counts[tables][ReducePolicy::table + 2];
             const bool here = bins <= ReducePolicy::table;
             for (auto& table : counts) std::fill_n(table, here ? bins + 2 : 0, 0);
             int bin[ReducePolicy::width];
             for_each_run(f.pixels, ReducePolicy::width, begin, end,
                          [&](const Pixel& p, int64_t n) __attribute__((always_inline)) {
                            f(p, n, bin);
                            if (!here) {
                              for (int64_t i = 0; i < n; ++i) add(bin[i], 1);
                              return;
                            }
                            int64_t i = 0;
                            for (; i + tables <= n; i += tables) {
                              for (int j = 0; j < tables; ++j) ++counts[j][bin[i + j]];
                            }
                            for (; i < n; ++i) ++counts[0][bin[i]];
                          });
             for (int64_t i = 0; here && i < bins + 2; ++i) {
               int64_t counted = 0;
               for (const auto& table : counts) counted += table[i];
               if (counted > 0) add(i, counted);
             }
           });
  return wrong;
}

#endif

}  // namespace segfuse::SEGFUSE_BACKEND
