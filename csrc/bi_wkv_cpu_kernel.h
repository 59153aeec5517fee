// The CPU kernel: as many channels at a time as fit one vector, WKV_WIDTH. Included by bi_wkv_cpu.cpp once per
// instruction set.
//
// A tile is what a call of a phase works on, held in scratch memory as (rows, columns) vectors:
//     one scan    a row per vector of channels, a column per token: kTogether vectors of one chunk
//     two scans   the pixels of kTileRows x kTileColumns, one vector of channels; a tile has one power-of-two scale, so
//                 that one exponential serves both orders
// A segment is a row or a column of a tile that a scan walks in one go. All segments of an order are chained by
// `carry`.

namespace WKV_NAMESPACE {

typedef float F __attribute__((vector_size(4 * WKV_WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WKV_WIDTH)));
typedef uint16_t H __attribute__((vector_size(2 * WKV_WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WKV_WIDTH)));

constexpr int kWidth = WKV_WIDTH;
constexpr int kTogether = 2;  // segments walked side by side: their recurrences wait for one another's latency
constexpr int kPitch = kTileColumns + 1;  // of a tile's rows; an even number would map a column to few cache sets
constexpr int kChunkPitch = kChunkTokens + 1;
constexpr int kScratch = kTileRows * kPitch > kTogether* kChunkPitch ? kTileRows * kPitch : kTogether * kChunkPitch;
constexpr int kLongest = kChunkTokens;  // tokens of a segment
// What float may meet at a tile's scale: the sum of a segment's weights with what enters it, sums in between, and
// states of gradients that enter.
constexpr float kLeastSum = 0x1p-40f, kMost = 0x1p110f, kMostCarried = 0x1p61f;

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

WKV_FN F splat(float x) { return F{} + x; }
WKV_FN F vmax(F a, F b) { return a > b ? a : b; }
WKV_FN I vmax(I a, I b) { return a > b ? a : b; }
WKV_FN F vabs(F a) { return (F)((I)a & 0x7fffffff); }

WKV_FN bool all_lanes(I condition) {
  I both = condition;
  int32_t lane[kWidth];
  __builtin_memcpy(lane, &both, sizeof lane);
  int32_t all = -1;
  for (int c = 0; c < kWidth; ++c) all &= lane[c];
  return all != 0;
}

// The whole number of binary digits in e^k.
WKV_FN F whole_digits(F k) { return (k * 1.44269504f + kRounding) - kRounding; }

// e^k / 2^scale where that is at most 1.42, and about 2^-125 where it is less than that. Adding kRounding leaves the
// whole digits in the lowest bits, from where they are added to the exponent.
struct ExpAt {
  F rounding, least;

