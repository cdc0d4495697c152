// upconv_concat: [skip, up] along the channels, where up is the transposed convolution of x whose
// stride is its kernel, and skip is centre-cropped to its size; and the gradients of x, the weight
// and the bias (that of skip is crop_concat's).
//
//   out[n, c, p] = c < Cs ? skip[n, c, p + floor((S - s) / 2)]
//                         : bias[o] + sum over i of x[n, i, q] w[i, o, t],  c = Cs + o, p = q k + t
//
// Taps do not overlap, so that up is one matrix product, its rows dealt out to the pixels of each
// tap: P = W^T X, of (Cout k^d, Cin) and (Cin, pixels).  A band of x's rows at a time P goes to a
// scratch that stays in the cache, and from there to its place; neither it nor up is ever stored as
// a whole.  On the way back the gradient is gathered into the scratch, as dP, a band at a time:
//
//   dX = W dP        dW = X dP^T, summed over bands in an order that only sizes decide
//
// Where x is channels_last, so are the scratch (P^T) and the weight.  dP has all channels of up,
// and of large kernels (some 10 taps an axis) no less than a band of 256 pixels.  The page is long
// since it holds both directions, with their functors and checks.
#include <optional>
#include <tuple>
#include <vector>

#include "core/blas.h"
#include "core/dtype.h"
#include "core/math.h"
#include "core/paste.h"

namespace segfuse::SEGFUSE_BACKEND {
namespace {

using torch::stable::new_empty;

// Sizes that the tensors have in common.
struct Shape {
  View x, weight;
  bool channels_last;
  int64_t in, out, taps;  // channels of x and of up; taps of the kernel

  Shape(const Tensor& x_, const Tensor& weight_)
      : x(x_),
        weight(weight_),
        channels_last(format_of(x_) != MemoryFormat::Contiguous),
        in(x.size[1]),
        out(weight.size[1]),
        taps(weight.size[2] * weight.size[3] * weight.size[4]) {}

  // Bands in which `channels` of up are stored.
  Bands bands(const Tensor& like, int64_t channels) const {
    return {x.size[0], x.size[2] * x.size[3], x.size[4],
            channels * taps * static_cast<int64_t>(like.element_size())};
  }

  // P of some channels of up, (channels times taps, pixels of the band), dense in a scratch.
  template <class T>
  Matrix<T> product(const Tensor& scratch, int64_t channels, const Band& band) const {
    const auto* data = scratch.const_data_ptr<T>();
    const int64_t height = channels * taps, n = band.pixels();
    return channels_last ? Matrix<T>{data, height, n, 1, height} : Matrix<T>{data, height, n, n, 1};
  }

  // The weight, or a gradient of it, (Cin, Cout times taps).
  template <class T>
  Matrix<T> dense(const T* data) const {
    return {data, in, out * taps, out * taps, 1};
  }
};

// A band of x, or of its gradient: (Cin, pixels of the band).  Spatial axes merge.
template <class T>
Matrix<T> band_of(const Tensor& map, const Band& band) {
  const View v(map);
  int innermost = axes - 1;
  while (innermost > 2 && v.size[innermost] == 1) --innermost;
  const int64_t step = v.stride[innermost];
  const int64_t first = band.image * v.stride[0] + (band.row * v.size[4] + band.x) * step;
  return {map.const_data_ptr<T>() + first, v.size[1], band.pixels(), v.stride[1], step};
}

// Where a band of up lies: in a tensor and in the scratch.
struct Places {
  bool channels_last;
  int64_t channels, kernel[3], tensor_step[axes];
  int64_t of_channel, of_tap, of_pixel;  // steps in the scratch
  int64_t offset, height;                // of the band's image; of x
  Band band;

  // Channels [first, first + count) of the tensor.
  Places(const Shape& s, const View& tensor, int64_t first, int64_t count, const Band& b)
      : channels_last(s.channels_last),
        channels(count),
        of_channel(channels_last ? 1 : s.taps * b.pixels()),
        of_tap(channels_last ? count : b.pixels()),
        of_pixel(channels_last ? s.taps * count : 1),
        offset(b.image * tensor.stride[0] + first * tensor.stride[1]),
        height(s.x.size[3]),
        band(b) {
    for (int a = 0; a < axes; ++a) tensor_step[a] = tensor.stride[a];
    for (int a = 0; a < 3; ++a) kernel[a] = s.weight.size[2 + a];
  }

