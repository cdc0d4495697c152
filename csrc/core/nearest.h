// From every pixel to the nearest label and to the nearest of another label: squared distances and
// ids, exact, in time linear in the pixels whatever the labels are.
//
// Method, axis by axis.  A pixel needs of each line through it two features alone: the nearest, and
// the nearest of another label.  Say B is a pixel's second nearest label, its feature in column c,
// and c kept features P and Q in its place.  Neither is farther than B along c, and one of them is
// not of the nearest label: it ties with B and stands in for it.
//
//   1 Sweep.  Along the first axis a pass each way finds both features by their offsets.
//   2 Envelopes, along each further axis.  Squared distances to the columns' nearest features are
//     parabolas; their lower envelope (Felzenszwalb and Huttenlocher 2012; Meijster et al. 2000)
//     cuts the line into runs of one nearest label.  In a run [s, e] of label A, the second label
//     is the envelope of each column's best feature that is not A's.  With w(x) the column that won
//     x, only columns w(s-1) to w(e+1) can be on it: w(s-1) is not A's and is lowest of all at s-1,
//     and any parabola from farther left only rises against it from there on; likewise on the
//     right.  w is monotone, so that these ranges cover a column about twice: linear in all.
//   3 A line may be cut into bands, each alone: `seek` finds the winners at a band's ends,
//   outwards,
//     and they bound its columns by the same argument.
//
// Distances are integers wherever the sizes allow (`Whole`), else float64, exact for integers too.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "core/dtype.h"
#include "core/lines.h"

namespace segfuse::SEGFUSE_BACKEND {

struct Place {
  int64_t n, z, y, x;
};

// Sizes of labels (N, *S) as (N, Z, Y, X); of two axes they are Z and X, and of one X.
struct Frame {
  int64_t n, z = 1, y = 1, x;

  explicit Frame(const Tensor& labels) : n(labels.size(0)), x(labels.size(labels.dim() - 1)) {
    if (labels.dim() > 2) z = labels.size(1);
    if (labels.dim() > 3) y = labels.size(2);
  }
  SEGFUSE_FUNCTOR int64_t index(const Place& p) const {
    return ((p.n * z + p.z) * y + p.y) * x + p.x;
  }
  SEGFUSE_FUNCTOR int64_t count() const { return n * z * y * x; }
  // The line along x of a number, and along y, neighbours in x following each other.
  SEGFUSE_FUNCTOR Place line_along_x(int64_t i) const {
    const Split at = split(i, y), above = split(at.quotient, z);
    return {above.quotient, above.remainder, at.remainder, 0};
  }
  SEGFUSE_FUNCTOR Place line_along_y(int64_t i) const {
    const Split at = split(i, x), above = split(at.quotient, z);
    return {above.quotient, above.remainder, 0, at.remainder};
  }
};

// Labels of any integer dtype and strides, as unsigned numbers L; some may be ignored.
struct Labels {
  static constexpr int most_ignored = 8;

  const void* data;
  int bytes;
  int64_t n, z = 0, y = 0, x;  // elements between neighbours
  int ignored = 0;
  uint64_t ignore[most_ignored] = {};

  explicit Labels(const Tensor& t, const std::vector<int64_t>& ignore_ = {})
      : data(t.const_data_ptr()),
        bytes(static_cast<int>(t.element_size())),
        n(t.stride(0)),
        x(t.stride(t.dim() - 1)) {
    if (t.dim() > 2) z = t.stride(1);
    if (t.dim() > 3) y = t.stride(2);
    for (const int64_t id : ignore_) {
      ignore[ignored++] = static_cast<uint64_t>(id) & (~uint64_t{0} >> (64 - 8 * bytes));
    }
  }

  SEGFUSE_FUNCTOR int64_t offset(const Place& p) const {
    return p.n * n + p.z * z + p.y * y + p.x * x;
  }

