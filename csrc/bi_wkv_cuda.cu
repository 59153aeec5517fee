// Bidirectional WKV on CUDA: the same three phases and the same arithmetic as on the CPU.
//
// A block takes one chunk of 16 channels. Each thread holds the consecutive tokens of one channel, a segment, in
// registers, and hands its sums to the other segments through shared memory. Channels for which float does not do
// (bi_wkv.h) are left out and marked; an exact kernel follows for them, one thread per channel. The blocks that write
// outputs run in the reverse order of those that summed, so that they find the last of k and v still in the cache.
// Everything is summed in a fixed order: no atomics.

#include "bi_wkv_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#define WKV_FN __host__ __device__ __forceinline__
#define WKV_NAMESPACE wkv::cuda

namespace WKV_NAMESPACE {

// |x| < 2^22: adding 1.5 * 2^23 puts x into the lowest bits. Cheaper than the conversion instruction.
__device__ __forceinline__ int to_int(float x) { return __float_as_int(x + 12582912.0f) - 0x4b400000; }
WKV_FN double magnitude(double x) { return ::fabs(x); }

WKV_FN double bits_to_double(int64_t bits) {
  union {
    int64_t bits;
    double x;
  } u = {bits};
  return u.x;
}

WKV_FN int64_t double_to_bits(double x) {
  union {
    double x;
    int64_t bits;
  } u = {x};
  return u.bits;
}

}  // namespace WKV_NAMESPACE

#include "bi_wkv.h"

