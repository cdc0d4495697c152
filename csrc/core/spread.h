// Upsampling along x for the CPU, by tables that hold for every row: pixels from sources, and on
// the way back sources' sums from pixels.
#pragma once

#include "core/lanes.h"
#include "core/sampler.h"

#if !SEGFUSE_CUDA_SOURCE

#include <vector>

namespace segfuse::SEGFUSE_BACKEND {

// Where pixels along x take their values from, eight at a time; and rows of sources so spread.
template <class Acc>
struct Spread {
  static constexpr int lanes = 8;
  using Eight = Lanes<Acc, lanes>;
  using Index = typename Eight::Index;

  int64_t pixels, groups;
  std::vector<int64_t> first, last;                 // source of a group
  std::vector<Index> low, high, has_low, has_high;  // from the first on; masks
  std::vector<Acc> of_low, of_high;

  explicit Spread(const Sampling<Acc>& across)
      : pixels(across.size()), groups((across.size() + lanes - 1) / lanes) {
    for (auto* table : {&first, &last}) table->resize(groups);
    for (auto* table : {&low, &high, &has_low, &has_high}) table->resize(groups * lanes);
    for (auto* table : {&of_low, &of_high}) table->resize(groups * lanes);
    for (int64_t g = 0; g < groups; ++g) {
      const auto pair = [&](int64_t i) { return across.pair(std::min(g * lanes + i, pixels - 1)); };
      // The sources of pixels behind the first that has one do not lie before its own.
      int64_t i = 0;
      while (i < lanes - 1 && !pair(i).has_low) ++i;
      first[g] = last[g] = pair(i).low;
      for (i = 0; i < lanes; ++i) {
        const int64_t at = g * lanes + i;
        const auto of = pair(i);
        low[at] = static_cast<Index>(of.has_low ? of.low - first[g] : 0);
        high[at] = static_cast<Index>(of.has_high ? of.high - first[g] : 0);
        has_low[at] = of.has_low ? -1 : 0;
        has_high[at] = of.has_high ? -1 : 0;
        of_low[at] = of.of_low;
        of_high[at] = of.of_high;
        last[g] = std::max(last[g], first[g] + std::max<int64_t>(low[at], high[at]));
      }
    }
  }

  // Group g of `rows` rows, whose sources from `from` on lie in `cells`, where eight more can be
  // read; the next row's lie `cells_step` on, and its pixels `step`.
  SEGFUSE_FUNCTOR void expand(const Acc* cells, int64_t cells_step, int64_t from, int64_t g,
                              int64_t rows, Acc* to, int64_t step) const {
    const Acc* source = cells + (first[g] - from);
    const int64_t at = g * lanes;
    Eight by_low, by_high;
    by_low.load(of_low.data() + at);
    by_high.load(of_high.data() + at);
    typename Eight::Places keep_low, keep_high;
    keep_low.load(has_low.data() + at);
    keep_high.load(has_high.data() + at);
    const auto weigh = [&](Eight& a, Eight& b) __attribute__((always_inline)) {
      a.weigh(by_low, keep_low);
      b.weigh(by_high, keep_high);
      a.add(b);
      a.store(to);
      source += cells_step;
      to += step;
    };
    Eight a, b;
    if (last[g] - first[g] < lanes) {
      typename Eight::Places at_low, at_high;
      at_low.load(low.data() + at);
      at_high.load(high.data() + at);
      for (int64_t k = 0; k < rows; ++k) {
        Eight all;
        all.load(source);
        a.pick(all, at_low);
        b.pick(all, at_high);
        weigh(a, b);
      }
    } else {
      for (int64_t k = 0; k < rows; ++k) {
        Acc left[lanes], right[lanes];
        for (int i = 0; i < lanes; ++i) {
          left[i] = source[low[at + i]];
          right[i] = source[high[at + i]];
        }
        a.load(left);
        b.load(right);
        weigh(a, b);
      }
    }
  }
};

// The way back: sums of the pixels that each source reaches, eight sources at a time.
template <class Acc>
struct Gathered {
  static constexpr int lanes = 8;
  using Eight = Lanes<Acc, lanes>;
  using Index = typename Eight::Index;

  int64_t count, taps = lanes;  // sources; pixels of one at most, a multiple of the lanes
  std::vector<int64_t> first;
  std::vector<Acc> weight;
  std::vector<Index> mask;

  explicit Gathered(const Sampling<Acc>& across) : count(across.count()) {
    const int64_t padded = (count + lanes - 1) / lanes * lanes;
    for (int64_t q = 0; q < count; ++q) {
      taps = std::max(taps, (across.targets(q).count() + lanes - 1) / lanes * lanes);
    }
    first.resize(padded);
    weight.resize(padded * taps);
    mask.resize(padded * taps);
    for (int64_t q = 0; q < count; ++q) {
      const Range reached = across.targets(q);
      if (reached.count() > 0) first[q] = reached.first;
      for (int64_t p = reached.first; p <= reached.last; ++p) {
        weight[q * taps + (p - reached.first)] = across.weight(p, q);
        mask[q * taps + (p - reached.first)] = -1;
      }
    }
  }

  // Of a row of pixels, behind which `taps` more can be read.
  SEGFUSE_FUNCTOR void sum(const Acc* pixels, Acc* to) const {
    if (taps == lanes) {
      sum(pixels, std::integral_constant<int64_t, lanes>{}, to);
    } else {
      sum(pixels, taps, to);
    }
  }

 private:
  template <class N>
  SEGFUSE_FUNCTOR void sum(const Acc* pixels, N taps, Acc* to) const {
    for (int64_t q = 0; q < count; q += lanes) {
      Eight sums[lanes];
#pragma GCC unroll 8
      for (int c = 0; c < lanes; ++c) {
        sums[c].clear();
        const int64_t at = (q + c) * taps;
        for (int64_t t = 0; t < taps; t += lanes) {
          Eight some, by;
          typename Eight::Places reached;
          some.load(pixels + first[q + c] + t);
          by.load(weight.data() + at + t);
          reached.load(mask.data() + at + t);
          some.weigh(by, reached);
          sums[c].add(some);
        }
      }
      if (q + lanes <= count) {
        totals(sums).store(to + q);
      } else {
        Acc values[lanes];
        totals(sums).store(values);
        for (int64_t i = 0; i < count - q; ++i) to[q + i] = values[i];
      }
    }
  }
};

}  // namespace segfuse::SEGFUSE_BACKEND

#endif