  struct At {
    int64_t tensor, scratch;
  };

  // Of a tap of pixel (row, column) of the band, in a channel.
  SEGFUSE_FUNCTOR At at(int64_t channel, int64_t row, int64_t column, int64_t tz, int64_t ty,
                        int64_t tx) const {
    const Split plane = split(band.row + row, height);
    const int64_t tap = (tz * kernel[1] + ty) * kernel[2] + tx;
    return {offset + channel * tensor_step[1] + (plane.quotient * kernel[0] + tz) * tensor_step[2] +
                (plane.remainder * kernel[1] + ty) * tensor_step[3] +
                ((band.x + column) * kernel[2] + tx) * tensor_step[4],
            channel * of_channel + tap * of_tap + (row * band.width + column) * of_pixel};
  }

  // The rows of up in a band, along x or the channels.
  SEGFUSE_FUNCTOR int64_t rows() const {
    return kernel[0] * kernel[1] * band.rows * (channels_last ? band.width * kernel[2] : channels);
  }
  SEGFUSE_FUNCTOR At row(int64_t r) const {
    if (channels_last) {
      const Split tx = split(r, kernel[2]), x = split(tx.quotient, band.width),
                  ty = split(x.quotient, kernel[1]), tz = split(ty.quotient, kernel[0]);
      return at(0, tz.quotient, x.remainder, tz.remainder, ty.remainder, tx.remainder);
    }
    const Split ty = split(r, kernel[1]), tz = split(ty.quotient, kernel[0]),
                y = split(tz.quotient, band.rows);
    return at(y.quotient, y.remainder, 0, tz.remainder, ty.remainder, 0);
  }
};

// From the scratch to the output, with the bias.
template <class T>
struct Deal {
  using Value = T;
  struct Row {
    T* to;
    int64_t step, size;
    const T *from, *bias;
  };

  Places places;
  T* to;
  const T *from, *bias;

  SEGFUSE_FUNCTOR int64_t rows() const { return places.rows(); }
  SEGFUSE_FUNCTOR int64_t longest() const {
    return places.channels_last ? places.channels : places.band.width * places.kernel[2];
  }

  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    const auto at = places.row(r);
    const int64_t channel = places.channels_last ? 0 : at.scratch / places.of_channel;
    return {to + at.tensor, places.tensor_step[places.channels_last ? 1 : 4], longest(),
            from + at.scratch, bias ? bias + channel : nullptr};
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, T* values) const {
    using Acc = Wide<T>;
    const int64_t k = places.kernel[2];
    if (places.channels_last) {
      for (int64_t i = 0; i < n; ++i) {
        const Acc bias = row.bias ? static_cast<Acc>(row.bias[x + i]) : 0;
        values[i] = static_cast<T>(static_cast<Acc>(row.from[x + i]) + bias);
      }
      return;
    }
    const Acc bias = row.bias ? static_cast<Acc>(*row.bias) : 0;
    if (k == 2 && x % 2 == 0 && n % 2 == 0) {  // as U-Net has it
      const T *first = row.from + x / 2, *second = first + places.of_tap;
      for (int64_t i = 0; i < n / 2; ++i) {
        values[2 * i] = static_cast<T>(static_cast<Acc>(first[i]) + bias);
        values[2 * i + 1] = static_cast<T>(static_cast<Acc>(second[i]) + bias);
      }
      return;
    }
    Split at = split(x, k);
    for (int64_t i = 0; i < n; ++i) {
      values[i] = static_cast<T>(
          static_cast<Acc>(row.from[at.remainder * places.of_tap + at.quotient]) + bias);
      if (++at.remainder == k) at = {at.quotient + 1, 0};
    }
  }
};

// From the gradient to the scratch.  A row is a tap's, of a channel or of a pixel.
template <class T>
struct Gather {
  using Value = T;
  struct Row {
    T* to;
    int64_t step, size;
    const T* from;
  };

  Places places;
  T* to;
  const T* from;
  int64_t from_step;

  Gather(const Places& p, T* scratch, const T* grad)
      : places(p),
        to(scratch),
        from(grad),
        from_step(p.channels_last ? p.tensor_step[1] : p.kernel[2] * p.tensor_step[4]) {}

  SEGFUSE_FUNCTOR int64_t rows() const {
    return places.rows() * (places.channels_last ? 1 : places.kernel[2]);
  }
  SEGFUSE_FUNCTOR int64_t longest() const {
    return places.channels_last ? places.channels : places.band.width;
  }