namespace WKV_NAMESPACE {

constexpr int kChannels = 16;  // of a block
constexpr int kExactThreads = 32;
constexpr int kExactChannels = 4;   // of a block of the exact kernels at a time; bounded by their shared memory
constexpr int kExactBlocks = 1024;  // about as many as a large GPU runs at once
constexpr int kRowChannels = 4;     // of a block of `carry` and `reduce`: one sector of memory
constexpr int kRowThreads = 256;    // for each of those
constexpr int kSpread = static_cast<int>(kMaxSpread);
constexpr int kBeyond = 1 << 29;  // a scale that float will not do for
constexpr int64_t kMaxBlocks = 0x7fffffff;

static_assert(kLanes % kChannels == 0 && kLanes % kRowChannels == 0, "the kernels rely on it");

enum class Phase { kSummary, kEmit, kBackwardSummary, kBackwardEmit };

__host__ __device__ constexpr bool is_backward(Phase phase) {
  return phase == Phase::kBackwardSummary || phase == Phase::kBackwardEmit;
}

// Tokens of a thread: as many as leave registers for 512 threads on a multiprocessor.
__host__ __device__ constexpr int segment_tokens(Phase phase) { return phase == Phase::kBackwardEmit ? 8 : 16; }

// 2^(i - scale); below the range of normal numbers, zero.
__device__ __forceinline__ float pow2(int i, int scale) {
  const int zero = scale - 127;
  return __uint_as_float((static_cast<uint32_t>(max(i, zero)) << 23) - (static_cast<uint32_t>(zero) << 23));
}

// ---- work ----

__device__ __forceinline__ uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }
__device__ __forceinline__ uint64_t high_product(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

// Divides many numbers by one. `inverse` is too small by less than 2, hence the quotient by at most 1.
template <class U>
struct Divider {
  U by, inverse;

  explicit Divider(int64_t by_) : by(static_cast<U>(by_)), inverse(static_cast<U>(-1) / by) {}
  __device__ U operator()(U n, U& rest) const {
    U quotient = high_product(n, inverse);
    rest = n - quotient * by;
    if (rest >= by) ++quotient, rest -= by;
    return quotient;
  }
};

// A scan, and what is the same for all of its threads.
struct Task {
  Scan scan;
  unsigned char* unsafe;  // (B, chunks, lanes)
  int64_t tokens, lanes, rows;
  Divider<uint32_t> groups, chunks;
  Divider<uint64_t> inner;

  Task(const Scan& s, unsigned char* unsafe_)
      : scan(s),
        unsafe(unsafe_),
        tokens(s.outer * s.inner),
        lanes(padded_channels(s)),
        rows(s.B * wkv::chunks(s)),
        groups(channel_groups(s, kChannels)),
        chunks(wkv::chunks(s)),
        inner(s.inner) {}
};

// Scans that run side by side, one for each blockIdx.z.
struct Batch {
  Task task[2];
};

__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// ---- memory ----

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void convert(float x, float& out) { out = x; }
__device__ __forceinline__ void convert(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void convert(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

template <class T>
__device__ __forceinline__ T& element(const View& a, int64_t offset) {
  return static_cast<T*>(a.data)[offset];
}

__device__ __forceinline__ double load_any(const View& a, int64_t offset) {
  switch (a.dtype) {
    case DType::kFloat:
      return element<float>(a, offset);
    case DType::kDouble:
      return element<double>(a, offset);
    case DType::kHalf:
      return to_float(element<__half>(a, offset));
    default:
      return to_float(element<__nv_bfloat16>(a, offset));
  }
}

__device__ __forceinline__ void store_any(const View& a, int64_t offset, double x) {
  switch (a.dtype) {
    case DType::kFloat:
      element<float>(a, offset) = static_cast<float>(x);
      break;
    case DType::kDouble:
      element<double>(a, offset) = x;
      break;
    case DType::kHalf:
      convert(static_cast<float>(x), element<__half>(a, offset));
      break;
    default:
      convert(static_cast<float>(x), element<__nv_bfloat16>(a, offset));
  }
}

// One channel of one chunk, in the arrays of states and shares.
struct Entry {
  int64_t row, lanes, channel;  // row: b * chunks + chunk

  __device__ double* number(double* state, int field) const { return state + (row * 6 + field) * lanes + channel; }
  __device__ double* share(const Scan& s, int field) const { return s.partial + (row * 2 + field) * lanes + channel; }
  __device__ Scaled read(double* state, int side) const {
    return {*number(state, 3 * side), *number(state, 3 * side + 1), *number(state, 3 * side + 2)};
  }
  __device__ void write(double* state, int side, const Scaled& x) const {
    *number(state, 3 * side) = x.o, *number(state, 3 * side + 1) = x.n, *number(state, 3 * side + 2) = x.d;
  }
};

// Where the tokens of a thread lie. Threads beyond C or T have none, and take part in every barrier.
template <int kTokens>
struct Place {
  Entry entry;
  int lane, segment, count;  // count: tokens of this thread
  bool active, whole;        // whole: no token is missing, and all are of one line
  uint32_t b;
  int64_t outer, inner;  // of the first token

  __device__ Place(const Task& task, uint32_t block) : lane(threadIdx.x), segment(threadIdx.y) {
    const Scan& s = task.scan;
    uint32_t group, chunk;
    const uint32_t row = task.groups(block, group);
    b = task.chunks(row, chunk);
    const int64_t channel = static_cast<int64_t>(group) * kChannels + lane;
    entry = {row, task.lanes, channel};
    active = channel < s.C;
    const int64_t first = static_cast<int64_t>(chunk) * kChunk + segment * kTokens, left = task.tokens - first;
    count = active ? static_cast<int>(min(max(left, int64_t{0}), int64_t{kTokens})) : 0;
    outer = 0, inner = first;
    if (s.outer > 1) {
      uint64_t rest;
      outer = task.inner(first, rest);
      inner = rest;
    }
    whole = count == kTokens && inner + kTokens <= s.inner;
  }

  // Calls f(t, element) for each token.
  template <class T, class F>
  __device__ __forceinline__ void each(const Scan& s, const View& a, F f) const {
    T* p = static_cast<T*>(a.data) + (b * a.batch_stride + entry.channel * a.channel_stride);
    p += outer * a.outer_stride + inner * a.inner_stride;
    if (whole) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t, p += a.inner_stride) f(t, *p);
      return;
    }
    const int64_t jump = a.outer_stride - s.inner * a.inner_stride;
    int64_t i = inner;
#pragma unroll
    for (int t = 0; t < kTokens; ++t, p += a.inner_stride) {
      if (t < count) f(t, *p);
      if (++i == s.inner) i = 0, p += jump;
    }
  }

  template <class T>
  __device__ __forceinline__ void load(const Scan& s, const View& a, float (&x)[kTokens]) const {
    each<T>(s, a, [&](int t, T element) { x[t] = to_float(element); });
  }
  template <class T>
  __device__ __forceinline__ void store(const Scan& s, const View& a, const float (&x)[kTokens]) const {
    each<T>(s, a, [&](int t, T& element) { convert(x[t], element); });
  }

  // Outputs of 16-bit inputs are float where they are summed. `x`: what is to be added to.
  template <class T>
  __device__ __forceinline__ void load_sum(const Scan& s, const View& a, float (&x)[kTokens]) const {
    for (int t = 0; t < kTokens; ++t) x[t] = 0;
    if (!s.accumulate) return;
    a.dtype == DType::kFloat ? load<float>(s, a, x) : load<T>(s, a, x);
  }
  template <class T>
  __device__ __forceinline__ void store_output(const Scan& s, const View& a, const float (&x)[kTokens]) const {
    a.dtype == DType::kFloat ? store<float>(s, a, x) : store<T>(s, a, x);
  }
};

// ---- one chunk in a block ----

// What the segments tell each other.
template <int kSegments>
struct Shared {
  int top[kSegments][kChannels], carried[4][kChannels];  // binary scales: of e^k, and of the states that enter
  float largest[2][kSegments][kChannels];                // |v|, |gy|
  float rates[3][kChannels];                             // expm1(-w), e^(-w kTokens), e^u
  // Of e^k (v, 1) and of the gradients, from the left and from the right: a segment's sums, then what enters it.
  Pair<float> states[2][2][kSegments][kChannels];
};

__device__ __forceinline__ bool in_range(float largest, float least) {
  return largest == 0 || (largest >= least && largest <= kMaxValue);
}

// A scale for comparison with others; kBeyond for a state that float will not do for.
__device__ __forceinline__ int comparable(const Scaled& s, bool moderate) {
  if (!(moderate && s.o < kBeyond)) return kBeyond;
  return s.o > -kBeyond ? static_cast<int>(s.o) : -kBeyond;
}

__device__ __forceinline__ Pair<float> at_scale(const Scaled& s, double scale) {
  const double f = pow2_whole(s.o - scale);
  return {static_cast<float>(s.n * f), static_cast<float>(s.d * f)};
}

// The tokens of a thread, and what all threads of its channel know.
template <Phase phase, class T>
struct Segment {
  static constexpr bool kStates = phase != Phase::kSummary;  // whether states enter
  static constexpr bool kGradients = is_backward(phase);
  static constexpr int kTokens = segment_tokens(phase), kSegments = kChunk / kTokens;

  const Task& task;
  const Scan& s;
  Shared<kSegments>& shared;
  const Place<kTokens> at;
  float e[kTokens], v[kTokens], g[kTokens];
  int scale;  // of e
  bool safe;
  float delta, decay_segment, bonus;
  Scaled state;  // threads of the first segments: left and right state, then left and right state of the gradients

  __device__ __forceinline__ Segment(const Task& task_, Shared<kSegments>& shared_, uint32_t block)
      : task(task_), s(task_.scan), shared(shared_), at(task_, block) {
    for (int t = 0; t < kTokens; ++t) e[t] = -kMaxKey, v[t] = g[t] = 0;
    at.template load<T>(s, s.k, e);
    at.template load<T>(s, s.v, v);
    if (kGradients) load_gradients();
    const bool fits = share_rates_and_states();
    share_sizes(fits);
  }

  __device__ __forceinline__ void load_gradients() {
    at.template load<T>(s, s.gy, g);
    if (s.gate.data == nullptr) return;
    float gate[kTokens] = {};
    at.template load<T>(s, s.gate, gate);
    for (int t = 0; t < kTokens; ++t) g[t] *= sigmoid(gate[t]);
  }

  // Seven jobs that are done once for all segments. False if w or u is out of float's reach.
  __device__ __forceinline__ bool share_rates_and_states() {
    const int lane = at.lane;
    bool fits = true;
    state = {kEmpty, 0, 0};
#pragma unroll
    for (int job = at.segment; job < 7; job += kSegments) {
      if (job < 4) {
        const bool enters = job < 2 ? kStates : phase == Phase::kBackwardEmit;
        if (enters && at.active) state = at.entry.read(job < 2 ? s.state : s.gstate, job % 2);
        if (enters) shared.carried[job][lane] = comparable(state, job >= 2 || is_moderate(state));
      } else if (job < 6) {
        const double w = at.active ? s.w[at.entry.channel] : 0;
        shared.rates[job - 4][lane] = static_cast<float>(job == 4 ? expm1(-w) : exp(-w * kTokens));
        fits = fits && fabs(w) <= kMaxDecay;
      } else {
        const double u = at.active ? s.u[at.entry.channel] : 0;
        shared.rates[2][lane] = static_cast<float>(exp(u));
        fits = fits && fabs(u) <= kMaxBonus;
      }
    }
    return fits;
  }

  // Brings e to one scale for the whole chunk and its states.
  __device__ __forceinline__ void share_sizes(bool fits) {
    const int lane = at.lane;
    int i[kTokens], top = -kBeyond;
    float largest_v = 0, largest_g = 0;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const bool key_fits = fabsf(e[t]) <= kMaxKey;
      fits = fits && key_fits && fabsf(v[t]) <= kMaxValue && fabsf(g[t]) <= kMaxValue;
      e[t] = split_exp<float, int>(key_fits ? e[t] : 0, i[t]);
      top = max(top, i[t]);
      largest_v = fmaxf(largest_v, fabsf(v[t]));
      largest_g = fmaxf(largest_g, fabsf(g[t]));
    }
    shared.top[at.segment][lane] = fits ? top : kBeyond;
    shared.largest[0][at.segment][lane] = largest_v;
    if (kGradients) shared.largest[1][at.segment][lane] = largest_g;
    __syncthreads();
    for (int j = 0; j < kSegments; ++j) {
      top = max(top, shared.top[j][lane]);
      largest_v = fmaxf(largest_v, shared.largest[0][j][lane]);
      if (kGradients) largest_g = fmaxf(largest_g, shared.largest[1][j][lane]);
    }
    safe = top < kBeyond && in_range(largest_v, kMinValue) && in_range(largest_g, kMinGradient);
    scale = top;
    if (kStates) {
      const int carried = max(shared.carried[0][lane], shared.carried[1][lane]);
      safe = safe && carried - top <= kSpread;
      scale = max(top, carried);
    }
    if (phase == Phase::kBackwardEmit) {
      safe = safe && max(shared.carried[2][lane], shared.carried[3][lane]) + scale <= kSpread;
    }
    delta = shared.rates[0][lane];
    decay_segment = shared.rates[1][lane];
    bonus = shared.rates[2][lane];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) e[t] *= pow2(i[t], scale);
    drop_missing(e);
    if (at.segment == 0) task.unsafe[at.entry.row * task.lanes + at.entry.channel] = at.active && !safe;
  }

  template <class X>
  __device__ __forceinline__ void drop_missing(X* x) const {
    if (at.count == kTokens) return;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= at.count) x[t] = {};
    }
  }

  // Sums up the chunk's items, of which (p, q) are this thread's. `of`: 0 for e^k (v, 1), 1 for the gradients. What
  // enters each segment is left in shared.states; where nothing enters the chunk, its sums may go to `sums`.
  __device__ __forceinline__ void exchange(int of, const float* p, const float* q, double* sums = nullptr) {
    Pair<float> left = {0, 0}, right = {0, 0};
    summarize(p, q, kTokens, delta, left, right);
    shared.states[of][0][at.segment][at.lane] = left;
    shared.states[of][1][at.segment][at.lane] = right;
    __syncthreads();
    if (at.segment / 2 == of) {
      const int side = at.segment % 2, binary = of == 0 ? scale : -scale;
      Pair<float> sum = at_scale(state, binary);
#pragma unroll
      for (int i = 0; i < kSegments; ++i) {
        Pair<float>& other = shared.states[of][side][side == 0 ? i : kSegments - 1 - i][at.lane];
        const Pair<float> x = other;
        other = sum;
        sum = {decay_segment * sum.n + x.n, decay_segment * sum.d + x.d};
      }
      if (sums != nullptr && at.active && safe) {
        at.entry.write(sums, side, {static_cast<double>(binary), sum.n, sum.d});
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ Pair<float> entering(int of, int side) const {
    return shared.states[of][side][at.segment][at.lane];
  }

  __device__ __forceinline__ void exchange_tokens(double* sums = nullptr) {
    float p[kTokens];
    for (int t = 0; t < kTokens; ++t) p[t] = e[t] * v[t];
    exchange(0, p, e, sums);
  }

  __device__ __forceinline__ void summary() { exchange_tokens(s.state); }

  __device__ __forceinline__ void emit() {
    exchange_tokens();
    if (!safe) return;
    float y[kTokens], other[kTokens];
    Pair<float> left = entering(0, 0), lefts[kTokens];
    walk_left(e, v, kTokens, delta, left, lefts);
    emit_outputs(e, v, kTokens, delta, bonus, lefts, entering(0, 1), y);
    at.template load_sum<T>(s, s.y, other);
    for (int t = 0; t < kTokens; ++t) y[t] += other[t];
    if (s.gate.data != nullptr) {
      at.template load<T>(s, s.gate, other);
      for (int t = 0; t < kTokens; ++t) y[t] *= sigmoid(other[t]);
    }
    at.template store_output<T>(s, s.y, y);
  }

  __device__ __forceinline__ void backward_summary() {
    exchange_tokens();
    Pair<float> left = entering(0, 0), lefts[kTokens];
    walk_left(e, v, kTokens, delta, left, lefts);
    float h[kTokens];
    emit_items<float>(e, v, kTokens, delta, bonus, lefts, entering(0, 1), g, h, nullptr, nullptr);
    drop_missing(g), drop_missing(h);  // whose denominator may be zero
    exchange(1, g, h, s.gstate);
  }

  __device__ __forceinline__ void backward_emit(double (&shares)[2][kSegments][kChannels]) {
    exchange_tokens();
    Pair<float> left = entering(0, 0), lefts[kTokens], rights[kTokens], out[kTokens];
    walk_left(e, v, kTokens, delta, left, lefts);
    float h[kTokens], ggate[kTokens], y[kTokens], gw = 0, gu = 0;
    for (int t = 0; t < kTokens; ++t) ggate[t] = g[t];
    emit_items(e, v, kTokens, delta, bonus, lefts, entering(0, 1), g, h, rights, &gu, y);
    for (int t = 0; t < kTokens; ++t) ggate[t] *= y[t];
    drop_missing(g), drop_missing(h);  // whose denominator may be zero
    drop_missing(lefts), drop_missing(rights);
    exchange(1, g, h);
    emit_gradients(e, v, g, h, kTokens, delta, bonus, lefts, rights, entering(1, 0), entering(1, 1), out, &gw);
    shares[0][at.segment][at.lane] = at.count > 0 ? -static_cast<double>(gw) * (1.0 + static_cast<double>(delta)) : 0;
    shares[1][at.segment][at.lane] = at.count > 0 ? gu : 0.0;
    __syncthreads();
    if (!at.active || !safe) return;
    float gk[kTokens], gv[kTokens];
    at.template load_sum<T>(s, s.gk, gk);
    at.template load_sum<T>(s, s.gv, gv);
    for (int t = 0; t < kTokens; ++t) gv[t] += out[t].n, gk[t] += out[t].d;
    at.template store_output<T>(s, s.gk, gk);
    at.template store_output<T>(s, s.gv, gv);
    if (s.gate.data != nullptr) emit_gate_gradient(ggate);
    if (at.segment > 1) return;
    double sum = 0;
    for (int j = 0; j < kSegments; ++j) sum += shares[at.segment][j][at.lane];
    *at.entry.share(s, at.segment) = sum;
  }

  // gated: gy sigmoid(gate) y. Since sigmoid(-x) = 1 - sigmoid(x), the rest of sigmoid' is exact for large gates too.
  __device__ __forceinline__ void emit_gate_gradient(const float* gated) const {
    float gate[kTokens] = {}, sum[kTokens];
    at.template load<T>(s, s.gate, gate);
    at.template load_sum<T>(s, s.ggate, sum);
    for (int t = 0; t < kTokens; ++t) sum[t] += gated[t] * sigmoid(-gate[t]);
    at.template store_output<T>(s, s.ggate, sum);
  }
};

template <Phase phase, class T>
__global__ void __launch_bounds__(kChannels* kChunk / segment_tokens(phase))
    chunk_kernel(const __grid_constant__ Batch batch) {
  constexpr int kSegments = kChunk / segment_tokens(phase);
  __shared__ Shared<kSegments> shared;
  // What is summed first is emitted last: the scans, and the chunks of each.
  const bool summary = phase == Phase::kSummary || phase == Phase::kBackwardSummary;
  const Task& task = batch.task[summary ? gridDim.z - 1 - blockIdx.z : blockIdx.z];
  Segment<phase, T> segment(task, shared, summary ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  if constexpr (phase == Phase::kSummary) segment.summary();
  if constexpr (phase == Phase::kEmit) segment.emit();
  if constexpr (phase == Phase::kBackwardSummary) segment.backward_summary();
  if constexpr (phase == Phase::kBackwardEmit) {
    __shared__ double shares[2][kSegments][kChannels];
    segment.backward_emit(shares);
  }
}

// ---- exact: one thread per channel ----

// Where token t of a chunk lies.
__device__ int64_t offset_of(const Task& task, const View& a, const Entry& entry, int t) {
  const Scan& s = task.scan;
  const int64_t chunks = task.chunks.by, token = entry.row % chunks * kChunk + t;
  return entry.row / chunks * a.batch_stride + token / s.inner * a.outer_stride + token % s.inner * a.inner_stride +
         entry.channel * a.channel_stride;
}

template <Phase phase>
__device__ void redo(const Task& task, const Entry& entry, double* work) {
  const Scan& s = task.scan;
  const int64_t left = task.tokens - entry.row % task.chunks.by * kChunk;
  const int tokens = static_cast<int>(min(left, int64_t{kChunk}));
  const auto load = [&](const View& a, int t) { return load_any(a, offset_of(task, a, entry, t)); };
  const auto store = [&](const View& a, int t, double x, double factor) {
    const int64_t offset = offset_of(task, a, entry, t);
    store_any(a, offset, s.accumulate ? (load_any(a, offset) + x) * factor : x * factor);
  };
  const bool gated = s.gate.data != nullptr;
  const ExactChunk x = {work, kExactChannels, tokens, s.w[entry.channel] * kLog2e, s.u[entry.channel] * kLog2e};
  for (int t = 0; t < tokens; ++t) {
    x.key(t) = load(s.k, t) * kLog2e;
    x.v(t) = load(s.v, t);
    if (is_backward(phase)) x.g(t) = load(s.gy, t) * (gated ? sigmoid(load(s.gate, t)) : 1.0);
  }
  Scaled sums[2];
  if (phase == Phase::kSummary) {
    x.summarize(sums[0], sums[1]);
    for (int side = 0; side < 2; ++side) entry.write(s.state, side, with_whole_scale(sums[side]));
    return;
  }
  const Scaled before = entry.read(s.state, 0), behind = entry.read(s.state, 1);
  if (phase == Phase::kEmit) {
    x.emit_outputs(before, behind);
    for (int t = 0; t < tokens; ++t) store(s.y, t, x.y(t), gated ? sigmoid(load(s.gate, t)) : 1.0);
    return;
  }
  const double gu = x.emit_items(before, behind);
  if (phase == Phase::kBackwardSummary) {
    x.summarize_items(sums[0], sums[1]);
    for (int side = 0; side < 2; ++side) entry.write(s.gstate, side, with_whole_scale(sums[side]));
    return;
  }
  *entry.share(s, 0) = x.emit_gradients(entry.read(s.gstate, 0), entry.read(s.gstate, 1));
  *entry.share(s, 1) = gu;
  for (int t = 0; t < tokens; ++t) {
    store(s.gv, t, x.gv(t), 1);
    store(s.gk, t, x.gk(t), 1);
    if (!gated) continue;
    const double r = sigmoid(load(s.gate, t));
    store(s.ggate, t, load(s.gy, t) * r * (1 - r) * x.y(t), 1);
  }
}

// Few blocks look through the marks, four channels at a time, since they seldom find one.
template <Phase phase>
__global__ void __launch_bounds__(kExactThreads) exact_kernel(const __grid_constant__ Batch batch) {
  __shared__ double work[ExactChunk::kNumbers * kChunk * kExactChannels];
  __shared__ uint32_t marks[kExactThreads];
  const Task& task = batch.task[blockIdx.z];
  const int64_t step = gridDim.x, row_items = task.lanes / kExactChannels, items = task.rows * row_items;
  for (int64_t first = blockIdx.x; first < items; first += kExactThreads * step) {
    const int64_t mine = first + threadIdx.x * step;
    __syncthreads();
    marks[threadIdx.x] = mine < items ? reinterpret_cast<const uint32_t*>(task.unsafe)[mine] : 0;
    __syncthreads();
    for (int i = 0; i < kExactThreads; ++i) {
      if (threadIdx.x >= kExactChannels || !(marks[i] >> (8 * threadIdx.x) & 1)) continue;
      const int64_t item = first + i * step, channel = item % row_items * kExactChannels + threadIdx.x;
      if (channel < task.scan.C) redo<phase>(task, {item / row_items, task.lanes, channel}, work + threadIdx.x);
    }
  }
}

// ---- carry and reduce: four channels to a block ----

// Each thread adds up a run of chunks, the runs are scanned in shared memory, and each thread walks its run again from
// the state that enters it. A block for each four channels of a batch and side.
__global__ void __launch_bounds__(kRowChannels* kRowThreads)
    carry_kernel(const __grid_constant__ Batch batch, bool gradients) {
  __shared__ Scaled sums[kRowThreads][kRowChannels];
  const Task& task = batch.task[blockIdx.z];
  const int lane = threadIdx.x, thread = threadIdx.y, threads = blockDim.y, side = blockIdx.x % 2;
  const int64_t groups = task.lanes / kRowChannels, chunks = task.chunks.by, b = blockIdx.x / 2 / groups;
  const int64_t channel = blockIdx.x / 2 % groups * kRowChannels + lane;
  const double w = channel < task.scan.C ? task.scan.w[channel] : 0;
  double* const state = gradients ? task.scan.gstate : task.scan.state;
  const auto entry = [&](int64_t step) {
    return Entry{b * chunks + (side == 0 ? step : chunks - 1 - step), task.lanes, channel};
  };
  const int64_t run = (chunks + threads - 1) / threads, begin = thread * run;
  const int64_t end = channel < task.scan.C ? min(begin + run, chunks) : 0;
  double decay_o, decay_f;
  chunk_decay(w, 1, decay_o, decay_f);
  Scaled sum = {kEmpty, 0, 0};
#pragma unroll 2
  for (int64_t step = begin; step < end; ++step) {
    sum = carry_over(sum, entry(step).read(state, side), decay_o, decay_f);
  }
  for (int span = 1; span < threads; span *= 2) {
    sums[thread][lane] = sum;
    __syncthreads();
    double span_o, span_f;
    chunk_decay(w, static_cast<double>(run * span), span_o, span_f);
    if (thread >= span) sum = carry_over(sums[thread - span][lane], sum, span_o, span_f);
    __syncthreads();
  }
  sums[thread][lane] = sum;
  __syncthreads();
  sum = thread > 0 ? sums[thread - 1][lane] : Scaled{kEmpty, 0, 0};
  constexpr int kAhead = 2;
  for (int64_t step = begin; step < end; step += kAhead) {
    Scaled own[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (step + i < end) own[i] = entry(step + i).read(state, side);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (step + i >= end) break;
      entry(step + i).write(state, side, sum);
      sum = carry_over(sum, own[i], decay_o, decay_f);
    }
  }
}

// A block for each four channels of gw and of gu.
__global__ void __launch_bounds__(kRowChannels* kRowThreads)
    reduce_kernel(const __grid_constant__ Batch batch, double* gw, double* gu) {
  __shared__ double sums[kRowThreads][kRowChannels];
  const Task& task = batch.task[blockIdx.z];
  const int lane = threadIdx.x, thread = threadIdx.y, field = blockIdx.x % 2;
  const int64_t channel = static_cast<int64_t>(blockIdx.x / 2) * kRowChannels + lane;
  double sum = 0;
  if (channel < task.scan.C) {
#pragma unroll 4
    for (int64_t row = thread; row < task.rows; row += kRowThreads) {
      sum += *Entry{row, task.lanes, channel}.share(task.scan, field);
    }
  }
  sums[thread][lane] = sum;
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread][lane] += sums[thread + half][lane];
  }
  if (thread == 0 && channel < task.scan.C) {
    (field == 0 ? gw : gu)[blockIdx.z * task.scan.C + channel] = sums[0][lane];
  }
}

}  // namespace WKV_NAMESPACE

