// Bidirectional WKV on CUDA: the same three phases and the same arithmetic as on the CPU.
//
// A block takes one chunk of 32 channels: lane = channel, each of 8 warps holds 8 consecutive tokens in registers and
// hands its sums to the others through shared memory. Channels for which float does not do (bi_wkv.h) are left out and
// marked; an exact kernel, one thread per channel, follows for them and leaves at once where nothing is marked.
// Everything is summed in a fixed order: no atomics.

#include "bi_wkv_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define WKV_FN __host__ __device__ __forceinline__
#define WKV_NAMESPACE wkv::cuda

namespace WKV_NAMESPACE {

WKV_FN int to_int(float x) { return static_cast<int>(x); }
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

constexpr int kChannels = 32;             // of a block
constexpr int kWarps = 8;                 // of a block
constexpr int kTokens = kChunk / kWarps;  // of a thread
constexpr int kExactChannels = 4;         // of a block of the exact kernels; bounded by their shared memory
constexpr int kCarryThreads = 128;

__device__ __forceinline__ float pow2(int i) { return __int_as_float((max(i, -127) + 127) << 23); }

// A key out of range, which float will not do for anyhow, as one whose binary digits are still a sensible int.
__device__ __forceinline__ float clamp_key(float k) { return fminf(fmaxf(k, -kMaxKey), kMaxKey); }

// ---- memory ----

__device__ __forceinline__ double load(const View& a, int64_t offset) {
  switch (a.dtype) {
    case DType::kFloat:
      return static_cast<const float*>(a.data)[offset];
    case DType::kDouble:
      return static_cast<const double*>(a.data)[offset];
    case DType::kHalf:
      return __half2float(static_cast<const __half*>(a.data)[offset]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(a.data)[offset]);
  }
}

__device__ __forceinline__ void store(const View& a, int64_t offset, bool accumulate, double x) {
  if (accumulate) x += load(a, offset);
  switch (a.dtype) {
    case DType::kFloat:
      static_cast<float*>(a.data)[offset] = static_cast<float>(x);
      break;
    case DType::kDouble:
      static_cast<double*>(a.data)[offset] = x;
      break;
    case DType::kHalf:
      static_cast<__half*>(a.data)[offset] = __float2half_rn(static_cast<float>(x));
      break;
    default:
      static_cast<__nv_bfloat16*>(a.data)[offset] = __float2bfloat16_rn(static_cast<float>(x));
  }
}

struct Place {
  int64_t b, chunk, first, channel;
  int64_t chunks, lanes;

  __device__ Place(const Scan& s, int64_t row, int64_t channel_) {
    chunks = wkv::chunks(s);
    lanes = padded_channels(s);
    b = row / chunks;
    chunk = row % chunks;
    first = chunk * kChunk;
    channel = channel_;
  }
  __device__ int tokens(const Scan& s) const {
    const int64_t left = s.outer * s.inner - first;
    return static_cast<int>(left < kChunk ? left : kChunk);
  }
  // Where token t of the chunk lies.
  __device__ int64_t offset(const Scan& s, const View& a, int t) const {
    const int64_t token = first + t;
    return b * a.batch_stride + token / s.inner * a.outer_stride + token % s.inner * a.inner_stride +
           channel * a.channel_stride;
  }
  __device__ double* number(double* state, int field) const {
    return state + ((b * chunks + chunk) * 6 + field) * lanes + channel;
  }
  __device__ double* share(const Scan& s, int field) const {
    return s.partial + ((b * chunks + chunk) * 2 + field) * lanes + channel;
  }
  __device__ Scaled left(double* state) const { return {*number(state, 0), *number(state, 1), *number(state, 2)}; }
  __device__ Scaled right(double* state) const { return {*number(state, 3), *number(state, 4), *number(state, 5)}; }
  __device__ void write(double* state, const Scaled& left, const Scaled& right) const {
    const double value[6] = {left.o, left.n, left.d, right.o, right.n, right.d};
    for (int f = 0; f < 6; ++f) *number(state, f) = value[f];
  }
};

// ---- one chunk in a block ----

// What the warps tell each other about their tokens.
struct Shared {
  float largest[3][kWarps][kChannels];
  int top[kWarps][kChannels];
  Pair<float> left[kWarps][kChannels], right[kWarps][kChannels];
};

__device__ __forceinline__ bool in_range(float largest, float least) {
  return largest == 0 || (largest >= least && largest <= kMaxValue);
}

// Eight tokens of one channel, and what the whole chunk knows. Threads beyond C or T hold zeros and take part in every
// synchronisation.
struct Segment {
  float e[kTokens], v[kTokens], g[kTokens];
  int top;
  bool active, safe;
  float delta, delta8, bonus;  // expm1(-w), expm1(-8 w), e^u
  int warp, lane, first;       // first: number of the first token within the chunk