  WKV_FN explicit ExpAt(F scale) : rounding(kRounding - scale), least((scale - 125.0f) * 0.69314718f) {}
  WKV_FN F operator()(F k) const {
    k = vmax(least, k);  // NaN goes through
    const F shifted = k * 1.44269504f + rounding;
    return (F)((I)exp_reduced(reduced(k, shifted - rounding)) + ((I)shifted << 23));
  }
};

// Beyond +-87 the sigmoid is 0 or 1 to float's last digit. NaN goes through.
WKV_FN F sigmoid(F x) {
  I i;
  const F below = x > splat(87.0f) ? splat(87.0f) : x;
  const F r = split_exp<F, I>(-(below < splat(-87.0f) ? splat(-87.0f) : below), i);
  return 1.0f / (1.0f + (F)((I)r + (i << 23)));
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

// ---- tiles and their segments ----

// The segments of a tile in one order: `count` of them, of `tokens` tokens, the last perhaps of fewer. Token t of
// segment j is scratch vector j * next + t * step.
struct Order {
  const Scan* scan;
  int count, tokens, last;
  int64_t next, step;
  int64_t first, stride;  // number of the first segment's state, and from one segment's to the next's
  int64_t lanes;          // of a state row
  int channel, channel_next;

  int length(int j) const { return j == count - 1 ? last : tokens; }
  WKV_FN double* state_row(double* state, int j, int field) const {
    return state + ((first + j * stride) * 6 + field) * lanes + channel + j * channel_next;
  }
  WKV_FN double* partial_row(int64_t tile, int j, int field) const {
    return scan->partial + (tile * 2 + field) * lanes + channel + j * channel_next;
  }
};

struct Tile {
  const CpuJob& job;
  int64_t b, number, outer, inner;  // number: of the tile among all; outer, inner: where it starts
  int rows, columns;                // in scratch
  int64_t pitch;
  int channel;          // the first
  bool cross, reverse;  // reverse: the next tile to come is the one before
  int orders;
  int64_t groups, group;
  Order order[2];

  Tile(const CpuJob& job_, int64_t item, bool reverse_) : job(job_), reverse(reverse_) {
    const Scan& s = job.scan[0];
    const int64_t lanes = padded_channels(s);
    cross = job.orders == 2;
    orders = job.orders;
    const int channels = cross ? kWidth : kWidth * kTogether;
    const int64_t down = tile_rows(job), across = tile_columns(job);
    groups = channel_groups(s, channels);
    group = item % groups;
    channel = static_cast<int>(group) * channels;
    number = item / groups;
    b = number / (down * across);
    const int64_t ty = number / across % down, tx = number % across;
    if (cross) {
      outer = ty * kTileRows, inner = tx * kTileColumns;
      rows = static_cast<int>(s.outer - outer < kTileRows ? s.outer - outer : kTileRows);
      columns = static_cast<int>(s.inner - inner < kTileColumns ? s.inner - inner : kTileColumns);
      const bool narrow = s.inner <= kNarrow;
      pitch = narrow ? columns : kPitch;
      order[1] = {&job.scan[1], columns, rows,    rows, 1, pitch, (b * s.inner + inner) * down + ty,
                  down,         lanes,   channel, 0};
      if (narrow) {
        const int per = segment_rows(job), count = (rows + per - 1) / per;
        const int64_t first = b * line(job, 0).count() + ty * (kTileRows / per);
        order[0] = {
            &job.scan[0], count, per * columns, (rows - (count - 1) * per) * columns, per * columns, 1, first, 1, lanes,
            channel,      0};
      } else {
        const int64_t first = (b * s.outer + outer) * across + tx;
        order[0] = {&job.scan[0], rows, columns, columns, pitch, 1, first, across, lanes, channel, 0};
      }
    } else {
      const int64_t token = tx * kChunkTokens, left = s.outer * s.inner - token;
      outer = token / s.inner, inner = token % s.inner;
      const int64_t vectors = (s.C - channel + kWidth - 1) / kWidth;
      rows = static_cast<int>(vectors < kTogether ? vectors : kTogether);
      columns = static_cast<int>(left < kChunkTokens ? left : kChunkTokens);
      pitch = kChunkPitch;
      order[0] = {&job.scan[0], rows, columns, columns, pitch, 1, number, 0, lanes, channel, kWidth};
    }
  }

  // Channels that are there, of those in scratch row r.
  int channels(int r) const {
    const int64_t left = job.scan[0].C - channel - (cross ? 0 : r * kWidth);
    return static_cast<int>(left < kWidth ? left : kWidth);
  }
  double* tops(int r) const { return job.tops + number * order[0].lanes + channel + (cross ? 0 : r * kWidth); }
  // From an element to the one that the next tile to come has in its place, near enough for prefetching.
  int64_t ahead(const View& a) const {
    const int64_t channels = (cross ? kWidth : kWidth * kTogether) * a.channel_stride;
    const int64_t tile = (cross ? kTileColumns : kChunkTokens) * a.inner_stride - (groups - 1) * channels;
    if (reverse) return group > 0 ? -channels : -tile;
    return group < groups - 1 ? channels : tile;
  }
  // Calls f(scratch index, offset) for the vectors of scratch row r.
  template <class Function>
  WKV_FN void walk(const View& a, int r, Function f) const {
    int64_t o = outer + (cross ? r : 0), i = inner;
    const int64_t base = b * a.batch_stride + (channel + (cross ? 0 : r * kWidth)) * a.channel_stride;
    const int64_t first = r * pitch, end = first + columns;
    for (int64_t at = first; at < end; i = 0, ++o) {  // usually once: until the image's row ends
      const int64_t run = at + job.scan[0].inner - i < end ? at + job.scan[0].inner - i : end;
      int64_t offset = base + o * a.outer_stride + i * a.inner_stride;
      for (; at < run; ++at, offset += a.inner_stride) f(at, offset);
    }
  }
};

// ---- between memory and scratch ----

template <class T>
WKV_FN void copy_lanes(T* to, int64_t to_stride, const T* from, int64_t from_stride, int count) {
  if (to_stride == 1 && from_stride == 1) {
    int c = 0;
    for (int piece = kWidth / 2; piece > 0; piece /= 2) {
      if (count & piece) __builtin_memcpy(to + c, from + c, piece * sizeof(T)), c += piece;
    }
  } else {
    for (int c = 0; c < count; ++c) to[c * to_stride] = from[c * from_stride];
  }
}

// Calls f(scratch index, vector) for a scratch row that lies in memory as vectors V of elements T.
template <class V, class T, class Function>
WKV_FN void load_row_as(const Tile& x, const View& a, int r, Function f) {
  const T* data = static_cast<const T*>(a.data);
  const int count = x.channels(r);
  const int64_t ahead = x.ahead(a);
  if (a.channel_stride == 1 && count == kWidth) {
    const int64_t wider = !x.cross && x.rows < kTogether ? kWidth : 0;  // the next tile has another vector of channels
    x.walk(a, r, [&](int64_t i, int64_t offset) {
      V vector;
      __builtin_memcpy(&vector, data + offset, sizeof vector);
      __builtin_prefetch(data + offset + ahead);
      if (wider != 0) __builtin_prefetch(data + offset + ahead + wider);
      f(i, vector);
    });
  } else {
    V raw[kLongest];
    x.walk(a, r, [&](int64_t i, int64_t offset) {
      V& vector = raw[i - r * x.pitch];
      vector = V{};
      copy_lanes(reinterpret_cast<T*>(&vector), 1, data + offset, a.channel_stride, count);
      __builtin_prefetch(data + offset + ahead);
    });
    for (int c = 0; c < x.columns; ++c) f(r * x.pitch + c, raw[c]);
  }
}

// Stores f(scratch index), of type V, as elements T.
template <class V, class T, class Function>
WKV_FN void store_row_as(const Tile& x, const View& a, int r, Function f) {
  T* data = static_cast<T*>(a.data);
  const int count = x.channels(r);
  if (a.channel_stride == 1 && count == kWidth) {
    x.walk(a, r, [&](int64_t i, int64_t offset) {
      const V vector = f(i);
      __builtin_memcpy(data + offset, &vector, sizeof vector);
    });
  } else {
    V raw[kLongest];
    for (int c = 0; c < x.columns; ++c) raw[c] = f(r * x.pitch + c);
    x.walk(a, r, [&](int64_t i, int64_t offset) {
      copy_lanes(data + offset, a.channel_stride, reinterpret_cast<const T*>(&raw[i - r * x.pitch]), 1, count);
    });
  }
}

// Calls f(scratch index, floats) for the vectors of scratch row r.
template <class Function>
WKV_FN void load_row(const Tile& x, const View& a, int r, Function f) {
  if (a.dtype == DType::kFloat) {
    load_row_as<F, float>(x, a, r, f);
  } else if (a.dtype == DType::kHalf) {
    load_row_as<H, uint16_t>(x, a, r, [&](int64_t i, H h) { f(i, from_half(h)); });
  } else {
    load_row_as<H, uint16_t>(x, a, r, [&](int64_t i, H h) { f(i, from_bfloat16(h)); });
  }
}

template <class Function>
WKV_FN void load(const Tile& x, const View& a, Function f) {
  for (int r = 0; r < x.rows; ++r) load_row(x, a, r, f);
}

// Stores f(scratch index) for every vector of the tile.
template <class Function>
WKV_FN void store(const Tile& x, const View& a, Function f) {
  for (int r = 0; r < x.rows; ++r) {
    if (a.dtype == DType::kFloat) {
      store_row_as<F, float>(x, a, r, f);
    } else if (a.dtype == DType::kHalf) {
      store_row_as<H, uint16_t>(x, a, r, [&](int64_t i) { return to_half(f(i)); });
    } else {
      store_row_as<H, uint16_t>(x, a, r, [&](int64_t i) { return to_bfloat16(f(i)); });
    }
  }
}

WKV_FN double load_one(const View& a, int64_t offset) {
  if (a.dtype == DType::kDouble) return static_cast<const double*>(a.data)[offset];
  if (a.dtype == DType::kFloat) return static_cast<const float*>(a.data)[offset];
  const H h = H{} + static_cast<const uint16_t*>(a.data)[offset];
  return (a.dtype == DType::kHalf ? from_half(h) : from_bfloat16(h))[0];
}

WKV_FN void store_one(const View& a, int64_t offset, double x) {
  const F f = splat(static_cast<float>(x));
  if (a.dtype == DType::kDouble) {
    static_cast<double*>(a.data)[offset] = x;
  } else if (a.dtype == DType::kFloat) {
    static_cast<float*>(a.data)[offset] = f[0];
  } else {
    static_cast<uint16_t*>(a.data)[offset] = (a.dtype == DType::kHalf ? to_half(f) : to_bfloat16(f))[0];
  }
}

// ---- walks: V segments side by side ----

// e^-w, rounded; what kSettle steps of it lack, as a share; e^u. The rounding is made good every kSettle tokens, so
// that it does not add up, and a decay below float's last digit is not lost.
struct Rates {
  F factor, settle, bonus;
};

constexpr int kSettle = 8;

WKV_FN F read_lanes(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

WKV_FN Rates rates(const Order& order, int j) {
  const float* p = order.scan->rates + order.channel + j * order.channel_next;
  return {read_lanes(p), read_lanes(p + order.lanes), read_lanes(p + 2 * order.lanes)};
}

WKV_FN bool is_safe(const Order& order, int j) {
  return all_lanes(read_lanes(order.scan->rates + 3 * order.lanes + order.channel + j * order.channel_next) != 0.0f);
}

void prepare(const Scan& s) {
  const int64_t lanes = padded_channels(s);
  for (int64_t c = 0; c < lanes; ++c) {
    const double w = c < s.C ? s.w[c] : 0.0, u = c < s.C ? s.u[c] : 0.0;
    const float factor = static_cast<float>(::exp(-w));
    s.rates[c] = factor;
    s.rates[lanes + c] = static_cast<float>(::expm1(-kSettle * (w + ::log(static_cast<double>(factor)))));
    s.rates[2 * lanes + c] = static_cast<float>(::exp(u));
    s.rates[3 * lanes + c] = magnitude(w) <= kMaxDecay && magnitude(u) <= kMaxBonus;
  }
}

template <int V>
struct Together {
  static constexpr int size = V;
  Rates rate[V];
  Pair<F> left[V], right[V];

  WKV_FN void push(Pair<F>& s, int j, F p, F q) const {
    s.n = s.n * rate[j].factor + p;
    s.d = s.d * rate[j].factor + q;
  }
  WKV_FN void settle(Pair<F>* s) const {
    for (int j = 0; j < V; ++j) {
      s[j].n += s[j].n * rate[j].settle;
      s[j].d += s[j].d * rate[j].settle;
    }
  }
};

// Calls step(t) for t from 0 to n - 1, or back, and settle() after every kSettle of them.
template <class Step, class Settle>
WKV_FN void forwards(int64_t n, Step step, Settle settle) {
  int64_t t = 0;
  while (t + kSettle <= n) {
    for (int64_t end = t + kSettle; t < end; ++t) step(t);
    settle();
  }
  for (; t < n; ++t) step(t);
}

template <class Step, class Settle>
WKV_FN void backwards(int64_t n, Step step, Settle settle) {
  int64_t t = n;
  while (t >= kSettle) {
    for (const int64_t end = t - kSettle; t > end;) step(--t);
    settle();
  }
  while (t > 0) step(--t);
}

// Calls f(batch, j) for all segments j, j + 1, ..., V at a time.
template <class Function>
WKV_FN void together(const Order& order, Function f) {
  int j = 0;
  const int even = order.last == order.tokens ? order.count : order.count - 1;
  for (; j + kTogether <= even; j += kTogether) {
    Together<kTogether> batch;
    for (int i = 0; i < kTogether; ++i) batch.rate[i] = rates(order, j + i);
    f(batch, j);
  }
  for (; j < order.count; ++j) {
    Together<1> batch;
    batch.rate[0] = rates(order, j);
    f(batch, j);
  }
}

// Both sums of the items (p, q): left, as a state behind their end, right, as one before their start.
template <int V>
WKV_FN void summarize(Together<V>& x, const F* p, const F* q, int64_t n, int64_t next, int64_t step) {
  for (int j = 0; j < V; ++j) x.left[j] = x.right[j] = {F{}, F{}};
  forwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          const int64_t front = j * next + t * step, back = j * next + (n - 1 - t) * step;
          x.push(x.left[j], j, p[front], q[front]);
          x.push(x.right[j], j, p[back], q[back]);
        }
      },
      [&] { x.settle(x.left), x.settle(x.right); });
}

