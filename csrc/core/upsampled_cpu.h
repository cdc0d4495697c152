// core/upsampled.h on the CPU: rows of sources spread along x, and rows of pixels between two.
#pragma once

#include <memory>

#include "core/spread.h"
#include "core/upsampled.h"

namespace segfuse::SEGFUSE_BACKEND {

struct UpsampledPolicy {
  static constexpr int width = 32;          // pixels that a functor has at once
  static constexpr int64_t values = 49152;  // of two spread rows: 192 KiB of floats
  static constexpr int64_t longest = 512;   // pixels of a strip
  static constexpr int64_t most = 16;       // classes whose gradients are computed together
};

// Uninitialised memory.
template <class Acc>
std::unique_ptr<Acc[]> memory(int64_t values) {
  return std::unique_ptr<Acc[]>(new Acc[values]);
}

// Rows of sources spread along x, some classes at a time.
template <class Acc>
class SpreadRows {
  static constexpr int64_t together = 16;
  static constexpr int lanes = Spread<Acc>::lanes;

  const Coarse<Acc>& coarse_;
  const Spread<Acc>& spread_;
  int64_t step_;
  std::unique_ptr<Acc[]> cells_;

 public:
  SpreadRows(const Coarse<Acc>& coarse, const Spread<Acc>& spread)
      : coarse_(coarse),
        spread_(spread),
        step_(coarse.across.count() + lanes),
        cells_(memory<Acc>(together * step_)) {
    std::fill_n(cells_.get(), together * step_, Acc(0));
  }

  // Groups [g0, g1) of classes [first, last) of a row; group g of the first class goes to at(g),
  // and the next class's `step` on.
  SEGFUSE_FUNCTOR void spread(int64_t n, int64_t row, int64_t first, int64_t last, int64_t g0,
                              int64_t g1, const auto& at, int64_t step) {
    int64_t from = spread_.first[g0], end = from;
    for (int64_t g = g0; g < g1; ++g) {
      from = std::min(from, spread_.first[g]);
      end = std::max(end, spread_.last[g] + 1);
    }
    Acc* cells = cells_.get();
    for (int64_t k = first; k < last; k += together) {
      const int64_t classes = std::min(together, last - k);
      for (int64_t i = 0; i < classes; ++i) {
        const Plane<Acc> plane = coarse_.plane(n, k + i);
        take<false>(plane.row(row) + from * plane.step, plane.step, Acc(1), end - from,
                    cells + i * step_);
      }
      for (int64_t g = g0; g < g1; ++g) {
        spread_.expand(cells, step_, from, g, classes, at(g) + (k - first) * step, step);
      }
    }
  }
};

// All classes of some pixels, as sums of two spread rows.
template <class Acc>
struct ScoreBlock {
  const Acc *low, *high;
  Acc of_low, of_high;
  SEGFUSE_FUNCTOR Acc operator()(int64_t k, int64_t i) const {
    const int64_t at = k * UpsampledPolicy::width + i;
    return low[at] * of_low + high[at] * of_high;
  }
};

// Spread rows of a strip of pixels, all classes: blocks of `width` pixels, class by class.
template <class Acc>
class Strip {
  static constexpr int width = UpsampledPolicy::width, lanes = Spread<Acc>::lanes;

  const Coarse<Acc>& coarse_;
  SpreadRows<Acc> rows_;
  const bool pairs_;
  int64_t blocks_;
  std::unique_ptr<Acc[]> lines_[2], zeros_;
  int64_t held_[2] = {-1, -1};
  int64_t image_ = -1, begin_ = -1;

 public:
  Strip(const Coarse<Acc>& coarse, const Spread<Acc>& spread, int64_t pixels)
      : coarse_(coarse),
        rows_(coarse, spread),
        pairs_(coarse.down.pairs() && !coarse.weights.table),
        blocks_((pixels + width - 1) / width) {
    const int64_t values = coarse.classes * width;
    for (int i = 0; i < (pairs_ ? 2 : 1); ++i) lines_[i] = memory<Acc>(blocks_ * values);
    zeros_ = memory<Acc>(values);
    std::fill_n(zeros_.get(), values, Acc(0));
  }

