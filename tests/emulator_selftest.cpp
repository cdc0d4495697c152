// Self-test of the emulator: small kernels with known answers, and kernels with known mistakes.
//
// Without an argument every check runs, and the exit status is 0 if all hold. With
// `overrun-dynamic` or `overrun-static` a kernel reaches one element past its shared memory, which
// the sanitizers are to report. With `race` the result of a race is printed, which depends on
// SEGFUSE_EMULATOR_SEED. With `time` the cost of a block is printed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/core/emulator.h"

namespace {

int failures = 0;

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                                        \
    }                                                                                    \
  } while (false)

constexpr unsigned kFull = 0xffffffff;
constexpr unsigned long kSeeds = 8;

// What the launch throws; empty if nothing.
template <class Launch>
std::string error_of(const Launch& launch) {
  try {
    launch();
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// ---- Kernels that are right: the same result whatever the order.

__global__ void write_indices(int* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] += static_cast<int>(block * threads + thread);
}

template <class T>
__global__ void __launch_bounds__(1024) block_sum(const T* __restrict__ in, T* out) {
  __shared__ T partial[32];
  T sum = __ldg(&in[blockIdx.x * blockDim.x + threadIdx.x]);
  for (unsigned delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(kFull, sum, delta);
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = sum;
  __syncthreads();
  if (threadIdx.x >= warpSize) return;
  sum = threadIdx.x < blockDim.x / warpSize ? partial[threadIdx.x] : T{0};
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFull, sum, lanes);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void inclusive_scan(int* data) {
  SEGFUSE_DYNAMIC_SHARED(int, buffer);
  const unsigned i = threadIdx.x;
  buffer[i] = data[i];
  __syncthreads();
  for (unsigned delta = 1; delta < blockDim.x; delta *= 2) {
    const int left = i >= delta ? buffer[i - delta] : 0;
    __syncthreads();
    buffer[i] += left;
    __syncthreads();
  }
  data[i] = buffer[i];
}

__global__ void histogram(const int* in, int n, int bins, int* counts) {
  SEGFUSE_DYNAMIC_SHARED(int, local);
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) local[bin] = 0;
  __syncthreads();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&local[in[i]], 1);
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) atomicAdd(&counts[bin], local[bin]);
}

__global__ void votes(unsigned* ballots, int* results) {
  const int lane = threadIdx.x % warpSize;
  const bool odd = lane % 2 == 1;
  const unsigned ballot = __ballot_sync(kFull, odd);
  if (lane == 0) ballots[threadIdx.x / warpSize] = ballot;
  if (odd) {  // a part of the warp, by its own mask
    const int all = __all_sync(ballot, lane > 0), any = __any_sync(ballot, lane == 2);
    if (lane == 1) results[0] = all, results[1] = any;
  }
  __syncwarp();
  const int count = __syncthreads_count(odd);
  const int any = __syncthreads_or(threadIdx.x == 5), all = __syncthreads_and(threadIdx.x != 5);
  if (threadIdx.x == 0) results[2] = count, results[3] = any, results[4] = all;
}

__global__ void segments(int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(kFull, lane, 3, 8);
  out[32 + lane] = __shfl_up_sync(kFull, lane, 2, 8);
  out[64 + lane] = __shfl_down_sync(kFull, lane, 2, 8);
  out[96 + lane] = __shfl_xor_sync(kFull, lane, 12, 8);
}

__global__ void early_return(int n, double* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const unsigned mask = __ballot_sync(kFull, 1);  // the lanes that have not returned
  const int last = 31 - __clz(static_cast<int>(mask));
  out[i] = __shfl_sync(mask, static_cast<double>(i), last);
}

__global__ void atomics(int* max, int* min, unsigned* bits, int* first, int* last) {
  const int i = threadIdx.x;
  atomicMax(max, i);
  atomicMin(min, i);
  atomicOr(bits, 1u << i % 32);
  atomicCAS(first, -1, i);
  atomicExch(last, i);
  __threadfence();
}