  // Of n pixels along x.
  template <class L, class N>
  SEGFUSE_FUNCTOR void read_all(const Place& p, N n, L* to) const {
    if constexpr (sizeof(L) == 8) {
      convert(static_cast<const uint64_t*>(data) + offset(p), n, to);
    } else if (bytes == 4) {
      convert(static_cast<const uint32_t*>(data) + offset(p), n, to);
    } else if (bytes == 2) {
      convert(static_cast<const uint16_t*>(data) + offset(p), n, to);
    } else {
      convert(static_cast<const uint8_t*>(data) + offset(p), n, to);
    }
  }
  // The same, 0 where ignored.
  template <class L, class N>
  SEGFUSE_FUNCTOR void read(const Place& p, N n, L* to) const {
    read_all(p, n, to);
    replace_ignored(n, to, to, L(0));
  }
  // Puts `by` into values where a label, as read_all gives it, is ignored.
  template <class L, class N, class T>
  SEGFUSE_FUNCTOR void replace_ignored(N n, const L* from, T* values, T by) const {
    for (int k = 0; k < ignored; ++k) {
      const auto id = static_cast<L>(ignore[k]);
      for (int64_t i = 0; i < n; ++i) values[i] = from[i] == id ? by : values[i];
    }
  }
  template <class L>
  SEGFUSE_FUNCTOR L at(const Place& p) const {
    L label;
    read(p, std::integral_constant<int, 1>{}, &label);
    return label;
  }

 private:
  template <class From, class L, class N>
  SEGFUSE_FUNCTOR void convert(const From* __restrict from, N n, L* __restrict to) const {
    if (x == 1) {
      for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = from[i * x];
    }
  }
};

// What a computation is made of: stored offsets, squared distances, ids.
template <class Offset_, class Square_, class Id_>
struct Kinds {
  using Offset = Offset_;
  using Square = Square_;
  using Id = Id_;
  static constexpr Offset none = std::numeric_limits<Offset>::min();  // no feature
  static constexpr bool whole = std::is_integral_v<Square>;
  // The squared distance of no feature, which sums of a few others do not reach.
  static constexpr Square never = whole ? (1 << 30) - 1 : std::numeric_limits<Square>::max() / 4;
  static constexpr Square highest = whole ? never - 1 : never / 2;

  // scale d^2 + h; whole distances are in pixels.
  SEGFUSE_FUNCTOR static Square parabola(int d, Square scale, Square h) {
    if constexpr (whole) {
      return Square(d) * d + h;
    } else {
      return scale * d * d + h;
    }
  }
};

// Whether squared distances in pixels, a block's surplus included, fit into 30 bits.
inline bool fits_whole(const Frame& f) {
  constexpr int64_t longest = 32767, most = 1 << 30;
  const int64_t x = f.x + LinePolicy::block;
  return std::max({f.z, f.y, x}) <= longest && f.z * f.z + f.y * f.y + x * x < most;
}

// What the sweep finds along z, for every pixel.
template <class K>
struct Swept {
  using Offset = typename K::Offset;
  using Square = typename K::Square;
  using Id = typename K::Id;
  Labels labels;
  Frame frame;
  Offset *nearest, *other;  // offsets to the nearest feature and to that of another label
  Id* id;                   // the label of the first
  int reach;                // features farther than this are dropped
  Square scale;             // the squared spacing along z

  template <class N>
  SEGFUSE_FUNCTOR void operator()(int64_t group, int64_t first, N n) const {
    const Split at = split(group, frame.y);
    Place p{at.quotient, 0, at.remainder, first};
    const int64_t step = frame.y * frame.x, bytes = n * sizeof(Offset);
    Offset* to = nearest + frame.index(p);
    Offset* to_other = other + frame.index(p);
    Id* to_id = id + frame.index(p);
    const auto limit = static_cast<Offset>(reach + 1);
    Strip met(limit), above(limit);
    for (p.z = 0; p.z < frame.z; ++p.z) {
      labels.read(p, n, met.label);
      met.advance(limit);
      std::memcpy(to, met.distance, bytes);
      std::memcpy(to_other, met.other, bytes);
      std::memcpy(to_id, met.last, n * sizeof(Id));
      to += step, to_other += step, to_id += step;
    }
    met = Strip(limit);
    while (--p.z >= 0) {
      to -= step, to_other -= step, to_id -= step;
      labels.read(p, n, met.label);
      met.advance(limit);
      std::memcpy(above.distance, to, bytes);
      std::memcpy(above.other, to_other, bytes);
      std::memcpy(above.last, to_id, n * sizeof(Id));
      above.join(met, limit);
      std::memcpy(to, above.distance, bytes);
      std::memcpy(to_other, above.other, bytes);
      std::memcpy(to_id, above.last, n * sizeof(Id));
    }
  }