  SEGFUSE_FUNCTOR Row row(int64_t r) const {
    if (places.channels_last) {
      const auto at = places.row(r);
      return {to + at.scratch, 1, longest(), from + at.tensor};
    }
    const Split tap = split(r, places.kernel[2]);
    const auto at = places.row(tap.quotient);
    return {to + at.scratch + tap.remainder * places.of_tap, 1, longest(),
            from + at.tensor + tap.remainder * places.tensor_step[4]};
  }

  SEGFUSE_FUNCTOR const T* at(const Row& row, int64_t x, int64_t) const {
    return from_step == 1 ? row.from + x : nullptr;
  }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row& row, int64_t x, N n, T* values) const {
    const T* first = row.from + x * from_step;
    if (from_step == 2) {  // as U-Net has it
      for (int64_t i = 0; i < n; ++i) values[i] = first[2 * i];
    } else {
      for (int64_t i = 0; i < n; ++i) values[i] = first[i * from_step];
    }
  }
};

// Sums of the scratch over x: of each tap of a channel, in each row of the band.
template <class T>
struct SumRows {
  using Value = double;
  struct Row {
    double* to;
    int64_t step, size;
  };

  double* to;
  const T* from;
  int64_t count, width, height;  // of sums; pixels of each; channels_last: channels times taps

  SEGFUSE_FUNCTOR int64_t rows() const { return 1; }
  SEGFUSE_FUNCTOR int64_t longest() const { return count; }
  SEGFUSE_FUNCTOR Row row(int64_t) const { return {to, 1, count}; }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row&, int64_t x, N n, double* values) const {
    for (int64_t i = 0; i < n; ++i) {
      const Split at = split(x + i, height);
      const T* first = from + at.quotient * width * height + at.remainder;
      double lane[8] = {};  // so that it vectorises
      int64_t j = 0;
      for (; j + 8 <= width; j += 8) {
        for (int l = 0; l < 8; ++l) lane[l] += static_cast<double>(first[(j + l) * height]);
      }
      for (; j < width; ++j) lane[0] += static_cast<double>(first[j * height]);
      values[i] =
          ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
    }
  }
};

// sum += part.
template <class T>
struct Add {
  using Value = T;
  struct Row {
    T* to;
    int64_t step, size;
  };

  T* sum;
  const T* part;
  int64_t count;

  SEGFUSE_FUNCTOR int64_t rows() const { return 1; }
  SEGFUSE_FUNCTOR int64_t longest() const { return count; }
  SEGFUSE_FUNCTOR Row row(int64_t) const { return {sum, 1, count}; }

  template <class N>
  SEGFUSE_FUNCTOR void operator()(const Row&, int64_t x, N n, T* values) const {
    for (int64_t i = 0; i < n; ++i) values[i] = sum[x + i] + part[x + i];
  }
};

// x as it is, where its spatial axes merge; else copied.
Tensor merging(const Tensor& x) {
  const View v(x);
  int64_t next = -1;  // step that the next axis must have; 0 beyond an expanded one
  for (int a = axes - 1; a > 1; --a) {
    if (v.size[a] == 1) continue;
    if (next >= 0 && v.stride[a] != next) return torch::stable::contiguous(x);
    next = v.stride[a] * v.size[a];
  }
  return x;
}

// The wrapper in Python has said what is wrong in more words before.
void check_alike(const char* op, const Tensor& x, const Tensor& weight) {
  check(x.dim() >= 3 && x.dim() <= axes && weight.dim() == x.dim() && weight.size(0) == x.size(1) &&
            weight.size(0) > 0 && weight.size(1) > 0,
        op, ": weight: expected (Cin, Cout, k, ..., k), of one channel or more");
  check(weight.scalar_type() == x.scalar_type() && weight.device() == x.device(), op,
        ": weight: expected the dtype and device of x");
  for (int64_t a = 2; a < x.dim(); ++a) {
    check(weight.size(a) == weight.size(2) && weight.size(a) > 0, op,
          ": weight: expected a kernel of one size, 1 or more");
  }
}