namespace wkv {

namespace {

using cuda::Batch;
using cuda::Phase;
using cuda::Task;

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// What an image in row-major order is: one line of tokens.
Scan as_one_line(Scan s) {
  const auto joins = [&](const View& a) { return a.data == nullptr || a.outer_stride == s.inner * a.inner_stride; };
  if (joins(s.k) && joins(s.v) && joins(s.gate) && joins(s.y) && joins(s.gy) && joins(s.gk) && joins(s.gv) &&
      joins(s.ggate)) {
    s.inner *= s.outer;
    s.outer = 1;
  }
  return s;
}

// One call of the operator.
struct Run {
  Batch batch;
  int count;
  cudaStream_t stream;
  const char* error = nullptr;

  Run(const Scan* scans, int count_, unsigned char* unsafe, void* stream_)
      : batch{{Task(as_one_line(scans[0]), unsafe),
               Task(as_one_line(scans[count_ - 1]), unsafe + (count_ - 1) * cuda_flag_count(scans, 1))}},
        count(count_),
        stream(static_cast<cudaStream_t>(stream_)) {
    if (blocks(cuda::kChannels) > cuda::kMaxBlocks) error = "more chunks and channels than CUDA has blocks";
    if (error == nullptr && exact()) {
      error = message(cudaMemsetAsync(unsafe, 1, static_cast<size_t>(cuda_flag_count(scans, count)), stream));
    }
  }

