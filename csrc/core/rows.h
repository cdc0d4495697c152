// Operators that fill their output a row at a time, in one or more parts.
//
// A row is a run of output elements at equal distance (`step`, mostly 1).  A functor F has
//
//   using Value = T;                          the type of an output element
//   int64_t rows() const, longest() const;    how many rows, and a bound of their sizes
//   struct Row { T* to; int64_t step, size; ... };
//   Row row(int64_t r) const;                 what is common to row r: computed once a row on the
//                                             CPU, once a thread and row on CUDA
//   void operator()(const Row&, int64_t x, N n, T* to) const;
//                                             computes elements x .. x + n - 1 into to[0 .. n - 1];
//                                             n is an int64_t, or a constant on CUDA
//
// so that it never sees where the values go: straight to the output, through a buffer that is
// streamed past the cache, or into a register that is stored 16 bytes at once.  One that moves
// elements as they are has, too,
//
//   const T* at(const Row&, int64_t x, int64_t n) const;
//                                             where those elements lie in memory, or nullptr
//
// and, where such rows come in series,
//
//   struct Row { ...; int64_t alike; };       how many rows follow that differ in place alone,
//   int64_t to_next, from_next;               each so many elements behind the one before
//
// One whose rows are made of unlike runs has
//
//   struct Run { int64_t end; bool skip; ... };   ends before element `end`; whether its elements
//                                             are left as they are
//   Run run(const Row&, int64_t x) const;     the run that element x lies in
//
// and takes a Run in place of a Row in operator() and at(), for elements of that run alone.  One
// that reads far more than it writes says how many elements for one, so that few rows are shared
// by threads too, and that nothing is streamed:
//
//   int64_t work() const;
#pragma once

#include "core/split.h"

#if !SEGFUSE_CUDA_SOURCE
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#endif

#include <array>
#include <cstring>
#include <type_traits>

namespace segfuse::SEGFUSE_BACKEND {

// Whether the output was allocated for this call, or is the caller's own; or was allocated, and a
// part of it has been filled before.
enum class Memory { fresh, reused, begun };

template <class F>
concept HasRuns = requires { typename F::Run; };

template <class F>
concept Moves = requires(const F& f, const typename F::Row& row) { f.at(row, 0, 0); } ||
                requires(const F& f, const typename F::Run& run) { f.at(run, 0, 0); };

template <class F>
concept Repeats = Moves<F> && requires(const F& f) { f.to_next + f.from_next; };

// What element x of a row lies in: its run, or the row as a whole.
template <class Row>
struct WholeRow : Row {
  int64_t end;
  static constexpr bool skip = false;
};
template <class F>
SEGFUSE_FUNCTOR auto run_at(const F& f, const typename F::Row& row, int64_t x) {
  if constexpr (HasRuns<F>) {
    return f.run(row, x);
  } else {
    return WholeRow<typename F::Row>{row, row.size};
  }
}

#if SEGFUSE_CUDA_SOURCE

// A thread computes 16 bytes of a row, a pack.  Packs lie where the output is aligned to 16 bytes,
// so that a row's first and last may be cut; those, and rows with a step, are stored one by one.
struct RowPolicy {
  static constexpr unsigned threads = 256;    // a block
  static constexpr int packs_a_thread = 8;    // a row that is longer is shared by several blocks
  static constexpr int64_t blocks = 1 << 30;  // at most; threads go on to further rows
  static constexpr int width = 16;            // elements that a functor has at once, at most
};

// Calls body(begin, n) for pieces of n elements of at most RowPolicy::width.
template <class N>
SEGFUSE_FUNCTOR void for_each_block(N n, const auto& body) {
  body(0, n);
}

// Calls body(i) for i from begin to end, within 0 to n - 1, by indices that the compiler knows.
template <class N>
SEGFUSE_FUNCTOR void for_each_within(N n, int64_t begin, int64_t end, const auto& body) {
  SEGFUSE_UNROLL
  for (int i = 0; i < n; ++i) {
    if (i >= begin && i < end) body(i);
  }
}

// How blocks of threads cover rows: `lanes` threads work on a row, `columns` blocks side by side.
struct RowGrid {
  unsigned lanes, columns, blocks;