  // A line of what was found, along x or along y.
  template <bool along_x>
  struct Line {
    const Swept* swept;
    Place start;
    const Offset *nearest, *other;
    const Id* id;

    SEGFUSE_FUNCTOR int64_t at(int c) const { return along_x ? c : c * swept->frame.x; }
    SEGFUSE_FUNCTOR Square first(int c) const { return swept->square(nearest[at(c)]); }
    SEGFUSE_FUNCTOR Square second(int c) const { return swept->square(other[at(c)]); }
    SEGFUSE_FUNCTOR Square besides(int c, Id label) const {
      const Square a = swept->square(nearest[at(c)]), b = swept->square(other[at(c)]);
      return id[at(c)] == label ? b : a;
    }
    SEGFUSE_FUNCTOR Id first_id(int c) const { return id[at(c)]; }
    SEGFUSE_FUNCTOR Id second_id(int c) const {
      Place p = start;
      (along_x ? p.x : p.y) = c;
      p.z += other[at(c)];
      return swept->labels.template at<Id>(p);
    }
  };
  template <bool along_x>
  SEGFUSE_FUNCTOR Line<along_x> line(const Place& start) const {
    const int64_t from = frame.index(start);
    return {this, start, nearest + from, other + from, id + from};
  }

  SEGFUSE_FUNCTOR Square square(Offset o) const {
    if constexpr (K::whole) {
      const Square found = Square(o) * Square(o);
      return found < K::never ? found : K::never;  // as none's is above
    } else {
      return o == K::none ? K::never : Square(o) * Square(o) * scale;
    }
  }

 private:
  // What the pass so far has met, in lines side by side: the newest label, how far back it was last
  // and how far back another was, `limit` for none.  All of a strip is computed, whatever part of
  // it is used, by loops of a length that the compiler knows.
  struct Strip {
    static constexpr int width = LinePolicy::strip;
    alignas(64) Offset distance[width], other[width];
    alignas(64) Id last[width], label[width];

    SEGFUSE_FUNCTOR explicit Strip(Offset limit) {
      for (int i = 0; i < width; ++i) distance[i] = other[i] = limit, last[i] = label[i] = 0;
    }

    // Goes on to the pixels of `label`.
    SEGFUSE_FUNCTOR void advance(Offset limit) {
      for (int i = 0; i < width; ++i) {
        const auto a = static_cast<Offset>(distance[i] + (distance[i] < limit));
        const auto b = static_cast<Offset>(other[i] + (other[i] < limit));
        const Id newest = label[i] ? label[i] : last[i];
        other[i] = newest != last[i] ? a : b;
        distance[i] = label[i] ? Offset(0) : a;
        last[i] = newest;
      }
    }

    // From what lies above to what is nearest, above or below, in offsets.
    SEGFUSE_FUNCTOR void join(const Strip& below, Offset limit) {
      for (int i = 0; i < width; ++i) {
        const Offset a = distance[i], b = below.distance[i];
        const bool up = a <= b, alike = last[i] == below.last[i];
        const Offset second_up = alike | up ? other[i] : a;
        const Offset second_down = alike | !up ? below.other[i] : b;
        const bool other_up = second_up <= second_down;
        const Offset nearest = up ? a : b, second = other_up ? second_up : second_down;
        const auto signed_nearest = static_cast<Offset>(up ? -nearest : nearest);
        const auto signed_second = static_cast<Offset>(other_up ? -second : second);
        distance[i] = nearest == limit ? K::none : signed_nearest;
        other[i] = second == limit ? K::none : signed_second;
        last[i] = up ? last[i] : below.last[i];
      }
    }
  };
};

// Squared distances and ids of both labels, pixel by pixel.
template <class K>
struct Planes {
  using Square = typename K::Square;
  using Id = typename K::Id;

  Frame frame;
  Square* square[2];
  Id* id[2];

