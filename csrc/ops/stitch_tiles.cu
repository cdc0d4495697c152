// stitch_tiles: tiles put together to an image, the later above the earlier or blended by a window;
// or to the classes of the image's largest scores.
//
//   out[c, p] = tiles[t, c, p - corner_t],  t the last tile that covers p
//   out[c, p] = sum_t w[p - corner_t] tiles[t, c, p - corner_t] / sum_t w[p - corner_t]
//   labels[p] = argmax_c of either
//
// A row of the image looks for the tiles that meet it, and falls into runs that the same tile is on
// top of, or, with a window, that the same tiles cover.  Each element is written once, sums go in
// the order of the tiles, and scores of the image are stored nowhere.  The page is long since it
// holds three results; gradients are made of this and of gather_tiles, in Python.
#include "core/argmax.h"
#include "core/dtype.h"
#include "core/math.h"
#include "core/out.h"
#include "core/rows.h"
#include "core/tiles.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

struct Geometry {
  Tiles tiles, image;
  Corners corners;

  SEGFUSE_FUNCTOR bool meets(int64_t tile, int axis, int64_t at) const {
    return corners.covers(tile, axis, tiles.size[axis], at);
  }

  // A row of the image: which tiles meet it, some of those from `first` to before `last`; and the
  // first row behind it that others meet.
  struct Line {
    int64_t z, y, first, last, end;
  };
  SEGFUSE_FUNCTOR Line line(int64_t z, int64_t y) const {
    Line line{z, y, corners.count, 0, image.size[1]};
    for (int64_t t = 0; t < corners.count; ++t) {
      if (!meets(t, 0, z)) continue;
      const int64_t begin = corners(t, 1), end = begin + tiles.size[1];
      if (end <= y) continue;
      line.end = std::min(line.end, begin > y ? begin : end);
      if (begin > y) continue;
      line.first = std::min(line.first, t);
      line.last = t + 1;
    }
    return line;
  }

  // Which tile is on top at x, -1 for none, and where that ends; with `all`, where any tile does.
  struct Cover {
    int64_t end, top;
  };
  SEGFUSE_FUNCTOR Cover cover(const Line& line, int64_t x, bool all) const {
    Cover cover{image.width(), -1};
    for (int64_t t = line.last - 1; t >= line.first && (all || cover.top < 0); --t) {
      if (!meets(t, 1, line.y) || !meets(t, 0, line.z)) continue;
      const int64_t begin = corners(t, 2), end = begin + tiles.width();
      if (end <= x) continue;
      cover.end = std::min(cover.end, begin > x ? begin : end);
      if (begin <= x && cover.top < 0) cover.top = t;
    }
    return cover;
  }

  // Where the element of a tile lies that covers a place.
  SEGFUSE_FUNCTOR int64_t offset(int64_t tile, int64_t channel, const Line& line, int64_t x) const {
    const int64_t z = line.z - corners(tile, 0), y = line.y - corners(tile, 1);
    return tiles.offset({tile, channel, z, y}) + (x - corners(tile, 2)) * tiles.step();
  }
};

// A window over tiles, and weighted sums of those that cover a run.
template <class T>
struct Window : Geometry {
  using Acc = Wide<T>;
  const T* from;
  const Acc* window;  // dense; nullptr: none

  // Calls body(tile, weights) for those that cover x and what follows, weights those from x on.
  SEGFUSE_FUNCTOR void for_each_tile(const Line& line, int64_t x, const auto& body) const {
    for (int64_t t = line.first; t < line.last; ++t) {
      if (!meets(t, 2, x) || !meets(t, 1, line.y) || !meets(t, 0, line.z)) continue;
      const int64_t z = line.z - corners(t, 0), y = line.y - corners(t, 1);
      body(t, window + (z * tiles.size[1] + y) * tiles.width() + (x - corners(t, 2)));
    }
  }

  template <class N>
  SEGFUSE_FUNCTOR void weigh(const Line& line, int64_t x, N n, Acc* sum) const {
    for (int64_t i = 0; i < n; ++i) sum[i] = 0;
    for_each_tile(line, x, [&](int64_t, const Acc* w) {
      for (int64_t i = 0; i < n; ++i) sum[i] += w[i];
    });
  }

