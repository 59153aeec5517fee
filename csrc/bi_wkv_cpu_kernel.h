// The CPU kernel: as many channels at a time as fit one vector, WKV_WIDTH. Included by bi_wkv_cpu.cpp once per
// instruction set.
//
// A tile is what a call of a phase works on, held in scratch memory as (rows, columns) vectors:
//     one scan    a row per vector of channels, a column per token: kTogether vectors of one chunk
//     two scans   the pixels of kTileRows x kTileColumns, one vector of channels; a tile has one power-of-two scale, so
//                 that one exponential serves both orders
// A segment is a row or a column of a tile that a scan walks in one go. All segments of an order are chained by
// `carry`.
//
// Time goes, in this order, into lines of the results that are not in the cache when they are written, into reading,
// and into arithmetic. So results go around the cache where they are too large for it, and are asked for early where
// they are not; each token is read once a phase, by the first walk that needs it, and the last walk writes.

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
#if WKV_WIDTH == 16
  return _mm512_movepi32_mask((__m512i)condition) == 0xffff;
#elif WKV_WIDTH == 8
  return _mm256_movemask_ps((__m256)condition) == 0xff;
#else
  I both = condition;
  int32_t lane[kWidth];
  __builtin_memcpy(lane, &both, sizeof lane);
  int32_t all = -1;
  for (int c = 0; c < kWidth; ++c) all &= lane[c];
  return all != 0;
#endif
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

// ---- writing around the cache ----

constexpr int64_t kLine = 64;
constexpr int64_t kLarge = 1 << 19;  // bytes of a tensor that a cache does not hold beside the others

#if WKV_WIDTH == 16
constexpr bool kCanStream = true;
WKV_FN void stream(float* to, F x) { _mm512_stream_ps(to, (__m512)x); }
WKV_FN void stream(uint16_t* to, H x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)x); }
WKV_FN void finish_streams() { _mm_sfence(); }
#elif WKV_WIDTH == 8
constexpr bool kCanStream = true;
WKV_FN void stream(float* to, F x) { _mm256_stream_ps(to, (__m256)x); }
WKV_FN void stream(uint16_t* to, H x) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)x); }
WKV_FN void finish_streams() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
template <class T, class V>
WKV_FN void stream(T* to, V x) {
  __builtin_memcpy(to, &x, sizeof x);
}
WKV_FN void finish_streams() {}
#endif

// ---- some lanes of a vector in memory, the others untouched ----

#if WKV_WIDTH == 16
constexpr bool kMasksFloats = true, kMasksShorts = true;
typedef __mmask16 Mask;
WKV_FN Mask mask_of(int lanes) { return static_cast<Mask>((1u << lanes) - 1); }
WKV_FN F read_some(Mask mask, const float* p) { return (F)_mm512_maskz_loadu_ps(mask, p); }
WKV_FN H read_some(Mask mask, const uint16_t* p) { return (H)_mm256_maskz_loadu_epi16(mask, p); }
WKV_FN void write_some(Mask mask, float* p, F x) { _mm512_mask_storeu_ps(p, mask, (__m512)x); }
WKV_FN void write_some(Mask mask, uint16_t* p, H x) { _mm256_mask_storeu_epi16(p, mask, (__m256i)x); }
#elif WKV_WIDTH == 8
constexpr bool kMasksFloats = true, kMasksShorts = false;
typedef I Mask;
WKV_FN Mask mask_of(int lanes) { return I{0, 1, 2, 3, 4, 5, 6, 7} < lanes; }
WKV_FN F read_some(Mask mask, const float* p) { return (F)_mm256_maskload_ps(p, (__m256i)mask); }
WKV_FN void write_some(Mask mask, float* p, F x) { _mm256_maskstore_ps(p, (__m256i)mask, (__m256)x); }
#else
constexpr bool kMasksFloats = false, kMasksShorts = false;
typedef int Mask;
WKV_FN Mask mask_of(int lanes) { return lanes; }
#endif

// ---- tiles and their segments ----

