// A baseline: Bi-WKV forward in the layout of the CUDA kernels that circulate, which is what their speed comes from.
// One thread for each batch, channel and 32nd of the tokens; it walks its tokens twice, each step waiting for the one
// before, and the state from the right is carried forward by subtracting what has been passed. 16 channels to a block.
//
// Unlike those kernels this one decays by the right number of steps. Like in them, the subtraction loses what is small
// beside the state, so it is no reference.

#include <cstdint>
#include <cuda_runtime.h>

namespace {

constexpr int kChannels = 16, kParts = 32;

struct State {
  float o, n, d;  // (n, d) e^o
};

__device__ void add(State& s, float decay, float k, float v) {
  const float o = fmaxf(s.o - decay, k), a = expf(s.o - decay - o), b = expf(k - o);
  s = {o, a * s.n + b * v, a * s.d + b};
}

__device__ void join(State& s, float decay, const State& x) {
  const float o = fmaxf(s.o - decay, x.o), a = expf(s.o - decay - o), b = expf(x.o - o);
  s = {o, a * s.n + b * x.n, a * s.d + b * x.d};
}

__global__ void __launch_bounds__(kChannels* kParts)
    forward_kernel(const float* w_, const float* u_, const float* k, const float* v, float* y, int64_t T, int64_t C) {
  __shared__ State lefts[kParts][kChannels], rights[kParts][kChannels];
  const int lane = threadIdx.x, part = threadIdx.y;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kChannels + lane, c = column % C;
  const int64_t base = column / C * T * C + c, run = (T + kParts - 1) / kParts;
  const int64_t begin = min(part * run, T), end = min(begin + run, T);
  const float w = w_[c], u = u_[c];
  const State empty = {-1e38f, 0, 0};
  State left = empty, right = empty;  // behind the last token, and at the first one
  for (int64_t t = begin; t < end; ++t) {
    const float key = k[base + t * C], value = v[base + t * C];
    add(left, w, key, value);
    add(right, 0, key - static_cast<float>(t - begin) * w, value);
  }
  lefts[part][lane] = left;
  rights[part][lane] = right;
  __syncthreads();
  left = empty;
  for (int j = 0; j < part; ++j) join(left, w * static_cast<float>(run), lefts[j][lane]);
  right = empty;
  for (int j = kParts - 1; j >= part; --j) join(right, w * static_cast<float>(run), rights[j][lane]);
  for (int64_t t = begin; t < end; ++t) {
    const float key = k[base + t * C], value = v[base + t * C], own = expf(key - right.o);
    right = {right.o + w, right.n - own * value, right.d - own};
    const float o = fmaxf(fmaxf(left.o, right.o), u + key);
    const float a = expf(left.o - o), b = expf(right.o - o), e = expf(u + key - o);
    y[base + t * C] = (a * left.n + b * right.n + e * value) / (a * left.d + b * right.d + e);
    add(left, w, key, value);
  }
}

}  // namespace

// w, u: (C); k, v, y: (B, T, C), contiguous, float, on the device. Returns what CUDA says. B C must be a multiple
// of 16.
extern "C" int published_layout(const float* w, const float* u, const float* k, const float* v, float* y, int64_t B,
                                int64_t T, int64_t C, void* stream) {
  const auto blocks = static_cast<unsigned>(B * C / kChannels);
  forward_kernel<<<blocks, dim3(kChannels, kParts), 0, static_cast<cudaStream_t>(stream)>>>(w, u, k, v, y, T, C);
  return cudaGetLastError();
}
