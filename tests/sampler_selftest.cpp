// Unit tests of csrc/core/sampler.h: a program that says what is wrong, and returns how much.
#include <cmath>
#include <cstdio>

#include "core/sampler.h"

using namespace segfuse::cpu;

static int wrong = 0;

#define EXPECT(condition)                                        \
  if (!(condition)) {                                            \
    std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    ++wrong;                                                     \
  }

// By trying every pair, where sources and targets meet.
static void deconvolution(int64_t count, int64_t factor, int64_t kernel, int64_t offset,
                          int64_t size) {
  const Deconvolution axis{count, size, factor, kernel, offset};
  EXPECT(axis.full() == (count - 1) * factor + kernel);
  for (int64_t p = 0; p < size; ++p) {
    const Range sources = axis.sources(p);
    for (int64_t q = 0; q < count; ++q) {
      const int64_t t = p + offset - q * factor;
      const bool meets = t >= 0 && t < kernel;
      EXPECT(meets == (q >= sources.first && q <= sources.last));
      EXPECT(axis.tap(p, q) == t);
      const Range targets = axis.targets(q);
      EXPECT(meets == (p >= targets.first && p <= targets.last));
    }
  }
}

template <class T>
static void bilinear_kernels() {
  for (int64_t size = 1; size <= 64; ++size) {
    const BilinearKernel<T> kernel(size);
    const int64_t reach = (size + 1) / 2;
    for (int64_t t = 0; t < size; ++t) {
      const double centre = size % 2 == 1 ? reach - 1 : reach - 0.5;
      EXPECT(std::abs(kernel(t) - (1 - std::abs(t - centre) / reach)) < 1e-6);
      EXPECT(kernel(t) > 0 && kernel(t) <= 1);
    }
    for (int64_t phase = 0; size % 2 == 0 && phase < reach; ++phase) {  // sums to one
      EXPECT(std::abs(kernel(phase) + kernel(phase + reach) - 1) < 1e-6);
    }
  }
}

template <class T>
static void interpolation(int64_t count, int64_t size, bool corners) {
  const Interpolation<T> axis(count, size, corners);
  for (int64_t p = 0; p < size; ++p) {
    double at = corners ? (size > 1 ? double(p) * (count - 1) / (size - 1) : 0)
                        : std::fmax((p + 0.5) * count / size - 0.5, 0);
    at = std::fmin(at, double(count - 1));
    const auto place = axis.place(p);
    EXPECT(place.low >= 0 && place.high < count && place.high - place.low <= 1);
    const double found = place.high > place.low ? place.low + double(place.fraction) : place.low;
    EXPECT(std::abs(found - at) < 1e-4);
  }
}

int main() {
  for (int64_t count = 1; count <= 5; ++count) {
    for (int64_t factor = 1; factor <= 5; ++factor) {
      for (int64_t kernel = 1; kernel <= 11; ++kernel) {
        const int64_t full = (count - 1) * factor + kernel;
        for (int64_t offset = 0; offset < full; offset += 1 + full / 4) {
          deconvolution(count, factor, kernel, offset, full - offset);
          deconvolution(count, factor, kernel, offset, (full - offset) / 2);
        }
      }
    }
  }
  deconvolution(16, 32, 64, 19, 500);  // FCN-32s
  deconvolution(17, 32, 63, 18, 500);  // FCN-AlexNet
  bilinear_kernels<float>();
  bilinear_kernels<double>();
  for (int64_t count = 1; count <= 7; ++count) {
    for (int64_t size = 1; size <= 20; ++size) {
      for (const bool corners : {false, true}) {
        interpolation<float>(count, size, corners);
        interpolation<double>(count, size, corners);
      }
    }
  }
  return wrong != 0;
}