// The left state of each token, in (token, V); x.left comes out behind the last.
template <int V>
WKV_FN void walk_left(Together<V>& x, const F* ev, const F* e, int64_t n, int64_t next, int64_t step, Pair<F>* lefts) {
  forwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          lefts[t * V + j] = x.left[j];
          x.push(x.left[j], j, ev[j * next + t * step], e[j * next + t * step]);
        }
      },
      [&] { x.settle(x.left); });
}

template <int V>
WKV_FN void emit_outputs(Together<V>& x, const F* ev, const F* e, int64_t n, int64_t next, int64_t step,
                         const Pair<F>* lefts, bool add, F* y) {
  backwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          const int64_t i = j * next + t * step;
          const F bonus = x.rate[j].bonus;
          const F num = (lefts[t * V + j].n + x.right[j].n) + bonus * ev[i];
          const F den = (lefts[t * V + j].d + x.right[j].d) + bonus * e[i];
          y[i] = add ? y[i] + num / den : num / den;
          x.push(x.right[j], j, ev[i], e[i]);
        }
      },
      [&] { x.settle(x.right); });
}

// The gradients. With den_t at the tile's scale, g_t = gy_t / den_t and h_t = g_t y_t are summed from both sides like
// e^k (v, 1) were, at the negative of that scale. GL, GR (of g) and HL, HR (of h) are those states; with
//     G_t = e^u g_t + GL_t + GR_t      H_t = e^u h_t + HL_t + HR_t      (of two scans, the sum)
//     gv_t = e^k_t G_t                 gk_t = v_t gv_t - e^k_t H_t
//     gu = sum_t e^(u + k_t) g_t (v_t - y_t)
//     gw = -e^-w sum_t [GR_t Ln_t - HR_t Ld_t + GL_t Rn_t - HL_t Rd_t]
// Here (g, h) in (token, V), the right state of each token, the sum of y over the scans, and gu.
template <bool kAll, int V>
WKV_FN void emit_items(Together<V>& x, const F* ev, const F* e, const F* gy, int64_t n, int64_t next, int64_t step,
                       const Pair<F>* lefts, F* g, F* h, Pair<F>* rights, bool add, F* y, F* gu) {
  backwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          const int64_t i = j * next + t * step, own = t * V + j;
          const F bonus = x.rate[j].bonus;
          const F inverse = 1.0f / ((lefts[own].d + x.right[j].d) + bonus * e[i]);
          const F out = ((lefts[own].n + x.right[j].n) + bonus * ev[i]) * inverse;
          g[own] = gy[i] * inverse;
          h[own] = g[own] * out;
          if (kAll) {
            rights[own] = x.right[j];
            y[i] = add ? y[i] + out : out;
            gu[j] += (bonus * g[own]) * (ev[i] - e[i] * out);
          }
          x.push(x.right[j], j, ev[i], e[i]);
        }
      },
      [&] { x.settle(x.right); });
}

