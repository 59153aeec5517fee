// As much of CUDA as csrc/bi_wkv_cuda.cu uses, on the CPU: blocks run one after the other in a random order, the
// threads of a block are fibers that run up to a barrier, in another random order after each. test_cuda_emulated.py
// rewrites `kernel<<<grid, block, shared, stream>>>(args)` and `__shared__` declarations into the calls at the end of
// this file.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
#define CUDART_VERSION 0

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) { return __int_as_float(static_cast<int>(bits)); }

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<unsigned __int128>(a) * b >> 64; }

using cudaStream_t = void*;
using cudaError_t = const char*;  // null is success, anything else says what happened
constexpr cudaError_t cudaSuccess = nullptr;

namespace cuda_on_cpu {

inline cudaError_t last_error = cudaSuccess;
inline std::mt19937 random(0);

inline std::vector<unsigned> shuffled(unsigned n) {
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

// The threads of one block. A thread goes back to `scheduler` at a barrier and at its end.
struct Block {
  static constexpr size_t kStack = 256 << 10, kMaxThreads = 1024, kMaxShared = 48 << 10;
  struct Thread {
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf place;  // where it goes on; cheaper than a ucontext, which also keeps the signal mask
    bool started;
    int barrier;  // the source line where it waits, 0 before the first one, -1 at its end
  };
  jmp_buf scheduler;
  std::vector<std::unique_ptr<Thread>> threads;
  Thread* current;
  std::function<void()> kernel;
  std::map<int, std::unique_ptr<uint16_t[]>> shared;  // by source line
  size_t shared_bytes;

  void wait(int line) {
    current->barrier = line;
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
  }

  void resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.start);
  }

  void* shared_memory(int line, size_t bytes) {
    std::unique_ptr<uint16_t[]>& memory = shared[line];
    if (!memory) {
      memory.reset(new uint16_t[(bytes + 1) / 2]);
      std::fill_n(memory.get(), (bytes + 1) / 2, uint16_t{0x7fff});  // NaN as float and double, large as int
      shared_bytes += bytes;
      if (shared_bytes > kMaxShared) last_error = "a block has more than 48 KiB of shared memory";
    }
    return memory.get();
  }

  void run();
};

inline Block block;

// Runs the same thread of one block after the other.
inline void run_thread() {
  for (;;) {
    block.kernel();
    block.wait(-1);
  }
}

inline void Block::run() {
  const unsigned n = blockDim.x * blockDim.y * blockDim.z;
  while (threads.size() < n) {
    threads.emplace_back(new Thread{std::unique_ptr<char[]>(new char[kStack])});
    Thread& t = *threads.back();
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack.get();
    t.start.uc_stack.ss_size = kStack;
    makecontext(&t.start, run_thread, 0);
  }
  shared.clear();
  shared_bytes = 0;
  do {
    for (const unsigned i : shuffled(n)) {
      threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      resume(*threads[i]);
    }
    for (unsigned i = 1; i < n; ++i) {
      if (threads[i]->barrier == threads[0]->barrier) continue;
      const bool ended = threads[i]->barrier == -1 || threads[0]->barrier == -1;
      last_error = ended ? "some threads of a block returned before a barrier at which others wait"
                         : "the threads of a block wait at different barriers";
    }
  } while (last_error == cudaSuccess && threads[0]->barrier != -1);
  if (last_error != cudaSuccess) threads.clear();  // some are in the middle of the kernel
}

inline void launch(dim3 grid, dim3 threads, size_t shared, cudaStream_t, std::function<void()> kernel) {
  if (last_error != cudaSuccess) return;
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535 ||
      threads.x * threads.y * threads.z == 0 || threads.x * threads.y * threads.z > Block::kMaxThreads || shared != 0) {
    last_error = "invalid configuration argument";
    return;
  }
  gridDim = grid;
  blockDim = threads;
  block.kernel = std::move(kernel);
  for (const unsigned i : shuffled(grid.x * grid.y * grid.z)) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    block.run();
    if (last_error != cudaSuccess) return;
  }
}

// A reference to the block's variable declared in that line.
template <class T>
T& shared(int line) {
  return *static_cast<T*>(block.shared_memory(line, sizeof(T)));
}

}  // namespace cuda_on_cpu

#define __syncthreads() cuda_on_cpu::block.wait(__LINE__)

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) { return error; }
