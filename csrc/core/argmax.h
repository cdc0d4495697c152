// The class of the largest score, pixel by pixel: of equal scores the lowest, and the first NaN
// before all others, as in torch.argmax.
#pragma once

#include "core/backend.h"

namespace segfuse::SEGFUSE_BACKEND {

// Of as many pixels at once as `width`, scores in Acc.
template <class Acc, int width>
struct Argmax {
  alignas(64) Acc best[width];
  alignas(64) int at[width];

  // Takes in pixel i's score of class k; the classes come in ascending order, from 0.
  SEGFUSE_FUNCTOR void take(int64_t i, int k, Acc score) {
    const bool better = k == 0 || score > best[i] || (score != score && best[i] == best[i]);
    best[i] = better ? score : best[i];
    at[i] = better ? k : at[i];
  }

  // Takes in scores x[k * channel + i * step] of all classes.
  template <class T, class N>
  SEGFUSE_FUNCTOR void take_all(const T* x, int64_t step, int64_t channel, int classes, N n) {
    for (int64_t i = 0; i < n; ++i) take(i, 0, static_cast<Acc>(x[i * step]));
    if (step == 1) {
      for (int k = 1; k < classes; ++k) {
        for (int64_t i = 0; i < n; ++i) take(i, k, static_cast<Acc>(x[k * channel + i]));
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        for (int k = 1; k < classes; ++k) {
          take(i, k, static_cast<Acc>(x[i * step + k * channel]));
        }
      }
    }
  }
};

}  // namespace segfuse::SEGFUSE_BACKEND
