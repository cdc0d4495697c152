// Transposed convolution along a row, and its transpose: for the CPU vectors of the processor's, on
// CUDA a thread an element.
//
//   expand      a row of targets from one or more rows of sources
//   correlate   a row of sources' gradients from rows of targets'
//   pair        a row of a kernel's gradients from sources and targets' gradients
//
// The kernel is a table (kernel, kernel) of weights, or bilinear: then sums go along y first.
#pragma once

#include "core/lanes.h"
#include "core/math.h"
#include "core/rows.h"
#include "core/sampler.h"

namespace segfuse::SEGFUSE_BACKEND {

constexpr int64_t longest_kernel = 1024;  // taps along an axis, which the CPU's buffers hold

// Rows of elements, each `below` behind the one before; elements of a row are `step` apart.
template <class T>
struct Plane {
  const T* data;
  int64_t below, step;
  SEGFUSE_FUNCTOR const T* row(int64_t y) const { return data + y * below; }
};

// The weights of a plane: a table, or where there is none, products of bilinear ones.
template <class Acc>
struct Weights {
  const Acc* table;  // (kernel, kernel), or nullptr
  const Acc* taps;   // CPU: the bilinear kernel's elements
  BilinearKernel<Acc> bilinear;
  int64_t kernel;

  SEGFUSE_FUNCTOR const Acc* row(int64_t t) const { return table + t * kernel; }
};

#if SEGFUSE_CUDA_SOURCE

// Targets x to x + n - 1 of row y.
template <class T, class Acc, class N>
SEGFUSE_FUNCTOR void expand(const Deconvolution& rows, const Deconvolution& columns,
                            const Plane<T>& x, const Weights<Acc>& w, int64_t y, int64_t first, N n,
                            Acc* to) {
  const Range from = rows.sources(y);
  for (int i = 0; i < n; ++i) {
    const Range across = columns.sources(first + i);
    Acc sum = 0;
    for (int64_t r = from.first; r <= from.last; ++r) {
      const T* line = x.row(r);
      Acc along = 0;
      for (int64_t q = across.first; q <= across.last; ++q) {
        const int64_t tx = columns.tap(first + i, q);
        const Acc weight = w.table ? w.row(rows.tap(y, r))[tx] : w.bilinear(tx);
        along += static_cast<Acc>(line[q * x.step]) * weight;
      }
      sum += w.table ? along : along * w.bilinear(rows.tap(y, r));
    }
    to[i] = sum;
  }
}

// Gradients of sources first to first + n - 1 of row y.
template <class T, class Acc, class N>
SEGFUSE_FUNCTOR void correlate(const Deconvolution& rows, const Deconvolution& columns,
                               const Plane<T>& grad, const Weights<Acc>& w, int64_t y,
                               int64_t first, N n, Acc* to) {
  const Range down = rows.targets(y);
  for (int i = 0; i < n; ++i) {
    const Range across = columns.targets(first + i);
    Acc sum = 0;
    for (int64_t r = down.first; r <= down.last; ++r) {
      const T* line = grad.row(r);
      Acc along = 0;
      for (int64_t p = across.first; p <= across.last; ++p) {
        const int64_t tx = columns.tap(p, first + i);
        const Acc weight = w.table ? w.row(rows.tap(r, y))[tx] : w.bilinear(tx);
        along += static_cast<Acc>(line[p]) * weight;
      }
      sum += w.table ? along : along * w.bilinear(rows.tap(r, y));
    }
    to[i] = sum;
  }
}

// Adds to the gradients of taps first to first + n - 1 what a row of sources and one of targets
// give.
template <class T, class N>
SEGFUSE_FUNCTOR void pair(const Deconvolution& columns, const T* x, int64_t step, const T* grad,
                          int64_t first, N n, double* to) {
  for (int i = 0; i < n; ++i) {
    Wide<T> sum = 0;
    for (int64_t q = 0; q < columns.count; ++q) {
      const int64_t p = q * columns.factor + first + i - columns.offset;
      if (p < 0) continue;
      if (p >= columns.size) break;
      sum += static_cast<Wide<T>>(x[q * step]) * static_cast<Wide<T>>(grad[p]);
    }
    to[i] += static_cast<double>(sum);
  }
}

#else

// Rows of sources, and a row of weights for each.
template <class Acc, int height>
struct Lines {
  const Acc *line[height], *w[height];
};

// Whole runs of `factor` targets, of two sources a line each: that of the run and the one before.
template <class Acc, int height, class F>
SEGFUSE_FUNCTOR void expand_runs(const Lines<Acc, height>& from, F factor, int64_t runs,
                                 Acc* __restrict to) {
  if constexpr (!std::is_same_v<F, int64_t>) {  // short runs: vectors reach over several
    Acc near[height][factor], far[height][factor];
    for (int h = 0; h < height; ++h) {
      for (int e = 0; e < factor; ++e) {
        near[h][e] = from.w[h][e];
        far[h][e] = from.w[h][factor + e];
      }
    }
    for (int64_t r = 0; r < runs; ++r) {
      for (int e = 0; e < factor; ++e) {
        Acc sum = from.line[0][r] * near[0][e] + from.line[0][r - 1] * far[0][e];
        for (int h = 1; h < height; ++h) {
          sum += from.line[h][r] * near[h][e];
          sum += from.line[h][r - 1] * far[h][e];
        }
        to[r * factor + e] = sum;
      }
    }
  } else {
    constexpr int lanes = 8;
    for (int64_t r = 0; r < runs; ++r, to += factor) {
      int64_t e = 0;
      for (; e + lanes <= factor; e += lanes) {
        Lanes<Acc, lanes> weight, sum;
        sum.clear();
        for (int h = 0; h < height; ++h) {
          weight.load(from.w[h] + e);
          sum.add(from.line[h][r], weight);
          weight.load(from.w[h] + factor + e);
          sum.add(from.line[h][r - 1], weight);
        }
        sum.store(to + e);
      }
      for (; e < factor; ++e) {
        Acc sum = 0;
        for (int h = 0; h < height; ++h) {
          sum += from.line[h][r] * from.w[h][e];
          sum += from.line[h][r - 1] * from.w[h][factor + e];
        }
        to[e] = sum;
      }
    }
  }
}

// Targets first to first + n - 1 from lines that hold the sources from q0 on.  A target's sum is
// taken line by line, the last source first, wherever it lies between first and n: so that a crop
// has the bits of the whole.
template <class Acc, int height>
SEGFUSE_FUNCTOR void expand_lines(const Deconvolution& columns, const Lines<Acc, height>& from,
                                  int64_t q0, int64_t first, int64_t n, Acc* to) {
  const int64_t factor = columns.factor;
  for (int64_t i = 0; i < n;) {
    const Split at = split(first + i + columns.offset, factor);
    const int64_t q = at.quotient;
    if (columns.kernel == 2 * factor && at.remainder == 0 && q > 0 && q < columns.count) {
      const int64_t runs = std::min(columns.count - q, (n - i) / factor);
      Lines<Acc, height> here = from;
      for (auto& line : here.line) line += q - q0;
      if (runs > 0) {
        if (factor == 2) {
          expand_runs(here, std::integral_constant<int, 2>{}, runs, to + i);
        } else if (factor == 4) {
          expand_runs(here, std::integral_constant<int, 4>{}, runs, to + i);
        } else {
          expand_runs(here, factor, runs, to + i);
        }
        i += runs * factor;
        continue;
      }
    }
    const int64_t m = std::min(factor - at.remainder, n - i);
    std::fill_n(to + i, m, Acc(0));
    const Range across = columns.sources(first + i);
    for (int h = 0; h < height; ++h) {
      for (int64_t s = across.last; s >= across.first; --s) {
        const int64_t t = columns.tap(first + i, s), covered = std::min(m, columns.kernel - t);
        const Acc source = from.line[h][s - q0];
        for (int64_t e = 0; e < covered; ++e) to[i + e] += source * from.w[h][t + e];
      }
    }
    i += m;
  }
}

// line (+)= weight source
template <bool adds, class T, class Acc>
SEGFUSE_FUNCTOR void take(const T* source, int64_t step, Acc weight, int64_t n, Acc* line) {
  if (step == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const Acc value = weight * static_cast<Acc>(source[i]);
      line[i] = adds ? line[i] + value : value;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const Acc value = weight * static_cast<Acc>(source[i * step]);
      line[i] = adds ? line[i] + value : value;
    }
  }
}