// x.left and x.right: the states of (g, h) that enter the segments. G, H: the sums above.
template <int V>
WKV_FN void emit_gradients(Together<V>& x, const F* g, const F* h, int64_t n, int64_t next, int64_t step,
                           const Pair<F>* lefts, const Pair<F>* rights, bool add, F* G, F* H_, F* gw) {
  backwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          const int64_t i = j * next + t * step, own = t * V + j;
          const F bonus = x.rate[j].bonus;
          gw[j] += x.right[j].n * lefts[own].n - x.right[j].d * lefts[own].d;
          const F sum_g = bonus * g[own] + x.right[j].n, sum_h = bonus * h[own] + x.right[j].d;
          G[i] = add ? G[i] + sum_g : sum_g;
          H_[i] = add ? H_[i] + sum_h : sum_h;
          x.push(x.right[j], j, g[own], h[own]);
        }
      },
      [&] { x.settle(x.right); });
  forwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          const int64_t i = j * next + t * step, own = t * V + j;
          gw[j] += x.left[j].n * rights[own].n - x.left[j].d * rights[own].d;
          G[i] += x.left[j].n;
          H_[i] += x.left[j].d;
          x.push(x.left[j], j, g[own], h[own]);
        }
      },
      [&] { x.settle(x.left); });
}

// ---- states ----

WKV_FN void write_state(const Order& order, double* state, int j, F scale, const Pair<F>& left, const Pair<F>& right) {
  const F value[6] = {scale, left.n, left.d, scale, right.n, right.d};
  for (int f = 0; f < 6; ++f) {
    double* row = order.state_row(state, j, f);
    for (int c = 0; c < kWidth; ++c) row[c] = value[f][c];
  }
}

WKV_FN F to_lanes(const double* p) {
  float x[kWidth];
  for (int c = 0; c < kWidth; ++c) x[c] = static_cast<float>(p[c]);
  return read_lanes(x);
}

WKV_FN F state_at(const double* o, const double* value, F scale) {
  double x[kWidth];
  for (int c = 0; c < kWidth; ++c) x[c] = value[c] * pow2_whole(o[c] - static_cast<double>(scale[c]));
  return to_lanes(x);
}