// Copies 16 bytes a thread, of whatever type.
__global__ void copy(const float* from, float* to) {
  reinterpret_cast<uint4*>(to)[threadIdx.x] = reinterpret_cast<const uint4*>(from)[threadIdx.x];
}

__global__ void nothing() {}

__global__ void read_shared(unsigned char* out) {
  SEGFUSE_DYNAMIC_SHARED(unsigned char, shared);
  out[blockIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 0;
}

// ---- Kernels with a mistake.

__global__ void racy_reverse(int* data) {
  SEGFUSE_DYNAMIC_SHARED(int, buffer);
  buffer[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];  // no barrier before
}

__global__ void throw_in(unsigned block, unsigned thread, int* destroyed) {
  struct Guard {
    int* count;
    ~Guard() { ++*count; }
  } guard{destroyed};
  __syncthreads();
  if (blockIdx.x == block && threadIdx.x == thread) throw std::out_of_range("thrown in a kernel");
  __syncthreads();
}

__global__ void barrier_missed_by_half() {
  if (threadIdx.x < blockDim.x / 2) __syncthreads();
}

__global__ void barriers_apart() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_against_warp() {
  if (threadIdx.x != 40) __syncwarp();
  __syncthreads();
}

__global__ void masks_apart() {
  __syncwarp(threadIdx.x < 16 ? kFull : 0xffff0000);
  __syncthreads();
}

__global__ void outside_mask() { __ballot_sync(0x7fffffff, 1); }

__global__ void shuffle_from_absent(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0xffff, out[threadIdx.x], 8);
}

__global__ void odd_width(int* out) { out[threadIdx.x] = __shfl_sync(kFull, 1, 0, 12); }

__global__ void overrun_dynamic(unsigned at) {
  SEGFUSE_DYNAMIC_SHARED(float, shared);
  __syncthreads();
  if (threadIdx.x == 7) shared[at] = 1;
}

template <class T>
__global__ void overrun_static(unsigned at, T* out) {
  __shared__ T shared[64];
  shared[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 7) *out = shared[at];
}

// ---- Checks.

void check_indices() {
  const dim3 grid(3, 2, 4), block(5, 4, 3);
  std::vector<int> out(24 * 60, 0);
  SEGFUSE_LAUNCH(write_indices, grid, block, 0, nullptr, out.data());
  for (int i = 0; i < 24 * 60; ++i) CHECK(out[i] == i);
}

template <class T>
void check_sum(unsigned threads) {
  std::vector<T> in(3 * threads), out(3);
  std::iota(in.begin(), in.end(), T{1});
  SEGFUSE_LAUNCH(block_sum<T>, 3, threads, 0, nullptr, in.data(), out.data());
  for (unsigned block = 0; block < 3; ++block) {
    const auto begin = in.begin() + block * threads;
    CHECK(out[block] == std::accumulate(begin, begin + threads, T{0}));
  }
}

void check_scan() {
  std::vector<int> data(1000), expected(1000);
  std::iota(data.begin(), data.end(), -300);
  std::partial_sum(data.begin(), data.end(), expected.begin());
  SEGFUSE_LAUNCH(inclusive_scan, 1, 1000, 1000 * sizeof(int), nullptr, data.data());
  CHECK(data == expected);
}

void check_histogram() {
  constexpr int n = 10000, bins = 77;
  std::vector<int> in(n), counts(bins), expected(bins);
  for (int i = 0; i < n; ++i) ++expected[in[i] = i * 31 % 1001 % bins];
  SEGFUSE_LAUNCH(histogram, (n + 255) / 256, 256, bins * sizeof(int), nullptr, in.data(), n, bins,
                 counts.data());
  CHECK(counts == expected);
}