  template <class N>
  SEGFUSE_FUNCTOR void mean(const Line& line, int64_t channel, int64_t x, N n, const Acc* weights,
                            Acc* to) const {
    const int64_t step = tiles.step();
    for (int64_t i = 0; i < n; ++i) to[i] = 0;
    for_each_tile(line, x, [&](int64_t t, const Acc* w) {
      const T* source = from + this->offset(t, channel, line, x);
      if (step == 1) {
        for (int64_t i = 0; i < n; ++i) {
          to[i] = multiply_add(w[i], static_cast<Acc>(source[i]), to[i]);
        }
      } else {
        for (int64_t i = 0; i < n; ++i) {
          to[i] = multiply_add(w[i], static_cast<Acc>(source[i * step]), to[i]);
        }
      }
    });
    for (int64_t i = 0; i < n; ++i) to[i] = weights[i] == 0 ? Acc(0) : to[i] / weights[i];
  }
};

// Rows of an image, and the runs that they are made of.
template <class Base, class To>
struct Onto : Base {
  using Value = To;
  struct Row {
    To* to;
    int64_t step, size, channel;
    Geometry::Line line;
    int64_t alike;
  };
  struct Run {
    int64_t end;
    bool skip;
    int64_t top, channel;
    int64_t from;  // the place in the tile on top that covers the image's first column
    Geometry::Line line;
  };

  To* to;
  bool keeps;  // what no tile covers

  SEGFUSE_FUNCTOR int64_t rows() const { return this->image.rows(); }
  SEGFUSE_FUNCTOR int64_t longest() const { return this->image.width(); }

  // Where a pixel's channels lie side by side, so do the rows that read them: each line of memory
  // is fetched once for all.
  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const bool interleaved = this->tiles.channel < this->tiles.step();
    const auto at = interleaved ? this->image.pixels_place(r) : this->image.place(r);
    const auto line = this->line(at.z, at.y);
    return {to + this->image.offset(at),
            this->image.step(),
            this->image.width(),
            at.channel,
            line,
            interleaved ? 0 : line.end - at.y - 1};
  }

  SEGFUSE_FUNCTOR Run find(const Row& row, int64_t x, bool all) const {
    const auto cover = this->cover(row.line, x, all);
    const bool none = cover.top < 0;
    return {cover.end,
            keeps && none,
            cover.top,
            row.channel,
            none ? 0 : this->offset(cover.top, row.channel, row.line, 0),
            row.line};
  }
};

// The tile on top.
template <class T>
struct Top : Onto<Geometry, T> {
  using typename Onto<Geometry, T>::Row, typename Onto<Geometry, T>::Run;
  const T* from;
  int64_t to_next, from_next;

  SEGFUSE_FUNCTOR Run run(const Row& row, int64_t x) const { return this->find(row, x, false); }

  SEGFUSE_FUNCTOR const T* at(const Run& run, int64_t x, int64_t) const {
    return run.top >= 0 && this->tiles.step() == 1 ? from + (run.from + x) : nullptr;
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Run& run, int64_t x, N n, T* values) const {
    if (run.top < 0) {
      for (int64_t i = 0; i < n; ++i) values[i] = T{};
      return;
    }
    const int64_t step = this->tiles.step();
    const T* source = from + (run.from + x * step);
    if (step == 2) {  // two classes are common, and a known step is many elements at once
      for (int64_t i = 0; i < n; ++i) values[i] = source[i * 2];
    } else {
      for (int64_t i = 0; i < n; ++i) values[i] = source[i * step];
    }
  }
};

// The weighted mean.
template <class T>
struct Mean : Onto<Window<T>, T> {
  using typename Onto<Window<T>, T>::Row, typename Onto<Window<T>, T>::Run;