// The states that enter a segment, at `scale`.
WKV_FN void read_state(const Order& order, double* state, int j, F scale, Pair<F>& left, Pair<F>& right) {
  const double* row[6];
  for (int f = 0; f < 6; ++f) row[f] = order.state_row(state, j, f);
  left = {state_at(row[0], row[1], scale), state_at(row[0], row[2], scale)};
  right = {state_at(row[3], row[4], scale), state_at(row[3], row[5], scale)};
}

// The larger of the two scales that enter a segment.
WKV_FN F largest_scale(const Order& order, int j) {
  double* state = order.scan->state;
  return vmax(to_lanes(order.state_row(state, j, 0)), to_lanes(order.state_row(state, j, 3)));
}

WKV_FN bool is_moderate(const Pair<F>& s) { return all_lanes(vabs(s.n) <= s.d * kMaxValue); }

// ---- a tile in float ----

struct Scratch {
  F e[kScratch], ev[kScratch];  // e^k and e^k v at the tile's scale
  F scale[kTogether];           // in binary digits; of each row of one scan's tile, of two scans' the first for all
};

// The scale of scratch row r: one for each row of one scan's tile, one for all of two scans'.
WKV_FN int scale_of(const Tile& x, int r) { return x.cross ? 0 : r; }
WKV_FN int scales(const Tile& x) { return x.cross ? 1 : x.rows; }

WKV_FN bool in_range(F largest, float least) {
  return all_lanes((largest == 0.0f) | ((largest >= splat(least)) & (largest <= splat(kMaxValue))));
}

WKV_FN bool decays_are_safe(const Tile& x) {
  for (int i = 0; i < x.orders; ++i) {
    for (int j = 0; j < (x.cross ? 1 : x.rows); ++j) {
      if (!is_safe(x.order[i], j)) return false;
    }
  }
  return x.job.scan[0].k.dtype != DType::kDouble;
}

// Keys and values at the scale of the largest key, unless they are out of float's range.
WKV_FN bool load_tokens(const Tile& x, Scratch& m) {
  if (!decays_are_safe(x)) return false;
  const Scan& s = x.job.scan[0];
  F top[kTogether], largest[kTogether] = {};
  for (F& f : top) f = splat(-kMaxKey);
  for (int r = 0; r < x.rows; ++r) {
    F up = top[scale_of(x, r)];
    load_row(x, s.k, r, [&](int64_t i, F k) {
      m.e[i] = k;
      up = vmax(k, up);
    });
    top[scale_of(x, r)] = up;
  }
  for (int n = 0; n < scales(x); ++n) m.scale[n] = whole_digits(top[n]);
  for (int r = 0; r < x.rows; ++r) {
    const ExpAt exp_at(m.scale[scale_of(x, r)]);
    F size = largest[scale_of(x, r)];
    load_row(x, s.v, r, [&](int64_t i, F v) {
      size = vmax(vabs(v), size);
      m.e[i] = exp_at(m.e[i]);
      m.ev[i] = v * m.e[i];
    });
    largest[scale_of(x, r)] = size;
  }
  bool safe = true;
  for (int n = 0; n < scales(x); ++n) {
    safe =
        safe && in_range(largest[n], kMinValue) && all_lanes((top[n] <= splat(kMaxKey)) & (top[n] > splat(-kMaxKey)));
  }
  return safe;
}

// Keys and values again, at a scale that fits the states too.
WKV_FN bool load_tokens_with_states(const Tile& x, Scratch& m) {
  if (!decays_are_safe(x)) return false;
  bool safe = true;
  for (int r = 0; r < scales(x); ++r) {
    const F top = to_lanes(x.tops(r));
    m.scale[r] = top;
    for (int i = 0; i < x.orders; ++i) {
      for (int j = r; j < (x.cross ? x.order[i].count : r + 1); ++j) {
        m.scale[r] = vmax(largest_scale(x.order[i], j), m.scale[r]);
      }
    }
    safe = safe && all_lanes(m.scale[r] - top <= splat(static_cast<float>(kMaxSpread)));  // false for NaN
  }
  if (!safe) return false;
  const Scan& s = x.job.scan[0];
  for (int r = 0; r < x.rows; ++r) {
    const ExpAt exp_at(m.scale[scale_of(x, r)]);
    load_row(x, s.k, r, [&](int64_t i, F k) { m.e[i] = exp_at(k); });
    load_row(x, s.v, r, [&](int64_t i, F v) { m.ev[i] = v * m.e[i]; });
  }
  return true;
}

// What a segment's sums must be for float to have taken them in.
WKV_FN bool is_sum(const Pair<F>& s) {
  return all_lanes((s.d >= splat(kLeastSum)) & (s.d <= splat(kMost)) & (vabs(s.n) <= splat(kMost)));
}

WKV_FN bool is_below(const Pair<F>& s, float limit) {
  return all_lanes((vabs(s.n) <= splat(limit)) & (vabs(s.d) <= splat(limit)));
}

WKV_FN bool summarize_tile(const Tile& x, Scratch& m) {
  if (!load_tokens(x, m)) return false;
  bool safe = true;
  for (int i = 0; i < x.orders; ++i) {
    const Order& order = x.order[i];
    together(order, [&](auto& batch, int j) {
      const int64_t at = j * order.next;
      const int length = order.length(j);
      summarize(batch, m.ev + at, m.e + at, length, order.next, order.step);
      for (int n = 0; n < batch.size; ++n) {
        safe = safe && is_sum(batch.left[n]) && is_sum(batch.right[n]);
        write_state(order, order.scan->state, j + n, m.scale[scale_of(x, j + n)], batch.left[n], batch.right[n]);
      }
    });
  }
  for (int r = 0; r < scales(x); ++r) {
    for (int c = 0; c < kWidth; ++c) x.tops(r)[c] = m.scale[r][c];
  }
  return safe;
}

