// Coarse scores at full resolution, which are stored nowhere.
//
//   for_each_pixel(f, like)      f sees all the classes of some pixels at once, and may sum
//   gradient_of_scores(f, out)   from pixels' gradients, a class at a time, the coarse scores'
//   gradient_of_weight(f, out)   and those of a learned kernel
//
// On the CPU a row of coarse scores is spread along x once for all the rows of pixels that it
// reaches, which are then weighted sums of two such; gradients go the same way back, along y first.
// So a pixel's score costs two products, and each exponential is computed once a direction.  A
// thread holds two spread rows of some classes, or of some pixels.  Where kernels are tables, or
// reach over more than two sources, a row is computed by core/upsample.h.  On CUDA a thread
// computes a pixel, or gathers a coarse score's gradient from the pixels that it reaches.
//
// Functors have
//
//   Coarse<T> coarse;
//   using Sum = ...; void write(const Sum& total) const;      as core/reduce.h has them
//   void operator()(const Pixel& p, N n, const auto& scores, Sum&) const;
//       n pixels along x, at most UpsampledPolicy::width; scores(k, i): class k of pixel p + i
//
// or, for gradients,
//
//   PixelTerms<Acc>; void read(const Pixel& p, N n, const PixelTerms<Acc>& to) const;
//   void differentiate(int64_t k, N n, const PixelTerms<Acc>&, Acc* x) const;
//       in place of n scores of class k their gradients
#pragma once

#include "core/cross_entropy.h"
#include "core/upsample.h"

namespace segfuse::SEGFUSE_BACKEND {

// Scores (N, K, H, W), and how they are upsampled; float or double, to which halves are converted,
// so that all this is compiled but twice.
template <class Acc>
struct Coarse {
  const Acc* scores;
  int64_t n_step, k_step, y_step, x_step;
  int64_t batch, classes;
  Sampling<Acc> down, across;
  Weights<Acc> weights;  // where there is a table, of the first class
  int64_t table_step;    // to that of the next

  SEGFUSE_FUNCTOR Plane<Acc> plane(int64_t n, int64_t k) const {
    return {scores + n * n_step + k * k_step, y_step, x_step};
  }
  SEGFUSE_FUNCTOR Weights<Acc> weights_of(int64_t k) const {
    Weights<Acc> w = weights;
    if (w.table) w.table += k * table_step;
    return w;
  }
};

// How scores (N, K, H, W) are upsampled, as both operators are told; checked.
struct UpsamplingArguments {
  const char* op;
  const Tensor& scores;
  const std::optional<Tensor>& weight;
  int64_t factor, kernel;  // 0: by interpolation
  const std::vector<int64_t>& offset;
  bool corners;

  void check_all(const std::vector<int64_t>& size) const {
    check(scores.dim() == 4 && scores.size(1) > 0 && scores.size(2) > 0 && scores.size(3) > 0, op,
          ": scores: expected (N, C, H, W), C, H and W at least 1");
    check(factor >= 0 && kernel >= (factor > 0) && kernel <= longest_kernel, op,
          ": kernel_size: expected 1 to ", longest_kernel, " with a factor, else 0");
    check(offset.size() == 2 && size.size() == 2 && size[0] >= 0 && size[1] >= 0, op,
          ": offset and size: expected one an axis");
    for (int a = 0; a < 2; ++a) {
      check(factor == 0 ? offset[a] == 0
                        : offset[a] >= 0 &&
                              size[a] <= (scores.size(2 + a) - 1) * factor + kernel - offset[a],
            op, ": offset and size: expected a range within the whole result");
    }
    check(!weight || (factor > 0 && weight->dim() == 3 && weight->size(0) == scores.size(1) &&
                      weight->size(1) == kernel && weight->size(2) == kernel &&
                      weight->device() == scores.device()),
          op, ": weight: expected (C, kernel_size, kernel_size) on the device of the scores");
  }

  // Calls body with the scores; what they point to lives as long.
  void with(const std::vector<int64_t>& size, const auto& body) const {
    const auto acc =
        scores.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    const Tensor wide = torch::stable::to(scores, acc);
    std::optional<Tensor> table;
    if (weight) table = torch::stable::contiguous(torch::stable::to(*weight, acc));
    visit(Types<float, double>{}, acc, op, [&]<class Acc>() {
      const Sampling<Acc> down(wide.size(2), size[0], factor, kernel, offset[0], corners);
      const Sampling<Acc> across(wide.size(3), size[1], factor, kernel, offset[1], corners);
      Coarse<Acc> coarse{
          wide.const_data_ptr<Acc>(),
          wide.stride(0),
          wide.stride(1),
          wide.stride(2),
          wide.stride(3),
          wide.size(0),
          wide.size(1),
          down,
          across,
          {table ? table->const_data_ptr<Acc>() : nullptr, nullptr, down.kernel, kernel},
          table ? kernel * kernel : 0};
#if !SEGFUSE_CUDA_SOURCE
      std::vector<Acc> taps;
      if (!table && !down.pairs()) {  // one for all classes
        for (int64_t y = 0; y < kernel; ++y) {
          for (int64_t x = 0; x < kernel; ++x) taps.push_back(down.kernel(y) * down.kernel(x));
        }
        coarse.weights.table = taps.data();
      }
#endif
      body(coarse);
    });
  }
};

}  // namespace segfuse::SEGFUSE_BACKEND

#if SEGFUSE_CUDA_SOURCE
#include "core/upsampled_cuda.h"
#else
#include "core/upsampled_cpu.h"
#endif