  SEGFUSE_FUNCTOR Run run(const Row& row, int64_t x) const { return this->find(row, x, true); }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Run& run, int64_t x, N n, T* values) const {
    for_each_block(n, [&](int64_t begin, auto m) {
      Wide<T> weights[RowPolicy::width], mean[RowPolicy::width];
      this->weigh(run.line, x + begin, m, weights);
      this->mean(run.line, run.channel, x + begin, m, weights, mean);
      for (int64_t i = 0; i < m; ++i) values[begin + i] = static_cast<T>(mean[i]);
    });
  }
};

// The class of the largest score.
template <class T, class Label>
struct Labels : Onto<Window<T>, Label> {
  using typename Onto<Window<T>, Label>::Row, typename Onto<Window<T>, Label>::Run;

  SEGFUSE_FUNCTOR Run run(const Row& row, int64_t x) const {
    return this->find(row, x, this->window != nullptr);
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Run& run, int64_t x, N n, Label* values) const {
    if (run.top < 0) {
      for (int64_t i = 0; i < n; ++i) values[i] = 0;
      return;
    }
    const int64_t step = this->tiles.step();
    const int classes = static_cast<int>(this->tiles.channels);
    for_each_block(n, [&](int64_t begin, auto m) {
      Argmax<Wide<T>, RowPolicy::width> found;
      if (this->window) {
        Wide<T> weights[RowPolicy::width], mean[RowPolicy::width];
        this->weigh(run.line, x + begin, m, weights);
        for (int k = 0; k < classes; ++k) {
          this->mean(run.line, k, x + begin, m, weights, mean);
          for (int64_t i = 0; i < m; ++i) {
            k == 0 ? found.start(i, mean[i]) : found.take(i, k, mean[i]);
          }
        }
      } else {
        found.take_all(this->from + run.from + (x + begin) * step, step, this->tiles.channel,
                       classes, m);
      }
      for (int64_t i = 0; i < m; ++i) values[begin + i] = static_cast<Label>(found.at[i]);
    });
  }
};

// The wrapper in Python has said what is wrong in more words before.
void check_arguments(const Tensor& tiles, const Tensor& corners, const std::vector<int64_t>& size,
                     const std::optional<Tensor>& window) {
  const int64_t dims = tiles.dim() - 2;
  check_corners("stitch_tiles", corners, tiles, dims);
  check_size("stitch_tiles", size, dims);
  check(tiles.size(0) == corners.size(0), "stitch_tiles: corners: expected one a tile");
  if (!window) return;
  const auto wide =
      tiles.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check(window->scalar_type() == wide && window->is_contiguous() &&
            window->device() == tiles.device() &&
            std::equal(window->sizes().begin(), window->sizes().end(), tiles.sizes().begin() + 2,
                       tiles.sizes().end()),
        "stitch_tiles: window: expected the size of a tile, in the arithmetic's dtype");
}

Geometry geometry(const Tensor& tiles, const Tensor& out, const Tensor& corners) {
  const int64_t dims = corners.size(1);
  return {Tiles(tiles, dims), Tiles(out, dims), Corners(corners)};
}

template <class T>
Window<T> window_over(const Geometry& g, const Tensor& tiles, const std::optional<Tensor>& window) {
  return {g, static_cast<const T*>(tiles.const_data_ptr()),
          window ? static_cast<const Wide<T>*>(window->const_data_ptr()) : nullptr};
}

void stitch_into(const Tensor& out, Memory memory, const Tensor& tiles, const Tensor& corners_,
                 const std::optional<Tensor>& window) {
  if (out.numel() == 0) return;
  const bool keeps = memory == Memory::reused;
  const Tensor corners = torch::stable::contiguous(corners_);
  const Geometry g = geometry(tiles, out, corners);
  if (window) {
    visit(Floating{}, tiles.scalar_type(), "stitch_tiles: tiles", [&]<class T>() {
      auto* to = static_cast<T*>(out.mutable_data_ptr());
      for_each_row(out, memory, std::array{Mean<T>{{window_over<T>(g, tiles, window), to, keeps}}});
    });
    return;
  }
  visit_size(out.element_size(), "stitch_tiles", [&]<class T>() {
    auto* to = static_cast<T*>(out.mutable_data_ptr());
    for_each_row(out, memory,
                 std::array{Top<T>{{g, to, keeps},
                                   static_cast<const T*>(tiles.const_data_ptr()),
                                   g.image.stride[1],
                                   g.tiles.stride[1]}});
  });
}

