// Operators that fill their output a row at a time.
//
// A row is a run of output elements at equal distance (`step`, mostly 1).  A functor F has
//
//   using Value = T;                          the type of an output element
//   struct Row { T* to; int64_t step, size; ... };
//   Row row(int64_t r) const;                 what is common to row r: computed once a row on the
//                                             CPU, once a thread and row on CUDA
//   void operator()(const Row&, int64_t x, N n, T* to) const;
//                                             computes elements x .. x + n - 1 into to[0 .. n - 1];
//                                             n is an int64_t, or a constant on CUDA
//
// so that it never sees where the values go: straight to the output, through a buffer that is
// streamed past the cache, or into a register that is stored 16 bytes at once.  It may also have
//
//   bool next(Row&) const;                    moves on to the following row, where that is cheaper
//                                             than row(r + 1); false where it is not
//   const T* at(const Row&, int64_t x, int64_t n) const;
//                                             where those elements lie in memory as they are, or
//                                             nullptr: they are then moved without a buffer
#pragma once

#include "core/backend.h"

#if !SEGFUSE_CUDA_SOURCE
#include <sys/mman.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#endif

#include <cstring>
#include <type_traits>

namespace segfuse::SEGFUSE_BACKEND {

// Quotient and remainder.  Most counts fit into 32 bits, where a division costs a quarter.
struct Split {
  int64_t quotient, remainder;
};
SEGFUSE_FUNCTOR Split split(int64_t n, int64_t by) {
  if (((n | by) >> 32) == 0) {
    const auto a = static_cast<uint32_t>(n), b = static_cast<uint32_t>(by);
    return {a / b, a % b};
  }
  return {n / by, n % by};
}

// Whether the output was allocated for this call, or is the caller's own.
enum class Memory { fresh, reused };

template <class F>
concept Moves = requires(const F& f, const typename F::Row& row) { f.at(row, 0, 0); };

#if SEGFUSE_CUDA_SOURCE

// A thread computes 16 bytes of a row, a pack.  Packs lie where the output is aligned to 16 bytes,
// so that a row's first and last may be cut; those, and rows with a step, are stored one by one.
struct RowPolicy {
  static constexpr int threads = 256;  // a block: whole warps, each on up to 32 packs of a row,
                                       // or several short rows a warp
  static constexpr int packs_a_thread = 8;  // long rows are split among blocks beyond this
};

template <class F>
__global__ void fill_rows(int64_t rows, F f) {
  using T = typename F::Value;
  constexpr int pack = 16 / sizeof(T);
  const int64_t stride = int64_t{gridDim.y} * blockDim.x * pack;
  for (int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; r < rows;
       r += int64_t{gridDim.x} * blockDim.y) {
    const auto row = f.row(r);
    const auto past = reinterpret_cast<uintptr_t>(row.to) % 16;
    const bool dense = row.step == 1 && past % sizeof(T) == 0;
    const int64_t lead = dense ? past / sizeof(T) : 0;
    for (int64_t x = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * pack - lead; x < row.size;
         x += stride) {
      if (dense && x >= 0 && x + pack <= row.size) {
        auto* to = reinterpret_cast<uint4*>(row.to + x);
        if constexpr (Moves<F>) {
          const T* from = f.at(row, x, pack);
          if (from && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
            *to = *reinterpret_cast<const uint4*>(from);
            continue;
          }
        }
        alignas(16) T values[pack];
        f(row, x, std::integral_constant<int, pack>{}, values);
        *to = *reinterpret_cast<const uint4*>(values);
      } else {
        for (int64_t i = x < 0 ? 0 : x; i < row.size && i < x + pack; ++i) {
          T value;
          f(row, i, std::integral_constant<int, 1>{}, &value);
          row.to[i * row.step] = value;
        }
      }
    }
  }
}

// Fills rows 0 .. rows - 1; `longest` bounds their sizes.
template <class F>
void for_each_row(const Tensor& out, Memory, int64_t rows, int64_t longest, const F& f) {
  if (rows <= 0 || longest <= 0) return;
  constexpr int64_t pack = 16 / sizeof(typename F::Value);
  const int64_t packs =
      (longest + pack - 1) / pack + (pack > 1);  // one more where rows start askew
  const unsigned x = packs > 16 ? 32 : packs > 8 ? 16 : 8, y = RowPolicy::threads / x;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((rows + y - 1) / y, 0x7fffffff)),
                  static_cast<unsigned>(std::clamp<int64_t>(
                      packs / (int64_t{x} * RowPolicy::packs_a_thread), 1, 65535)));
  const Launch launch(out);
  SEGFUSE_LAUNCH(fill_rows<F>, grid, dim3(x, y), 0, launch.stream, rows, f);
  launch.done();
}