void check_warps() {
  std::vector<unsigned> ballots(2);
  std::vector<int> results(5, -1), out(128);
  SEGFUSE_LAUNCH(votes, 1, 64, 0, nullptr, ballots.data(), results.data());
  CHECK(ballots == std::vector<unsigned>(2, 0xaaaaaaaa));
  CHECK((results == std::vector<int>{1, 0, 32, 1, 0}));

  SEGFUSE_LAUNCH(segments, 1, 32, 0, nullptr, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(out[lane] == lane / 8 * 8 + 3);
    CHECK(out[32 + lane] == (lane % 8 >= 2 ? lane - 2 : lane));
    CHECK(out[64 + lane] == (lane % 8 < 6 ? lane + 2 : lane));
    CHECK(out[96 + lane] == ((lane ^ 12) < lane / 8 * 8 + 8 ? lane ^ 12 : lane));
  }

  std::vector<double> last(72, -1);
  SEGFUSE_LAUNCH(early_return, 2, 48, 0, nullptr, 71, last.data());
  for (int i = 0; i < 72; ++i) {
    const int end = i < 32 ? 31 : i < 48 ? 47 : 70;
    CHECK(last[i] == (i == 71 ? -1 : end));
  }
}

void check_atomics() {
  int max = -5, min = 5, first = -1, last = -1;
  unsigned bits = 0;
  SEGFUSE_LAUNCH(atomics, 1, 100, 0, nullptr, &max, &min, &bits, &first, &last);
  CHECK(max == 99 && min == 0 && bits == kFull);
  CHECK(first >= 0 && last >= 0 && first != last);
  CHECK(__popc(0xf0f0) == 8 && __popcll(~0ull) == 64);
  CHECK(__ffs(0) == 0 && __ffs(8) == 4 && __clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0);
}

void check_vectors() {
  alignas(16) float from[64], to[64] = {};
  std::iota(from, from + 64, 0.5f);
  SEGFUSE_LAUNCH(copy, 1, 16, 0, nullptr, from, to);
  CHECK(std::equal(from, from + 64, to));
}

void check_shared_memory_is_garbage() {
  std::vector<unsigned char> out(4);
  SEGFUSE_LAUNCH(read_shared, 4, 1, 1, nullptr, out.data());
  CHECK(out == std::vector<unsigned char>(4, 0xCD));
}

std::vector<int> reversed_by_race() {
  std::vector<int> data(64);
  std::iota(data.begin(), data.end(), 0);
  SEGFUSE_LAUNCH(racy_reverse, 1, 64, 64 * sizeof(int), nullptr, data.data());
  return data;
}

void check_races_differ() {
  std::set<std::vector<int>> results;
  for (unsigned long seed = 0; seed < kSeeds; ++seed) {
    segfuse::emulator::set_seed(seed);
    CHECK(reversed_by_race() == reversed_by_race());
    results.insert(reversed_by_race());
  }
  CHECK(results.size() == kSeeds);
}

void check_throwing() {
  int destroyed = 0;
  bool caught = false;
  try {
    SEGFUSE_LAUNCH(throw_in, 4, 96, 0, nullptr, 2u, 50u, &destroyed);
  } catch (const std::out_of_range& error) {
    caught = std::string(error.what()) == "thrown in a kernel";
  }
  CHECK(caught);
  CHECK(destroyed % 96 == 0 && destroyed >= 96);  // whole blocks, the failed one as well
}

void check_mistakes() {
  std::vector<int> out(64);
  const auto missed = error_of([] { SEGFUSE_LAUNCH(barrier_missed_by_half, 1, 64, 0, nullptr); });
  CHECK(contains(missed, "block (0, 0, 0): deadlock; 32 wait at "));
  CHECK(contains(missed, "emulator_selftest.cpp:"));
  CHECK(contains(missed, "32 have returned"));
  const auto apart = error_of([] { SEGFUSE_LAUNCH(barriers_apart, dim3(1, 3), 64, 0, nullptr); });
  CHECK(contains(apart, "thread (") && contains(apart, "others wait for this thread at"));
  const auto against = error_of([] { SEGFUSE_LAUNCH(barrier_against_warp, 1, 64, 0, nullptr); });
  CHECK(contains(against, "deadlock") && contains(against, "; 31 wait at "));
  CHECK(contains(error_of([] { SEGFUSE_LAUNCH(masks_apart, 1, 32, 0, nullptr); }), "deadlock"));
  const auto outside = error_of([] { SEGFUSE_LAUNCH(outside_mask, 1, 32, 0, nullptr); });
  CHECK(contains(outside, "thread (31, 0, 0)") && contains(outside, "not in the mask"));
  CHECK(contains(
      error_of([&] { SEGFUSE_LAUNCH(shuffle_from_absent, 1, 32, 0, nullptr, out.data()); }),
      "which takes no part"));
  CHECK(contains(error_of([&] { SEGFUSE_LAUNCH(odd_width, 1, 32, 0, nullptr, out.data()); }),
                 "power of two"));
}