  // A line of them along x.
  struct Line {
    const Square* square[2];
    const Id* id[2];
    SEGFUSE_FUNCTOR Square first(int c) const { return square[0][c]; }
    SEGFUSE_FUNCTOR Square second(int c) const { return square[1][c]; }
    SEGFUSE_FUNCTOR Square besides(int c, Id label) const {
      const Square a = first(c), b = second(c);
      return id[0][c] == label ? b : a;
    }
    SEGFUSE_FUNCTOR Id first_id(int c) const { return id[0][c]; }
    SEGFUSE_FUNCTOR Id second_id(int c) const { return id[1][c]; }
  };
  template <bool along_x>
  SEGFUSE_FUNCTOR Line line(const Place& start) const {
    static_assert(along_x);
    const int64_t from = frame.index(start);
    return {{square[0] + from, square[1] + from}, {id[0] + from, id[1] + from}};
  }
};

// Parabolas of an envelope: the column and the first pixel of each.  First pixels differ, so that
// there are no more than a band has pixels.
struct Stack {
  static constexpr int room = 2 * sizeof(int);  // bytes a pixel of the band
  int *column, *start;
};

constexpr int few = 16;  // columns, of which fewer are best taken one by one

// Calls f(c, height(c)) for columns lo <= c <= hi, from left to right: for all, up to `highest`,
// whose parabolas scale (x - c)^2 + height(c) may be lowest anywhere.
#if SEGFUSE_CUDA_SOURCE

template <class K>
SEGFUSE_FUNCTOR void for_each_candidate(const auto& height, typename K::Square,
                                        typename K::Square highest, int lo, int hi, const auto& f) {
  for (int c = lo; c <= hi; ++c) {
    const typename K::Square h = height(c);
    if (h <= highest) f(c, h);
  }
}

#else

// Bits of 64 bytes that are 0 or 1.
SEGFUSE_FUNCTOR uint64_t pack(const char (&bytes)[64]) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, bytes + i, 8);  // the first is the lowest: of little-endian machines
    bits |= (eight * 0x0102040810204080) >> 56 << i;  // byte k times 2^(56 - 7 k) is bit 56 + k
  }
  return bits;
}

// Vectors sieve out most of those that an envelope would take up and drop again.  Between columns
// c - k and c + k, the parabola of c is lowest nowhere if
//
//   2 height(c) >= height(c - k) + height(c + k) + 2 scale k^2
//
// One, three and eight columns apart find nearly all that more distances would.
template <class K>
SEGFUSE_FUNCTOR void for_each_candidate(const auto& height, typename K::Square scale,
                                        typename K::Square highest, int lo, int hi, const auto& f) {
  using Square = typename K::Square;
  constexpr int block = 64, apart[] = {1, 3, 8}, most = 8;
  if (hi - lo < few) {
    for (int c = lo; c <= hi; ++c) {
      const Square h = height(c);
      if (h <= highest) f(c, h);
    }
    return;
  }
  Square values[block + 2 * most];
  for (int first = lo; first <= hi; first += block) {
    const int begin = std::max(lo, first - most), end = std::min(hi + 1, first + block + most);
    if (end - begin < block + 2 * most) std::fill(std::begin(values), std::end(values), K::never);
    for (int c = begin; c < end; ++c) values[c - first + most] = height(c);
    char candidate[block];
    for (int i = 0; i < block; ++i) {
      const Square* here = values + most + i;
      bool below = true;
      for (const int k : apart) {
        below &= (*here - here[-k]) + (*here - here[k]) < 2 * scale * k * k;
      }
      candidate[i] = below & (*here <= highest);
    }
    for (uint64_t left = pack(candidate); left != 0; left &= left - 1) {
      const int i = __builtin_ctzll(left);
      f(first + i, values[most + i]);
    }
  }
}

#endif