  RowGrid() = default;
  RowGrid(int64_t rows, int64_t longest, int64_t pack) {
    const int64_t packs =
        (longest + pack - 1) / pack + (pack > 1);  // one more where rows lie askew
    lanes = packs > 16 ? 32 : packs > 8 ? 16 : 8;
    columns = std::clamp<int64_t>(packs / (lanes * RowPolicy::packs_a_thread), 1, 1 << 15);
    const int64_t rows_a_block = RowPolicy::threads / lanes,
                  block_rows = (rows + rows_a_block - 1) / rows_a_block;
    blocks = columns * std::min(block_rows, RowPolicy::blocks / columns);
  }
};

template <class F, size_t n>
struct RowParts {
  std::array<F, n> part;
  RowGrid grid[n];
};

template <class F, size_t n>
__global__ void fill_rows(const __grid_constant__ RowParts<F, n> parts) {
  using T = typename F::Value;
  constexpr int pack = 16 / sizeof(T);
  unsigned block = blockIdx.x, p = 0;
  for (; p + 1 < n && block >= parts.grid[p].blocks; ++p) block -= parts.grid[p].blocks;
  const F& f = parts.part[p];
  const RowGrid grid = parts.grid[p];
  const int64_t rows_a_block = RowPolicy::threads / grid.lanes;
  const int64_t first = (block % grid.columns * grid.lanes + threadIdx.x % grid.lanes) * pack;
  for (int64_t r = block / grid.columns * rows_a_block + threadIdx.x / grid.lanes, rows = f.rows();
       r < rows; r += grid.blocks / grid.columns * rows_a_block) {
    const auto row = f.row(r);
    const auto askew = reinterpret_cast<uintptr_t>(row.to) % 16;
    const bool dense = row.step == 1 && askew % sizeof(T) == 0;
    for (int64_t x = first - (dense ? askew / sizeof(T) : 0); x < row.size;
         x += int64_t{grid.columns} * grid.lanes * pack) {
      const int64_t begin = x < 0 ? 0 : x, end = x + pack < row.size ? x + pack : row.size;
      auto run = run_at(f, row, begin);
      if (dense && end - begin == pack && run.end >= end) {
        if (run.skip) continue;
        auto* to = reinterpret_cast<uint4*>(row.to + x);
        if constexpr (Moves<F>) {
          const T* from = f.at(run, x, pack);
          if (from && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
            *to = *reinterpret_cast<const uint4*>(from);
            continue;
          }
        }
        alignas(16) T values[pack];
        f(run, x, std::integral_constant<int, pack>{}, values);
        *to = *reinterpret_cast<const uint4*>(values);
      } else {
        for (int64_t i = begin; i < end; ++i) {
          if (i >= run.end) run = run_at(f, row, i);
          if (run.skip) continue;
          T value{};
          f(run, i, std::integral_constant<int, 1>{}, &value);
          row.to[i * row.step] = value;
        }
      }
    }
  }
}

// Fills the rows of all parts of the output, in one launch.
template <class F, size_t n>
void for_each_row(const Tensor& out, Memory, const std::array<F, n>& parts) {
  RowParts<F, n> all{parts, {}};
  unsigned blocks = 0;
  for (size_t p = 0; p < n; ++p) {
    const int64_t rows = parts[p].longest() > 0 ? parts[p].rows() : 0;
    all.grid[p] = RowGrid(rows, parts[p].longest(), 16 / sizeof(typename F::Value));
    blocks += all.grid[p].blocks;
  }
  if (blocks == 0) return;
  const Launch launch(out);
  SEGFUSE_LAUNCH((fill_rows<F, n>), dim3(blocks), RowPolicy::threads, 0, launch.stream, all);
  launch.done();
}

#else

struct RowPolicy {
  static constexpr int64_t grain = 32768;    // bytes a thread writes at least
  static constexpr int64_t longest = 65536;  // bytes; longer rows are split among threads
  static constexpr int64_t buffer = 2048;    // bytes computed before they are streamed
  static constexpr int64_t streamed = 240;   // bytes; rows shorter than this do not gain
  static constexpr int width = 512;          // elements that a functor has at once, at most
};

// Calls body(begin, n) for pieces of n elements of at most RowPolicy::width.
SEGFUSE_FUNCTOR void for_each_block(int64_t n, const auto& body) {
  for (int64_t begin = 0; begin < n; begin += RowPolicy::width) {
    body(begin, std::min<int64_t>(RowPolicy::width, n - begin));
  }
}

// Calls body(i) for i from begin to end, within 0 to n - 1.
SEGFUSE_FUNCTOR void for_each_within(int64_t n, int64_t begin, int64_t end, const auto& body) {
  const int64_t last = std::min(end, n);
  for (int64_t i = std::max<int64_t>(begin, 0); i < last; ++i) body(i);
}

// Copies bytes, 32 at a time (64 would mostly straddle cache lines); the last overlap those before.
// Long runs are left to libc, which has the processor move them without reading what is
// overwritten.
SEGFUSE_FUNCTOR void copy(char* to, const char* from, int64_t bytes) {
  using Pack [[gnu::vector_size(32), gnu::aligned(1), gnu::may_alias]] = char;
  if (bytes < 32 || bytes >= 4096) {
    std::memcpy(to, from, bytes);
    return;
  }
  int64_t i = 0;
  for (; i + 32 <= bytes; i += 32) {
    *reinterpret_cast<Pack*>(to + i) = *reinterpret_cast<const Pack*>(from + i);
  }
  if (i < bytes) {
    *reinterpret_cast<Pack*>(to + bytes - 32) = *reinterpret_cast<const Pack*>(from + bytes - 32);
  }
}

// Writes runs of bytes past the cache, in whole aligned lines: a line that is streamed in part and
// stored in part costs more than streaming saves, so what a run leaves over waits for the next.
class LineWriter {
 public:
  SEGFUSE_FUNCTOR void write(char* to, const char* from, int64_t bytes) {
    if (to != to_ + held_) {
      flush();
      to_ = to;
    }
    const int64_t room = 64 - reinterpret_cast<uintptr_t>(to_) % 64 - held_;
    const int64_t head = std::min(room, bytes);
    if (held_ > 0 || head < 64) {
      std::memcpy(line_ + held_, from, head);
      held_ += head;
      if (head < room) return;
      held_ == 64 ? stream(to_, line_) : copy(to_, line_, held_);
      to_ += held_;
      held_ = 0;
      from += head;
      bytes -= head;
    }
    for (; bytes >= 64; bytes -= 64, to_ += 64, from += 64) stream(to_, from);
    std::memcpy(line_, from, bytes);
    held_ = bytes;
  }
  SEGFUSE_FUNCTOR void flush() {
    std::memcpy(to_, line_, held_);
    held_ = 0;
  }