void check_configurations() {
  constexpr std::size_t most = 227 * 1024;
  const auto refused = [](dim3 grid, dim3 block, std::size_t bytes) {
    return contains(error_of([&] { SEGFUSE_LAUNCH(nothing, grid, block, bytes, nullptr); }),
                    "invalid launch");
  };
  CHECK(refused(0, 1, 0) && refused(dim3(1, 0), 1, 0) && refused(1, 0, 0));
  CHECK(refused(1, 1025, 0) && refused(1, dim3(32, 33), 0) && refused(1, dim3(1, 1, 65), 0));
  CHECK(refused(dim3(1, 65536), 1, 0) && refused(dim3(1, 1, 65536), 1, 0));
  CHECK(refused(dim3(0x80000000), 1, 0) && refused(1, 1, most + 1));
  CHECK(!refused(1, dim3(32, 32), most) && !refused(dim3(1, 65535), 1, 0));
}

void check_all() {
  check_indices();
  check_sum<int>(64);
  check_sum<double>(1024);
  check_sum<float>(32);
  check_scan();
  check_histogram();
  check_warps();
  check_atomics();
  check_vectors();
  check_shared_memory_is_garbage();
  check_throwing();
  check_mistakes();
  check_configurations();
}

template <class Launch>
void time(const char* name, int blocks, const Launch& launch) {
  launch();
  const auto start = std::chrono::steady_clock::now();
  launch();
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  std::printf("%-40s %8.2f us a block\n", name, took.count() / blocks);
}

void time_all() {
  std::vector<int> indices(1000 * 256), scanned(1024);
  std::vector<float> in(1000 * 1024), out(1000);
  for (const unsigned long seed : {0ul, 1ul}) {
    segfuse::emulator::set_seed(seed);
    std::printf("seed %lu\n", seed);
    time("no wait, 256 threads", 1000,
         [&] { SEGFUSE_LAUNCH(write_indices, 1000, 256, 0, nullptr, indices.data()); });
    time("sum, 11 waits, 256 threads", 1000,
         [&] { SEGFUSE_LAUNCH(block_sum<float>, 1000, 256, 0, nullptr, in.data(), out.data()); });
    time("sum, 11 waits, 1024 threads", 1000,
         [&] { SEGFUSE_LAUNCH(block_sum<float>, 1000, 1024, 0, nullptr, in.data(), out.data()); });
    time("scan, 17 barriers, 256 threads", 1,
         [&] { SEGFUSE_LAUNCH(inclusive_scan, 1, 256, 1024, nullptr, scanned.data()); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "overrun-dynamic") {
    SEGFUSE_LAUNCH(overrun_dynamic, 1, 64, 64 * sizeof(float), nullptr, 64u);
  } else if (mode == "overrun-static") {
    float out = 0;
    SEGFUSE_LAUNCH(overrun_static<float>, 1, 64, 0, nullptr, 64u, &out);
  } else if (mode == "race") {
    for (const int value : reversed_by_race()) std::printf("%d ", value);
  } else if (mode == "time") {
    time_all();
  } else {
    check_races_differ();
    for (unsigned long seed = 0; seed < kSeeds; ++seed) {
      segfuse::emulator::set_seed(seed);
      check_all();
    }
    std::vector<std::thread> callers;  // as autograd's
    for (int i = 0; i < 4; ++i) callers.emplace_back(check_scan);
    for (std::thread& caller : callers) caller.join();
    check_all();
  }
  return failures == 0 ? 0 : 1;
}