// The states that enter the segments of a batch and the left state of each token. `least`: of the sum of all weights.
template <class Batch>
WKV_FN bool enter(const Tile& x, const Order& order, const Scratch& m, Batch& batch, int j, const F* least,
                  Pair<F>* lefts) {
  bool safe = true;
  for (int n = 0; n < batch.size; ++n) {
    read_state(order, order.scan->state, j + n, m.scale[scale_of(x, j + n)], batch.left[n], batch.right[n]);
    safe = safe && is_moderate(batch.left[n]) && is_moderate(batch.right[n]);
  }
  const int64_t at = j * order.next;
  const int length = order.length(j);
  walk_left(batch, m.ev + at, m.e + at, length, order.next, order.step, lefts);
  for (int n = 0; n < batch.size; ++n) {
    safe = safe && all_lanes(batch.left[n].d + batch.right[n].d >=
                             vmax(least[scale_of(x, j + n)] * batch.rate[n].bonus, splat(kLeastSum)));
  }
  return safe;
}

WKV_FN bool emit_tile(const Tile& x, Scratch& m) {
  if (!load_tokens_with_states(x, m)) return false;
  F y[kScratch], least[kTogether] = {};
  Pair<F> lefts[kLongest * kTogether];
  bool safe = true;
  for (int i = 0; i < x.orders; ++i) {
    const Order& order = x.order[i];
    together(order, [&](auto& batch, int j) {
      safe = safe && enter(x, order, m, batch, j, least, lefts);
      const int64_t at = j * order.next;
      const int length = order.length(j);
      emit_outputs(batch, m.ev + at, m.e + at, length, order.next, order.step, lefts, i > 0, y + at);
    });
  }
  if (!safe) return false;
  const Scan& s = x.job.scan[0];
  if (s.gate.data != nullptr) load(x, s.gate, [&](int64_t i, F gate) { y[i] *= sigmoid(gate); });
  store(x, s.y, [&](int64_t i) { return y[i]; });
  return true;
}

// gy, times the gate's sigmoid. `least` as for `enter`: what keeps e^u gy y / den in range.
WKV_FN bool load_gradients(const Tile& x, F* gy, F* least) {
  const Scan& s = x.job.scan[0];
  F largest[kTogether] = {};
  for (int r = 0; r < x.rows; ++r) {
    load_row(x, s.gy, r, [&](int64_t i, F g) { gy[i] = g; });
    if (s.gate.data != nullptr) load_row(x, s.gate, r, [&](int64_t i, F gate) { gy[i] *= sigmoid(gate); });
    F size = largest[scale_of(x, r)];
    for (int64_t i = r * x.pitch; i < r * x.pitch + x.columns; ++i) size = vmax(vabs(gy[i]), size);
    largest[scale_of(x, r)] = size;
  }
  bool safe = true;
  for (int n = 0; n < scales(x); ++n) {
    safe = safe && in_range(largest[n], kMinGradient);
    least[n] = largest[n] * 0x1p-70f;
  }
  return safe;
}

WKV_FN bool summarize_gradients(const Tile& x, Scratch& m) {
  F gy[kScratch], least[kTogether], g[kLongest * kTogether], h[kLongest * kTogether];
  Pair<F> lefts[kLongest * kTogether];
  if (!load_gradients(x, gy, least) || !load_tokens_with_states(x, m)) return false;
  bool safe = true;
  for (int i = 0; i < x.orders; ++i) {
    const Order& order = x.order[i];
    together(order, [&](auto& batch, int j) {
      safe = safe && enter(x, order, m, batch, j, least, lefts);
      const int64_t at = j * order.next;
      const int length = order.length(j);
      emit_items<false>(batch, m.ev + at, m.e + at, gy + at, length, order.next, order.step, lefts, g, h, nullptr,
                        false, nullptr, nullptr);
      summarize(batch, g, h, length, 1, batch.size);
      for (int n = 0; n < batch.size; ++n) {
        safe = safe && is_below(batch.left[n], kMost) && is_below(batch.right[n], kMost);
        write_state(order, order.scan->gstate, j + n, -m.scale[scale_of(x, j + n)], batch.left[n], batch.right[n]);
      }
    });
  }
  return safe;
}

// The tile's shares of gw and gu; those of two scans are summed over its segments.
WKV_FN bool write_shares(const Tile& x, const Order& order, F* gw, F* gu) {
  for (int n = 1; x.cross && n < kTogether; ++n) gw[0] += gw[n], gu[0] += gu[n];
  bool safe = true;
  for (int n = 0; n < (x.cross ? 1 : x.rows); ++n) {
    safe = safe && is_below({gw[n], gu[n]}, kMost);
    const F factor = rates(order, n).factor;
    for (int c = 0; c < kWidth; ++c) {
      order.partial_row(x.number, n, 0)[c] = -static_cast<double>(gw[n][c]) * static_cast<double>(factor[c]);
      order.partial_row(x.number, n, 1)[c] = gu[n][c];
    }
  }
  return safe;
}