std::vector<int64_t> result_size(const Tensor& skip, const Tensor& x, const Tensor& weight,
                                 const std::optional<Tensor>& bias) {
  const char* op = "upconv_concat";
  check_alike(op, x, weight);
  check(skip.dim() == x.dim() && skip.size(0) == x.size(0) &&
            skip.scalar_type() == x.scalar_type() && skip.device() == x.device(),
        op, ": skip: expected the dimensions, batch size, dtype and device of x");
  check(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(1) &&
                  bias->scalar_type() == x.scalar_type() && bias->device() == x.device()),
        op, ": bias: expected (Cout,) of the dtype and device of x");
  std::vector<int64_t> size{x.size(0), skip.size(1) + weight.size(1)};
  for (int64_t a = 2; a < x.dim(); ++a) {
    size.push_back(x.size(a) * weight.size(a));
    check(skip.size(a) >= size.back(), op, ": skip: expected at least ", size.back(),
          " along dimension ", a, ", got ", skip.size(a));
  }
  return size;
}

Tensor upconv_concat(const Tensor& skip, const Tensor& x_, const Tensor& weight_,
                     const std::optional<Tensor>& bias_) {
  const Tensor out = empty_as(x_, result_size(skip, x_, weight_, bias_));
  const Part first = centre(skip, View(out));
  visit_size(out.element_size(), "upconv_concat", [&]<class T>() {
    for_each_row(out, Memory::fresh, std::array{paste<T>(out, first)});
  });
  const Shape s(x_, weight_);
  const Tensor x = merging(x_), weight = torch::stable::contiguous(weight_, format_of(x_));
  const auto bias = bias_ ? std::optional(torch::stable::contiguous(*bias_)) : std::nullopt;
  // Blocks of channels, so that deep levels, of few pixels, have work for many threads too.
  const int64_t block =
      s.channels_last ? s.out : std::clamp<int64_t>(BandPolicy::block / s.taps, 1, s.out);
  const int64_t blocks = divide_up(s.out, block);
  const Bands bands = s.bands(x, block);
  visit(Floating{}, x.scalar_type(), "upconv_concat", [&]<class T>() {
    in_pieces(bands.count() * blocks, [&](int64_t begin, int64_t end) {
      const Tensor scratch = new_empty(x, {block * s.taps * bands.most_pixels()});
      for (int64_t i = begin; i < end; ++i) {
        const Split at = split(i, blocks);
        const Band band = bands[at.quotient];
        const int64_t first = at.remainder * block, count = std::min(block, s.out - first);
        multiply(
            s.dense(weight.const_data_ptr<T>()).transposed().block(first * s.taps, count * s.taps),
            band_of<T>(x, band), s.product<T>(scratch, count, band), x.device());
        for_each_row(out, Memory::begun,
                     std::array{Deal<T>{{s, View(out), skip.size(1) + first, count, band},
                                        out.mutable_data_ptr<T>(),
                                        scratch.const_data_ptr<T>(),
                                        bias ? bias->const_data_ptr<T>() + first : nullptr}});
      }
    });
  });
  return out;
}

// The sums of a scratch over all but the channels, into row b of `sums`.
template <class T>
void sum_channels(const Shape& s, const Tensor& scratch, const Band& band, const Tensor& sums,
                  int64_t b) {
  const int64_t height = s.out * s.taps, rows = s.taps * band.rows;
  const Tensor of_rows = new_empty(scratch, {height * band.rows}, ScalarType::Double);
  auto* to = of_rows.mutable_data_ptr<double>();
  for_each_row(of_rows, Memory::begun,
               std::array{SumRows<T>{to, scratch.const_data_ptr<T>(), height * band.rows,
                                     band.width, s.channels_last ? height : 1}});
  const Matrix<double> all = s.channels_last ? Matrix<double>{to, s.out, rows, 1, s.out}
                                             : Matrix<double>{to, s.out, rows, rows, 1};
  Tensor sum = Matrix<double>{sums.const_data_ptr<double>() + b * s.out, s.out, 1, 1, 1}.tensor(
      sums.device());
  torch::stable::sum_out(sum, all.tensor(sums.device()), std::array<int64_t, 1>{1}, true);
}