// The segments of a tile in one order: `count` of them, of `tokens` tokens, the last perhaps of fewer. From one to the
// next it is next_rows rows and next_columns columns of the tile, from a token to the next step_rows and step_columns;
// in scratch, that is `next` and `step` vectors.
struct Order {
  const Scan* scan;
  int count, tokens, last;
  int next_rows, next_columns, step_rows, step_columns;
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
  bool full;            // no lane of a vector lies beyond the channels
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
      full = s.C - channel >= kWidth;
      order[1] = {&job.scan[1], columns, rows,    rows, 0, 1, 1, 0, 1, pitch, (b * s.inner + inner) * down + ty,
                  down,         lanes,   channel, 0};
      if (narrow) {
        const int per = segment_rows(job), count = (rows + per - 1) / per;
        const int64_t first = b * line(job, 0).count() + ty * (kTileRows / per);
        order[0] = {&job.scan[0],
                    count,
                    per * columns,
                    (rows - (count - 1) * per) * columns,
                    0,
                    per * columns,
                    0,
                    1,
                    per * columns,
                    1,
                    first,
                    1,
                    lanes,
                    channel,
                    0};
      } else {
        const int64_t first = (b * s.outer + outer) * across + tx;
        order[0] = {&job.scan[0], rows, columns, columns, 1, 0, 0, 1, pitch, 1, first, across, lanes, channel, 0};
      }
    } else {
      const int64_t token = tx * kChunkTokens, left = s.outer * s.inner - token;
      outer = token / s.inner, inner = token % s.inner;
      const int64_t vectors = (s.C - channel + kWidth - 1) / kWidth;
      rows = static_cast<int>(vectors < kTogether ? vectors : kTogether);
      columns = static_cast<int>(left < kChunkTokens ? left : kChunkTokens);
      pitch = kChunkPitch;
      full = s.C - channel >= rows * kWidth;
      order[0] = {&job.scan[0], rows, columns, columns, 1, 0, 0, 1, pitch, 1, number, 0, lanes, channel, kWidth};
    }
  }

  // Channels that are there, of those in scratch row r.
  int channels(int r) const {
    const int64_t left = job.scan[0].C - channel - (cross ? 0 : r * kWidth);
    return static_cast<int>(left < kWidth ? left : kWidth);
  }
  // What is subtracted from v; see `refer`.
  const double* reference(int r) const {
    return job.references + b * order[0].lanes + channel + (cross ? 0 : r * kWidth);
  }
  double* tops(int r) const { return job.tops + number * order[0].lanes + channel + (cross ? 0 : r * kWidth); }
  // The scale of scratch row r: one for each row of one scan's tile, one for all of two scans'.
  int scale_of(int r) const { return cross ? 0 : r; }
  int scales() const { return cross ? 1 : rows; }
  // Whether vectors that can be read and written as such lie in memory one row and one column from the next.
  bool is_plain(const View& a) const {
    const Scan& s = job.scan[0];
    const bool wraps = cross ? s.inner <= kNarrow : inner + columns > s.inner;
    const bool whole = full || (a.dtype == DType::kFloat ? kMasksFloats : kMasksShorts);
    return whole && a.channel_stride == 1 && (!wraps || a.outer_stride == s.inner * a.inner_stride);
  }
  int64_t row_stride(const View& a) const { return cross ? a.outer_stride : kWidth * a.channel_stride; }
  int64_t offset(const View& a) const {
    return b * a.batch_stride + outer * a.outer_stride + inner * a.inner_stride + channel * a.channel_stride;
  }
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
    for (int piece = kWidth; piece > 0; piece /= 2) {
      if (count & piece) __builtin_memcpy(to + c, from + c, piece * sizeof(T)), c += piece;
    }
  } else {
    for (int c = 0; c < count; ++c) to[c * to_stride] = from[c * from_stride];
  }
}

// The vectors of a tile in memory, as elements T: float, or uint16_t for the 16-bit types.
template <class T>
struct Panel {
  using Vector = std::conditional_t<std::is_same_v<T, float>, F, H>;
  static constexpr bool kMasks = std::is_same_v<T, float> ? kMasksFloats : kMasksShorts;

  T* data;
  int64_t row, column;  // strides
  bool half;            // of the 16-bit types
  int64_t ahead;        // to the next tile to come
  bool streams;         // written around the cache
  bool masked;          // lanes of `mask` only, which is that of each row, or for two scans the first for all
  Mask mask[kTogether];

  WKV_FN int64_t start(const Order& order, int j) const {
    return j * (order.next_rows * row + order.next_columns * column);
  }
  WKV_FN int64_t step(const Order& order) const { return order.step_rows * row + order.step_columns * column; }

  WKV_FN F read(int r, int64_t i) const {
    Vector x;
    if constexpr (kMasks) {
      if (masked) {
        x = read_some(mask[r], data + i);
      } else {
        __builtin_memcpy(&x, data + i, sizeof x);
      }
    } else {
      __builtin_memcpy(&x, data + i, sizeof x);
    }
    if constexpr (std::is_same_v<T, float>) {
      return x;
    } else {
      return half ? from_half(x) : from_bfloat16(x);
    }
  }
  WKV_FN F read_ahead(int r, int64_t i) const {
    __builtin_prefetch(data + i + ahead);
    return read(r, i);
  }
  WKV_FN void write(int r, int64_t i, F value) const {
    Vector x;
    if constexpr (std::is_same_v<T, float>) {
      x = value;
    } else {
      x = half ? to_half(value) : to_bfloat16(value);
    }
    if (streams) return stream(data + i, x);
    if constexpr (kMasks) {
      if (masked) return write_some(mask[r], data + i, x);
    }
    __builtin_memcpy(data + i, &x, sizeof x);
  }
};