// Targets first to first + n - 1, at most RowPolicy::width, of row y.
template <class T, class Acc>
SEGFUSE_FUNCTOR void expand(const Deconvolution& rows, const Deconvolution& columns,
                            const Plane<T>& x, const Weights<Acc>& w, int64_t y, int64_t first,
                            int64_t n, Acc* to) {
  const Range down = rows.sources(y);
  const int64_t begin = columns.sources(first).first;
  const int64_t count = columns.sources(first + n - 1).last + 1 - begin;
  if (down.count() == 0 || count <= 0) {
    std::fill_n(to, n, Acc(0));
    return;
  }
  Acc line[2][RowPolicy::width + longest_kernel], more[RowPolicy::width];
  const auto source = [&](int64_t r)
                          __attribute__((always_inline)) { return x.row(r) + begin * x.step; };
  for (int64_t r = down.first; r <= down.last;) {
    Acc* sums = r == down.first ? to : more;
    const int64_t t = rows.tap(y, r);
    const bool two = w.table && r < down.last;
    if (w.table) {
      take<false>(source(r), x.step, Acc(1), count, line[0]);
      if (two) take<false>(source(r + 1), x.step, Acc(1), count, line[1]);
      r += two ? 2 : 1;
    } else {
      take<false>(source(r), x.step, w.taps[t], count, line[0]);
      while (++r <= down.last) {
        take<true>(source(r), x.step, w.taps[rows.tap(y, r)], count, line[0]);
      }
    }
    if (two) {
      const Lines<Acc, 2> from{{line[0], line[1]}, {w.row(t), w.row(t - rows.factor)}};
      expand_lines(columns, from, begin, first, n, sums);
    } else {
      const Lines<Acc, 1> from{{line[0]}, {w.table ? w.row(t) : w.taps}};
      expand_lines(columns, from, begin, first, n, sums);
    }
    for (int64_t i = 0; sums == more && i < n; ++i) to[i] += more[i];
  }
}