  __device__ void load_tokens(const Scan& s, const Place& at, Shared& shared, bool with_gradients) {
    warp = threadIdx.y, lane = threadIdx.x, first = warp * kTokens;
    active = at.channel < s.C;
    const int n = active ? min(max(at.tokens(s) - first, 0), kTokens) : 0;
    const double w = active ? s.w[at.channel] : 0, u = active ? s.u[at.channel] : 0;
    float largest_k = 0, largest_v = 0, largest_g = 0;
    bool bad = false;
    int i[kTokens];
    top = -1000000;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      e[t] = v[t] = g[t] = 0;
      i[t] = 0;
      if (t >= n) continue;
      const float k = static_cast<float>(load(s.k, at.offset(s, s.k, first + t)));
      v[t] = static_cast<float>(load(s.v, at.offset(s, s.v, first + t)));
      if (with_gradients) g[t] = static_cast<float>(load(s.gy, at.offset(s, s.gy, first + t)));
      largest_k = fmaxf(largest_k, fabsf(k));
      largest_v = fmaxf(largest_v, fabsf(v[t]));
      largest_g = fmaxf(largest_g, fabsf(g[t]));
      bad = bad || k != k || v[t] != v[t] || g[t] != g[t];
      e[t] = split_exp<float, int>(clamp_key(k), i[t]);
      top = max(top, i[t]);
    }
    shared.largest[0][warp][lane] = bad ? 2 * kMaxKey : largest_k;
    shared.largest[1][warp][lane] = largest_v;
    shared.largest[2][warp][lane] = largest_g;
    shared.top[warp][lane] = top;
    __syncthreads();
    for (int j = 0; j < kWarps; ++j) {
      largest_k = fmaxf(largest_k, shared.largest[0][j][lane]);
      largest_v = fmaxf(largest_v, shared.largest[1][j][lane]);
      largest_g = fmaxf(largest_g, shared.largest[2][j][lane]);
      top = max(top, shared.top[j][lane]);
    }
    safe = fabs(w) <= kMaxDecay && fabs(u) <= kMaxBonus && largest_k <= kMaxKey && in_range(largest_v, kMinValue) &&
           in_range(largest_g, kMinGradient);
    delta = static_cast<float>(expm1(-w));
    delta8 = static_cast<float>(expm1(-w * kTokens));
    bonus = static_cast<float>(exp(u));
    for (int t = 0; t < kTokens; ++t) e[t] = t < n ? e[t] * pow2(i[t] - top) : 0;
  }

  // Moves e from the scale `top` to a larger one.
  __device__ void rescale(int scale) {
    const float f = pow2(top - scale);
    for (int t = 0; t < kTokens; ++t) e[t] *= f;
    top = scale;
  }

  // Sums of this thread's items, told to the other warps.
  __device__ void tell(Shared& shared, const float* p, const float* q) const {
    Pair<float> left = {0, 0}, right = {0, 0};
    summarize(p, q, kTokens, delta, left, right);
    __syncthreads();  // whatever was told before has been read
    shared.left[warp][lane] = left;
    shared.right[warp][lane] = right;
    __syncthreads();
  }

  // From the states that enter the chunk to those that enter this thread's tokens.
  __device__ void enter(const Shared& shared, Pair<float>& left, Pair<float>& right) const {
    for (int j = 0; j < warp; ++j) push(left, shared.left[j][lane].n, shared.left[j][lane].d, delta8);
    for (int j = kWarps - 1; j > warp; --j) push(right, shared.right[j][lane].n, shared.right[j][lane].d, delta8);
  }