  // Calls f for the pixels [begin, end) of a row.
  template <class F>
  SEGFUSE_FUNCTOR void row(const F& f, int64_t n, int64_t y, int64_t begin, int64_t end,
                           typename F::Sum& sum) {
    if (n != image_ || begin != begin_) held_[0] = held_[1] = -1;
    image_ = n;
    begin_ = begin;
    const int64_t values = coarse_.classes * width;
    ScoreBlock<Acc> block{zeros_.get(), zeros_.get(), Acc(0), Acc(0)};
    int64_t low_step = 0, high_step = 0;
    if (!pairs_) {
      compute(y, begin, end);
      block.low = lines_[0].get();
      block.of_low = 1;
      low_step = values;
    } else {
      const auto pair = coarse_.down.pair(y);
      if (pair.has_low) {
        block.low = line(pair.low, begin, end);
        block.of_low = pair.of_low;
        low_step = values;
      }
      if (pair.has_high) {
        block.high = line(pair.high, begin, end);
        block.of_high = pair.of_high;
        high_step = values;
      }
    }
    for (int64_t x = begin; x < end; x += width) {
      f(Pixel{{n, 0, y, x}}, std::min<int64_t>(width, end - x), block, sum);
      block.low += low_step;
      block.high += high_step;
    }
  }

 private:
  // A row of sources spread: the two that a row of pixels has follow each other.
  SEGFUSE_FUNCTOR const Acc* line(int64_t row, int64_t begin, int64_t end) {
    const int slot = row % 2;
    Acc* to = lines_[slot].get();
    if (held_[slot] == row) return to;
    held_[slot] = row;
    const int64_t g0 = begin / lanes;
    const auto at = [&](int64_t g) {
      const int64_t x = (g - g0) * lanes;
      return to + x / width * coarse_.classes * width + x % width;
    };
    rows_.spread(image_, row, 0, coarse_.classes, g0, (end + lanes - 1) / lanes, at, width);
    return to;
  }

  // A row of pixels.
  SEGFUSE_FUNCTOR void compute(int64_t y, int64_t begin, int64_t end) {
    Acc* to = lines_[0].get();
    for (int64_t k = 0; k < coarse_.classes; ++k) {
      Acc values[RowPolicy::width];
      expand(coarse_.down.taps, coarse_.across.taps, coarse_.plane(image_, k),
             coarse_.weights_of(k), y, begin, end - begin, values);
      for (int64_t i = 0; i < end - begin; ++i) {
        to[(i / width * coarse_.classes + k) * width + i % width] = values[i];
      }
    }
  }
};

// How often work of `pieces` is to be divided for all threads to have some.
inline int64_t bands_for(int64_t pieces, int64_t rows, int64_t shortest) {
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads == 1 ? 1 : 3 * threads;
  return std::clamp<int64_t>((wanted + pieces - 1) / std::max<int64_t>(pieces, 1), 1,
                             std::max<int64_t>(rows / shortest, 1));
}

template <class F>
int64_t for_each_pixel(const F& f, const Tensor&) {
  using Acc = typename F::Acc;
  using Sum = typename F::Sum;
  const auto& coarse = f.coarse;
  const int64_t height = coarse.down.size(), width = coarse.across.size();
  constexpr int64_t block = UpsampledPolicy::width, longest = UpsampledPolicy::longest;
  const int64_t room = UpsampledPolicy::values / 2 / coarse.classes / block * block;
  const int64_t most = std::clamp<int64_t>(room, block, longest);
  const int64_t fewest = std::max<int64_t>((width + most - 1) / most, 1);
  const int64_t length = (width + fewest * block - 1) / (fewest * block) * block;  // much alike
  const int64_t strips = (width + length - 1) / std::max<int64_t>(length, 1);
  const int64_t pieces = coarse.batch * strips;
  std::vector<Sum> partial(std::is_empty_v<Sum> ? 0 : pieces * height);
  if (pieces * height > 0) {
    const Spread<Acc> spread(coarse.across);
    // A band spreads the row before its first once more.
    const int64_t rows = std::max<int64_t>(4 * height / coarse.down.count(), 1);
    const int64_t bands = bands_for(pieces, height, rows);
    parallel(pieces * bands, 1,
             [&, partial = partial.data()](int64_t begin, int64_t end)
                 __attribute__((always_inline)) {
                   Strip strip(coarse, spread, std::min(length, width));
                   for (int64_t task = begin; task < end; ++task) {
                     const Split piece = split(task, bands), at = split(piece.quotient, strips);
                     const int64_t x = at.remainder * length, stop = std::min(x + length, width);
                     const int64_t first = piece.remainder * height / bands;
                     const int64_t last = (piece.remainder + 1) * height / bands;
                     for (int64_t y = first; y < last; ++y) {
                       Sum sum{};
                       strip.row(f, at.quotient, y, x, stop, sum);
                       if constexpr (!std::is_empty_v<Sum>) {
                         partial[piece.quotient * height + y] = sum;
                       }
                     }
                   }
                 });
  }
  if constexpr (!std::is_empty_v<Sum>) {
    Sum total{};
    for (const Sum& sum : partial) total += sum;
    f.write(total);
    return total.wrong;
  }
  return 0;
}

// Arrays for a row of pixels' terms; those behind the row are of pixels without gradients.
template <class Acc>
struct TermsRow {
  std::unique_ptr<Acc[]> values;
  std::unique_ptr<int[]> ids;
  PixelTerms<Acc> terms;

