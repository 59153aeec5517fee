// The CPU kernel: as many channels at a time as fit one vector, WKV_WIDTH. Included by bi_wkv_cpu.cpp once per
// instruction set.

namespace WKV_NAMESPACE {

typedef float F __attribute__((vector_size(4 * WKV_WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WKV_WIDTH)));
typedef uint16_t H __attribute__((vector_size(2 * WKV_WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WKV_WIDTH)));

constexpr int kWidth = WKV_WIDTH;

WKV_FN I to_int(F x) { return __builtin_convertvector(x, I); }
WKV_FN double magnitude(double x) { return __builtin_fabs(x); }

WKV_FN double bits_to_double(int64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

WKV_FN int64_t double_to_bits(double x) {
  int64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

}  // namespace WKV_NAMESPACE

#include "bi_wkv.h"

namespace WKV_NAMESPACE {

static_assert(kChunk == kChunkTokens, "the chunk of the arithmetic is the chunk of the state");

WKV_FN F vmax(F a, F b) { return a > b ? a : b; }
WKV_FN I vmax(I a, I b) { return a > b ? a : b; }
WKV_FN F vabs(F a) { return (F)((I)a & 0x7fffffff); }

// 2^i per lane for i <= 127; below the range of normal numbers, zero.
WKV_FN F pow2(I i) {
  const I low = I{} - 127;
  return (F)(((i > low ? i : low) + 127) << 23);
}

// ---- 16-bit types ----

WKV_FN F from_bfloat16(H h) { return (F)(__builtin_convertvector(h, U) << 16); }

WKV_FN H to_bfloat16(F x) {
  const U b = (U)x;
  const U rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const U quiet = (b >> 16) | 0x40;
  const U nan = (U)((b & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector((nan & quiet) | (~nan & rounded), H);
}

// The exponent is rebased by a multiplication, which also gets subnormals right.
WKV_FN F from_half(H h) {
  const U b = __builtin_convertvector(h, U);
  const U sign = (b & 0x8000) << 16, rest = (b & 0x7fff) << 13;
  const U special = (U)(rest >= (0x7c00u << 13));  // infinity and NaN
  const U finite = (U)((F)rest * 0x1p112f);
  return (F)(sign | (special & (rest | 0x7f800000)) | (~special & finite));
}

WKV_FN H to_half(F x) {
  const U b = (U)x, sign = (b >> 16) & 0x8000, size = b & 0x7fffffff;
  const U nan = (U)(size > 0x7f800000), large = (U)(size >= 0x477ff000), tiny = (U)(size < 0x38800000);
  const U subnormal = (U)((F)size + 0.5f) - 0x3f000000;                     // the adder rounds to multiples of 2^-24
  const U normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;  // to nearest, ties to even
  const U finite = (tiny & subnormal) | (~tiny & normal);
  const U value = (nan & 0x7e00) | (~nan & ((large & 0x7c00) | (~large & finite)));
  return __builtin_convertvector(sign | value, H);
}

// ---- rows of kWidth channels ----

template <class V, class T>
WKV_FN V load_lanes(const T* p, int64_t stride, int count) {
  V x = {};
  if (stride == 1 && count == kWidth) {
    __builtin_memcpy(&x, p, sizeof(V));
  } else {
    for (int c = 0; c < count; ++c) x[c] = p[c * stride];
  }
  return x;
}

template <class V, class T>
WKV_FN void store_lanes(T* p, int64_t stride, int count, V x) {
  if (stride == 1 && count == kWidth) {
    __builtin_memcpy(p, &x, sizeof(V));
  } else {
    for (int c = 0; c < count; ++c) p[c * stride] = x[c];
  }
}

WKV_FN F load(const View& a, int64_t offset, int count) {
  if (a.dtype == DType::kFloat)
    return load_lanes<F>(static_cast<const float*>(a.data) + offset, a.channel_stride, count);
  const H h = load_lanes<H>(static_cast<const uint16_t*>(a.data) + offset, a.channel_stride, count);
  return a.dtype == DType::kHalf ? from_half(h) : from_bfloat16(h);
}

WKV_FN void store(const View& a, int64_t offset, int count, bool accumulate, F x) {
  if (accumulate) x += load(a, offset, count);
  if (a.dtype == DType::kFloat) {
    store_lanes(static_cast<float*>(a.data) + offset, a.channel_stride, count, x);
  } else {
    const H h = a.dtype == DType::kHalf ? to_half(x) : to_bfloat16(x);
    store_lanes(static_cast<uint16_t*>(a.data) + offset, a.channel_stride, count, h);
  }
}

WKV_FN double load_one(const View& a, int64_t offset) {
  if (a.dtype == DType::kDouble) return static_cast<const double*>(a.data)[offset];
  return load(a, offset, 1)[0];
}

WKV_FN void store_one(const View& a, int64_t offset, bool accumulate, double x) {
  if (a.dtype == DType::kDouble) {
    double& out = static_cast<double*>(a.data)[offset];
    out = accumulate ? out + x : x;
  } else {
    store(a, offset, 1, accumulate, F{} + static_cast<float>(x));
  }
}

// ---- one chunk of one channel group ----

struct Place {
  int64_t b, chunk, channel;  // channel: the first of the group
  int tokens, count;          // of this chunk, of this group
  int64_t outer, inner;       // where the first token lies
  int64_t lanes;              // channels a state row holds

  WKV_FN Place(const Scan& s, int64_t item) {
    const int64_t ng = channel_groups(s, kWidth), nc = chunks(s), first = item / ng % nc * kChunk;
    channel = item % ng * kWidth;
    chunk = item / ng % nc;
    b = item / ng / nc;
    const int64_t left_tokens = s.outer * s.inner - first, left_channels = s.C - channel;
    tokens = static_cast<int>(left_tokens < kChunk ? left_tokens : kChunk);
    count = static_cast<int>(left_channels < kWidth ? left_channels : kWidth);
    outer = first / s.inner;
    inner = first % s.inner;
    lanes = padded_channels(s);
  }

  WKV_FN double* state_row(const Scan& s, double* state, int field) const {
    return state + ((b * chunks(s) + chunk) * 6 + field) * lanes + channel;
  }
  WKV_FN double* partial_row(const Scan& s, int field) const {
    return s.partial + ((b * chunks(s) + chunk) * 2 + field) * lanes + channel;
  }
};

// Calls f(t, offset) for the tokens of the chunk, in order.
template <class Function>
WKV_FN void walk(const Scan& s, const Place& at, const View& a, Function f) {
  int64_t outer = at.outer, inner = at.inner;
  int64_t row = at.b * a.batch_stride + outer * a.outer_stride + at.channel * a.channel_stride;
  for (int t = 0; t < at.tokens; ++t) {
    f(t, row + inner * a.inner_stride);
    if (++inner == s.inner) {
      inner = 0;
      row = at.b * a.batch_stride + ++outer * a.outer_stride + at.channel * a.channel_stride;
    }
  }
}

WKV_FN bool all_lanes(I condition, int count) {
  for (int c = 0; c < count; ++c) {
    if (!condition[c]) return false;
  }
  return true;
}

WKV_FN bool in_range(F largest, float least, int count) {
  return all_lanes((largest == 0.0f) | ((largest >= least) & (largest <= kMaxValue)), count);
}

// What `prepare` worked out for the channels of a group.
struct Decay {
  F delta, bonus;  // expm1(-w), e^u
  bool safe;

  WKV_FN Decay(const Scan& s, const Place& at) {
    const int64_t lanes = padded_channels(s);
    F flag;
    __builtin_memcpy(&delta, s.rates + at.channel, sizeof delta);
    __builtin_memcpy(&bonus, s.rates + lanes + at.channel, sizeof bonus);
    __builtin_memcpy(&flag, s.rates + 2 * lanes + at.channel, sizeof flag);
    safe = all_lanes(flag != 0.0f, kWidth);
  }
};

void prepare(const Scan& s) {
  const int64_t lanes = padded_channels(s);
  for (int64_t c = 0; c < lanes; ++c) {
    const double w = c < s.C ? s.w[c] : 0.0, u = c < s.C ? s.u[c] : 0.0;
    s.rates[c] = static_cast<float>(::expm1(-w));
    s.rates[lanes + c] = static_cast<float>(::exp(u));
    s.rates[2 * lanes + c] = magnitude(w) <= kMaxDecay && magnitude(u) <= kMaxBonus;
  }
}

// The keys and values of a chunk, in float lanes. `safe` says whether the lanes may go on with them.
struct Tokens {
  F e[kChunk], v[kChunk];  // e: first r of e^k = r 2^i, then e^k at the chunk's scale
  I i[kChunk];
  I top = I{} - 1000000;  // the largest i
  bool safe;

  WKV_FN Tokens(const Scan& s, const Place& at) : safe(s.k.dtype != DType::kDouble) {
    if (!safe) return;
    F largest_k = {}, largest_v = {};
    I bad = {};
    walk(s, at, s.k, [&](int t, int64_t offset) {
      const F k = load(s.k, offset, at.count);
      e[t] = k;
      largest_k = vmax(vabs(k), largest_k);
      bad |= (k != k);
    });
    walk(s, at, s.v, [&](int t, int64_t offset) {
      v[t] = load(s.v, offset, at.count);
      largest_v = vmax(vabs(v[t]), largest_v);
      bad |= (v[t] != v[t]);
    });
    safe = all_lanes((largest_k <= kMaxKey) & ~bad, at.count) && in_range(largest_v, kMinValue, at.count);
    if (!safe) return;
    for (int t = 0; t < at.tokens; ++t) {
      e[t] = split_exp<F, I>(e[t], i[t]);
      top = vmax(top, i[t]);
    }
  }

  WKV_FN void scale(I scale, int tokens) {
    for (int t = 0; t < tokens; ++t) e[t] *= pow2(i[t] - scale);
  }
};

// The two states that enter a chunk. For the lanes they are brought to one scale, that of the largest of them and
// `top`.
struct Carried {
  const double* row[6];

  WKV_FN Carried(const Scan& s, const Place& at, double* state) {
    for (int f = 0; f < 6; ++f) row[f] = at.state_row(s, state, f);
  }
  WKV_FN Scaled left(int c) const { return {row[0][c], row[1][c], row[2][c]}; }
  WKV_FN Scaled right(int c) const { return {row[3][c], row[4][c], row[5][c]}; }

  // The larger of the two scales, as float: exact wherever it is near enough for the lanes.
  WKV_FN F top() const {
    float o[kWidth];
    for (int c = 0; c < kWidth; ++c) o[c] = static_cast<float>(row[0][c] > row[3][c] ? row[0][c] : row[3][c]);
    F x;
    __builtin_memcpy(&x, o, sizeof x);
    return x;
  }
  WKV_FN bool near(I scale, int count) const {
    return all_lanes(top() - __builtin_convertvector(scale, F) <= static_cast<float>(kMaxSpread), count);
  }
  WKV_FN bool moderate(int count) const {
    for (int c = 0; c < count; ++c) {
      if (!is_moderate(left(c)) || !is_moderate(right(c))) return false;
    }
    return true;
  }
  // Raises `scale` to the larger of the two; false if that is too far from where it was, or they are not moderate.
  WKV_FN bool raise(I& scale, int count) const {
    if (!near(scale, count) || !moderate(count)) return false;
    scale = to_int(vmax(top(), __builtin_convertvector(scale, F)));
    return true;
  }
  WKV_FN void at_scale(I scale, Pair<F>& left, Pair<F>& right) const {
    left = {scaled(0, 1, scale), scaled(0, 2, scale)};
    right = {scaled(3, 4, scale), scaled(3, 5, scale)};
  }
  WKV_FN F scaled(int o, int value, I scale) const {
    float out[kWidth];
    for (int c = 0; c < kWidth; ++c) out[c] = static_cast<float>(row[value][c] * pow2_whole(row[o][c] - scale[c]));
    F x;
    __builtin_memcpy(&x, out, sizeof x);
    return x;
  }
};

WKV_FN void write_sums(const Scan& s, const Place& at, double* state, I scale, const Pair<F>& left,
                       const Pair<F>& right) {
  double* row[6];
  for (int f = 0; f < 6; ++f) row[f] = at.state_row(s, state, f);
  for (int c = 0; c < kWidth; ++c) {
    row[0][c] = row[3][c] = scale[c];
    row[1][c] = left.n[c];
    row[2][c] = left.d[c];
    row[4][c] = right.n[c];
    row[5][c] = right.d[c];
  }
}

WKV_FN void write_sums(const Scan& s, const Place& at, double* state, int c, Scaled left, Scaled right) {
  left = with_whole_scale(left);
  right = with_whole_scale(right);
  const double value[6] = {left.o, left.n, left.d, right.o, right.n, right.d};
  for (int f = 0; f < 6; ++f) at.state_row(s, state, f)[c] = value[f];
}

// ---- forward ----

// Keys and values of channel `c` of the group, in the caller's memory.
WKV_FN ExactChunk load_exact(const Scan& s, const Place& at, int c, double* work) {
  const ExactChunk x = {work, 1, at.tokens, s.w[at.channel + c] * kLog2e, s.u[at.channel + c] * kLog2e};
  walk(s, at, s.k, [&](int t, int64_t offset) { x.key(t) = load_one(s.k, offset + c * s.k.channel_stride) * kLog2e; });
  walk(s, at, s.v, [&](int t, int64_t offset) { x.v(t) = load_one(s.v, offset + c * s.v.channel_stride); });
  return x;
}

WKV_NOINLINE void summary_exact(const Scan& s, const Place& at) {
  double work[ExactChunk::kNumbers * kChunk];
  for (int c = 0; c < at.count; ++c) {
    Scaled left, right;
    load_exact(s, at, c, work).summarize(left, right);
    write_sums(s, at, s.state, c, left, right);
  }
}

void summary(const Scan& s, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Place at(s, item);
    const Decay decay(s, at);
    Tokens x(s, at);
    if (!(decay.safe && x.safe)) {
      summary_exact(s, at);
      continue;
    }
    x.scale(x.top, at.tokens);
    F ev[kChunk];
    for (int t = 0; t < at.tokens; ++t) ev[t] = x.e[t] * x.v[t];
    Pair<F> left = {F{}, F{}}, right = left;
    summarize(ev, x.e, at.tokens, decay.delta, left, right);
    write_sums(s, at, s.state, x.top, left, right);
  }
}

void carry(const Scan& s, double* state, int64_t begin, int64_t end) {
  const int64_t nc = chunks(s), ng = channel_groups(s, kLanes), lanes = padded_channels(s);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t channel = item % ng * kLanes;
    double* base = state + item / ng * nc * 6 * lanes + channel;
    double decay_o[kLanes], decay_f[kLanes];
    for (int c = 0; c < kLanes; ++c) chunk_decay(channel + c < s.C ? s.w[channel + c] : 0.0, 1, decay_o[c], decay_f[c]);
    for (int side = 0; side < 2; ++side) {
      double o[kLanes], n[kLanes], d[kLanes];
      for (int c = 0; c < kLanes; ++c) o[c] = kEmpty, n[c] = d[c] = 0;
      for (int64_t step = 0; step < nc; ++step) {
        double* row = base + ((side == 0 ? step : nc - 1 - step) * 6 + 3 * side) * lanes;
        for (int c = 0; c < kLanes; ++c) {
          const Scaled before = {o[c], n[c], d[c]};
          const Scaled after = carry_over(before, {row[c], row[lanes + c], row[2 * lanes + c]}, decay_o[c], decay_f[c]);
          row[c] = before.o, row[lanes + c] = before.n, row[2 * lanes + c] = before.d;
          o[c] = after.o, n[c] = after.n, d[c] = after.d;
        }
      }
    }
  }
}

WKV_NOINLINE void emit_exact(const Scan& s, const Place& at) {
  const Carried carried(s, at, s.state);
  double work[ExactChunk::kNumbers * kChunk];
  for (int c = 0; c < at.count; ++c) {
    const ExactChunk x = load_exact(s, at, c, work);
    x.emit_outputs(carried.left(c), carried.right(c));
    walk(s, at, s.y,
         [&](int t, int64_t offset) { store_one(s.y, offset + c * s.y.channel_stride, s.accumulate, x.y(t)); });
  }
}

void emit(const Scan& s, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Place at(s, item);
    const Decay decay(s, at);
    Tokens x(s, at);
    const Carried carried(s, at, s.state);
    I scale = x.top;
    if (!(decay.safe && x.safe && carried.raise(scale, at.count))) {
      emit_exact(s, at);
      continue;
    }
    x.scale(scale, at.tokens);
    Pair<F> lefts[kChunk], left, right;
    carried.at_scale(scale, left, right);
    walk_left(x.e, x.v, at.tokens, decay.delta, left, lefts);
    F y[kChunk];
    emit_outputs(x.e, x.v, at.tokens, decay.delta, decay.bonus, lefts, right, y);
    walk(s, at, s.y, [&](int t, int64_t offset) { store(s.y, offset, at.count, s.accumulate, y[t]); });
  }
}

// ---- backward ----

WKV_FN ExactChunk load_exact_with_gradients(const Scan& s, const Place& at, int c, double* work) {
  const ExactChunk x = load_exact(s, at, c, work);
  walk(s, at, s.gy, [&](int t, int64_t offset) { x.g(t) = load_one(s.gy, offset + c * s.gy.channel_stride); });
  return x;
}

WKV_NOINLINE void backward_summary_exact(const Scan& s, const Place& at) {
  const Carried carried(s, at, s.state);
  double work[ExactChunk::kNumbers * kChunk];
  for (int c = 0; c < at.count; ++c) {
    const ExactChunk x = load_exact_with_gradients(s, at, c, work);
    Scaled gleft, gright;
    x.emit_items(carried.left(c), carried.right(c));
    x.summarize_items(gleft, gright);
    write_sums(s, at, s.gstate, c, gleft, gright);
  }
}

WKV_NOINLINE void backward_emit_exact(const Scan& s, const Place& at) {
  const Carried carried(s, at, s.state), gcarried(s, at, s.gstate);
  double work[ExactChunk::kNumbers * kChunk];
  for (int c = 0; c < at.count; ++c) {
    const ExactChunk x = load_exact_with_gradients(s, at, c, work);
    at.partial_row(s, 1)[c] = x.emit_items(carried.left(c), carried.right(c));
    at.partial_row(s, 0)[c] = x.emit_gradients(gcarried.left(c), gcarried.right(c));
    walk(s, at, s.gv,
         [&](int t, int64_t offset) { store_one(s.gv, offset + c * s.gv.channel_stride, s.accumulate, x.gv(t)); });
    walk(s, at, s.gk,
         [&](int t, int64_t offset) { store_one(s.gk, offset + c * s.gk.channel_stride, s.accumulate, x.gk(t)); });
  }
}

// gy of a chunk; `safe` as for Tokens.
struct Gradients {
  F g[kChunk];
  bool safe;

  WKV_FN Gradients(const Scan& s, const Place& at) {
    F largest = {};
    I bad = {};
    walk(s, at, s.gy, [&](int t, int64_t offset) {
      g[t] = load(s.gy, offset, at.count);
      largest = vmax(vabs(g[t]), largest);
      bad |= (g[t] != g[t]);
    });
    safe = all_lanes(~bad, at.count) && in_range(largest, kMinGradient, at.count);
  }
};

void backward_summary(const Scan& s, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Place at(s, item);
    const Decay decay(s, at);
    Tokens x(s, at);
    const Carried carried(s, at, s.state);
    I scale = x.top;
    if (!(decay.safe && x.safe && carried.raise(scale, at.count))) {
      backward_summary_exact(s, at);
      continue;
    }
    Gradients gy(s, at);
    if (!gy.safe) {
      backward_summary_exact(s, at);
      continue;
    }
    x.scale(scale, at.tokens);
    Pair<F> lefts[kChunk], left, right, gleft = {F{}, F{}}, gright = gleft;
    carried.at_scale(scale, left, right);
    walk_left(x.e, x.v, at.tokens, decay.delta, left, lefts);
    F h[kChunk];
    emit_items<F>(x.e, x.v, at.tokens, decay.delta, decay.bonus, lefts, right, gy.g, h, nullptr, nullptr);
    summarize(gy.g, h, at.tokens, decay.delta, gleft, gright);
    write_sums(s, at, s.gstate, -scale, gleft, gright);
  }
}

void backward_emit(const Scan& s, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const Place at(s, item);
    const Decay decay(s, at);
    Tokens x(s, at);
    const Carried carried(s, at, s.state), gcarried(s, at, s.gstate);
    I scale = x.top;
    if (!(decay.safe && x.safe && carried.raise(scale, at.count) && gcarried.near(-scale, at.count))) {
      backward_emit_exact(s, at);
      continue;
    }
    Gradients gy(s, at);
    if (!gy.safe) {
      backward_emit_exact(s, at);
      continue;
    }
    x.scale(scale, at.tokens);
    Pair<F> lefts[kChunk], rights[kChunk], left, right, gleft, gright;
    carried.at_scale(scale, left, right);
    gcarried.at_scale(-scale, gleft, gright);
    walk_left(x.e, x.v, at.tokens, decay.delta, left, lefts);
    F h[kChunk], gw = {}, gu = {};
    emit_items(x.e, x.v, at.tokens, decay.delta, decay.bonus, lefts, right, gy.g, h, rights, &gu);
    Pair<F>* out = lefts;  // each left state is read before its place is written
    emit_gradients(x.e, x.v, gy.g, h, at.tokens, decay.delta, decay.bonus, lefts, rights, gleft, gright, out, &gw);
    walk(s, at, s.gv, [&](int t, int64_t offset) { store(s.gv, offset, at.count, s.accumulate, out[t].n); });
    walk(s, at, s.gk, [&](int t, int64_t offset) { store(s.gk, offset, at.count, s.accumulate, out[t].d); });
    for (int c = 0; c < at.count; ++c) {
      at.partial_row(s, 0)[c] = -static_cast<double>(gw[c]) * (1.0 + static_cast<double>(decay.delta[c]));
      at.partial_row(s, 1)[c] = gu[c];
    }
  }
}

// Adds the chunks' shares of gw and gu up, always in the same order.
void reduce(const Scan& s, double* gw, double* gu, int64_t begin, int64_t end) {
  const int64_t rows = s.B * chunks(s), lanes = padded_channels(s);
  for (int64_t c = begin; c < end; ++c) {
    double sum_w = 0, sum_u = 0;
    for (int64_t r = 0; r < rows; ++r) {
      sum_w += s.partial[2 * r * lanes + c];
      sum_u += s.partial[(2 * r + 1) * lanes + c];
    }
    gw[c] = sum_w;
    gu[c] = sum_u;
  }
}

}  // namespace WKV_NAMESPACE