  // The chunk's sums, written by the first warp.
  __device__ void write_sums(const Place& at, const Shared& shared, double* state, int scale) const {
    if (!active || !safe || warp != 0) return;
    Pair<float> left = {0, 0}, right = {0, 0};
    for (int j = 0; j < kWarps; ++j) push(left, shared.left[j][lane].n, shared.left[j][lane].d, delta8);
    for (int j = kWarps - 1; j >= 0; --j) push(right, shared.right[j][lane].n, shared.right[j][lane].d, delta8);
    const double o = scale;
    at.write(state, {o, left.n, left.d}, {o, right.n, right.d});
  }
};

__device__ __forceinline__ Pair<float> at_scale(const Scaled& s, double scale) {
  const double f = pow2_whole(s.o - scale);
  return {static_cast<float>(s.n * f), static_cast<float>(s.d * f)};
}

// The states that enter this thread's tokens, at the scale that e then has too.
__device__ __forceinline__ void enter_chunk(Segment& x, const Place& at, Shared& shared, double* state,
                                            Pair<float>& left, Pair<float>& right) {
  Scaled l = {kEmpty, 0, 0}, r = l;
  if (x.active) l = at.left(state), r = at.right(state);
  const double o = l.o > r.o ? l.o : r.o;
  x.safe = x.safe && o - x.top <= kMaxSpread && is_moderate(l) && is_moderate(r);
  if (x.safe && o > x.top) x.rescale(static_cast<int>(o));
  float p[kTokens];
  for (int t = 0; t < kTokens; ++t) p[t] = x.e[t] * x.v[t];
  x.tell(shared, p, x.e);
  left = at_scale(l, x.top);
  right = at_scale(r, x.top);
  x.enter(shared, left, right);
}

__device__ __forceinline__ void mark(const Scan& s, const Segment& x, unsigned char* unsafe) {
  if (x.active && !x.safe) unsafe[static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y] = 1;
}

__global__ void __launch_bounds__(kChannels* kWarps) summary_kernel(Scan s, unsigned char* unsafe) {
  __shared__ Shared shared;
  const Place at(s, blockIdx.x, static_cast<int64_t>(blockIdx.y) * kChannels + threadIdx.x);
  Segment x;
  x.load_tokens(s, at, shared, false);
  float p[kTokens];
  for (int t = 0; t < kTokens; ++t) p[t] = x.e[t] * x.v[t];
  x.tell(shared, p, x.e);
  x.write_sums(at, shared, s.state, x.top);
  mark(s, x, unsafe);
}

__global__ void __launch_bounds__(kChannels* kWarps) emit_kernel(Scan s, unsigned char* unsafe) {
  __shared__ Shared shared;
  const Place at(s, blockIdx.x, static_cast<int64_t>(blockIdx.y) * kChannels + threadIdx.x);
  Segment x;
  x.load_tokens(s, at, shared, false);
  Pair<float> left, right, lefts[kTokens];
  enter_chunk(x, at, shared, s.state, left, right);
  mark(s, x, unsafe);
  if (!x.active || !x.safe) return;
  float y[kTokens];
  walk_left(x.e, x.v, kTokens, x.delta, left, lefts);
  emit_outputs(x.e, x.v, kTokens, x.delta, x.bonus, lefts, right, y);
  const int n = at.tokens(s) - x.first;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t < n) store(s.y, at.offset(s, s.y, x.first + t), s.accumulate, y[t]);
  }
}

__global__ void __launch_bounds__(kChannels* kWarps) backward_summary_kernel(Scan s, unsigned char* unsafe) {
  __shared__ Shared shared;
  const Place at(s, blockIdx.x, static_cast<int64_t>(blockIdx.y) * kChannels + threadIdx.x);
  Segment x;
  x.load_tokens(s, at, shared, true);
  Pair<float> left, right, lefts[kTokens];
  enter_chunk(x, at, shared, s.state, left, right);
  mark(s, x, unsafe);
  float h[kTokens];
  walk_left(x.e, x.v, kTokens, x.delta, left, lefts);
  emit_items<float>(x.e, x.v, kTokens, x.delta, x.bonus, lefts, right, x.g, h, nullptr, nullptr);
  const int n = at.tokens(s) - x.first;
  for (int t = 0; t < kTokens; ++t) {
    if (t >= n) x.g[t] = h[t] = 0;  // beyond the end, den may be zero
  }
  x.tell(shared, x.g, h);
  x.write_sums(at, shared, s.gstate, -x.top);
}

