// Where upsampling takes its values from, along an axis: positions, weights and borders of
// transposed convolution and of bilinear interpolation.
//
// Two axes are sampled independently, so that a pixel's weights are products of two.
#pragma once

#include "core/split.h"

namespace segfuse::SEGFUSE_BACKEND {

// Sources, or targets, from the first to the last; none where the last lies before the first.
struct Range {
  int64_t first, last;
  SEGFUSE_FUNCTOR constexpr int64_t count() const { return last < first ? 0 : last - first + 1; }
};

// Transposed convolution, of which `size` elements from `offset` on are wanted:
//
//   out[p] = sum over q of x[q] w[p + offset - q factor],  0 <= p + offset - q factor < kernel
struct Deconvolution {
  int64_t count, size;  // sources and targets
  int64_t factor, kernel, offset;

  // Of the uncropped result.
  SEGFUSE_FUNCTOR constexpr int64_t full() const { return (count - 1) * factor + kernel; }

  // The sources that reach target p.
  SEGFUSE_FUNCTOR constexpr Range sources(int64_t p) const {
    const int64_t at = p + offset, last = split(at, factor).quotient;
    return {at < kernel ? 0 : split(at - kernel, factor).quotient + 1,
            last < count ? last : count - 1};
  }
  // Which element of the kernel carries source q to target p.
  SEGFUSE_FUNCTOR constexpr int64_t tap(int64_t p, int64_t q) const {
    return p + offset - q * factor;
  }
  // The targets that source q reaches.
  SEGFUSE_FUNCTOR constexpr Range targets(int64_t q) const {
    const int64_t first = q * factor - offset, last = first + kernel - 1;
    return {first < 0 ? 0 : first, last < size ? last : size - 1};
  }
};

// A bilinear kernel's elements along an axis: 1 - |t - centre| / reach.
template <class Acc>
struct BilinearKernel {
  Acc centre, reach;

  SEGFUSE_FUNCTOR constexpr explicit BilinearKernel(int64_t size)
      : centre(static_cast<Acc>(size % 2 == 1 ? (size + 1) / 2 - 1 : size / 2 - Acc(0.5))),
        reach(static_cast<Acc>((size + 1) / 2)) {}

  SEGFUSE_FUNCTOR constexpr Acc operator()(int64_t t) const {
    const Acc away = static_cast<Acc>(t) - centre;
    return 1 - (away < 0 ? -away : away) / reach;
  }
};

// Bilinear interpolation from `count` to `size` elements, as torch's: the outermost source is held
// beyond the border.  With `corners`, first and last elements coincide; else their outer edges do.
template <class Acc>
struct Interpolation {
  struct Place {
    int64_t low, high;  // neighbours; the same at the end, and where nothing is resized
    Acc fraction;       // weight of `high`
  };

  int64_t count;
  bool corners, resizes;
  Acc step;  // sources from one target to the next

  SEGFUSE_FUNCTOR constexpr Interpolation(int64_t count_, int64_t size, bool corners_)
      : count(count_),
        corners(corners_),
        resizes(count_ != size),
        step(!corners_  ? static_cast<Acc>(count_) / static_cast<Acc>(size)
             : size > 1 ? static_cast<Acc>(count_ - 1) / static_cast<Acc>(size - 1)
                        : Acc(0)) {}

  SEGFUSE_FUNCTOR constexpr Place place(int64_t p) const {
    const Acc middle =
        corners ? step * static_cast<Acc>(p) : step * (static_cast<Acc>(p) + Acc(0.5)) - Acc(0.5);
    const Acc at = middle < 0 ? Acc(0) : middle;
    const int64_t below = static_cast<int64_t>(at), low = below < count ? below : count - 1;
    return {low, low + (resizes && low < count - 1), at - static_cast<Acc>(low)};
  }
};

// An axis of an upsampling by either, whose weights are products of two axes'.
template <class Acc>
struct Sampling {
  Deconvolution taps;  // of the bilinear kernel
  BilinearKernel<Acc> kernel;
  Interpolation<Acc> places;
  bool interpolates;

  // From `count` to `size` elements; factor 0: by interpolation.
  Sampling(int64_t count, int64_t size, int64_t factor, int64_t kernel_, int64_t offset,
           bool corners)
      : taps{count, size, factor, kernel_, offset},
        kernel(kernel_),
        places(count, size, corners),
        interpolates(factor == 0) {}

  SEGFUSE_FUNCTOR int64_t count() const { return taps.count; }
  SEGFUSE_FUNCTOR int64_t size() const { return taps.size; }

  // Whether two sources at most reach a target, one behind the other.
  bool pairs() const { return interpolates || taps.kernel <= 2 * taps.factor; }

  // Those two, where pairs(); what has no weight takes no part, be it infinite.
  struct Pair {
    int64_t low, high;
    Acc of_low, of_high;
    bool has_low, has_high;
  };
  SEGFUSE_FUNCTOR Pair pair(int64_t p) const {
    if (interpolates) {
      const auto place = places.place(p);
      return {place.low, place.high, 1 - place.fraction, place.fraction, true, true};
    }
    const Range from = taps.sources(p);
    const bool one = from.count() > 0, two = from.count() > 1;
    const int64_t low = one ? from.first : 0;
    return {low,
            two ? from.last : low,
            one ? kernel(taps.tap(p, low)) : Acc(0),
            two ? kernel(taps.tap(p, from.last)) : Acc(0),
            one,
            two};
  }

  // What source q weighs in target p.
  SEGFUSE_FUNCTOR Acc weight(int64_t p, int64_t q) const {
    if (!interpolates) return kernel(taps.tap(p, q));
    const auto place = places.place(p);
    return (q == place.low ? 1 - place.fraction : Acc(0)) +
           (q == place.high ? place.fraction : Acc(0));
  }

  // The targets that source q reaches.
  SEGFUSE_FUNCTOR Range targets(int64_t q) const {
    if (!interpolates) return taps.targets(q);
    if (!places.resizes) return {q, q};
    return {q == 0 ? 0 : first_from(q - 1), first_from(q + 1) - 1};
  }

 private:
  // The first target whose lower source is q or one behind; `size` where there is none.
  SEGFUSE_FUNCTOR int64_t first_from(int64_t q) const {
    int64_t begin = 0, end = taps.size;
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (places.place(middle).low < q) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }
};

}  // namespace segfuse::SEGFUSE_BACKEND
