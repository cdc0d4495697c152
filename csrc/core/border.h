// What lies beyond the ends of an axis.
//
//   mirror      d c b | a b c d | c b a      numpy's "reflect"; again and again
//   symmetric   c b a | a b c d | d c b
//   edge        a a a | a b c d | d d d
//   wrap        b c d | a b c d | a b c
//   constant    . . . | a b c d | . . .
#pragma once

#include "core/split.h"

namespace segfuse::SEGFUSE_BACKEND {

enum class Border : int64_t { mirror, symmetric, edge, wrap, constant };

// Places from some place on that are mapped to the axis in one way: place + i to at + i * sign.
struct Piece {
  int64_t end;  // the first place behind them
  int64_t at;   // -1: to no element
  int sign;
};

// The piece of an axis of n elements that begins at `place`, which is no more than 2^61 from 0.
SEGFUSE_FUNCTOR Piece piece(Border border, int64_t n, int64_t place) {
  if (place >= 0 && place < n) return {n, place, 1};
  const int64_t end = place < 0 ? 0 : int64_t{1} << 62;
  if (border == Border::constant || n == 0) return {end, -1, 0};
  if (border == Border::edge || (border == Border::mirror && n == 1)) {
    return {end, place < 0 ? 0 : n - 1, 0};
  }
  // Copies of the axis follow each other, every other one turned round where they are mirrored;
  // one whose ends are not repeated leaves out its last element.
  const bool mirrored = border != Border::wrap;
  const int64_t length = border == Border::mirror ? n - 1 : n;
  const Split s = place < 0 ? split(-1 - place, length) : split(place, length);
  const int64_t into = place < 0 ? length - 1 - s.remainder : s.remainder;
  const bool turned = mirrored && (place < 0) != (s.quotient % 2 == 1);
  return {place - into + length, turned ? n - 1 - into : into, turned ? -1 : 1};
}

}  // namespace segfuse::SEGFUSE_BACKEND