__global__ void __launch_bounds__(kChannels* kWarps) backward_emit_kernel(Scan s, unsigned char* unsafe) {
  __shared__ Shared shared;
  __shared__ double shares[2][kWarps][kChannels];
  const Place at(s, blockIdx.x, static_cast<int64_t>(blockIdx.y) * kChannels + threadIdx.x);
  Segment x;
  x.load_tokens(s, at, shared, true);
  Pair<float> left, right, lefts[kTokens], rights[kTokens], out[kTokens];
  enter_chunk(x, at, shared, s.state, left, right);
  Scaled gl = {kEmpty, 0, 0}, gr = gl;
  if (x.active) gl = at.left(s.gstate), gr = at.right(s.gstate);
  x.safe = x.safe && gl.o + x.top <= kMaxSpread && gr.o + x.top <= kMaxSpread;
  mark(s, x, unsafe);
  float h[kTokens], gw = 0, gu = 0;
  walk_left(x.e, x.v, kTokens, x.delta, left, lefts);
  emit_items(x.e, x.v, kTokens, x.delta, x.bonus, lefts, right, x.g, h, rights, &gu);
  const int n = x.active ? at.tokens(s) - x.first : 0;
  for (int t = 0; t < kTokens; ++t) {
    if (t >= n) x.g[t] = h[t] = 0, lefts[t] = rights[t] = {0, 0};
  }
  x.tell(shared, x.g, h);
  Pair<float> gleft = at_scale(gl, -x.top), gright = at_scale(gr, -x.top);
  x.enter(shared, gleft, gright);
  emit_gradients(x.e, x.v, x.g, h, kTokens, x.delta, x.bonus, lefts, rights, gleft, gright, out, &gw);
  shares[0][x.warp][x.lane] = n > 0 ? -static_cast<double>(gw) * (1.0 + static_cast<double>(x.delta)) : 0.0;
  shares[1][x.warp][x.lane] = n > 0 ? gu : 0.0;
  __syncthreads();
  if (!x.active || !x.safe) return;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= n) continue;
    store(s.gv, at.offset(s, s.gv, x.first + t), s.accumulate, out[t].n);
    store(s.gk, at.offset(s, s.gk, x.first + t), s.accumulate, out[t].d);
  }
  if (x.warp < 2) {
    double sum = 0;
    for (int j = 0; j < kWarps; ++j) sum += shares[x.warp][j][x.lane];
    *at.share(s, x.warp) = sum;
  }
}

// ---- exact: one thread per channel ----

enum class Phase { kSummary, kEmit, kBackwardSummary, kBackwardEmit };

// Whether float did for this channel is decided again, from the same numbers, by `exact_needed`: a chunk is marked for
// all of its 32 channels, and writing the others again, in a sum of two scans, would add them twice.
__device__ bool exact_needed(const Scan& s, const Place& at, Phase phase) {
  if (s.k.dtype == DType::kDouble) return true;
  if (!(fabs(s.w[at.channel]) <= kMaxDecay && fabs(s.u[at.channel]) <= kMaxBonus)) return true;
  const bool backward = phase == Phase::kBackwardSummary || phase == Phase::kBackwardEmit;
  float largest_k = 0, largest_v = 0, largest_g = 0;
  int top = -1000000;
  for (int t = 0; t < at.tokens(s); ++t) {
    const float k = static_cast<float>(load(s.k, at.offset(s, s.k, t)));
    const float v = static_cast<float>(load(s.v, at.offset(s, s.v, t)));
    const float g = backward ? static_cast<float>(load(s.gy, at.offset(s, s.gy, t))) : 0.0f;
    if (k != k || v != v || g != g) return true;
    largest_k = fmaxf(largest_k, fabsf(k));
    largest_v = fmaxf(largest_v, fabsf(v));
    largest_g = fmaxf(largest_g, fabsf(g));
    int i;
    split_exp<float, int>(clamp_key(k), i);
    top = max(top, i);
  }
  if (!(largest_k <= kMaxKey && in_range(largest_v, kMinValue) && in_range(largest_g, kMinGradient))) return true;
  if (phase == Phase::kSummary) return false;
  const Scaled l = at.left(s.state), r = at.right(s.state);
  const double o = l.o > r.o ? l.o : r.o;
  if (!(o - top <= kMaxSpread && is_moderate(l) && is_moderate(r))) return true;
  if (phase != Phase::kBackwardEmit) return false;
  const double scale = o > top ? static_cast<int>(o) : top;
  return !(*at.number(s.gstate, 0) + scale <= kMaxSpread && *at.number(s.gstate, 3) + scale <= kMaxSpread);
}