  explicit TermsRow(int64_t width) : values(memory<Acc>(4 * width)), ids(memory<int>(width)) {
    Acc* at = values.get();
    terms = {at, at + width, at + 2 * width, at + 3 * width, ids.get()};
    std::fill_n(at, 4 * width, Acc(0));
    std::fill_n(ids.get(), width, -1);
  }
};

// Gradients of some classes of an image and some rows of sources, by pairs of spread rows.
template <class F>
class PairedGradient {
  using Acc = typename F::Acc;
  using Pair = typename Sampling<Acc>::Pair;
  static constexpr int lanes = Spread<Acc>::lanes, block = UpsampledPolicy::width;
  static constexpr int together = 4;  // rows of pixels of one pair of rows of sources, at most

  const F& f_;
  const Spread<Acc>& spread_;
  const Gathered<Acc>& gathered_;
  Acc* out_;
  int64_t width_, padded_;
  SpreadRows<Acc> rows_;
  std::vector<TermsRow<Acc>> terms_;
  std::unique_ptr<Acc[]> lines_[2], sums_[2];  // of each class: two rows and their gradients
  std::unique_ptr<Acc[]> zeros_, waste_;

 public:
  PairedGradient(const F& f, const Spread<Acc>& spread, const Gathered<Acc>& gathered, Acc* out,
                 int64_t classes)
      : f_(f),
        spread_(spread),
        gathered_(gathered),
        out_(out),
        width_(f.coarse.across.size()),
        padded_((width_ + block - 1) / block * block + gathered.taps),
        rows_(f.coarse, spread),
        zeros_(memory<Acc>(padded_)),
        waste_(memory<Acc>(padded_)) {
    const int64_t rows = UpsampledPolicy::values / 5 / padded_;  // as many bytes as lines have
    for (int i = 0; i < std::clamp<int64_t>(rows, 1, together); ++i) terms_.emplace_back(padded_);
    for (auto& line : lines_) line = memory<Acc>(classes * padded_);
    for (auto& line : lines_) std::fill_n(line.get(), classes * padded_, Acc(0));
    for (auto& sum : sums_) sum = memory<Acc>(classes * padded_);
    std::fill_n(zeros_.get(), padded_, Acc(0));
    std::fill_n(waste_.get(), padded_, Acc(0));
  }

  // Classes [first, last) and rows of sources [begin, end) of image n.
  SEGFUSE_FUNCTOR void run(int64_t n, int64_t first, int64_t last, int64_t begin, int64_t end) {
    const auto& down = f_.coarse.down;
    const int64_t most = terms_.size();
    int64_t held[2] = {-1, -1}, next = begin, rows = 1;
    for (auto& sum : sums_) std::fill_n(sum.get(), (last - first) * padded_, Acc(0));
    const Range top = reached(begin, end);
    for (int64_t y = top.first; y <= top.last; y += rows) {
      const Pair pair = down.pair(y);
      Acc of_low[together]{pair.of_low}, of_high[together]{pair.of_high};
      for (rows = 1; rows < most && y + rows <= top.last; ++rows) {
        const Pair other = down.pair(y + rows);
        if (other.low != pair.low || other.high != pair.high || other.has_low != pair.has_low ||
            other.has_high != pair.has_high) {
          break;
        }
        of_low[rows] = other.of_low;
        of_high[rows] = other.of_high;
      }
      if (!pair.has_low) continue;  // no source, so that there is no gradient
      while (next < std::min(pair.low, end)) flush(n, first, last, next++);
      for (const int64_t source : {pair.low, pair.high}) {
        if (held[source % 2] == source) continue;
        held[source % 2] = source;
        Acc* to = lines_[source % 2].get();
        const auto at = [&](int64_t g) { return to + g * lanes; };
        rows_.spread(n, source, first, last, 0, spread_.groups, at, padded_);
      }
      for (int64_t r = 0; r < rows; ++r) {
        f_.read(Pixel{{n, 0, y + r, 0}}, width_, terms_[r].terms);
      }
      const auto inside = [&](int64_t q) { return q >= begin && q < end; };
      for (int64_t k = first; k < last; ++k) {
        const int64_t at = (k - first) * padded_;
        add(k, rows, lines_[pair.low % 2].get() + at,
            pair.has_high ? lines_[pair.high % 2].get() + at : zeros_.get(), of_low, of_high,
            inside(pair.low) ? sums_[pair.low % 2].get() + at : waste_.get(),
            pair.has_high && inside(pair.high) ? sums_[pair.high % 2].get() + at : waste_.get());
      }
    }
    while (next < end) flush(n, first, last, next++);
  }