// Tensors that are not asked for are empty.
std::tuple<Tensor, Tensor, Tensor> upconv_concat_backward(const Tensor& grad, const Tensor& x_,
                                                          const Tensor& weight_, bool for_x,
                                                          bool for_weight, bool for_bias) {
  const char* op = "upconv_concat_backward";
  check_alike(op, x_, weight_);
  check(grad.dim() == x_.dim() && grad.size(0) == x_.size(0) && grad.size(1) >= weight_.size(1) &&
            grad.scalar_type() == x_.scalar_type() && grad.device() == x_.device(),
        op, ": grad: expected the batch size, dtype and device of x and no fewer channels than up");
  for (int64_t a = 2; a < x_.dim(); ++a) {
    check(grad.size(a) == x_.size(a) * weight_.size(a), op, ": grad: expected the size of up");
  }
  const Shape s(x_, weight_);
  const Tensor x = merging(x_), weight = torch::stable::contiguous(weight_, format_of(x_));
  const auto made = [&](bool wanted, const Tensor& like) {
    const std::vector<int64_t> size(like.sizes().begin(), like.sizes().end());
    return wanted ? empty_as(x_, size) : new_empty(x_, {0});
  };
  const Tensor grad_x = made(for_x, x_), grad_weight = made(for_weight, weight_);
  Tensor grad_bias = new_empty(x_, {for_bias ? s.out : 0});
  const Bands bands = s.bands(x, s.out);
  const int64_t entries = s.in * s.out * s.taps, count = bands.count();
  const int64_t block = std::min(BandPolicy::block, s.in), blocks = divide_up(s.in, block);
  visit(Floating{}, x.scalar_type(), op, [&]<class T>() {
    using Acc = Wide<T>;
    const auto acc = torch::headeronly::CppTypeToScalarType<Acc>::value;
    const int64_t most =
        std::clamp<int64_t>(BandPolicy::sums_bytes / (entries * static_cast<int64_t>(sizeof(Acc))),
                            1, BandPolicy::sums);
    const int64_t sums = for_weight ? std::min(most, count) : count;  // of so many runs of bands
    const bool in_place = for_weight && std::is_same_v<T, Acc> && sums == 1;
    const Tensor weight_sums =
        in_place ? grad_weight : new_empty(x, {for_weight ? sums : 0, entries}, acc);
    const Tensor bias_sums = new_empty(x, {for_bias ? count : 0, s.out}, ScalarType::Double);
    in_pieces(sums * blocks, [&](int64_t begin, int64_t end) {
      const Tensor scratch = new_empty(x, {s.out * s.taps * bands.most_pixels()});
      const Tensor part = new_empty(x, {for_weight ? block * s.out * s.taps : 0}, acc);
      for (int64_t i = begin; i < end; ++i) {
        const Split at = split(i, blocks);
        const int64_t row = at.remainder * block, rows = std::min(block, s.in - row);
        const int64_t first = count * at.quotient / sums, last = count * (at.quotient + 1) / sums;
        for (int64_t b = first; b < last; ++b) {
          const Band band = bands[b];
          const Matrix<T> product = s.product<T>(scratch, s.out, band);
          for_each_row(
              scratch, Memory::begun,
              std::array{Gather<T>({s, View(grad), grad.size(1) - s.out, s.out, band},
                                   scratch.mutable_data_ptr<T>(), grad.const_data_ptr<T>())});
          if (for_x) {
            multiply(s.dense(weight.const_data_ptr<T>()).block(row, rows), product,
                     band_of<T>(grad_x, band).block(row, rows), x.device());
          }
          if (for_weight) {
            Acc* sum =
                weight_sums.mutable_data_ptr<Acc>() + at.quotient * entries + row * s.out * s.taps;
            Acc* to = b == first ? sum : part.mutable_data_ptr<Acc>();
            multiply(band_of<T>(x, band).block(row, rows), product.transposed(),
                     s.dense(static_cast<const Acc*>(to)).block(0, rows), x.device());
            if (b > first) {
              for_each_row(weight_sums, Memory::begun,
                           std::array{Add<Acc>{sum, to, rows * s.out * s.taps}});
            }
          }
          if (for_bias && row == 0) sum_channels<T>(s, scratch, band, bias_sums, b);
        }
      }
    });
    const std::array<int64_t, 1> all{0};
    if (for_bias) torch::stable::copy_(grad_bias, torch::stable::sum(bias_sums, all));
    if (for_weight && !in_place) {
      Tensor flat = torch::stable::from_blob(grad_weight.mutable_data_ptr(), {entries}, {1},
                                             x.device(), x.scalar_type());
      torch::stable::copy_(flat, torch::stable::sum(weight_sums, all));
    }
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

SEGFUSE_IMPL(m) {
  m.impl("upconv_concat", TORCH_BOX(&upconv_concat));
  m.impl("upconv_concat_backward", TORCH_BOX(&upconv_concat_backward));
}

}  // namespace segfuse::SEGFUSE_BACKEND