template <Phase phase>
__global__ void __launch_bounds__(kExactChannels) exact_kernel(Scan s, const unsigned char* unsafe) {
  __shared__ double work[ExactChunk::kNumbers * kChunk * kExactChannels];
  const int64_t channel = static_cast<int64_t>(blockIdx.y) * kExactChannels + threadIdx.x;
  const int64_t groups = (s.C + kChannels - 1) / kChannels;
  if (channel >= s.C || !unsafe[blockIdx.x * groups + channel / kChannels]) return;
  const Place at(s, blockIdx.x, channel);
  if (!exact_needed(s, at, phase)) return;
  const ExactChunk x = {work + threadIdx.x, kExactChannels, at.tokens(s), s.w[channel] * kLog2e, s.u[channel] * kLog2e};
  for (int t = 0; t < x.tokens; ++t) {
    x.key(t) = load(s.k, at.offset(s, s.k, t)) * kLog2e;
    x.v(t) = load(s.v, at.offset(s, s.v, t));
    if (phase == Phase::kBackwardSummary || phase == Phase::kBackwardEmit) x.g(t) = load(s.gy, at.offset(s, s.gy, t));
  }
  if (phase == Phase::kSummary) {
    Scaled left, right;
    x.summarize(left, right);
    at.write(s.state, with_whole_scale(left), with_whole_scale(right));
    return;
  }
  const Scaled left = at.left(s.state), right = at.right(s.state);
  if (phase == Phase::kEmit) {
    x.emit_outputs(left, right);
    for (int t = 0; t < x.tokens; ++t) store(s.y, at.offset(s, s.y, t), s.accumulate, x.y(t));
    return;
  }
  const double gu = x.emit_items(left, right);
  if (phase == Phase::kBackwardSummary) {
    Scaled gleft, gright;
    x.summarize_items(gleft, gright);
    at.write(s.gstate, with_whole_scale(gleft), with_whole_scale(gright));
    return;
  }
  *at.share(s, 0) = x.emit_gradients(at.left(s.gstate), at.right(s.gstate));
  *at.share(s, 1) = gu;
  for (int t = 0; t < x.tokens; ++t) {
    store(s.gv, at.offset(s, s.gv, t), s.accumulate, x.gv(t));
    store(s.gk, at.offset(s, s.gk, t), s.accumulate, x.gk(t));
  }
}

// ---- carry and reduce ----

// A block for each (b, channel, side). Each thread adds up a run of chunks, one thread carries over the runs, and each
// walks its run again from the state that enters it.
__global__ void __launch_bounds__(kCarryThreads) carry_kernel(Scan s, double* state) {
  __shared__ Scaled sums[kCarryThreads];
  const int64_t side = blockIdx.x % 2, channel = blockIdx.x / 2 % s.C, b = blockIdx.x / 2 / s.C;
  const Place start(s, b * chunks(s), channel);
  const int64_t run = (start.chunks + kCarryThreads - 1) / kCarryThreads;
  const int64_t begin = min(threadIdx.x * run, start.chunks), end = min(begin + run, start.chunks);
  double decay_o, decay_f;
  chunk_decay(s.w[channel], 1, decay_o, decay_f);
  const auto row = [&](int64_t step, int field) {
    const int64_t chunk = side == 0 ? step : start.chunks - 1 - step;
    return start.number(state, 3 * static_cast<int>(side) + field) + chunk * 6 * start.lanes;
  };
  Scaled sum = {kEmpty, 0, 0};
  for (int64_t step = begin; step < end; ++step) {
    sum = carry_over(sum, {*row(step, 0), *row(step, 1), *row(step, 2)}, decay_o, decay_f);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double run_o, run_f;
    chunk_decay(s.w[channel], static_cast<double>(run), run_o, run_f);
    Scaled before = {kEmpty, 0, 0};
    for (int i = 0; i < kCarryThreads; ++i) {
      const Scaled after = carry_over(before, sums[i], run_o, run_f);
      sums[i] = before;
      before = after;
    }
  }
  __syncthreads();
  Scaled before = sums[threadIdx.x];
  for (int64_t step = begin; step < end; ++step) {
    const Scaled after = carry_over(before, {*row(step, 0), *row(step, 1), *row(step, 2)}, decay_o, decay_f);
    *row(step, 0) = before.o, *row(step, 1) = before.n, *row(step, 2) = before.d;
    before = after;
  }
}

