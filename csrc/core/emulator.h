// Runs CUDA kernels on the host, so that they can be tested where there is no GPU.
//
// Problem. The mistakes peculiar to kernels (a barrier that some threads miss, a race, an overrun
// of shared memory) show only when a kernel runs, and few of the machines on which this library is
// tested have a GPU.
//
// Method. A kernel launched by SEGFUSE_LAUNCH compiles as plain C++ when this header stands in for
// CUDA's. Blocks run one after another, and so do a block's threads: as plain calls on the caller's
// stack, until one must wait at a barrier or a warp intrinsic. It keeps that stack, and another
// takes over the threads that have not begun. A kernel that never waits thus costs little more than
// a loop; any other, a switch of stacks a wait. Stacks are kept for the next launch.
//
// Order. With seed 0 blocks and threads go in natural order, and in that of their arrival after a
// wait. Any other seed draws the next block, and after each wait or return the next thread, at
// random, and the same way each time. A race, such as a missing __syncthreads(), shows as a result
// that differs between seeds.
//
// Checks. A launch throws std::logic_error when its configuration is invalid; when threads wait for
// others that have returned or wait elsewhere; when threads meet at different lines of the kernel;
// when a lane is not in the mask it names, or reads from a lane that takes no part. What a kernel
// throws, the launch throws. Dynamic shared memory has its exact size and is filled with 0xCD
// before each block; AddressSanitizer, told of the switches of stacks, reports its overrun.
//
// Limits. __syncthreads() wants every thread of the block, also where hardware forgives those that
// have returned; warp intrinsics forgive them. A `__shared__` array is a static one: it keeps what
// the block before left there. A loop that polls for another thread never ends. Launches from
// several threads take turns; a kernel cannot launch another. Streams are ignored: a launch is over
// when it returns. Above 48 KiB of shared memory hardware wants an attribute, not checked here.
// Stacks have 256 KiB, with a guard below. It is made for gcc, from version 12 on.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define SEGFUSE_DYNAMIC_SHARED(T, name) T* name = segfuse::emulator::device.shared<T>()
#define SEGFUSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  segfuse::emulator::launch(kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// Kernels reinterpret arrays of anything as vectors, which nvcc allows.
// clang-format off
struct [[gnu::may_alias]] alignas(8) int2 { int x, y; };
struct [[gnu::may_alias]] alignas(16) int4 { int x, y, z, w; };
struct [[gnu::may_alias]] alignas(8) uint2 { unsigned x, y; };
struct [[gnu::may_alias]] alignas(16) uint4 { unsigned x, y, z, w; };
struct [[gnu::may_alias]] alignas(8) float2 { float x, y; };
struct [[gnu::may_alias]] alignas(16) float4 { float x, y, z, w; };
// clang-format on
using cudaStream_t = struct CUstream_st*;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

extern "C" {  // null in a process without AddressSanitizer
[[gnu::weak]] void __sanitizer_start_switch_fiber(void**, const void*, std::size_t);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*);
}

namespace segfuse::emulator {

using Where = std::source_location;

// A stack, and where its execution was left.
struct Fiber {
  const void* stack = nullptr;  // lowest address
  std::size_t size = 0;
  bool entered = false;
  void* resume[5] = {};        // as the builtins want it
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Thread {
  uint3 index = {};
  Fiber* fiber = nullptr;  // where it waits, or last waited; null before
};

// What threads bring to a meeting; all but `votes` means something within a warp only.
struct Exchange {
  unsigned votes = 0, lanes = 0, ballot = 0;
  std::uint64_t values[32] = {};
};

// Threads that wait for each other: a block at a barrier, or the lanes of a mask.
struct Meeting {
  Where where = {};
  std::vector<unsigned> waiting = {};
  Exchange arriving = {}, complete = {};  // the quick may arrive anew before the slow have read
};

struct Cancelled {};  // unwinds the threads that wait when another has failed

// The emulated GPU. It runs one launch at a time, and of that one thread at a time.
class Device {
 public:
  void set_seed(unsigned long seed) {
    const std::lock_guard lock(mutex_);
    seed_ = seed;
  }