  const Task& task() const { return batch.task[0]; }
  bool exact() const { return task().scan.k.dtype == DType::kDouble; }
  int64_t blocks(int channels) const { return task().rows * (task().lanes / channels); }
  static dim3 grid(int64_t x, int scans) { return dim3(static_cast<unsigned>(x), 1, static_cast<unsigned>(scans)); }
  void check() {
    if (error == nullptr) error = message(cudaGetLastError());
  }

  // The first scans of a batch, in float, then exactly what that marked.
  template <Phase phase>
  void chunks(const Batch& scans, int number) {
    if (error != nullptr) return;
    const dim3 all = grid(blocks(cuda::kChannels), number);
    const dim3 threads(cuda::kChannels, kChunkTokens / cuda::segment_tokens(phase));
    const DType dtype = task().scan.k.dtype;
    if (dtype == DType::kFloat) cuda::chunk_kernel<phase, float><<<all, threads, 0, stream>>>(scans);
    if (dtype == DType::kHalf) cuda::chunk_kernel<phase, __half><<<all, threads, 0, stream>>>(scans);
    if (dtype == DType::kBFloat16) cuda::chunk_kernel<phase, __nv_bfloat16><<<all, threads, 0, stream>>>(scans);
    const dim3 few = grid(std::min<int64_t>(blocks(cuda::kExactChannels), cuda::kExactBlocks), number);
    cuda::exact_kernel<phase><<<few, cuda::kExactThreads, 0, stream>>>(scans);
    check();
  }

