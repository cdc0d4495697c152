// The only file that decides for what an operator is being compiled.
//
// Each csrc/ops/<op>.cu is compiled three times: by the host's compiler for the CPU, by nvcc for
// CUDA, and in test builds by the host's compiler as CUDA, run by core/emulator.h.  An operator is
// written once, as a functor that core/rows.h and its siblings apply; here they find
//
//   SEGFUSE_BACKEND         namespace cpu, cuda or emulated: the linker must not merge templates
//                           of two compilations that have the same name
//   SEGFUSE_IMPL(m)         registers kernels of this backend: SEGFUSE_IMPL(m) { m.impl(...); }
//   SEGFUSE_FUNCTOR         marks what runs per row or element: on the CPU always inlined, so that
//                           it is compiled anew for each instruction set; on CUDA device code
//   SEGFUSE_CUDA_SOURCE     1 where kernels are launched (CUDA and emulated), 0 on the CPU
//   SEGFUSE_UNROLL          before a loop: its values shall stay in registers (CUDA)
//   SEGFUSE_ASSERT          stops a kernel that found a wrong value: a device-side assert (CUDA);
//                           nothing on the CPU, whose functors count what is wrong
//   parallel                CPU: a loop on torch's threads, in the chosen instruction set
//   ask_for_large_pages     CPU: for a result that was just allocated, and not yet written
//   Launch, SEGFUSE_LAUNCH  CUDA and emulated: the device and stream of a tensor, and a launch
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>

#if defined(SEGFUSE_EMULATED)
#include "core/emulator.h"
#define SEGFUSE_BACKEND emulated
#define SEGFUSE_CUDA_SOURCE 1
#define SEGFUSE_FUNCTOR inline
#define SEGFUSE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(segfuse_emulated, CPU, m)
#define SEGFUSE_UNROLL
#define SEGFUSE_ASSERT(good, text) \
  if (!(good)) throw std::invalid_argument(text)
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#define SEGFUSE_BACKEND cuda
#define SEGFUSE_CUDA_SOURCE 1
#define SEGFUSE_FUNCTOR __host__ __device__ __forceinline__
#define SEGFUSE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(segfuse, CUDA, m)
#define SEGFUSE_UNROLL _Pragma("unroll")
#define SEGFUSE_ASSERT(good, text) CUDA_KERNEL_ASSERT_MSG(good, text)
#define SEGFUSE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define SEGFUSE_DYNAMIC_SHARED(T, name)                               \
  extern __shared__ __align__(16) unsigned char segfuse_shared_raw[]; \
  T* name = reinterpret_cast<T*>(segfuse_shared_raw)
#else
#include "core/host.h"
#define SEGFUSE_BACKEND cpu
#define SEGFUSE_CUDA_SOURCE 0
#define SEGFUSE_FUNCTOR [[gnu::always_inline]] inline
#define SEGFUSE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(segfuse, CPU, m)
#define SEGFUSE_UNROLL
#define SEGFUSE_ASSERT(good, text)
#endif

namespace segfuse {

using torch::stable::Tensor;

// Throws what Python sees as a ValueError.  Called before anything is written, and never inside a
// parallel loop, where the text would be lost.
template <class... Words>
void check(bool good, const Words&... words) {
  if (good) return;
  std::ostringstream text;
  (text << ... << words);
  throw std::invalid_argument(text.str());
}

namespace SEGFUSE_BACKEND {

#if SEGFUSE_CUDA_SOURCE

#if defined(SEGFUSE_EMULATED)

struct Launch {
  explicit Launch(const Tensor&) {}
  cudaStream_t stream = nullptr;
  void done() const {}
};

#else

// Makes a tensor's device the current one, knows torch's stream on it, and reports a failed launch.
class Launch {
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  explicit Launch(const Tensor& on) : guard_(on.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  cudaStream_t stream;
  void done() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }
};

#endif

inline void ask_for_large_pages(const Tensor&) {}

#else

inline void ask_for_large_pages(const Tensor& fresh) {
  host::ask_for_large_pages(fresh.const_data_ptr(), fresh.numel() * fresh.element_size());
}

// Calls body(begin, end) for pieces of [0, n) of at least `grain`, on torch's threads.  The body is
// inlined, with all that it calls, into a function of each instruction set.
template <class Body>
void parallel(int64_t n, int64_t grain, const Body& body) {
  const auto run = host::chosen<Body>();
  torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1),
                              [&](int64_t begin, int64_t end) { run(body, begin, end); });
}

#endif

}  // namespace SEGFUSE_BACKEND
}  // namespace segfuse