  void launch(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
    const auto within = [](dim3 size, unsigned x, unsigned y, unsigned z) {
      return size.x - 1 < x && size.y - 1 < y && size.z - 1 < z;  // 0 wraps around and fails
    };
    if (!within(grid, 0x7fffffff, 65535, 65535) || !within(block, 1024, 1024, 64) ||
        block.x * block.y * block.z > 1024 || shared_bytes > 227 * 1024) {
      throw std::logic_error("invalid launch: grid " + text(grid) + ", block " + text(block) +
                             ", shared memory of " + std::to_string(shared_bytes) + " bytes");
    }
    const std::lock_guard lock(mutex_);
    gridDim = grid;
    blockDim = block;
    body_ = &body;
    threads_.resize(block.x * block.y * block.z);
    for (unsigned rank = 0; rank < threads_.size(); ++rank) {
      threads_[rank].index = {rank % block.x, rank / block.x % block.y, rank / block.x / block.y};
    }
    lanes_.assign((threads_.size() + 31) / 32, 0);
    meetings_.clear();
    std::vector<std::uint64_t> order(std::uint64_t{grid.x} * grid.y * grid.z);
    std::iota(order.begin(), order.end(), std::uint64_t{0});
    random_.seed(seed_);
    if (seed_ != 0) std::ranges::shuffle(order, random_);
    for (const std::uint64_t i : order) {
      blockIdx.x = i % grid.x;
      blockIdx.y = i / grid.x % grid.y;
      blockIdx.z = i / grid.x / grid.y;
      shared_ = std::vector(shared_bytes, std::byte{0xCD});
      run_block();
    }
  }

  // The rest of the interface serves the running thread.
  template <class T>
  T* shared() {
    return reinterpret_cast<T*>(shared_.data());
  }

  unsigned lane() const { return current_ % 32; }

  [[noreturn]] void refuse(const std::string& why, const Where& where) const {
    throw std::logic_error("block " + text(blockIdx) + ", thread " + text(threadIdx) + ", " +
                           text(where) + ": " + why);
  }

  const Exchange& meet_block(bool vote, const Where& where) {
    return meet(meetings_[{kBlock, 0}], threads_.size(), vote, where);
  }

  const Exchange& meet_warp(unsigned mask, std::uint64_t value, const Where& where) {
    const unsigned warp = current_ / 32;
    if ((mask >> lane() & 1) == 0) refuse("the lane is not in the mask it names", where);
    return meet(meetings_[{warp, mask}], std::popcount(mask & lanes_[warp]), value, where);
  }

 private:
  static constexpr unsigned kBlock = ~0u;  // in place of a warp: the block's barrier

  static std::string text(const auto& v) {
    std::ostringstream result;
    result << '(' << v.x << ", " << v.y << ", " << v.z << ')';
    return result.str();
  }

  static std::string text(const Where& where) {
    return std::string(where.file_name()) + ":" + std::to_string(where.line());
  }