  // The outputs of the scans are summed, one after the other.
  template <Phase phase>
  void outputs() {
    for (int i = 0; i < count; ++i) chunks<phase>(Batch{{batch.task[i], batch.task[i]}}, 1);
  }

  void carry(bool gradients) {
    if (error != nullptr) return;
    unsigned threads = 1;
    while (threads < cuda::kRowThreads && threads < task().chunks.by) threads *= 2;
    const dim3 all = grid(2 * task().scan.B * (task().lanes / cuda::kRowChannels), count);
    cuda::carry_kernel<<<all, dim3(cuda::kRowChannels, threads), 0, stream>>>(batch, gradients);
    check();
  }

  void reduce(double* gw, double* gu) {
    if (error != nullptr) return;
    const dim3 all = grid(2 * (task().lanes / cuda::kRowChannels), count);
    cuda::reduce_kernel<<<all, dim3(cuda::kRowChannels, cuda::kRowThreads), 0, stream>>>(batch, gw, gu);
    check();
  }
};

}  // namespace

int64_t cuda_flag_count(const Scan* scans, int count) {
  return count * scans->B * chunks(*scans) * padded_channels(*scans);
}

int cuda_version() { return CUDART_VERSION; }

const char* cuda_forward(const Scan* scans, int count, unsigned char* unsafe, void* stream) {
  Run run(scans, count, unsafe, stream);
  run.chunks<Phase::kSummary>(run.batch, count);
  run.carry(false);
  run.outputs<Phase::kEmit>();
  return run.error;
}

const char* cuda_backward(const Scan* scans, int count, unsigned char* unsafe, double* gw, double* gu, void* stream) {
  Run run(scans, count, unsafe, stream);
  run.chunks<Phase::kBackwardSummary>(run.batch, count);
  run.carry(true);
  run.outputs<Phase::kBackwardEmit>();
  run.reduce(gw, gu);
  return run.error;
}

}  // namespace wkv
