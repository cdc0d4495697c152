// unet_weight_map, unet_weight_map_2019: how much each pixel counts in training, so that a network
// learns the gaps between touching cells.
//
//   w = w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))                              2015
//   w = ratio + border exp(-(d1 + d2)^2 / (2 sigma^2))
//             + (1 - ratio) exp(-d1^2 / (2 sigma1^2)) on background, else 1   2019
//
// d1 and d2 are the distances to the nearest and second nearest cell.  core/nearest.h finds them;
// the last pass, along x, stores them for a line at a time alone.  Where an exponential cannot
// change the sum in float32, it is 0, and no label is searched for farther away.
#include "core/math.h"
#include "core/nearest.h"
#include "core/out.h"
#include "core/reduce.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

// amplitude exp(-d^2 / (2 sigma^2)), or 0 from `reach` on.
struct Gaussian {
  double amplitude = 0, rate = 0;
  float reach = 0;

  Gaussian() = default;
  // Beside a sum of at least `beside`.
  Gaussian(double amplitude, double sigma, double beside)
      : amplitude(amplitude), rate(1 / (2 * sigma * sigma)) {
    constexpr double half_ulp = 0x1p-25, least = 0x1p-126;  // the last normal number
    const double unseen = beside > 0 ? beside * half_ulp : least;
    const double exponent = amplitude > unseen ? std::log(amplitude / unseen) : 0;
    reach = static_cast<float>(sigma * std::sqrt(2 * exponent));
  }
  // In float64, since amplitudes are large and so are the errors that they multiply.
  SEGFUSE_FUNCTOR double operator()(double d, double d_squared) const {
    constexpr int terms = 8;  // 4e-11
    const double value = amplitude * exp_below_one<double, terms>(-d_squared * rate);
    return d < reach ? value : 0.0;
  }
};

struct Weights {
  Gaussian border, halo;  // of d1 + d2, and of d1
  bool everywhere;        // the border's term on cells as well
  bool balanced;
  float background, cell;  // unless balanced
  const int64_t* counts;   // an image's pixels of background and of cells

  struct Classes {
    float background, cell;
  };
  SEGFUSE_FUNCTOR Classes of(int64_t image) const {
    if (!balanced) return {background, cell};
    const int64_t none = counts[2 * image], some = counts[2 * image + 1];
    if (none == 0 || some == 0) return {1, 1};
    const double pixels = static_cast<double>(none + some);
    return {static_cast<float>(pixels / (2 * none)), static_cast<float>(pixels / (2 * some))};
  }
};

template <class K, class Source>
struct WeightMap {
  using Square = typename K::Square;
  using Id = typename K::Id;
  static constexpr int room = 3 * sizeof(float) + sizeof(Id) + 2 * Stack::room;
  static constexpr float none = std::numeric_limits<float>::infinity();

  Source from;
  Frame frame;
  Square scale;
  int reach;
  Weights weights;
  Labels labels;
  float* to;
  int64_t stride[4];

  struct Out {
    float *first_square, *second_square;
    int64_t begin;
    float live;  // the border's term is 0 where d1 is not below this, squared
    bool everywhere;

    SEGFUSE_FUNCTOR void first(int x, int n, int c, Square scale, Square h, Id) const {
      draw<K>(x, n, c, scale, h, first_square + (x - begin));
    }
    SEGFUSE_FUNCTOR void second(int x, int n, int c, Square scale, Square h, Id) const {
      draw<K>(x, n, c, scale, h, second_square + (x - begin));
    }
    SEGFUSE_FUNCTOR void end(int x) const {
      mark(LinePolicy::block - 1, none, second_square + (x - begin));
    }
    SEGFUSE_FUNCTOR bool matters(int x) const {
      const float square = first_square[x - begin];
      return square < live && (everywhere || square > 0);
    }
    SEGFUSE_FUNCTOR bool wants(int& s, int& e) const {
      while (s <= e && !matters(s)) ++s;
      while (e > s && !matters(e)) --e;
      return s <= e;
    }
  };