void labels_into(const Tensor& out, Memory memory, const Tensor& tiles, const Tensor& corners_,
                 const std::optional<Tensor>& window) {
  if (out.numel() == 0) return;
  const Tensor corners = torch::stable::contiguous(corners_);
  const Geometry g = geometry(tiles, out, corners);
  visit(Floating{}, tiles.scalar_type(), "stitch_tiles: tiles", [&]<class T>() {
    visit(Types<uint8_t, int16_t, int32_t>{}, out.scalar_type(), "stitch_tiles: out",
          [&]<class Label>() {
            auto* to = static_cast<Label*>(out.mutable_data_ptr());
            for_each_row(out, memory,
                         std::array{Labels<T, Label>{
                             {window_over<T>(g, tiles, window), to, memory == Memory::reused}}});
          });
  });
}

Tensor stitch_tiles(const Tensor& tiles, const Tensor& corners, const std::vector<int64_t>& size,
                    const std::optional<Tensor>& window) {
  check_arguments(tiles, corners, size, window);
  std::vector<int64_t> shape{tiles.size(1)};
  shape.insert(shape.end(), size.begin(), size.end());
  const Tensor out = torch::stable::new_empty(tiles, shape);
  stitch_into(out, Memory::fresh, tiles, corners, window);
  return out;
}

void stitch_tiles_out(const Tensor& tiles, const Tensor& corners,
                      const std::optional<Tensor>& window, const Tensor& out) {
  check(out.dim() == tiles.dim() - 1 && out.size(0) == tiles.size(1) &&
            out.scalar_type() == tiles.scalar_type() && out.device() == tiles.device(),
        "stitch_tiles: out: expected the shape, dtype and device of the result");
  check_arguments(tiles, corners, {out.sizes().begin() + 1, out.sizes().end()}, window);
  check_memory("stitch_tiles", out, {{"tiles", &tiles}, {"corners", &corners}});
  stitch_into(out, Memory::reused, tiles, corners, window);
}

ScalarType label_type(const Tensor& tiles) {
  const int64_t classes = tiles.size(1);
  check(classes > 0 && classes <= INT32_MAX, "stitch_tiles: tiles: expected classes to choose of");
  return classes <= 256 ? ScalarType::Byte : classes <= 32768 ? ScalarType::Short : ScalarType::Int;
}

Tensor stitch_tiles_argmax(const Tensor& tiles, const Tensor& corners,
                           const std::vector<int64_t>& size, const std::optional<Tensor>& window) {
  check_arguments(tiles, corners, size, window);
  const Tensor out = torch::stable::new_empty(tiles, size, label_type(tiles));
  labels_into(out, Memory::fresh, tiles, corners, window);
  return out;
}

void stitch_tiles_argmax_out(const Tensor& tiles, const Tensor& corners,
                             const std::optional<Tensor>& window, const Tensor& out) {
  check_arguments(tiles, corners, {out.sizes().begin(), out.sizes().end()}, window);
  check(out.scalar_type() == label_type(tiles) && out.device() == tiles.device(),
        "stitch_tiles: out: expected the dtype and device of the result");
  check_memory("stitch_tiles", out, {{"tiles", &tiles}, {"corners", &corners}});
  labels_into(out, Memory::reused, tiles, corners, window);
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("stitch_tiles", TORCH_BOX(&stitch_tiles));
  m.impl("stitch_tiles_out", TORCH_BOX(&stitch_tiles_out));
  m.impl("stitch_tiles_argmax", TORCH_BOX(&stitch_tiles_argmax));
  m.impl("stitch_tiles_argmax_out", TORCH_BOX(&stitch_tiles_argmax_out));
}

}  // namespace segfuse::SEGFUSE_BACKEND