#else

struct RowPolicy {
  static constexpr int64_t grain = 32768;    // bytes a thread writes at least
  static constexpr int64_t longest = 65536;  // bytes; longer rows are split among threads
  static constexpr int64_t buffer = 2048;    // bytes computed before they are streamed
  static constexpr int64_t streamed = 240;   // bytes; rows shorter than this do not gain
};

template <class F>
concept Steps = requires(const F& f, typename F::Row& row) { f.next(row); };

// Copies bytes, 32 at a time (64 would mostly straddle cache lines); the last overlap those before.
SEGFUSE_FUNCTOR void copy(char* to, const char* from, int64_t bytes) {
  using Pack [[gnu::vector_size(32), gnu::aligned(1), gnu::may_alias]] = char;
  if (bytes < 32) {
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

// Fills elements [x, end) of a row.
template <bool past_cache, class F, class Row>
SEGFUSE_FUNCTOR void fill(const F& f, const Row& row, int64_t x, int64_t end, LineWriter& writer) {
  using T = typename F::Value;
  const auto bytes = [](const T* p) { return reinterpret_cast<const char*>(p); };
  auto* to = reinterpret_cast<char*>(row.to + x);
  if constexpr (Moves<F>) {
    if (const T* from = row.step == 1 ? f.at(row, x, end - x) : nullptr) {
      const int64_t size = (end - x) * sizeof(T);
      past_cache ? writer.write(to, bytes(from), size) : copy(to, bytes(from), size);
      return;
    }
  }
  if (row.step == 1 && !past_cache) {
    f(row, x, end - x, row.to + x);
    return;
  }
  constexpr int64_t block = RowPolicy::buffer / sizeof(T);
  alignas(64) T values[block];
  for (; x < end; x += block) {
    const int64_t n = std::min(block, end - x);
    f(row, x, n, values);
    if (row.step == 1) {
      writer.write(reinterpret_cast<char*>(row.to + x), bytes(values), n * sizeof(T));
    } else {
      for (int64_t i = 0; i < n; ++i) row.to[(x + i) * row.step] = values[i];
    }
  }
}

template <bool past_cache, class F>
void fill_rows(int64_t rows, int64_t longest, const F& f) {
  using T = typename F::Value;
  constexpr int64_t limit = RowPolicy::longest / sizeof(T);
  const int64_t piece = std::min(longest, limit), pieces = (longest + piece - 1) / piece;
  const auto body = [=](int64_t begin, int64_t end) __attribute__((always_inline)) {
    typename F::Row row;
    bool known = false;
    LineWriter writer;
    for (int64_t i = begin; i < end; ++i) {
      const Split at = pieces == 1 ? Split{i, 0} : split(i, pieces);
      if (!known) row = f.row(at.quotient);
      const int64_t x = at.remainder * piece, stop = std::min(x + piece, row.size);
      if (x < stop) fill<past_cache>(f, row, x, stop, writer);
      if constexpr (Steps<F>) known = pieces == 1 && f.next(row);
    }
    writer.flush();
#if defined(__SSE2__)
    _mm_sfence();
#endif
  };
  parallel(rows * pieces, RowPolicy::grain / (piece * static_cast<int64_t>(sizeof(T))), body);
}

// Page faults of a fresh large output cost more than filling it: ask for large pages, which the
// system grants where it is set to "madvise" or "always".
inline void ask_for_large_pages(const void* begin, int64_t bytes) {
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  if (first + 4 * page <= last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
}

// Fills rows 0 .. rows - 1; `longest` bounds their sizes.
template <class F>
void for_each_row(const Tensor& out, Memory memory, int64_t rows, int64_t longest, const F& f) {
  const auto size = static_cast<int64_t>(sizeof(typename F::Value)), bytes = out.numel() * size;
  if (rows <= 0 || longest <= 0) return;
  // Streaming stores spare the read of what is overwritten, but leave nothing in the cache for the
  // next operator.  Fresh memory is not streamed to: the system has just brought each page into the
  // cache, to clear it.
  const bool large = bytes > host::streams_from && longest * size >= RowPolicy::streamed;
  if (memory == Memory::reused && (large || host::streams_from < 0)) {
    fill_rows<true>(rows, longest, f);
    return;
  }
  if (memory == Memory::fresh) ask_for_large_pages(out.const_data_ptr(), bytes);
  fill_rows<false>(rows, longest, f);
}

#endif

}  // namespace segfuse::SEGFUSE_BACKEND