 private:
  // The rows of pixels that rows [begin, end) of sources reach.
  SEGFUSE_FUNCTOR Range reached(int64_t begin, int64_t end) const {
    const auto& down = f_.coarse.down;
    if (down.interpolates) return {down.targets(begin).first, down.targets(end - 1).last};
    Range all{down.size(), -1};
    for (int64_t q = begin; q < end; ++q) {
      const Range one = down.targets(q);
      if (one.count() == 0) continue;
      all = {std::min(all.first, one.first), std::max(all.last, one.last)};
    }
    return all;
  }

  // Rows of pixels of class k: scores, their gradients, and those added to two rows', which may be
  // one and the same.
  SEGFUSE_FUNCTOR void add(int64_t k, int64_t rows, const Acc* low, const Acc* high,
                           const Acc* of_low, const Acc* of_high, Acc* to_low, Acc* to_high) const {
    for (int64_t x = 0; x < width_; x += block) {
      Acc value[block], sum_low[block], sum_high[block];
      for (int64_t r = 0; r < rows; ++r) {
        for (int i = 0; i < block; ++i) {
          value[i] = low[x + i] * of_low[r] + high[x + i] * of_high[r];
        }
        f_.differentiate(k, std::integral_constant<int, block>{}, terms_[r].terms.from(x), value);
        if (r == 0) {
          for (int i = 0; i < block; ++i) sum_low[i] = of_low[0] * value[i];
          for (int i = 0; i < block; ++i) sum_high[i] = of_high[0] * value[i];
        } else {
          for (int i = 0; i < block; ++i) sum_low[i] += of_low[r] * value[i];
          for (int i = 0; i < block; ++i) sum_high[i] += of_high[r] * value[i];
        }
      }
      for (int i = 0; i < block; ++i) to_low[x + i] += sum_low[i];
      for (int i = 0; i < block; ++i) to_high[x + i] += sum_high[i];
    }
  }

  // Row q of sources has all its pixels.
  SEGFUSE_FUNCTOR void flush(int64_t n, int64_t first, int64_t last, int64_t q) {
    const auto& coarse = f_.coarse;
    for (int64_t k = first; k < last; ++k) {
      Acc* sum = sums_[q % 2].get() + (k - first) * padded_;
      const int64_t row = (n * coarse.classes + k) * coarse.down.count() + q;
      gathered_.sum(sum, out_ + row * coarse.across.count());
      std::fill_n(sum, padded_, Acc(0));
    }
  }
};

// Rows of pixels' gradients of a class, whatever the kernel; there `body` has them.
template <class F>
class RowsOfGradient {
  using Acc = typename F::Acc;
  const F& f_;
  int64_t width_;
  TermsRow<Acc> row_;
  std::unique_ptr<Acc[]> values_;

 public:
  explicit RowsOfGradient(const F& f)
      : f_(f), width_(f.coarse.across.size()), row_(width_), values_(memory<Acc>(width_)) {}