  SEGFUSE_FUNCTOR void operator()(int64_t i, int64_t begin, int64_t end, char* memory) const {
    const Place start = frame.line_along_x(i);
    const int64_t n = end - begin;
    const int64_t length = n + LinePolicy::block;
    auto* raw = reinterpret_cast<Id*>(memory);
    auto* squares = reinterpret_cast<float*>(raw + length);
    auto* values = squares + 2 * length;
    auto* ints = reinterpret_cast<int*>(squares + 3 * length);
    for (int64_t x = 0; x < 2 * length; ++x) squares[x] = none;
    // d1 <= d2, so that d1 + d2 < reach wants d1 < reach / 2.
    const float live = weights.border.reach * weights.border.reach / 4;
    Out out{squares, squares + length, begin, live, weights.everywhere};
    two_nearest<K>(from.template line<true>(start), scale, static_cast<int>(frame.x), reach,
                   static_cast<int>(begin), static_cast<int>(end), Stack{ints, ints + n},
                   Stack{ints + 2 * n, ints + 3 * n}, out);
    compute(weights.of(start.n), squares, squares + length, n, values);
    if (labels.ignored > 0) {
      labels.read_all({start.n, start.z, start.y, begin}, n, raw);
      labels.replace_ignored(n, raw, values, 0.0f);
    }
    float* row = to + start.n * stride[0] + start.z * stride[1] + start.y * stride[2];
    for (int64_t x = 0; x < n; ++x) row[(begin + x) * stride[3]] = values[x];
  }

  SEGFUSE_FUNCTOR void compute(const Weights::Classes& of, const float* first, const float* second,
                               int64_t n, float* values) const {
    constexpr int64_t block = 32;
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t end = std::min(begin + block, n);
      const auto any = [&](const float* squares, const Gaussian& term) {
        float least = none;
        for (int64_t x = begin; x < end; ++x) least = std::min(least, squares[x]);
        return least < term.reach * term.reach;
      };
      for (int64_t x = begin; x < end; ++x) values[x] = first[x] > 0 ? of.background : of.cell;
      if (any(second, weights.border)) {
        for (int64_t x = begin; x < end; ++x) {
          const double d = static_cast<double>(std::sqrt(first[x])) + std::sqrt(second[x]);
          const double added = weights.border(d, d * d);
          const bool there = (first[x] > 0) | weights.everywhere;
          values[x] = static_cast<float>(values[x] + (there ? added : 0.0));
        }
      }
      if (any(first, weights.halo)) {
        for (int64_t x = begin; x < end; ++x) {
          const double added = weights.halo(std::sqrt(first[x]), first[x]);
          values[x] = static_cast<float>(values[x] + (first[x] > 0 ? added : 0.0));
        }
      }
    }
  }
};

// Counts an image's pixels of background and of cells, in bins 2 n and 2 n + 1.
struct Sides {
  Pixels pixels;
  Labels labels;
  int bins;

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Pixel& p, N n, int* bin) const {
    if (labels.bytes == 8) {
      sort<uint64_t>(p, n, bin);
    } else {
      sort<uint32_t>(p, n, bin);
    }
  }
  template <class L, class N>
  SEGFUSE_FUNCTOR void sort(const Pixel& p, N n, int* bin) const {
    L ids[ReducePolicy::width];
    labels.read_all({p.at[0], p.at[1], p.at[2], p.at[3]}, n, ids);
    const int first = static_cast<int>(2 * p.at[0]);
    for (int64_t i = 0; i < n; ++i) bin[i] = first + (ids[i] != 0);
    labels.replace_ignored(n, ids, bin, bins);
  }
};

Tensor count_sides(const Tensor& labels, const Labels& seen, const Frame& frame) {
  const Tensor counts = torch::stable::new_zeros(labels, {frame.n, 2}, ScalarType::Long);
  Sides f{Pixels(labels), seen, static_cast<int>(2 * frame.n)};
  f.pixels.size[1] = frame.z;
  f.pixels.size[2] = frame.y;
  count(f, 2 * frame.n, counts);
  return counts;
}