template <class T>
WKV_FN Panel<T> plain_panel(const Tile& x, const View& a, T* data, int64_t ahead, bool streams) {
  Panel<T> panel = {
      data + x.offset(a), x.row_stride(a), a.inner_stride, a.dtype == DType::kHalf, ahead, streams, !x.full, {}};
  for (int r = 0; r < x.scales(); ++r) panel.mask[r] = mask_of(x.channels(r));
  return panel;
}

template <class T>
WKV_FN Panel<T> packed_panel(const Tile& x, const View& a, T* packed) {
  return {packed, x.pitch * kWidth, kWidth, a.dtype == DType::kHalf, 0, false, false, {}};
}

// A tensor of the tile; `packed` is where to repack it if its vectors are not plain.
template <class T>
WKV_FN Panel<T> input(const Tile& x, const View& a, T* packed) {
  if (a.data == nullptr) return {};
  T* data = static_cast<T*>(a.data);
  const int64_t ahead = x.ahead(a);
  if (x.is_plain(a)) return plain_panel(x, a, data, ahead, false);
  for (int r = 0; r < x.rows; ++r) {
    const int count = x.channels(r);
    x.walk(a, r, [&](int64_t i, int64_t offset) {
      T* to = packed + i * kWidth;
      if (count < kWidth) __builtin_memset(to + count, 0, (kWidth - count) * sizeof(T));
      copy_lanes(to, 1, data + offset, a.channel_stride, count);
      __builtin_prefetch(data + offset + ahead);
    });
  }
  return packed_panel(x, a, packed);
}

// Where to write the tile's part of a tensor, to be followed by `unpack`. Of large tensors, whole lines go
// around the cache, others are asked for now.
template <class T>
WKV_FN Panel<T> output(const Tile& x, const View& a, T* packed) {
  if (a.data == nullptr) return {};
  T* data = static_cast<T*>(a.data);
  const bool plain = x.is_plain(a);
  const Scan& s = x.job.scan[0];
  const int64_t at_once = (x.cross ? 1 : x.rows) * kWidth, apart = a.inner_stride | (x.cross ? a.outer_stride : 0);
  const bool lines = ((at_once | apart) * sizeof(T) | reinterpret_cast<uintptr_t>(data + x.offset(a))) % kLine == 0;
  const int64_t size = s.B * s.outer * s.inner * s.C * static_cast<int64_t>(sizeof(T));
  const bool streams = kCanStream && x.full && plain && lines && size >= kLarge;
  for (int r = 0; r < x.rows && size >= kLarge && !streams; ++r) {
    x.walk(a, r, [&](int64_t, int64_t offset) {
      __builtin_prefetch(data + offset, 1);
      __asm__ volatile("");  // or else the compiler sees a function without effects, and leaves its calls out
    });
  }
  if (plain) return plain_panel(x, a, data, 0, streams);
  return packed_panel(x, a, packed);
}

template <class T>
WKV_FN void unpack(const Tile& x, const View& a, const T* packed) {
  if (a.data == nullptr || x.is_plain(a)) return;
  for (int r = 0; r < x.rows; ++r) {
    x.walk(a, r, [&](int64_t i, int64_t offset) {
      copy_lanes(static_cast<T*>(a.data) + offset, a.channel_stride, packed + i * kWidth, 1, x.channels(r));
    });
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

// Calls f(j, token, y) for each.
template <int V, class Function>
WKV_FN void emit_outputs(Together<V>& x, const F* ev, const F* e, int64_t n, int64_t next, int64_t step,
                         const Pair<F>* lefts, Function f) {
  backwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          const int64_t i = j * next + t * step;
          const F bonus = x.rate[j].bonus;
          const F num = (lefts[t * V + j].n + x.right[j].n) + bonus * ev[i];
          const F den = (lefts[t * V + j].d + x.right[j].d) + bonus * e[i];
          f(j, t, num / den);
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
// Here (g, h) in (token, V), the right state of each token, and gu. Calls f(j, token, y) for each.
template <bool kAll, int V, class Function>
WKV_FN void emit_items(Together<V>& x, const F* ev, const F* e, const F* gy, int64_t n, int64_t next, int64_t step,
                       const Pair<F>* lefts, F* g, F* h, Pair<F>* rights, F* gu, Function f) {
  backwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          const int64_t i = j * next + t * step, own = t * V + j;
          const F bonus = x.rate[j].bonus;
          const F inverse = 1.0f / ((lefts[own].d + x.right[j].d) + bonus * e[i]);
          const F y = ((lefts[own].n + x.right[j].n) + bonus * ev[i]) * inverse;
          g[own] = gy[i] * inverse;
          h[own] = g[own] * y;
          if (kAll) {
            rights[own] = x.right[j];
            gu[j] += (bonus * g[own]) * (ev[i] - e[i] * y);
            f(j, t, y);
          }
          x.push(x.right[j], j, ev[i], e[i]);
        }
      },
      [&] { x.settle(x.right); });
}