__global__ void __launch_bounds__(kCarryThreads) reduce_kernel(Scan s, double* gw, double* gu) {
  __shared__ double sums[kCarryThreads];
  const int64_t rows = s.B * chunks(s), lanes = padded_channels(s);
  const int field = blockIdx.x % 2;
  const int64_t channel = blockIdx.x / 2;
  double sum = 0;
  for (int64_t r = threadIdx.x; r < rows; r += kCarryThreads) sum += s.partial[(2 * r + field) * lanes + channel];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kCarryThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) (field == 0 ? gw : gu)[channel] = sums[0];
}

}  // namespace WKV_NAMESPACE

namespace wkv {

namespace {

int64_t wide_groups(const Scan& s) { return (s.C + cuda::kChannels - 1) / cuda::kChannels; }

// A phase in float, then the exact kernel for what it marked; for double all is marked.
template <cuda::Phase phase, class Kernel>
const char* run_phase(const Scan& s, Kernel kernel, unsigned char* unsafe, cudaStream_t stream) {
  const dim3 rows(static_cast<unsigned>(s.B * chunks(s)), static_cast<unsigned>(wide_groups(s)));
  const bool exact = s.k.dtype == DType::kDouble;
  cudaError_t error = cudaMemsetAsync(unsafe, exact, static_cast<size_t>(cuda_flag_count(s)), stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (!exact) kernel<<<rows, dim3(cuda::kChannels, cuda::kWarps), 0, stream>>>(s, unsafe);
  const dim3 exact_rows(rows.x, static_cast<unsigned>((s.C + cuda::kExactChannels - 1) / cuda::kExactChannels));
  cuda::exact_kernel<phase><<<exact_rows, cuda::kExactChannels, 0, stream>>>(s, unsafe);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* carry(const Scan& s, double* state, cudaStream_t stream) {
  cuda::carry_kernel<<<static_cast<unsigned>(2 * s.B * s.C), cuda::kCarryThreads, 0, stream>>>(s, state);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

int64_t cuda_flag_count(const Scan& s) { return s.B * chunks(s) * wide_groups(s); }

int cuda_version() { return CUDART_VERSION; }

const char* cuda_forward(const Scan& s, unsigned char* unsafe, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const char* error = run_phase<cuda::Phase::kSummary>(s, cuda::summary_kernel, unsafe, stream);
  if (error == nullptr) error = carry(s, s.state, stream);
  if (error == nullptr) error = run_phase<cuda::Phase::kEmit>(s, cuda::emit_kernel, unsafe, stream);
  return error;
}

const char* cuda_backward(const Scan& s, unsigned char* unsafe, double* gw, double* gu, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const char* error = run_phase<cuda::Phase::kBackwardSummary>(s, cuda::backward_summary_kernel, unsafe, stream);
  if (error == nullptr) error = carry(s, s.gstate, stream);
  if (error == nullptr) error = run_phase<cuda::Phase::kBackwardEmit>(s, cuda::backward_emit_kernel, unsafe, stream);
  if (error != nullptr) return error;
  cuda::reduce_kernel<<<static_cast<unsigned>(2 * s.C), cuda::kCarryThreads, 0, stream>>>(s, gw, gu);
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace wkv
