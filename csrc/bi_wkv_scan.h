// What one scan of bidirectional WKV is about: plain pointers and strides, the same for the CPU and the CUDA kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WKV_EVERYWHERE __host__ __device__
#else
#define WKV_EVERYWHERE
#endif

namespace wkv {

enum class DType : int { kFloat, kDouble, kHalf, kBFloat16 };

// A (B, outer, inner, C) tensor; tokens are numbered t = o * inner + i. Strides are in elements and may be anything.
// A scan in column-major order is the same thing with the two middle axes exchanged.
struct View {
  void* data;
  DType dtype;
  int64_t batch_stride, outer_stride, inner_stride, channel_stride;
};

struct Scan {
  int64_t B, outer, inner, C;
  const double* w;  // (C)
  const double* u;  // (C)
  View k, v;
  View y;           // forward: out
  View gy, gk, gv;  // backward: in, out, out
  float* rates;     // (3, lanes): expm1(-w), e^u, and whether float will do; only the CPU kernels have it
  // (B, chunks, 6, lanes): o, n, d of the state that enters each chunk from the left, then from the right.
  double* state;
  double* gstate;   // backward: the same for the states of (gy / den, y gy / den)
  double* partial;  // backward: (B, chunks, 2, lanes), each chunk's share of gw and gu
  bool accumulate;  // add to y, gk and gv instead of writing them
};

constexpr int kChunkTokens = 64;
constexpr int kLanes = 16;  // state rows are padded to a multiple of this

WKV_EVERYWHERE inline int64_t chunks(const Scan& s) { return (s.outer * s.inner + kChunkTokens - 1) / kChunkTokens; }
WKV_EVERYWHERE inline int64_t channel_groups(const Scan& s, int64_t width) { return (s.C + width - 1) / width; }
WKV_EVERYWHERE inline int64_t padded_channels(const Scan& s) { return channel_groups(s, kLanes) * kLanes; }

// `prepare` first; then the phases in this order: summary, carry, emit; then, for the gradients, backward_summary,
// carry (of gstate), backward_emit, reduce. Items of a phase are independent of each other and may run in any order, on
// any thread.
struct CpuKernel {
  const char* name;
  int width;                                                              // channels at a time
  void (*prepare)(const Scan&);                                           // fills rates
  void (*summary)(const Scan&, int64_t begin, int64_t end);               // items: B * chunks * groups of width
  void (*carry)(const Scan&, double* state, int64_t begin, int64_t end);  // items: B * groups of kLanes
  void (*emit)(const Scan&, int64_t begin, int64_t end);                  // items: B * chunks * groups of width
  void (*backward_summary)(const Scan&, int64_t begin, int64_t end);      // items: B * chunks * groups of width
  void (*backward_emit)(const Scan&, int64_t begin, int64_t end);         // items: B * chunks * groups of width
  void (*reduce)(const Scan&, double* gw, double* gu, int64_t begin, int64_t end);  // items: C
};

// The widest kernel this processor runs, or the one called `name`; null if it cannot run that one.
const CpuKernel* cpu_kernel(const char* name = nullptr);

}  // namespace wkv