 private:
  SEGFUSE_FUNCTOR static void stream(char* to, const char* from) {
#if defined(__SSE2__)
    for (int i = 0; i < 64; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
#else
    copy(to, from, 64);
#endif
  }

  alignas(64) char line_[64];
  char* to_ = line_;  // where the line's first byte will go
  int64_t held_ = 0;  // bytes that wait
};

template <bool past_cache, class T>
SEGFUSE_FUNCTOR void move(T* to, const T* from, int64_t n, LineWriter& writer) {
  auto* bytes_to = reinterpret_cast<char*>(to);
  const auto* bytes_from = reinterpret_cast<const char*>(from);
  const int64_t bytes = n * sizeof(T);
  past_cache ? writer.write(bytes_to, bytes_from, bytes) : copy(bytes_to, bytes_from, bytes);
}

// Fills elements [x, end) of a row, which lie in one run.
template <bool past_cache, class F, class Row>
SEGFUSE_FUNCTOR void fill_run(const F& f, const Row& row, const auto& run, int64_t x, int64_t end,
                              LineWriter& writer) {
  using T = typename F::Value;
  if constexpr (Moves<F>) {
    if (const T* from = row.step == 1 ? f.at(run, x, end - x) : nullptr) {
      move<past_cache>(row.to + x, from, end - x, writer);
      return;
    }
  }
  // Straight to the output in one go, or by way of a buffer; f stands here once, since it is
  // inlined.
  const bool straight = row.step == 1 && !past_cache;
  constexpr int64_t block = RowPolicy::buffer / sizeof(T);
  alignas(64) T values[block];
  while (x < end) {
    const int64_t n = straight ? end - x : std::min(block, end - x);
    f(run, x, n, straight ? row.to + x : values);
    if (!straight && row.step == 1) {
      move<past_cache>(row.to + x, values, n, writer);
    } else if (!straight) {
      for (int64_t i = 0; i < n; ++i) row.to[(x + i) * row.step] = values[i];
    }
    x += n;
  }
}

// Fills elements [x, end) of a row.
template <bool past_cache, class F, class Row>
SEGFUSE_FUNCTOR void fill_row(const F& f, const Row& row, int64_t x, int64_t end,
                              LineWriter& writer) {
  while (x < end) {
    const auto run = run_at(f, row, x);
    const int64_t stop = std::min(run.end, end);
    if (!run.skip) fill_run<past_cache>(f, row, run, x, stop, writer);
    x = stop;
  }
}

// A part's pieces of rows; they count from 0, row by row.
template <class F>
struct Pieces {
  static constexpr int64_t size = sizeof(typename F::Value);
  F f;
  int64_t length, per_row, count;