// Adds sums of n elements in each of `height` rows, times weights, at `many` places `apart`.
template <int lanes, int many, class Acc>
SEGFUSE_FUNCTOR void dot(const Acc* from, int64_t below, int64_t height, int64_t apart,
                         const Acc* w, int64_t w_below, int64_t n, Acc* to) {
  Lanes<Acc, lanes> sum[many];
  Acc rest[many] = {};
  for (auto& s : sum) s.clear();
  for (int64_t r = 0; r < height; ++r, from += below, w += w_below) {
    int64_t e = 0;
    for (; e + lanes <= n; e += lanes) {
      Lanes<Acc, lanes> weight, value;
      weight.load(w + e);
      for (int m = 0; m < many; ++m) {
        value.load(from + m * apart + e);
        sum[m].add(weight, value);
      }
    }
    for (; e < n; ++e) {
      for (int m = 0; m < many; ++m) rest[m] += w[e] * from[m * apart + e];
    }
  }
  for (int m = 0; m < many; ++m) to[m] += sum[m].total() + rest[m];
}

// Adds to the gradients of sources first to first + n - 1 what `height` rows give, which hold the
// targets from p0 on, with as many rows of weights.
template <int lanes, class Acc>
SEGFUSE_FUNCTOR void correlate_rows(const Deconvolution& columns, const Acc* grad, int64_t p0,
                                    int64_t below, int64_t height, const Acc* w, int64_t w_below,
                                    int64_t first, int64_t n, Acc* to) {
  constexpr int many = 4;
  for (int64_t i = 0; i < n;) {
    const int64_t q = first + i;
    const Range across = columns.targets(q);
    const Acc* from = grad + (across.first - p0);
    if (across.count() == 0) {
      ++i;
    } else if (i + many <= n && across.count() == columns.kernel &&
               columns.targets(q + many - 1).count() == columns.kernel) {
      dot<lanes, many>(from, below, height, columns.factor, w, w_below, columns.kernel, to + i);
      i += many;
    } else {
      const int64_t t = columns.tap(across.first, q);
      dot<lanes, 1>(from, below, height, 0, w + t, w_below, across.count(), to + i++);
    }
  }
}

// to = sum over `height` rows of n elements, each times its weight.
template <class T, class Acc>
SEGFUSE_FUNCTOR void sum_rows(const T* from, int64_t below, int64_t height, const Acc* w, int64_t n,
                              Acc* to) {
  constexpr int lanes = 8, many = 4;
  int64_t i = 0;
  for (; i + many * lanes <= n; i += many * lanes) {
    Lanes<Acc, lanes> sum[many], value;
    for (auto& s : sum) s.clear();
    for (int64_t r = 0; r < height; ++r) {
      for (int m = 0; m < many; ++m) {
        value.load(from + r * below + i + m * lanes);
        sum[m].add(w[r], value);
      }
    }
    for (int m = 0; m < many; ++m) sum[m].store(to + i + m * lanes);
  }
  for (; i < n; ++i) {
    Acc sum = 0;
    for (int64_t r = 0; r < height; ++r) sum += w[r] * static_cast<Acc>(from[r * below + i]);
    to[i] = sum;
  }
}