// What the operators ask for.
struct Asked {
  double border, sigma;
  std::optional<double> halo;  // of the later map alone
  double sigma1, background, cell;
  bool balanced, everywhere;
  const std::vector<int64_t>& ignored;
};

void fill(const Tensor& out, const Tensor& labels_, const Asked& asked) {
  if (out.numel() == 0) return;
  const Frame frame(labels_);
  const Labels labels(labels_, asked.ignored);
  const Tensor counts = asked.balanced ? count_sides(labels_, labels, frame) : labels_;
  // Of a class with all pixels but few the balanced weight is just above a half.
  const double least = asked.balanced     ? 0.5
                       : asked.everywhere ? std::min(asked.background, asked.cell)
                                          : asked.background;
  const Weights weights{Gaussian(asked.border, asked.sigma, least),
                        Gaussian(asked.halo.value_or(0), asked.sigma1, least),
                        asked.everywhere,
                        asked.balanced,
                        static_cast<float>(asked.background),
                        static_cast<float>(asked.cell),
                        asked.balanced ? counts.const_data_ptr<int64_t>() : nullptr};
  const double spacing[] = {1, 1, 1}, reach = std::max(weights.border.reach, weights.halo.reach);
  with_kinds("unet_weight_map", labels_, true, [&]<class K>() {
    find_nearest<K>(labels_, asked.ignored, spacing, reach,
                    [&]<class Source>(const Source& from, typename K::Square scale, int pixels) {
                      WeightMap<K, Source> f{from,
                                             frame,
                                             scale,
                                             pixels,
                                             weights,
                                             labels,
                                             static_cast<float*>(out.mutable_data_ptr()),
                                             {}};
                      const Labels strides(out);
                      f.stride[0] = strides.n, f.stride[1] = strides.z;
                      f.stride[2] = strides.y, f.stride[3] = strides.x;
                      for_each_band(frame.n * frame.z * frame.y, frame.x, f, labels_);
                    });
  });
}

void check_arguments(const Tensor& labels, const std::vector<int64_t>& ignored) {
  check_labels("unet_weight_map", labels);
  check(static_cast<int>(ignored.size()) <= Labels::most_ignored,
        "unet_weight_map: ignore_index: expected at most ", Labels::most_ignored, " ids");
  check(labels.size(0) < int64_t{1} << 30, "unet_weight_map: labels: expected fewer images");
}

Tensor unet_weight_map(const Tensor& labels, double border, double sigma,
                       std::optional<double> halo, double sigma1, double background, double cell,
                       bool balanced, bool everywhere, const std::vector<int64_t>& ignored) {
  check_arguments(labels, ignored);
  const Tensor out = torch::stable::new_empty(labels, labels.sizes(), ScalarType::Float);
  ask_for_large_pages(out);
  fill(out, labels, {border, sigma, halo, sigma1, background, cell, balanced, everywhere, ignored});
  return out;
}

void unet_weight_map_out(const Tensor& labels, double border, double sigma,
                         std::optional<double> halo, double sigma1, double background, double cell,
                         bool balanced, bool everywhere, const std::vector<int64_t>& ignored,
                         const Tensor& out) {
  check_arguments(labels, ignored);
  check(out.scalar_type() == ScalarType::Float && out.dim() == labels.dim() &&
            out.device() == labels.device() &&
            std::equal(out.sizes().begin(), out.sizes().end(), labels.sizes().begin()),
        "unet_weight_map: out: expected float32, of labels' shape and device");
  check_memory(halo ? "unet_weight_map_2019" : "unet_weight_map", out, {{"labels", &labels}});
  fill(out, labels, {border, sigma, halo, sigma1, background, cell, balanced, everywhere, ignored});
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("unet_weight_map", TORCH_BOX(&unet_weight_map));
  m.impl("unet_weight_map_out", TORCH_BOX(&unet_weight_map_out));
}

}  // namespace segfuse::SEGFUSE_BACKEND
