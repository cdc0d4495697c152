// What the CPU build knows of its machine: instruction sets, the last-level cache, large pages.
//
// One body is compiled for each instruction set, and one is chosen at load.  A function with
// [[gnu::target]] inlines what has no target of its own and vectorises it for that instruction set;
// [[gnu::flatten]] inlines the rest.  The compiler's own target_clones chooses in the same way but
// cannot be overridden, and what cannot be chosen cannot be tested.  Without multiply-add
// contraction all sets give the same bits.
#pragma once

#include <sys/mman.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace segfuse::host {

enum class Isa { baseline, x86_64_v3, x86_64_v4 };
inline constexpr std::array<std::string_view, 3> names{"baseline", "x86-64-v3", "x86-64-v4"};

#if defined(__x86_64__)
inline Isa best() {
  __builtin_cpu_init();
  bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
            __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#if !defined(__clang__)  // older ones do not know these names; only a masked CPU lacks them alone
  v3 = v3 && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
       __builtin_cpu_supports("movbe");
#endif
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v3 && v4 ? Isa::x86_64_v4 : v3 ? Isa::x86_64_v3 : Isa::baseline;
}
#else
inline Isa best() { return Isa::baseline; }
#endif

// The instruction set that a name stands for; "" stands for the best that this CPU has.
inline Isa parse(std::string_view name) {
  if (name.empty()) return best();
  std::string known;
  for (int i = 0; i <= static_cast<int>(best()); ++i) {
    if (name == names[i]) return static_cast<Isa>(i);
    known += (i ? ", " : "") + std::string(names[i]);
  }
  throw std::invalid_argument("SEGFUSE_ISA: this CPU has " + known + "; got " + std::string(name));
}

// Chosen from the environment when _C is loaded, and by tests.
inline Isa isa = best();

// Larger outputs than this are written past the cache, since it would not keep them anyway.  The
// size is not asked of sysconf, which adds up the caches of a whole machine.
inline int64_t last_level_cache() {
  int64_t kib = 0;
  std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
  return (kib > 0 ? kib : 32 * 1024) * 1024;
}
inline int64_t streams_from = last_level_cache();  // bytes; negative (tests): always stream

// Whether large fresh outputs ask for large pages.  Mostly that saves more than half of their time;
// on a virtual machine that hands freed memory back to its host it can cost more than it saves.
inline const bool large_pages = [] {
  const char* set = std::getenv("SEGFUSE_LARGE_PAGES");
  return !set || std::string_view(set) != "0";
}();

// Page faults of a fresh large result cost more than filling it: ask for large pages, which the
// system grants where it is set to "madvise" or "always".
inline void ask_for_large_pages(const void* begin, int64_t bytes) {
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  if (large_pages && first + 4 * page <= last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
}

template <class Body>
using Run = void (*)(const Body&, int64_t, int64_t);

template <class Body>
[[gnu::flatten]] void run_baseline(const Body& body, int64_t begin, int64_t end) {
  body(begin, end);
}

#if defined(__x86_64__)
template <class Body>
[[gnu::target("arch=x86-64-v3"), gnu::flatten]] void run_v3(const Body& body, int64_t begin,
                                                            int64_t end) {
  body(begin, end);
}

template <class Body>
[[gnu::target("arch=x86-64-v4"), gnu::flatten]] void run_v4(const Body& body, int64_t begin,
                                                            int64_t end) {
  body(begin, end);
}

template <class Body>
Run<Body> chosen() {
  constexpr std::array<Run<Body>, 3> all{run_baseline<Body>, run_v3<Body>, run_v4<Body>};
  return all[static_cast<int>(isa)];
}
#else
template <class Body>
Run<Body> chosen() {
  return run_baseline<Body>;
}
#endif

}  // namespace segfuse::host