// x.left and x.right: the states of (g, h) that enter the segments. `lefts` is overwritten. Calls f(j, token, G, H).
template <int V, class Function>
WKV_FN void emit_gradients(Together<V>& x, const F* g, const F* h, int64_t n, Pair<F>* lefts, const Pair<F>* rights,
                           F* gw, Function f) {
  backwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          const int64_t own = t * V + j;
          const F bonus = x.rate[j].bonus;
          gw[j] += x.right[j].n * lefts[own].n - x.right[j].d * lefts[own].d;
          lefts[own] = {bonus * g[own] + x.right[j].n, bonus * h[own] + x.right[j].d};
          x.push(x.right[j], j, g[own], h[own]);
        }
      },
      [&] { x.settle(x.right); });
  forwards(
      n,
      [&](int64_t t) {
        for (int j = 0; j < V; ++j) {
          const int64_t own = t * V + j;
          gw[j] += x.left[j].n * rights[own].n - x.left[j].d * rights[own].d;
          f(j, t, lefts[own].n + x.left[j].n, lefts[own].d + x.left[j].d);
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
  F e[kScratch], ev[kScratch];                  // e^k and e^k v at the tile's scale
  F y[kScratch], gy[kScratch], gate[kScratch];  // the sum of y over the scans; gy, times the gate; its sigmoid
  F G[kScratch], H_[kScratch];                  // sums over the scans
  F g[kLongest * kTogether], h[kLongest * kTogether];
  Pair<F> lefts[kLongest * kTogether], rights[kLongest * kTogether];
  float packed[7][kScratch * kWidth];
  // Of each row of one scan's tile, of two scans' the first for all:
  F scale[kTogether], reference[kTogether];  // in binary digits; of v
};

// The thread's own, kept: a stack may be too small for it.
Scratch& scratch() {
  static thread_local const std::unique_ptr<Scratch> kept(new Scratch);
  return *kept;
}

// The tensors of a tile that a phase reads.
template <class T>
struct Inputs {
  Panel<T> k, v, gate, gy;

  WKV_FN Inputs(const Tile& x, Scratch& m, bool with_gate, bool with_gy) : gate{}, gy{} {
    const Scan& s = x.job.scan[0];
    k = input(x, s.k, reinterpret_cast<T*>(m.packed[0]));
    v = input(x, s.v, reinterpret_cast<T*>(m.packed[1]));
    if (with_gate) gate = input(x, s.gate, reinterpret_cast<T*>(m.packed[2]));
    if (with_gy) gy = input(x, s.gy, reinterpret_cast<T*>(m.packed[3]));
    for (int r = 0; r < x.scales(); ++r) m.reference[r] = to_lanes(x.reference(r));
  }
};

WKV_FN bool in_range(F largest, float least) {
  return all_lanes((largest == 0.0f) | ((largest >= splat(least)) & (largest <= splat(kMaxValue))));
}

WKV_FN bool decays_are_safe(const Tile& x) {
  for (int i = 0; i < x.orders; ++i) {
    for (int j = 0; j < (x.cross ? 1 : x.rows); ++j) {
      if (!is_safe(x.order[i], j)) return false;
    }
  }
  return true;
}

// A scale for keys and states. False if float cannot hold them together.
WKV_FN bool scale_with_states(const Tile& x, Scratch& m) {
  if (!decays_are_safe(x)) return false;
  bool safe = true;
  for (int r = 0; r < x.scales(); ++r) {
    const F top = to_lanes(x.tops(r));
    m.scale[r] = top;
    for (int i = 0; i < x.orders; ++i) {
      for (int j = r; j < (x.cross ? x.order[i].count : r + 1); ++j) {
        m.scale[r] = vmax(largest_scale(x.order[i], j), m.scale[r]);
      }
    }
    safe = safe && all_lanes(m.scale[r] - top <= splat(static_cast<float>(kMaxSpread)));  // false for NaN
  }
  return safe;
}

// Reads the keys and values of segment j, at the tile's scale. `largest` grows to the largest value's magnitude.
template <class T>
WKV_FN void read_tokens(const Tile& x, Scratch& m, const Inputs<T>& in, int j, F* largest = nullptr) {
  const Order& order = x.order[0];
  const int r = x.scale_of(j);
  const ExpAt exp_at(m.scale[r]);
  const F reference = m.reference[r];
  F size = {}, *e = m.e + j * order.next, *ev = m.ev + j * order.next;
  int64_t key = in.k.start(order, j), value = in.v.start(order, j);
  const int64_t key_step = in.k.step(order), value_step = in.v.step(order);
  for (int t = 0; t < order.length(j); ++t, key += key_step, value += value_step) {
    const F weight = exp_at(in.k.read_ahead(r, key)), v = in.v.read_ahead(r, value) - reference;
    size = vmax(vabs(v), size);
    e[t] = weight;
    ev[t] = weight * v;
  }
  if (largest != nullptr) *largest = vmax(size, *largest);
}

// Reads gy of segment j, times the gate's sigmoid. `largest` grows to the largest of them in magnitude.
template <class T>
WKV_FN void read_gradients(const Tile& x, Scratch& m, const Inputs<T>& in, int j, F* largest) {
  const Order& order = x.order[0];
  const int length = order.length(j), r = x.scale_of(j);
  F size = {}, *gy = m.gy + j * order.next, *gate = m.gate + j * order.next;
  int64_t at = in.gy.start(order, j);
  for (int t = 0; t < length; ++t, at += in.gy.step(order)) gy[t] = in.gy.read_ahead(r, at);
  if (in.gate.data != nullptr) {
    at = in.gate.start(order, j);
    for (int t = 0; t < length; ++t, at += in.gate.step(order)) {
      gate[t] = sigmoid(in.gate.read_ahead(r, at));
      gy[t] *= gate[t];
    }
  }
  for (int t = 0; t < length; ++t) size = vmax(vabs(gy[t]), size);
  *largest = vmax(size, *largest);
}

// What a segment's sums must be for float to have taken them in.
WKV_FN bool is_sum(const Pair<F>& s) {
  return all_lanes((s.d >= splat(kLeastSum)) & (s.d <= splat(kMost)) & (vabs(s.n) <= splat(kMost)));
}

WKV_FN bool is_below(const Pair<F>& s, float limit) {
  return all_lanes((vabs(s.n) <= splat(limit)) & (vabs(s.d) <= splat(limit)));
}

template <class T>
WKV_FN bool summarize_tile(const Tile& x, Scratch& m) {
  if (!decays_are_safe(x)) return false;
  const Inputs<T> in(x, m, false, false);
  F top[kTogether], largest[kTogether] = {};
  for (F& f : top) f = splat(-kMaxKey);
  for (int r = 0; r < x.rows; ++r) {
    F up[2] = {top[x.scale_of(r)], splat(-kMaxKey)};  // two, so that one need not wait for the other
    const int row = x.scale_of(r);
    for (int c = 0; c < x.columns; ++c) {
      up[c % 2] = vmax(in.k.read(row, r * in.k.row + c * in.k.column), up[c % 2]);
    }
    top[row] = vmax(up[0], up[1]);
  }
  for (int r = 0; r < x.scales(); ++r) {
    m.scale[r] = whole_digits(top[r]);
    for (int c = 0; c < kWidth; ++c) x.tops(r)[c] = m.scale[r][c];
  }
  bool safe = true;
  for (int i = 0; i < x.orders; ++i) {
    const Order& order = x.order[i];
    together(order, [&](auto& batch, int j) {
      for (int n = 0; i == 0 && n < batch.size; ++n) read_tokens(x, m, in, j + n, &largest[x.scale_of(j + n)]);
      const int64_t at = j * order.next;
      summarize(batch, m.ev + at, m.e + at, order.length(j), order.next, order.step);
      for (int n = 0; n < batch.size; ++n) {
        safe = safe && is_sum(batch.left[n]) && is_sum(batch.right[n]);
        write_state(order, order.scan->state, j + n, m.scale[x.scale_of(j + n)], batch.left[n], batch.right[n]);
      }
    });
  }
  for (int r = 0; r < x.scales(); ++r) {
    safe = safe && in_range(largest[r], kMinValue);
    safe = safe && all_lanes((top[r] <= splat(kMaxKey)) & (top[r] > splat(-kMaxKey)));
  }
  return safe;
}

// The states that enter the segments of a batch, and the left state of each token in m.lefts. `lightest` falls to the
// least sum of all weights, in terms of e^u.
template <class Batch>
WKV_FN bool enter(const Tile& x, const Order& order, Scratch& m, Batch& batch, int j, F* lightest = nullptr) {
  bool safe = true;
  for (int n = 0; n < batch.size; ++n) {
    read_state(order, order.scan->state, j + n, m.scale[x.scale_of(j + n)], batch.left[n], batch.right[n]);
    safe = safe && is_moderate(batch.left[n]) && is_moderate(batch.right[n]);
  }
  const int64_t at = j * order.next;
  walk_left(batch, m.ev + at, m.e + at, order.length(j), order.next, order.step, m.lefts);
  for (int n = 0; n < batch.size; ++n) {
    const F sum = batch.left[n].d + batch.right[n].d;
    safe = safe && all_lanes(sum >= splat(kLeastSum));
    if (lightest == nullptr) continue;
    F& least = lightest[x.scale_of(j + n)];
    least = -vmax(-(sum / batch.rate[n].bonus), -least);
  }
  return safe;
}

// Whether gy and e^u gy y / den, whose parts `read_gradients` and `enter` have measured, are in float's range.
WKV_FN bool gradients_are_safe(const Tile& x, const F* largest, const F* lightest) {
  bool safe = true;
  for (int r = 0; r < x.scales(); ++r) {
    safe = safe && in_range(largest[r], kMinGradient) && all_lanes(lightest[r] >= largest[r] * 0x1p-70f);
  }
  return safe;
}

template <class T>
WKV_FN bool emit_tile(const Tile& x, Scratch& m) {
  if (!scale_with_states(x, m)) return false;
  const Scan& s = x.job.scan[0];
  T* const packed = reinterpret_cast<T*>(m.packed[4]);
  const Panel<T> y = output(x, s.y, packed);
  const Inputs<T> in(x, m, true, false);
  bool safe = true;
  for (int i = 0; i < x.orders; ++i) {
    const Order& order = x.order[i];
    together(order, [&](auto& batch, int j) {
      for (int n = 0; i == 0 && n < batch.size; ++n) read_tokens(x, m, in, j + n);
      safe = safe && enter(x, order, m, batch, j);
      const int64_t at = j * order.next, y_step = y.step(order), gate_step = in.gate.step(order);
      int64_t y_at[kTogether], gate_at[kTogether];
      int row[kTogether];
      F shift[kTogether];
      for (int n = 0; n < batch.size; ++n) {
        y_at[n] = y.start(order, j + n), gate_at[n] = in.gate.start(order, j + n), row[n] = x.scale_of(j + n);
        shift[n] = m.reference[row[n]] * static_cast<float>(x.orders);
      }
      const auto walk = [&](auto f) {
        emit_outputs(batch, m.ev + at, m.e + at, order.length(j), order.next, order.step, m.lefts, f);
      };
      const auto put = [&](int n, int64_t t, F out) { y.write(row[n], y_at[n] + t * y_step, out); };
      const auto sum = [&](int n, int64_t t) -> F& { return m.y[at + n * order.next + t * order.step]; };
      const auto gate = [&](int n, int64_t t) {
        return sigmoid(in.gate.read_ahead(row[n], gate_at[n] + t * gate_step));
      };
      const bool gated = in.gate.data != nullptr;
      if (i < x.orders - 1) {
        walk([&](int n, int64_t t, F out) { sum(n, t) = out + shift[n]; });
      } else if (x.cross && gated) {
        walk([&](int n, int64_t t, F out) { put(n, t, (sum(n, t) + out) * gate(n, t)); });
      } else if (x.cross) {
        walk([&](int n, int64_t t, F out) { put(n, t, sum(n, t) + out); });
      } else if (gated) {
        walk([&](int n, int64_t t, F out) { put(n, t, (out + shift[n]) * gate(n, t)); });
      } else {
        walk([&](int n, int64_t t, F out) { put(n, t, out + shift[n]); });
      }
    });
  }
  if (safe) unpack(x, s.y, packed);
  return safe;
}

template <class T>
WKV_FN bool summarize_gradients(const Tile& x, Scratch& m) {
  if (!scale_with_states(x, m)) return false;
  const Inputs<T> in(x, m, true, true);
  F largest[kTogether] = {}, lightest[kTogether];
  for (F& f : lightest) f = splat(kMost);
  bool safe = true;
  for (int i = 0; i < x.orders; ++i) {
    const Order& order = x.order[i];
    together(order, [&](auto& batch, int j) {
      for (int n = 0; i == 0 && n < batch.size; ++n) {
        read_tokens(x, m, in, j + n);
        read_gradients(x, m, in, j + n, &largest[x.scale_of(j + n)]);
      }
      safe = safe && enter(x, order, m, batch, j, lightest);
      const int64_t at = j * order.next;
      const int length = order.length(j);
      emit_items<false>(batch, m.ev + at, m.e + at, m.gy + at, length, order.next, order.step, m.lefts, m.g, m.h,
                        nullptr, nullptr, [](int, int64_t, F) {});
      summarize(batch, m.g, m.h, length, 1, batch.size);
      for (int n = 0; n < batch.size; ++n) {
        safe = safe && is_below(batch.left[n], kMost) && is_below(batch.right[n], kMost);
        write_state(order, order.scan->gstate, j + n, -m.scale[x.scale_of(j + n)], batch.left[n], batch.right[n]);
      }
    });
  }
  return safe && gradients_are_safe(x, largest, lightest);
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

template <class T>
WKV_FN bool emit_gradients_of_tile(const Tile& x, Scratch& m) {
  if (!scale_with_states(x, m)) return false;
  const Scan& s = x.job.scan[0];
  T* const packed[3] = {reinterpret_cast<T*>(m.packed[4]), reinterpret_cast<T*>(m.packed[5]),
                        reinterpret_cast<T*>(m.packed[6])};
  const Panel<T> gk = output(x, s.gk, packed[0]), gv = output(x, s.gv, packed[1]),
                 ggate = output(x, s.ggate, packed[2]);
  const Inputs<T> in(x, m, true, true);
  const bool gated = in.gate.data != nullptr;
  F largest[kTogether] = {}, lightest[kTogether];
  for (F& f : lightest) f = splat(kMost);
  bool safe = true;
  for (int i = 0; i < x.orders; ++i) {
    const Order& order = x.order[i];
    const bool first = i == 0, last = i == x.orders - 1;
    F gw[kTogether] = {}, gu[kTogether] = {};
    together(order, [&](auto& batch, int j) {
      for (int n = 0; first && n < batch.size; ++n) {
        read_tokens(x, m, in, j + n);
        read_gradients(x, m, in, j + n, &largest[x.scale_of(j + n)]);
      }
      safe = safe && enter(x, order, m, batch, j, lightest);
      const int64_t at = j * order.next;
      const int length = order.length(j);
      const auto index = [&](int n, int64_t t) { return at + n * order.next + t * order.step; };
      const auto items = [&](auto f) {
        emit_items<true>(batch, m.ev + at, m.e + at, m.gy + at, length, order.next, order.step, m.lefts, m.g, m.h,
                         m.rights, gu, f);
      };
      if (!gated) {
        items([](int, int64_t, F) {});
      } else if (first) {
        items([&](int n, int64_t t, F y) { m.y[index(n, t)] = y; });
      } else {
        items([&](int n, int64_t t, F y) { m.y[index(n, t)] += y; });
      }
      for (int n = 0; n < batch.size; ++n) {
        read_state(order, order.scan->gstate, j + n, -m.scale[x.scale_of(j + n)], batch.left[n], batch.right[n]);
        safe = safe && is_below(batch.left[n], kMostCarried) && is_below(batch.right[n], kMostCarried);
      }
      const auto gradients = [&](auto f) { emit_gradients(batch, m.g, m.h, length, m.lefts, m.rights, gw, f); };
      if (!last) {
        gradients([&](int n, int64_t t, F G, F H_) { m.G[index(n, t)] = G, m.H_[index(n, t)] = H_; });
        return;
      }
      int64_t k_at[kTogether], v_at[kTogether];
      int row[kTogether];
      for (int n = 0; n < batch.size; ++n) {
        k_at[n] = gk.start(order, j + n), v_at[n] = gv.start(order, j + n), row[n] = x.scale_of(j + n);
      }
      const int64_t k_step = gk.step(order), v_step = gv.step(order);
      const auto put = [&](int n, int64_t t, F G, F H_) {
        const F e = m.e[index(n, t)];
        gv.write(row[n], v_at[n] + t * v_step, e * G);
        gk.write(row[n], k_at[n] + t * k_step, m.ev[index(n, t)] * G - e * H_);
      };
      if (first) {
        gradients(put);
      } else {
        gradients([&](int n, int64_t t, F G, F H_) { put(n, t, m.G[index(n, t)] + G, m.H_[index(n, t)] + H_); });
      }
      for (int n = 0; gated && n < batch.size; ++n) {
        const F shift = m.reference[row[n]] * static_cast<float>(x.orders);
        const int64_t to = ggate.start(order, j + n), to_step = ggate.step(order);
        for (int64_t t = 0; t < length; ++t) {
          const int64_t k = index(n, t);
          ggate.write(row[n], to + t * to_step, ((m.y[k] + shift) * m.gy[k]) * (1.0f - m.gate[k]));
        }
      }
    });
    safe = write_shares(x, order, gw, gu) && safe;
  }
  if (!safe || !gradients_are_safe(x, largest, lightest)) return false;
  unpack(x, s.gk, packed[0]);
  unpack(x, s.gv, packed[1]);
  unpack(x, s.ggate, packed[2]);
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
  double reference;

  ExactTile(const Tile& x_, int row_, int c_) : x(x_), row(row_), c(c_), s(x.job.scan[0]) {
    load(s.k, [&](int64_t i, double value) { k[i] = value * kLog2e; });
    reference = x.reference(row)[c];
    load(s.v, [&](int64_t i, double value) { v[i] = value - reference; });
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
    store(s.y, [&](int64_t i) { return gate[i] * (y[i] + x.orders * reference); });
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
    if (s.gate.data != nullptr)
      store(s.ggate, [&](int64_t i) { return gy[i] * gate[i] * (1 - gate[i]) * (y[i] + x.orders * reference); });
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

int64_t reference_items(const CpuJob& job) { return job.scan[0].B * channel_groups(job.scan[0], kWidth); }

// Any number may be subtracted from all values of a channel and added to y: no gradient knows. Where all values are of
// about one size, this spares the sums the digits of what they have in common, and a constant v comes out as it went
// in. A guess from a few tokens; those with a key far below the others have no say. Values of a few tokens that are
// much smaller than all of these are given the rounding of the others.
void refer(const CpuJob& job, int64_t begin, int64_t end) {
  constexpr int kSamples = 32;
  constexpr double kApart = 50;               // e^-50 times a value is nothing beside another
  constexpr double kMostReference = 0x1p100;  // so that sums with it are finite
  const Scan& s = job.scan[0];
  const int64_t lanes = padded_channels(s), groups = channel_groups(s, kWidth), tokens = s.outer * s.inner;
  const int samples = static_cast<int>(tokens < kSamples ? tokens : kSamples);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / groups, channel = item % groups * kWidth;
    const int count = static_cast<int>(s.C - channel < kWidth ? s.C - channel : kWidth);
    double k[kSamples][kWidth], v[kSamples][kWidth];
    const auto gather = [&](const View& a, int64_t o, int64_t i, double* to) {
      const int64_t at = b * a.batch_stride + o * a.outer_stride + i * a.inner_stride + channel * a.channel_stride;
      for (int c = 0; c < kWidth; ++c) to[c] = c < count ? load_one(a, at + c * a.channel_stride) : 0;
    };
    double top[kWidth], first[kWidth] = {}, sum[kWidth] = {}, voices[kWidth] = {}, least[kWidth], most[kWidth];
    for (int c = 0; c < kWidth; ++c) top[c] = most[c] = -__builtin_inf(), least[c] = __builtin_inf();
    for (int i = 0; i < samples; ++i) {
      const int64_t token = (2 * i + 1) * tokens / (2 * samples);
      gather(s.k, token / s.inner, token % s.inner, k[i]);
      gather(s.v, token / s.inner, token % s.inner, v[i]);
      for (int c = 0; c < kWidth; ++c) top[c] = k[i][c] > top[c] ? k[i][c] : top[c];
    }
    for (int i = 0; i < samples; ++i) {
      for (int c = 0; c < kWidth; ++c) {
        const bool counts = k[i][c] >= top[c] - kApart && k[i][c] > -__builtin_inf();
        first[c] = counts && voices[c] == 0 ? v[i][c] : first[c];
        sum[c] += counts ? v[i][c] - first[c] : 0;
        voices[c] += counts;
        least[c] = counts && !(v[i][c] >= least[c]) ? v[i][c] : least[c];  // NaN goes through
        most[c] = counts && !(v[i][c] <= most[c]) ? v[i][c] : most[c];
      }
    }
    for (int c = 0; c < count; ++c) {
      const double mean = first[c] + sum[c] / voices[c], apart = magnitude(mean) / 2;
      const bool common = most[c] - mean <= apart && mean - least[c] <= apart && magnitude(mean) <= kMostReference;
      const double rounded = s.v.dtype == DType::kDouble ? mean : static_cast<float>(mean);
      job.references[b * lanes + channel + c] = common ? rounded : 0;
    }
    for (int c = count; c < kWidth; ++c) job.references[b * lanes + channel + c] = 0;
  }
}

int64_t items(const CpuJob& job) {
  const int group = job.orders == 2 ? kWidth : kWidth * kTogether;
  return job.scan[0].B * tile_rows(job) * tile_columns(job) * channel_groups(job.scan[0], group);
}

// The second half of a pass starts where the first ended: that is still in the cache.
template <class Wide, class Narrow>
WKV_FN void each_tile(const CpuJob& job, int64_t begin, int64_t end, bool reverse, void (ExactTile::*exact)(),
                      Wide wide, Narrow narrow) {
  Scratch& m = scratch();
  const DType dtype = job.scan[0].k.dtype;
  for (int64_t n = begin; n < end; ++n) {
    const Tile x(job, reverse ? begin + end - 1 - n : n, reverse);
    const bool done = dtype == DType::kDouble ? false : dtype == DType::kFloat ? wide(x, m) : narrow(x, m);
    if (!done) exactly(x, exact);
  }
  finish_streams();
}

void summary(const CpuJob& job, int64_t begin, int64_t end) {
  each_tile(job, begin, end, false, &ExactTile::summarize, summarize_tile<float>, summarize_tile<uint16_t>);
}
void emit(const CpuJob& job, int64_t begin, int64_t end) {
  each_tile(job, begin, end, true, &ExactTile::emit, emit_tile<float>, emit_tile<uint16_t>);
}
void backward_summary(const CpuJob& job, int64_t begin, int64_t end) {
  each_tile(job, begin, end, false, &ExactTile::summarize_gradients, summarize_gradients<float>,
            summarize_gradients<uint16_t>);
}
void backward_emit(const CpuJob& job, int64_t begin, int64_t end) {
  each_tile(job, begin, end, true, &ExactTile::emit_gradients, emit_gradients_of_tile<float>,
            emit_gradients_of_tile<uint16_t>);
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