WKV_FN bool emit_gradients_of_tile(const Tile& x, Scratch& m) {
  F gy[kScratch], y[kScratch], G[kScratch], H_[kScratch], least[kTogether];
  F g[kLongest * kTogether], h[kLongest * kTogether];
  Pair<F> lefts[kLongest * kTogether], rights[kLongest * kTogether];
  if (!load_gradients(x, gy, least) || !load_tokens_with_states(x, m)) return false;
  bool safe = true;
  for (int i = 0; i < x.orders; ++i) {
    const Order& order = x.order[i];
    F gw[kTogether] = {}, gu[kTogether] = {};
    together(order, [&](auto& batch, int j) {
      safe = safe && enter(x, order, m, batch, j, least, lefts);
      const int64_t at = j * order.next;
      const int length = order.length(j);
      emit_items<true>(batch, m.ev + at, m.e + at, gy + at, length, order.next, order.step, lefts, g, h, rights, i > 0,
                       y + at, gu);
      for (int n = 0; n < batch.size; ++n) {
        read_state(order, order.scan->gstate, j + n, -m.scale[scale_of(x, j + n)], batch.left[n], batch.right[n]);
        safe = safe && is_below(batch.left[n], kMostCarried) && is_below(batch.right[n], kMostCarried);
      }
      emit_gradients(batch, g, h, length, order.next, order.step, lefts, rights, i > 0, G + at, H_ + at, gw);
    });
    safe = write_shares(x, order, gw, gu) && safe;
  }
  if (!safe) return false;
  const Scan& s = x.job.scan[0];
  store(x, s.gk, [&](int64_t i) { return m.ev[i] * G[i] - m.e[i] * H_[i]; });
  store(x, s.gv, [&](int64_t i) { return m.e[i] * G[i]; });
  if (s.gate.data == nullptr) return true;
  load(x, s.gy, [&](int64_t i, F g) { y[i] *= g; });
  load(x, s.gate, [&](int64_t i, F gate) {
    const F r = sigmoid(gate);
    y[i] *= r * (1.0f - r);
  });
  store(x, s.ggate, [&](int64_t i) { return y[i]; });
  return true;
}

// ---- a tile in double, channel by channel ----

struct ExactTile {
  const Tile& x;
  const int row, c;  // the channel: lane c of scratch row `row` (one scan) or of all rows
  const Scan& s;
  double k[kScratch], v[kScratch], gy[kScratch], gate[kScratch];  // k in binary digits; the gate's sigmoid, or 1
  double y[kScratch] = {}, gk[kScratch] = {}, gv[kScratch] = {};  // sums over the scans
  double work[ExactChunk::kNumbers * kLongest];

  ExactTile(const Tile& x_, int row_, int c_) : x(x_), row(row_), c(c_), s(x.job.scan[0]) {
    load(s.k, [&](int64_t i, double value) { k[i] = value * kLog2e; });
    load(s.v, [&](int64_t i, double value) { v[i] = value; });
    walk(s.k, [&](int64_t i, int64_t) { gate[i] = 1; });
    if (s.gate.data != nullptr) load(s.gate, [&](int64_t i, double value) { gate[i] = sigmoid(value); });
  }

  template <class Function>
  void walk(const View& a, Function f) const {
    for (int r = x.cross ? 0 : row; r < (x.cross ? x.rows : row + 1); ++r) {
      x.walk(a, r, [&](int64_t i, int64_t offset) { f(i, offset + c * a.channel_stride); });
    }
  }
  template <class Function>
  void load(const View& a, Function f) const {
    walk(a, [&](int64_t i, int64_t offset) { f(i, load_one(a, offset)); });
  }
  template <class Function>
  void store(const View& a, Function f) const {
    walk(a, [&](int64_t i, int64_t offset) { store_one(a, offset, f(i)); });
  }

  // Calls f(order, number of the segment, the segment as a chunk, scratch index of its first token).
  template <class Function>
  void segments(Function f) {
    for (int n = 0; n < x.orders; ++n) {
      const Order& order = x.order[n];
      for (int j = x.cross ? 0 : row; j < (x.cross ? order.count : row + 1); ++j) {
        const int64_t channel = order.channel + j * order.channel_next + c;
        const ExactChunk chunk = {work, 1, order.length(j), order.scan->w[channel] * kLog2e,
                                  order.scan->u[channel] * kLog2e};
        for (int t = 0; t < order.length(j); ++t) {
          const int64_t i = j * order.next + t * order.step;
          chunk.key(t) = k[i], chunk.v(t) = v[i];
          chunk.g(t) = gy[i] * gate[i];
        }
        f(order, j, chunk);
      }
    }
  }
  Scaled read(const Order& order, double* state, int j, int side) const {
    return {order.state_row(state, j, 3 * side)[c], order.state_row(state, j, 3 * side + 1)[c],
            order.state_row(state, j, 3 * side + 2)[c]};
  }
  void write(const Order& order, double* state, int j, int side, Scaled sum) const {
    sum = with_whole_scale(sum);
    const double value[3] = {sum.o, sum.n, sum.d};
    for (int f = 0; f < 3; ++f) order.state_row(state, j, 3 * side + f)[c] = value[f];
  }

  void summarize() {
    segments([&](const Order& order, int j, const ExactChunk& chunk) {
      Scaled left, right;
      chunk.summarize(left, right);
      write(order, order.scan->state, j, 0, left);
      write(order, order.scan->state, j, 1, right);
    });
    x.tops(row)[c] = __builtin_nan("");
  }
  void emit() {
    segments([&](const Order& order, int j, const ExactChunk& chunk) {
      chunk.emit_outputs(read(order, order.scan->state, j, 0), read(order, order.scan->state, j, 1));
      for (int t = 0; t < order.length(j); ++t) y[j * order.next + t * order.step] += chunk.y(t);
    });
    store(s.y, [&](int64_t i) { return gate[i] * y[i]; });
  }
  void load_gradients() {
    load(s.gy, [&](int64_t i, double value) { gy[i] = value; });
  }
  double emit_items(const Order& order, int j, const ExactChunk& chunk) const {
    return chunk.emit_items(read(order, order.scan->state, j, 0), read(order, order.scan->state, j, 1));
  }
  void summarize_gradients() {
    load_gradients();
    segments([&](const Order& order, int j, const ExactChunk& chunk) {
      emit_items(order, j, chunk);
      Scaled left, right;
      chunk.summarize_items(left, right);
      write(order, order.scan->gstate, j, 0, left);
      write(order, order.scan->gstate, j, 1, right);
    });
  }
  void emit_gradients() {
    load_gradients();
    for (int n = 0; n < x.orders; ++n) share(x.order[n], 0) = share(x.order[n], 1) = 0;
    segments([&](const Order& order, int j, const ExactChunk& chunk) {
      share(order, 1) += emit_items(order, j, chunk);
      share(order, 0) +=
          chunk.emit_gradients(read(order, order.scan->gstate, j, 0), read(order, order.scan->gstate, j, 1));
      for (int t = 0; t < order.length(j); ++t) {
        const int64_t i = j * order.next + t * order.step;
        y[i] += chunk.y(t), gk[i] += chunk.gk(t), gv[i] += chunk.gv(t);
      }
    });
    store(s.gk, [&](int64_t i) { return gk[i]; });
    store(s.gv, [&](int64_t i) { return gv[i]; });
    if (s.gate.data != nullptr) store(s.ggate, [&](int64_t i) { return gy[i] * gate[i] * (1 - gate[i]) * y[i]; });
  }
  double& share(const Order& order, int field) const {
    return order.partial_row(x.number, x.cross ? 0 : row, field)[c];
  }
};