// The lower envelope on pixels s to e of scale (x - c)^2 + height(c), lo <= c <= hi, of heights up
// to `highest`: entry k is lowest from its start on.  Returns how many there are.
template <class K>
SEGFUSE_FUNCTOR int envelope(const auto& height, typename K::Square scale,
                             typename K::Square highest, int lo, int hi, int s, int e,
                             const Stack& stack) {
  using Square = typename K::Square;
  int count = 0, top = 0, top_start = 0;  // the top of the stack, in registers
  Square top_height = 0;
  for_each_candidate<K>(height, scale, highest, lo, hi, [&](int c, Square h) {
    int from = s;
    // A label's own pixels are each their own column's.
    if (h == 0 && top_height == 0 && count > 0 && top == c - 1) from = std::max(s, c);
    while (count > 0 && from == s) {
      // The top survives at its start: both then cross there or to the right of it.
      if (K::parabola(top_start - top, scale, top_height) <= K::parabola(top_start - c, scale, h)) {
        if constexpr (K::whole) {
          const Square above = (Square(c) * c + h) - (Square(top) * top + top_height);
          from = 1 + (c - top == 1 ? above >> 1 : above / (2 * (c - top)));
        } else {
          const double cross =
              0.5 * (double(c) + top) + (h - top_height) / (2 * scale * (double(c) - top));
          from = cross >= e ? e + 1 : static_cast<int>(std::max<double>(top_start, cross)) + 1;
        }
        break;
      }
      if (--count > 0) {
        top = stack.column[count - 1], top_start = stack.start[count - 1];
        top_height = height(top);
      }
    }
    if (from <= e) {
      stack.column[count] = top = c;
      stack.start[count] = top_start = from;
      top_height = h;
      ++count;
    }
  });
  return count;
}

// The columns that hold the two labels nearest to a pixel, -1 for none.
template <class K>
struct Winners {
  using Square = typename K::Square;
  using Id = typename K::Id;

  int column = -1, other = -1;
  Id id = 0, other_id = 0;
  Square square = K::never, other_square = K::never;

  SEGFUSE_FUNCTOR void take(Square q, Id label, int c) {
    if (column >= 0 && label == id) {
      if (q < square) square = q, column = c;
    } else if (q < square) {
      other_square = square, other_id = id, other = column;
      square = q, id = label, column = c;
    } else if (q < other_square) {
      other_square = q, other_id = label, other = c;
    }
  }
  // The nearest that is not of a label.
  SEGFUSE_FUNCTOR int besides(Id label) const { return id != label ? column : other; }
};

// Outwards from x, until no column can hold a nearer second label.
template <class K>
SEGFUSE_FUNCTOR Winners<K> seek(const auto& line, typename K::Square scale, int width, int reach,
                                int x) {
  using Square = typename K::Square;
  Winners<K> found;
  for (int d = 0; d < width && d <= reach; ++d) {
    const Square across = K::parabola(d, scale, 0);
    if (across >= found.other_square) break;
    for (int side = d > 0 ? -1 : 1; side <= 1; side += 2) {
      const int c = x + side * d;
      if (c < 0 || c >= width) continue;
      const Square first = line.first(c), second = line.second(c);
      if (first < found.other_square - across) {
        found.take(across + first, line.first_id(c), c);
      }
      if (second < found.other_square - across) {
        found.take(across + second, line.second_id(c), c);
      }
    }
  }
  return found;
}

// Columns that may hold what is nearest to pixels s to e, given those that do to the left and to
// the right of them, -1 for none: `left` first, but for rounding, where heights tie.
struct Columns {
  int first, last;

  SEGFUSE_FUNCTOR Columns(int left, int right, int s, int e, int reach, int width)
      : first(s - reach), last(e + reach) {
    if (left >= 0 && right >= 0 && right < left) {
      const int least = right;
      right = left, left = least;
    }
    if (first < left) first = left;
    if (first < 0) first = 0;
    if (right >= 0 && last > right) last = right;
    if (last >= width) last = width - 1;
  }
};

