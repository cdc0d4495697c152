// label_distances: the distances from every pixel to the nearest label and to the nearest of
// another label, and which they are.
//
// core/nearest.h finds both; here the pass along x writes the result a row at a time.
#include "core/nearest.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

// How squares become what is asked for.
struct Measure {
  double unit;  // a pixel
  bool squared;

  template <class Square, class N>
  SEGFUSE_FUNCTOR void operator()(const Square* q, Square never, N n, float* to) const {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const double unit_squared = unit * unit;
    if (std::is_integral_v<Square> && unit == 1 && !squared) {
      for (int64_t i = 0; i < n; ++i) {
        const float distance = std::sqrt(static_cast<float>(q[i]));
        to[i] = q[i] == never ? infinity : distance;
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const double value = static_cast<double>(q[i]) * unit_squared;
        to[i] = q[i] == never ? infinity : static_cast<float>(squared ? value : std::sqrt(value));
      }
    }
  }
};

template <class K, class Source>
struct Distances {
  using Square = typename K::Square;
  using Id = typename K::Id;
  static constexpr int room = 2 * (sizeof(Square) + sizeof(Id) + Stack::room);

  Source from;
  Frame frame;
  Square scale;
  int reach, bytes;  // of an id
  Measure measure;
  float* distance;
  char* id;

  struct Out {
    Square* square[2];
    Id* id[2];
    int64_t begin;
    SEGFUSE_FUNCTOR void put(int k, int x, int n, int c, Square scale, Square h, Id label) const {
      draw<K>(x, n, c, scale, h, square[k] + (x - begin));
      mark(n, label, id[k] + (x - begin));
    }
    SEGFUSE_FUNCTOR void first(int x, int n, int c, Square scale, Square h, Id label) const {
      put(0, x, n, c, scale, h, label);
    }
    SEGFUSE_FUNCTOR void second(int x, int n, int c, Square scale, Square h, Id label) const {
      put(1, x, n, c, scale, h, label);
    }
    SEGFUSE_FUNCTOR bool wants(int&, int&) const { return true; }
    SEGFUSE_FUNCTOR void end(int x) const {
      mark(LinePolicy::block - 1, K::never, square[1] + (x - begin));
      mark(LinePolicy::block - 1, Id(0), id[1] + (x - begin));
    }
  };

  SEGFUSE_FUNCTOR void operator()(int64_t i, int64_t begin, int64_t end, char* memory) const {
    const Place start = frame.line_along_x(i);
    const int64_t n = end - begin;
    auto* squares = reinterpret_cast<Square*>(memory);
    const int64_t length = n + LinePolicy::block;
    auto* ids = reinterpret_cast<Id*>(squares + 2 * length);
    auto* ints = reinterpret_cast<int*>(ids + 2 * length);
    Out out{{squares, squares + length}, {ids, ids + length}, begin};
    for (int64_t x = 0; x < 2 * length; ++x) squares[x] = K::never, ids[x] = 0;
    two_nearest<K>(from.template line<true>(start), scale, static_cast<int>(frame.x), reach,
                   static_cast<int>(begin), static_cast<int>(end), Stack{ints, ints + n},
                   Stack{ints + 2 * n, ints + 3 * n}, out);
    for (int k = 0; k < 2; ++k) {
      const int64_t to =
          (2 * start.n + k) * (frame.count() / frame.n) + frame.index({0, start.z, start.y, begin});
      measure(out.square[k], K::never, n, distance + to);
      write(out.id[k], n, to);
    }
  }

  SEGFUSE_FUNCTOR void write(const Id* ids, int64_t n, int64_t to) const {
    const auto all = [&]<class T>(T*) {
      auto* dense = reinterpret_cast<T*>(id) + to;
      for (int64_t i = 0; i < n; ++i) dense[i] = static_cast<T>(ids[i]);
    };
    if constexpr (sizeof(Id) == 8) {
      all(static_cast<uint64_t*>(nullptr));
    } else if (bytes == 4) {
      all(static_cast<uint32_t*>(nullptr));
    } else if (bytes == 2) {
      all(static_cast<uint16_t*>(nullptr));
    } else {
      all(static_cast<uint8_t*>(nullptr));
    }
  }
};

std::tuple<Tensor, Tensor> label_distances(const Tensor& labels, double z, double y, double x,
                                           bool squared) {
  check_labels("label_distances", labels);
  std::vector<int64_t> shape(labels.sizes().begin(), labels.sizes().end());
  shape.insert(shape.begin() + 1, 2);
  const Tensor distances = torch::stable::new_empty(labels, shape, ScalarType::Float);
  const Tensor ids = torch::stable::new_empty(labels, shape);
  if (labels.numel() == 0) return {distances, ids};
  ask_for_large_pages(distances);
  ask_for_large_pages(ids);
  const Frame frame(labels);
  const bool even = (frame.z == 1 || z == x) && (frame.y == 1 || y == x);
  const bool whole = even && fits_whole(frame);
  const double own[] = {z, y, x}, unit[] = {1, 1, 1};
  with_kinds("label_distances", labels, even, [&]<class K>() {
    find_nearest<K>(labels, {}, whole ? unit : own, std::numeric_limits<double>::infinity(),
                    [&]<class Source>(const Source& from, typename K::Square scale, int reach) {
                      const Distances<K, Source> f{
                          from,
                          frame,
                          scale,
                          reach,
                          static_cast<int>(labels.element_size()),
                          {whole ? x : 1, squared},
                          static_cast<float*>(distances.mutable_data_ptr()),
                          static_cast<char*>(ids.mutable_data_ptr())};
                      for_each_band(frame.n * frame.z * frame.y, frame.x, f, labels);
                    });
  });
  return {distances, ids};
}

}  // namespace

SEGFUSE_IMPL(m) { m.impl("label_distances", TORCH_BOX(&label_distances)); }

}  // namespace segfuse::SEGFUSE_BACKEND