// Runs `method` for every channel of the tile.
WKV_NOINLINE void exactly(const Tile& x, void (ExactTile::*method)()) {
  for (int r = 0; r < (x.cross ? 1 : x.rows); ++r) {
    for (int c = 0; c < x.channels(r); ++c) (ExactTile(x, r, c).*method)();
  }
}

// ---- the phases ----

int64_t items(const CpuJob& job) {
  const int group = job.orders == 2 ? kWidth : kWidth * kTogether;
  return job.scan[0].B * tile_rows(job) * tile_columns(job) * channel_groups(job.scan[0], group);
}

// The second half of a pass starts where the first ended: that is still in the cache.
template <class Function>
WKV_FN void each_tile(const CpuJob& job, int64_t begin, int64_t end, bool reverse, void (ExactTile::*exact)(),
                      Function f) {
  Scratch m;
  for (int64_t n = begin; n < end; ++n) {
    const Tile x(job, reverse ? begin + end - 1 - n : n, reverse);
    if (!f(x, m)) exactly(x, exact);
  }
}

void summary(const CpuJob& job, int64_t begin, int64_t end) {
  each_tile(job, begin, end, false, &ExactTile::summarize, summarize_tile);
}
void emit(const CpuJob& job, int64_t begin, int64_t end) {
  each_tile(job, begin, end, true, &ExactTile::emit, emit_tile);
}
void backward_summary(const CpuJob& job, int64_t begin, int64_t end) {
  each_tile(job, begin, end, false, &ExactTile::summarize_gradients, summarize_gradients);
}
void backward_emit(const CpuJob& job, int64_t begin, int64_t end) {
  each_tile(job, begin, end, true, &ExactTile::emit_gradients, emit_gradients_of_tile);
}

// Replaces the sums of all segments by the states that enter them. An item is one direction of one order of kLanes
// channels of a picture.
void carry(const CpuJob& job, bool backward, int64_t begin, int64_t end) {
  const int64_t lanes = padded_channels(job.scan[0]), groups = channel_groups(job.scan[0], kLanes);
  for (int64_t item = begin; item < end; ++item) {
    const int side = item % 2, i = static_cast<int>(item / 2 % job.orders);
    const int64_t channel = item / 2 / job.orders % groups * kLanes, b = item / 2 / job.orders / groups;
    const Scan& s = job.scan[i];
    const Line of = line(job, i);
    const int64_t count = of.count();
    double* base = (backward ? s.gstate : s.state) + (b * count * 6 + 3 * side) * lanes + channel;
    double decay_o[2][kLanes], decay_f[2][kLanes];  // over a segment, and over the last of a line
    for (int c = 0; c < kLanes; ++c) {
      const double w = channel + c < s.C ? s.w[channel + c] : 0.0;
      chunk_decay(w, of.segment / double(kChunk), decay_o[0][c], decay_f[0][c]);
      chunk_decay(w, of.last() / double(kChunk), decay_o[1][c], decay_f[1][c]);
    }
    double o[kLanes], n[kLanes], d[kLanes];
    for (int c = 0; c < kLanes; ++c) o[c] = kEmpty, n[c] = d[c] = 0;
    for (int64_t step = 0; step < count; ++step) {
      const int64_t segment = side == 0 ? step : count - 1 - step;
      const int last = segment % of.segments == of.segments - 1;
      double* row = base + segment * 6 * lanes;
      for (int c = 0; c < kLanes; ++c) {
        const Scaled before = {o[c], n[c], d[c]};
        const Scaled after =
            carry_over(before, {row[c], row[lanes + c], row[2 * lanes + c]}, decay_o[last][c], decay_f[last][c]);
        row[c] = before.o, row[lanes + c] = before.n, row[2 * lanes + c] = before.d;
        o[c] = after.o, n[c] = after.n, d[c] = after.d;
      }
    }
  }
}

// Adds the tiles' shares of gw and gu up, always in the same order.
void reduce(const CpuJob& job, int i, double* gw, double* gu, int64_t begin, int64_t end) {
  const Scan& s = job.scan[i];
  const int64_t tiles = s.B * tile_rows(job) * tile_columns(job), lanes = padded_channels(s);
  for (int64_t c = begin; c < end; ++c) {
    double sum_w = 0, sum_u = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      sum_w += s.partial[2 * tile * lanes + c];
      sum_u += s.partial[(2 * tile + 1) * lanes + c];
    }
    gw[c] = sum_w;
    gu[c] = sum_u;
  }
}

}  // namespace WKV_NAMESPACE
