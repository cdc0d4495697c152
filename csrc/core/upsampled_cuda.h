// core/upsampled.h on CUDA: a thread a pixel, or a coarse score.
#pragma once

#include "core/upsampled.h"

namespace segfuse::SEGFUSE_BACKEND {

struct UpsampledPolicy {
  static constexpr int width = 1;
};

// Class k at a pixel.
template <class Acc>
SEGFUSE_FUNCTOR Acc upsampled(const Coarse<Acc>& coarse, int64_t n, int64_t k, int64_t y,
                              int64_t x) {
  const Plane<Acc> plane = coarse.plane(n, k);
  Acc value = 0;
  if (coarse.down.interpolates) {
    const auto v = coarse.down.pair(y), h = coarse.across.pair(x);
    const Acc *low = plane.row(v.low), *high = plane.row(v.high);
    const auto along = [&](const Acc* line) {
      return line[h.low * plane.step] * h.of_low + line[h.high * plane.step] * h.of_high;
    };
    value = along(low) * v.of_low + along(high) * v.of_high;
  } else {
    expand(coarse.down.taps, coarse.across.taps, plane, coarse.weights_of(k), y, x,
           std::integral_constant<int, 1>{}, &value);
  }
  return value;
}

template <class F>
struct UpsampledPixels {
  using Sum = typename F::Sum;
  F f;
  Pixels pixels;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, Sum& sum) const {
    const auto scores = [&](int64_t k, int64_t) {
      return upsampled(f.coarse, p.at[0], k, p.at[2], p.at[3]);
    };
    f(p, n, scores, sum);
  }
  SEGFUSE_FUNCTOR void write(const Sum& total) const { f.write(total); }
};

template <class F>
int64_t for_each_pixel(const F& f, const Tensor& pixels) {
  if (pixels.numel() == 0 && std::is_empty_v<typename F::Sum>) return 0;
  return reduce(UpsampledPixels<F>{f, Pixels(pixels)}, pixels);
}

// A pixel's gradient of class k.
template <class F>
SEGFUSE_FUNCTOR auto pixel_gradient(const F& f, int64_t n, int64_t k, int64_t y, int64_t x) {
  using Acc = typename F::Acc;
  Acc log_sum, scale, all, hard, value = upsampled(f.coarse, n, k, y, x);
  int id;
  constexpr std::integral_constant<int, 1> one{};
  const PixelTerms<Acc> terms{&log_sum, &scale, &all, &hard, &id};
  f.read({{n, 0, y, x}}, one, terms);
  f.differentiate(k, one, terms, &value);
  return value;
}

template <class F>
struct ScoresGradient {
  using Acc = typename F::Acc;
  using Value = Acc;
  struct Row {
    Acc* to;
    int64_t step, size, n, k, y;
  };
  F f;
  Acc* to;

  SEGFUSE_FUNCTOR int64_t rows() const {
    return f.coarse.batch * f.coarse.classes * f.coarse.down.count();
  }
  SEGFUSE_FUNCTOR int64_t longest() const { return f.coarse.across.count(); }
  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const Split line = split(r, f.coarse.down.count());
    const Split image = split(line.quotient, f.coarse.classes);
    return {to + r * longest(), 1, longest(), image.quotient, image.remainder, line.remainder};
  }
  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, Acc* values) const {
    const auto& coarse = f.coarse;
    const Weights<Acc> w = coarse.weights_of(row.k);
    const Range down = coarse.down.targets(row.y);
    for (int i = 0; i < n; ++i) {
      const Range across = coarse.across.targets(x + i);
      Acc sum = 0;
      for (int64_t r = down.first; r <= down.last; ++r) {
        Acc along = 0;
        for (int64_t p = across.first; p <= across.last; ++p) {
          const Acc weight =
              w.table ? w.row(coarse.down.taps.tap(r, row.y))[coarse.across.taps.tap(p, x + i)]
                      : coarse.across.weight(p, x + i);
          along += pixel_gradient(f, row.n, row.k, r, p) * weight;
        }
        sum += w.table ? along : along * coarse.down.weight(r, row.y);
      }
      values[i] = sum;
    }
  }
};

template <class F>
void gradient_of_scores(const F& f, const Tensor& out) {
  using Acc = typename F::Acc;
  for_each_row(out, Memory::fresh, std::array{ScoresGradient<F>{f, out.mutable_data_ptr<Acc>()}});
}

template <class F>
struct WeightGradient {
  using Acc = typename F::Acc;
  using Value = Acc;
  struct Row {
    Acc* to;
    int64_t step, size, k;
  };
  F f;
  Acc* to;

  SEGFUSE_FUNCTOR int64_t rows() const { return f.coarse.classes; }
  SEGFUSE_FUNCTOR int64_t longest() const {
    return f.coarse.weights.kernel * f.coarse.weights.kernel;
  }
  SEGFUSE_FUNCTOR Row row(int64_t k) const { return {to + k * longest(), 1, longest(), k}; }
  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t t, N n, Acc* values) const {
    const auto& coarse = f.coarse;
    const auto &down = coarse.down.taps, &across = coarse.across.taps;
    for (int i = 0; i < n; ++i) {
      const Split tap = split(t + i, coarse.weights.kernel);
      double sum = 0;
      for (int64_t b = 0; b < coarse.batch; ++b) {
        const auto plane = coarse.plane(b, row.k);
        for (int64_t q = 0; q < down.count; ++q) {
          const int64_t y = q * down.factor + tap.quotient - down.offset;
          if (y < 0 || y >= down.size) continue;
          for (int64_t r = 0; r < across.count; ++r) {
            const int64_t x = r * across.factor + tap.remainder - across.offset;
            if (x < 0 || x >= across.size) continue;
            sum += static_cast<double>(pixel_gradient(f, b, row.k, y, x)) *
                   static_cast<double>(plane.row(q)[r * plane.step]);
          }
        }
      }
      values[i] = static_cast<Acc>(sum);
    }
  }
};

template <class F>
void gradient_of_weight(const F& f, const Tensor& out) {
  using Acc = typename F::Acc;
  for_each_row(out, Memory::fresh, std::array{WeightGradient<F>{f, out.mutable_data_ptr<Acc>()}});
}

}  // namespace segfuse::SEGFUSE_BACKEND