  void run_block() {
    alive_ = threads_.size();
    for (unsigned rank = alive_; rank-- > 0; runnable_.push_back(rank)) {
      threads_[rank].fiber = nullptr;
      lanes_[rank / 32] |= 1u << rank % 32;
    }
    fiber_ = &caller_;
    work();
    std::erase(idle_, &caller_);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // Runs threads on this stack. When the next one waits on another stack, this one is left until a
  // thread that has not begun needs it or, being the caller's, until all have returned.
  void work() {
    while (alive_ > 0) {
      current_ = draw();
      if (Fiber* fiber = threads_[current_].fiber) {
        idle_.push_back(fiber_);
        switch_to(*fiber);
        if (alive_ == 0) return;
      }
      run_thread();
    }
  }

  void run_thread() {
    threadIdx = threads_[current_].index;
    try {
      if (!error_) (*body_)();
    } catch (const Cancelled&) {
    } catch (...) {
      fail(std::current_exception());
    }
    --alive_;
    const unsigned warp = current_ / 32;
    lanes_[warp] &= ~(1u << lane());
    for (auto at = meetings_.lower_bound({warp, 0}); at != meetings_.end(); ++at) {
      if (at->first.first != warp) break;
      Meeting& meeting = at->second;
      const std::size_t expected = std::popcount(at->first.second & lanes_[warp]);
      if (meeting.waiting.size() == expected) release(meeting);
    }
  }

  // The running thread waits until `expected` have come, itself included.
  const Exchange& meet(Meeting& meeting, std::size_t expected, std::uint64_t value,
                       const Where& where) {
    const unsigned self = current_;
    if (!meeting.waiting.empty() &&
        (meeting.where.line() != where.line() || meeting.where.column() != where.column())) {
      refuse("others wait for this thread at " + text(meeting.where), where);
    }
    if (idle_.empty()) idle_.push_back(new_fiber());
    meeting.where = where;
    meeting.waiting.push_back(self);
    meeting.arriving.votes += value != 0;
    meeting.arriving.lanes |= 1u << lane();
    meeting.arriving.ballot |= unsigned{value != 0} << lane();
    meeting.arriving.values[lane()] = value;
    if (meeting.waiting.size() == expected) release(meeting);

    threads_[self].fiber = fiber_;
    current_ = draw();
    Fiber* next = threads_[current_].fiber;
    if (!next) {
      next = idle_.back();
      idle_.pop_back();
    }
    if (next != fiber_) switch_to(*next);
    threadIdx = threads_[self].index;
    if (error_) throw Cancelled();
    return meeting.complete;
  }

  void release(Meeting& meeting) {
    runnable_.insert(runnable_.end(), meeting.waiting.rbegin(), meeting.waiting.rend());
    meeting.waiting.clear();
    meeting.complete = std::exchange(meeting.arriving, {});
  }

  void fail(const std::exception_ptr& error) {
    if (!error_) error_ = error;
    for (auto& [key, meeting] : meetings_) release(meeting);
  }

  // The rank of the next thread. When none can run, those that have not returned wait in vain.
  unsigned draw() {
    if (runnable_.empty()) fail(std::make_exception_ptr(std::logic_error(deadlock())));
    if (seed_ != 0) std::swap(runnable_.back(), runnable_[random_() % runnable_.size()]);
    const unsigned rank = runnable_.back();
    runnable_.pop_back();
    return rank;
  }

  std::string deadlock() const {
    std::string result = "block " + text(blockIdx) + ": deadlock";
    for (const auto& [key, meeting] : meetings_) {
      if (meeting.waiting.empty()) continue;
      result += "; " + std::to_string(meeting.waiting.size()) + " wait at " + text(meeting.where) +
                ", thread " + text(threads_[meeting.waiting[0]].index) + " first";
    }
    return result + "; " + std::to_string(threads_.size() - alive_) + " have returned";
  }

  Fiber* new_fiber() {
    constexpr std::size_t guard = 64 * 1024, size = 256 * 1024;
    void* memory = mmap(nullptr, guard + size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
    fibers_.push_back({.stack = static_cast<std::byte*>(memory) + guard, .size = size});
    return &fibers_.back();
  }

  void switch_to(Fiber& to) {
    left_ = std::exchange(fiber_, &to);
    if (__sanitizer_start_switch_fiber) {
      __sanitizer_start_switch_fiber(&left_->fake_stack, to.stack, to.size);
    }
    jump(*left_, to);
    arrive();
  }

  void arrive() {
    if (__sanitizer_finish_switch_fiber) {
      __sanitizer_finish_switch_fiber(fiber_->fake_stack, &left_->stack, &left_->size);
    }
  }

  // The builtins make no system call, unlike swapcontext, and refuse no jump to another stack,
  // unlike a fortified longjmp. They want a function of their own, which saves the registers.
  [[gnu::noinline, gnu::no_sanitize_address]] static void jump(Fiber& from, Fiber& to) {
    if (__builtin_setjmp(from.resume) != 0) return;
    if (std::exchange(to.entered, true)) __builtin_longjmp(to.resume, 1);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = const_cast<void*>(to.stack);
    context.uc_stack.ss_size = to.size;
    makecontext(&context, &enter, 0);
    setcontext(&context);
  }

  [[noreturn]] static void enter();

  std::mutex mutex_;  // a launch holds it: the rest and the kernels' static arrays are its own
  unsigned long seed_ = [] {
    const char* seed = std::getenv("SEGFUSE_EMULATOR_SEED");
    return seed ? std::strtoul(seed, nullptr, 10) : 0;
  }();
  std::mt19937 random_;

  const std::function<void()>* body_ = nullptr;
  std::vector<std::byte> shared_;
  std::vector<Thread> threads_;                                // by rank: x runs fastest, then y
  std::vector<unsigned> lanes_;                                // of a warp: those not returned
  std::map<std::pair<unsigned, unsigned>, Meeting> meetings_;  // by warp and mask
  std::vector<unsigned> runnable_;                             // ranks; the last comes first
  unsigned alive_ = 0;                                         // threads that have not returned
  unsigned current_ = 0;                                       // rank of the running thread
  std::exception_ptr error_;                                   // of the first thread that failed

  Fiber caller_{.entered = true};
  Fiber* fiber_ = nullptr;    // the running one
  Fiber* left_ = nullptr;     // the one before
  std::list<Fiber> fibers_;   // all but the caller's; their stacks last as long as the process
  std::vector<Fiber*> idle_;  // those on which no thread runs or waits
};

inline Device device;

// Where a new fiber begins: with a thread already drawn.
inline void Device::enter() {
  device.arrive();
  while (true) {
    device.run_thread();
    device.work();
    device.idle_.push_back(device.fiber_);
    device.switch_to(device.caller_);
  }
}

inline void set_seed(unsigned long seed) { device.set_seed(seed); }

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t,
            std::type_identity_t<P>... arguments) {
  static_assert((std::is_trivially_copyable_v<P> && ...), "a kernel takes plain values");
  device.launch(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

// `inside`: the source lies in the lane's segment. If not, the lane keeps its own value.
template <class T>
T shuffle(unsigned mask, T value, unsigned source, bool inside, const Where& where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Exchange& exchange = device.meet_warp(mask, bits, where);
  if (!inside) return value;
  if ((exchange.lanes >> source & 1) == 0) {
    device.refuse("reads from lane " + std::to_string(source) + ", which takes no part", where);
  }
  std::memcpy(&value, &exchange.values[source], sizeof(T));
  return value;
}

// The first lane of the segment of `width` lanes in which the lane lies.
inline unsigned segment(int width, const Where& where) {
  if (width > 32 || !std::has_single_bit(static_cast<unsigned>(width))) {
    device.refuse("a width is a power of two up to 32, not " + std::to_string(width), where);
  }
  return device.lane() & ~(width - 1u);
}

// The types that CUDA's atomic functions take.
template <class T>
concept Integer =
    std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;
template <class T>
concept Number = Integer<T> || std::same_as<T, float> || std::same_as<T, double>;
template <class T>
using Same = std::type_identity_t<T>;  // converts to T instead of deducing it

// The last argument, never passed, is the line of the kernel that calls.
#define SEGFUSE_HERE Where where = Where::current()

namespace intrinsics {

inline void __syncthreads(SEGFUSE_HERE) { device.meet_block(false, where); }
inline int __syncthreads_count(int vote, SEGFUSE_HERE) {
  return device.meet_block(vote != 0, where).votes;
}
inline int __syncthreads_or(int vote, SEGFUSE_HERE) {
  return device.meet_block(vote != 0, where).votes != 0;
}
inline int __syncthreads_and(int vote, SEGFUSE_HERE) {
  return device.meet_block(vote == 0, where).votes == 0;
}

inline void __syncwarp(unsigned mask = ~0u, SEGFUSE_HERE) { device.meet_warp(mask, 0, where); }
inline unsigned __ballot_sync(unsigned mask, int vote, SEGFUSE_HERE) {
  return device.meet_warp(mask, vote != 0, where).ballot;
}
inline int __any_sync(unsigned mask, int vote, SEGFUSE_HERE) {
  return device.meet_warp(mask, vote != 0, where).votes != 0;
}
inline int __all_sync(unsigned mask, int vote, SEGFUSE_HERE) {
  return device.meet_warp(mask, vote == 0, where).votes == 0;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SEGFUSE_HERE) {
  return shuffle(mask, value, segment(width, where) + (source & (width - 1)), true, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SEGFUSE_HERE) {
  const bool inside = device.lane() - segment(width, where) >= delta;
  return shuffle(mask, value, device.lane() - delta, inside, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SEGFUSE_HERE) {
  const bool inside = device.lane() - segment(width, where) + delta < unsigned(width);
  return shuffle(mask, value, device.lane() + delta, inside, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SEGFUSE_HERE) {
  const unsigned source = device.lane() ^ (bits & 31);
  return shuffle(mask, value, source, source < segment(width, where) + width, where);
}

// Plain accesses, since no other thread runs before this one waits or returns.
// clang-format off
template <Number T> T atomicAdd(T* p, Same<T> x) { return std::exchange(*p, *p + x); }
template <Number T> T atomicExch(T* p, Same<T> x) { return std::exchange(*p, x); }
template <Integer T> T atomicMax(T* p, Same<T> x) { return std::exchange(*p, std::max(*p, x)); }
template <Integer T> T atomicMin(T* p, Same<T> x) { return std::exchange(*p, std::min(*p, x)); }
template <Integer T> T atomicOr(T* p, Same<T> x) { return std::exchange(*p, *p | x); }
template <Integer T> T atomicCAS(T* p, Same<T> expected, Same<T> x) {
  return std::exchange(*p, *p == expected ? x : *p);
}
template <class T> T __ldg(const T* p) { return *p; }
// clang-format on
inline void __threadfence() {}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }

}  // namespace intrinsics

#undef SEGFUSE_HERE

}  // namespace segfuse::emulator

using namespace segfuse::emulator::intrinsics;