  explicit Pieces(const F& part)
      : f(part),
        length(std::max<int64_t>(std::min(f.longest(), RowPolicy::longest / size), 1)),
        per_row((f.longest() + length - 1) / length),
        count(f.rows() * per_row) {}

  template <bool past_cache>
  SEGFUSE_FUNCTOR void fill(int64_t begin, int64_t end, LineWriter& writer) const {
    while (begin < end) {
      const Split at = per_row == 1 ? Split{begin, 0} : split(begin, per_row);
      const auto row = f.row(at.quotient);
      if constexpr (Repeats<F>) {
        const int64_t whole = at.remainder == 0 ? (end - begin) / per_row : 0;
        if (row.step == 1 && whole > 0) {
          const int64_t rows = std::min(row.alike + 1, whole);
          fill_alike<past_cache>(at.quotient, row, rows, writer);
          begin += rows * per_row;
          continue;
        }
      }
      const int64_t x = at.remainder * length, stop = std::min(x + length, row.size);
      if (x < stop) fill_row<past_cache>(f, row, x, stop, writer);
      ++begin;
    }
  }

  // Fills rows that are alike, from row r on, run by run.
  template <bool past_cache>
  SEGFUSE_FUNCTOR void fill_alike(int64_t r, const auto& row, int64_t rows,
                                  LineWriter& writer) const {
    for (int64_t x = 0; x < row.size;) {
      const auto run = run_at(f, row, x);
      const int64_t stop = std::min(run.end, row.size);
      const auto* from = run.skip ? nullptr : f.at(run, x, stop - x);
      auto* to = row.to + x;
      for (int64_t i = 0; i < (run.skip ? 0 : rows); ++i, to += f.to_next) {
        if (from) {
          move<past_cache>(to, from, stop - x, writer);
          from += f.from_next;
        } else {
          const auto other = f.row(r + i);
          fill_run<past_cache>(f, other, run_at(f, other, x), x, stop, writer);
        }
      }
      x = stop;
    }
  }
};

// Each thread fills its share of every part.
template <bool past_cache, class F, size_t n>
void fill_parts(const std::array<Pieces<F>, n>& parts, int64_t shares) {
  parallel(shares, 1, [=](int64_t begin, int64_t end) __attribute__((always_inline)) {
    LineWriter writer;
    for (const auto& part : parts) {
      part.template fill<past_cache>(part.count * begin / shares, part.count * end / shares,
                                     writer);
    }
    writer.flush();
#if defined(__SSE2__)
    _mm_sfence();
#endif
  });
}

template <class F, size_t... i>
auto pieces(const std::array<F, sizeof...(i)>& parts, std::index_sequence<i...>) {
  return std::array{Pieces<F>(parts[i])...};
}

// Fills the rows of all parts of the output.
template <class F, size_t n>
void for_each_row(const Tensor& out, Memory memory, const std::array<F, n>& parts) {
  const int64_t size = Pieces<F>::size, bytes = out.numel() * size;
  if (bytes == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  const auto all = pieces(parts, std::make_index_sequence<n>());
  if constexpr (requires(const F& f) { f.work(); }) {
    const int64_t grain = RowPolicy::grain / std::max<int64_t>(parts[0].work(), 1) + 1;
    fill_parts<false>(all, std::clamp<int64_t>(bytes / grain, 1, threads));
  } else {
    const int64_t shares = std::clamp<int64_t>(bytes / RowPolicy::grain, 1, threads);
    // Streaming stores spare the read of what is overwritten, but leave nothing in the cache for
    // the next operator.  Fresh memory is not streamed to: the system has just brought each page
    // into the cache, to clear it.
    bool stream = memory == Memory::reused && bytes > host::streams_from;
    for (const F& f : parts) stream = stream && f.longest() * size >= RowPolicy::streamed;
    stream = stream || host::streams_from < 0;
    if (memory == Memory::fresh) ask_for_large_pages(out);
    stream ? fill_parts<true>(all, shares) : fill_parts<false>(all, shares);
  }
}

#endif

}  // namespace segfuse::SEGFUSE_BACKEND