// The two nearest labels of pixels begin to end - 1 of a line:
//
//   out.first(x, n, c, scale, h, id)      n pixels from x on: scale (x - c)^2 + h
//   out.second(x, n, c, scale, h, id)     the same; pixels without one are left out
//   out.end(x)                            `second` was called up to pixel x, and not for x
//   bool out.wants(s, e)                  whether the second labels of pixels s to e matter, whose
//                                         nearest is one; it may move s and e inwards
//
// Calls go from left to right, so that `first` and `second` may write up to LinePolicy::block - 1
// pixels beyond their ends, as draw and mark do, where there is room and `end` puts back what stood
// there.
template <class K>
SEGFUSE_FUNCTOR void two_nearest(const auto& line, typename K::Square scale, int width, int reach,
                                 int begin, int end, const Stack& stack, const Stack& second,
                                 auto& out) {
  using Square = typename K::Square;
  using Id = typename K::Id;
  Winners<K> left, right;
  if (begin > 0) left = seek<K>(line, scale, width, reach, begin);
  if (end < width) right = seek<K>(line, scale, width, reach, end - 1);
  const auto height = [&](int c) { return line.first(c); };
  const Columns all(left.column, right.column, begin, end - 1, reach, width);
  const int count =
      envelope<K>(height, scale, K::highest, all.first, all.last, begin, end - 1, stack);
  int surplus = -1;  // where what `second` wrote beyond its end may stand
  for (int k = 0, next; k < count; k = next) {  // a run: entries k to next - 1, of one label
    const Id id = line.first_id(stack.column[k]);
    for (next = k; next < count && line.first_id(stack.column[next]) == id; ++next) {
      const int c = stack.column[next], x = stack.start[next];
      const int stop = next + 1 < count ? stack.start[next + 1] : end;
      out.first(x, stop - x, c, scale, line.first(c), id);
    }
    int s = stack.start[k], e = next < count ? stack.start[next] - 1 : end - 1;
    if (!out.wants(s, e)) continue;
    const int from = k > 0 ? stack.column[k - 1] : left.besides(id);
    const int to = next < count ? stack.column[next] : right.besides(id);
    const Columns some(from, to, s, e, reach, width);
    const auto besides = [&](int c) { return line.besides(c, id); };
    Square highest = K::highest;
    if (some.last - some.first > few) {
      // A run's neighbours bound how high a column's feature can lie and win a pixel, each those of
      // its half, where its parabola is highest at an end.
      const auto at = [&](int c, int x) { return K::parabola(x - c, scale, besides(c)); };
      const int middle = to < 0 ? e : from < 0 ? s : (s + e) / 2;
      if (from >= 0) highest = std::max(at(from, s), at(from, middle));
      if (to >= 0) {
        const Square right_half = std::max(at(to, middle), at(to, e));
        highest = from < 0 ? right_half : std::max(highest, right_half);
      }
    }
    const int others = envelope<K>(besides, scale, highest, some.first, some.last, s, e, second);
    if (others > 0 && surplus >= 0 && surplus != s) out.end(surplus);
    for (int i = 0; i < others; ++i) {
      const int c = second.column[i], x = second.start[i];
      const int stop = i + 1 < others ? second.start[i + 1] : e + 1;
      const bool own = line.first_id(c) == id;
      const Square h = besides(c);
      out.second(x, stop - x, c, scale, h, own ? line.second_id(c) : line.first_id(c));
    }
    if (others > 0) surplus = e + 1;
  }
  if (surplus >= 0) out.end(surplus);
}

// Writes squared distances, a parabola's, of n pixels and of up to LinePolicy::block - 1 more: most
// runs are short, and a vector costs less than a loop that ends where nothing foresees.
template <class K, class T>
SEGFUSE_FUNCTOR void draw(int x, int n, int c, typename K::Square scale, typename K::Square h,
                          T* to) {
  constexpr int block = LinePolicy::block;
  for (int i = 0; i < n; i += block) {
    for (int j = i; j < i + block; ++j) to[j] = static_cast<T>(K::parabola(x + j - c, scale, h));
  }
}

// Writes a value in the same way.
template <class T>
SEGFUSE_FUNCTOR void mark(int n, T value, T* to) {
  constexpr int block = LinePolicy::block;
  for (int i = 0; i < n; i += block) {
    for (int j = i; j < i + block; ++j) to[j] = value;
  }
}

// The pass along y, from what was swept to planes.
template <class K>
struct AlongY {
  using Square = typename K::Square;
  using Id = typename K::Id;
  static constexpr int room = 2 * Stack::room;

  Swept<K> swept;
  Planes<K> to;
  Square scale;

  struct Out {
    Square* square[2];
    Id* id[2];
    int64_t step;
    SEGFUSE_FUNCTOR void put(int k, int x, int n, int c, Square scale, Square h, Id label) const {
      for (int64_t y = x; y < x + n; ++y) {
        square[k][y * step] = K::parabola(static_cast<int>(y) - c, scale, h);
        id[k][y * step] = label;
      }
    }
    SEGFUSE_FUNCTOR void first(int x, int n, int c, Square scale, Square h, Id label) const {
      put(0, x, n, c, scale, h, label);
    }
    SEGFUSE_FUNCTOR void second(int x, int n, int c, Square scale, Square h, Id label) const {
      put(1, x, n, c, scale, h, label);
    }
    SEGFUSE_FUNCTOR bool wants(int&, int&) const { return true; }
    SEGFUSE_FUNCTOR void end(int) const {}
  };