// Gradients of sources first to first + n - 1 of row y; elements of grad's rows are neighbours.
template <class T, class Acc>
SEGFUSE_FUNCTOR void correlate(const Deconvolution& rows, const Deconvolution& columns,
                               const Plane<T>& grad, const Weights<Acc>& w, int64_t y,
                               int64_t first, int64_t n, Acc* to) {
  std::fill_n(to, n, Acc(0));
  const Range down = rows.targets(y);
  if (down.count() == 0) return;
  constexpr int64_t most = 2 * longest_kernel;
  const bool as_they_are = std::is_same_v<T, Acc> && w.table;
  const int64_t t = rows.tap(down.first, y), height = down.count();
  const int64_t block = as_they_are ? n : (most - columns.kernel) / columns.factor + 1;
  const int64_t passes = as_they_are || !w.table ? 1 : height;  // else a row at a time
  for (int64_t i = 0; i < n; i += block) {
    const int64_t some = std::min(block, n - i);
    const int64_t begin = columns.targets(first + i).first;
    const int64_t end = columns.targets(first + i + some - 1).last + 1;
    for (int64_t pass = 0; pass < passes && begin < end; ++pass) {
      const T* from = grad.row(down.first + pass) + begin;
      Acc line[most];
      const Acc *values = line, *weights = w.table ? w.row(t + pass) : w.taps;
      int64_t below = 0, together = 1;
      if (!w.table) {
        sum_rows(from, grad.below, height, w.taps + t, end - begin, line);
      } else if constexpr (std::is_same_v<T, Acc>) {
        values = from;
        below = grad.below;
        together = height;
      } else {
        take<false>(from, 1, Acc(1), end - begin, line);
      }
      if (columns.kernel % 8 == 0) {
        correlate_rows<8>(columns, values, begin, below, together, weights, w.kernel, first + i,
                          some, to + i);
      } else {
        correlate_rows<4>(columns, values, begin, below, together, weights, w.kernel, first + i,
                          some, to + i);
      }
    }
  }
}

// Gradients of taps t to t + lanes chunks - 1.
template <int lanes, int chunks, class T>
SEGFUSE_FUNCTOR void pair_taps(const Deconvolution& columns, const T* x, int64_t step,
                               const T* grad, int64_t t, double* to) {
  using Acc = Wide<T>;
  constexpr int taps = lanes * chunks, apart = 2;  // sources at once, summed by themselves
  Lanes<Acc, lanes> sum[apart][chunks], value;
  Acc edge[taps] = {};
  for (auto& part : sum) {
    for (auto& s : part) s.clear();
  }
  const auto inside = [&](int64_t q) __attribute__((always_inline)) {
    const int64_t p = q * columns.factor + t - columns.offset;
    return p >= 0 && p + taps <= columns.size;
  };
  for (int64_t q = 0; q < columns.count;) {
    const int64_t p = q * columns.factor + t - columns.offset;
    if (inside(q) && q + 1 < columns.count && inside(q + 1)) {
      for (int a = 0; a < apart; ++a, ++q) {
        const T* from = grad + p + a * columns.factor;
        const Acc source = static_cast<Acc>(x[q * step]);
        for (int c = 0; c < chunks; ++c) {
          value.load(from + c * lanes);
          sum[a][c].add(source, value);
        }
      }
      continue;
    }
    const Acc source = static_cast<Acc>(x[q * step]);
    for (int e = 0; e < taps; ++e) {
      if (p + e >= 0 && p + e < columns.size) edge[e] += source * static_cast<Acc>(grad[p + e]);
    }
    ++q;
  }
  for (int c = 0; c < chunks; ++c) {
    Acc one[lanes], other[lanes];
    sum[0][c].store(one);
    sum[1][c].store(other);
    for (int e = 0; e < lanes; ++e) {
      to[c * lanes + e] += (one[e] + other[e]) + edge[c * lanes + e];
    }
  }
}

// Adds to the gradients of taps first to first + n - 1 what a row of sources and one of targets
// give.
template <class T>
SEGFUSE_FUNCTOR void pair(const Deconvolution& columns, const T* x, int64_t step, const T* grad,
                          int64_t first, int64_t n, double* to) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) pair_taps<8, 4>(columns, x, step, grad, first + i, to + i);
  for (; i + 16 <= n; i += 16) pair_taps<8, 2>(columns, x, step, grad, first + i, to + i);
  for (; i + 4 <= n; i += 4) pair_taps<4, 1>(columns, x, step, grad, first + i, to + i);
  for (; i < n; ++i) pair_taps<1, 1>(columns, x, step, grad, first + i, to + i);
}

#endif

}  // namespace segfuse::SEGFUSE_BACKEND
