// The class of the largest score, pixel by pixel: of equal scores the lowest, and the first NaN
// before all others, as in torch.argmax.
#pragma once

#include <type_traits>

#include "core/backend.h"

namespace segfuse::SEGFUSE_BACKEND {

// Of as many pixels at once as `width`, scores in Acc.
template <class Acc, int width>
struct Argmax {
  alignas(64) Acc best[width];
  alignas(64) int at[width];

  // Takes in pixel i's score of class 0.
  SEGFUSE_FUNCTOR void start(int64_t i, Acc score) {
    best[i] = score;
    at[i] = 0;
  }
  // And of class k; the classes come in ascending order.
  SEGFUSE_FUNCTOR void take(int64_t i, int k, Acc score) {
    const bool better = !(score <= best[i]) & (best[i] == best[i]);
    best[i] = better ? score : best[i];
    at[i] = better ? k : at[i];
  }

  // Takes in scores x[k * channel + i * step] of all classes.
  template <class T, class N>
  SEGFUSE_FUNCTOR void take_all(const T* x, int64_t step, int64_t channel, int classes, N n) {
    if (step == 1) {
      take_planes(x, std::integral_constant<int, 1>{}, channel, classes, n);
    } else if (step == 2) {  // two classes, the last axis: a known step is many pixels at once
      take_planes(x, std::integral_constant<int, 2>{}, channel, classes, n);
    } else {
      take_planes(x, step, channel, classes, n);
    }
  }

 private:
  template <class T, class Step, class N>
  SEGFUSE_FUNCTOR void take_planes(const T* x, Step step, int64_t channel, int classes, N n) {
    for (int64_t i = 0; i < n; ++i) start(i, static_cast<Acc>(x[i * step]));
    for (int k = 1; k < classes; ++k) {
      for (int64_t i = 0; i < n; ++i) take(i, k, static_cast<Acc>(x[k * channel + i * step]));
    }
  }
};

}  // namespace segfuse::SEGFUSE_BACKEND