  SEGFUSE_FUNCTOR void operator()(int64_t i, int64_t begin, int64_t end, char* room) const {
    const Frame& f = to.frame;
    const Place start = f.line_along_y(i);
    const int64_t from = f.index(start), n = end - begin;
    Out out{{to.square[0] + from, to.square[1] + from}, {to.id[0] + from, to.id[1] + from}, f.x};
    for (int64_t y = begin; y < end; ++y) {
      out.square[0][y * f.x] = out.square[1][y * f.x] = K::never;
      out.id[0][y * f.x] = out.id[1][y * f.x] = 0;
    }
    auto* ints = reinterpret_cast<int*>(room);
    two_nearest<K>(swept.template line<false>(start), scale, static_cast<int>(f.y), swept.reach,
                   static_cast<int>(begin), static_cast<int>(end), Stack{ints, ints + n},
                   Stack{ints + 2 * n, ints + 3 * n}, out);
  }
};

// Sweeps labels, and then calls last(line source, squared spacing along x, reach) for the pass
// along x; a source gives lines by line<true>(start).
template <class K>
void find_nearest(const Tensor& labels_, const std::vector<int64_t>& ignore, const double* spacing,
                  double reach_, const auto& last) {
  using Square = typename K::Square;
  using Offset = typename K::Offset;
  using Id = typename K::Id;
  const Labels labels(labels_, ignore);
  const Frame frame(labels_);
  const auto plane = [&](auto zero) {
    return torch::stable::new_empty(labels_, {frame.count() * static_cast<int64_t>(sizeof(zero))},
                                    ScalarType::Byte);
  };
  const auto squared = [&](int axis) { return static_cast<Square>(spacing[axis] * spacing[axis]); };
  const int64_t longest = std::max({frame.z, frame.y, frame.x});
  const int reach = static_cast<int>(std::min<double>(std::ceil(reach_), longest - 1));
  const Tensor nearest = plane(Offset{}), other = plane(Offset{}), id = plane(Id{});
  const Swept<K> swept{labels,
                       frame,
                       static_cast<Offset*>(nearest.mutable_data_ptr()),
                       static_cast<Offset*>(other.mutable_data_ptr()),
                       static_cast<Id*>(id.mutable_data_ptr()),
                       reach,
                       squared(0)};
  sweep(frame.n * frame.y, frame.x, swept, labels_);
  if (frame.y == 1) return last(swept, squared(2), reach);
  const Tensor square[2] = {plane(Square{}), plane(Square{})}, ids[2] = {plane(Id{}), plane(Id{})};
  Planes<K> planes{frame, {}, {}};
  for (int k = 0; k < 2; ++k) {
    planes.square[k] = static_cast<Square*>(square[k].mutable_data_ptr());
    planes.id[k] = static_cast<Id*>(ids[k].mutable_data_ptr());
  }
  for_each_band(frame.n * frame.z * frame.x, frame.y, AlongY<K>{swept, planes, squared(1)},
                labels_);
  last(planes, squared(2), reach);
}

// Calls body.operator()<Kinds>() with those that fit the labels; `whole`: distances are in pixels.
void with_kinds(const char* op, const Tensor& labels, bool whole, const auto& body) {
  const Frame f(labels);
  check(std::max({f.z, f.y, f.x}) < int64_t{1} << 28, op,
        ": labels: expected fewer than 2^28 pixels along an axis");
  const bool wide = labels.element_size() == 8;
  if (whole && fits_whole(f)) {
    wide ? body.template operator()<Kinds<int16_t, int32_t, uint64_t>>()
         : body.template operator()<Kinds<int16_t, int32_t, uint32_t>>();
  } else {
    wide ? body.template operator()<Kinds<int32_t, double, uint64_t>>()
         : body.template operator()<Kinds<int32_t, double, uint32_t>>();
  }
}

inline void check_labels(const char* op, const Tensor& labels) {
  check(labels.dim() >= 2 && labels.dim() <= 4, op, ": labels: expected (N, *S)");
  visit(Integers{}, labels.scalar_type(), op, [&]<class T>() {});
}

}  // namespace segfuse::SEGFUSE_BACKEND