  // Calls body(y, gradients) for each row of image n.
  SEGFUSE_FUNCTOR void run(int64_t n, int64_t k, const auto& body) {
    const auto& coarse = f_.coarse;
    Acc* values = values_.get();
    for (int64_t y = 0; y < coarse.down.size(); ++y) {
      f_.read(Pixel{{n, 0, y, 0}}, width_, row_.terms);
      for (int64_t x = 0; x < width_; x += RowPolicy::width) {
        const int64_t some = std::min<int64_t>(RowPolicy::width, width_ - x);
        expand(coarse.down.taps, coarse.across.taps, coarse.plane(n, k), coarse.weights_of(k), y, x,
               some, values + x);
      }
      f_.differentiate(k, width_, row_.terms, values);
      body(y, static_cast<const Acc*>(values));
    }
  }
};

template <class F>
void gradient_of_scores(const F& f, const Tensor& out) {
  using Acc = typename F::Acc;
  const auto& coarse = f.coarse;
  Acc* to = out.mutable_data_ptr<Acc>();
  const int64_t rows = coarse.down.count(), columns = coarse.across.count();
  if (out.numel() == 0) return;
  if (coarse.down.size() == 0 || coarse.across.size() == 0) {
    std::fill_n(to, out.numel(), Acc(0));
    return;
  }
  if (coarse.down.pairs() && !coarse.weights.table) {
    const Spread<Acc> spread(coarse.across);
    const Gathered<Acc> gathered(coarse.across);
    const int64_t room = UpsampledPolicy::values / 4 / coarse.across.size();
    const int64_t most = std::clamp<int64_t>(room, 1, UpsampledPolicy::most);
    const int64_t blocks = (coarse.classes + most - 1) / most, pieces = coarse.batch * blocks;
    const int64_t bands = bands_for(pieces, rows, 8);
    const int64_t classes = (coarse.classes + blocks - 1) / blocks;
    parallel(pieces * bands, 1, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      PairedGradient<F> work(f, spread, gathered, to, classes);
      for (int64_t task = begin; task < end; ++task) {
        const Split piece = split(task, bands), at = split(piece.quotient, blocks);
        work.run(at.quotient, at.remainder * coarse.classes / blocks,
                 (at.remainder + 1) * coarse.classes / blocks, piece.remainder * rows / bands,
                 (piece.remainder + 1) * rows / bands);
      }
    });
    return;
  }
  // A row's gradients go to all the rows of sources that it has.
  const auto &down = coarse.down.taps, &across = coarse.across.taps;
  parallel(coarse.batch * coarse.classes, 1,
           [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
             RowsOfGradient<F> work(f);
             for (int64_t task = begin; task < end; ++task) {
               const Split at = split(task, coarse.classes);
               const Weights<Acc> w = coarse.weights_of(at.remainder);
               Acc* plane = to + task * rows * columns;
               std::fill_n(plane, rows * columns, Acc(0));
               work.run(at.quotient, at.remainder,
                        [&](int64_t y, const Acc* gradients) __attribute__((always_inline)) {
                          const Range from = down.sources(y);
                          for (int64_t q = from.first; q <= from.last; ++q) {
                            correlate_rows<4>(across, gradients, 0, 0, 1, w.row(down.tap(y, q)), 0,
                                              0, columns, plane + q * columns);
                          }
                        });
             }
           });
}

template <class F>
void gradient_of_weight(const F& f, const Tensor& out) {
  using Acc = typename F::Acc;
  const auto& coarse = f.coarse;
  Acc* to = out.mutable_data_ptr<Acc>();
  const auto &down = coarse.down.taps, &across = coarse.across.taps;
  const int64_t kernel = coarse.weights.kernel, taps = kernel * kernel;
  parallel(coarse.classes, 1, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    RowsOfGradient<F> work(f);
    const auto sums = memory<double>(taps);
    const auto row = memory<Acc>(across.count);
    for (int64_t k = begin; k < end; ++k) {
      std::fill_n(sums.get(), taps, 0.0);
      for (int64_t n = 0; n < coarse.batch; ++n) {
        const auto plane = coarse.plane(n, k);
        work.run(n, k, [&](int64_t y, const Acc* gradients) __attribute__((always_inline)) {
          const Range from = down.sources(y);
          for (int64_t q = from.first; q <= from.last; ++q) {
            take<false>(plane.row(q), plane.step, Acc(1), across.count, row.get());
            pair(across, static_cast<const Acc*>(row.get()), 1, gradients, 0, kernel,
                 sums.get() + down.tap(y, q) * kernel);
          }
        });
      }
      for (int64_t t = 0; t < taps; ++t) to[k * taps + t] = static_cast<Acc>(sums[t]);
    }
  });
}

}  // namespace segfuse::SEGFUSE_BACKEND
