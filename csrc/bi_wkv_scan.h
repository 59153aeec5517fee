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
  // r, where the result is sigmoid(r) y; data null where there is no gate. Forward: set for the last of several scans,
  // whose sum it multiplies. Backward: set for all; gy is multiplied by sigmoid(r) as it is read, and
  // ggate = gy sigmoid'(r) y.
  View gate, ggate;
  float* rates;  // (4, lanes), only of the CPU kernels: see Rates, and whether float will do
  // (B, chunks, 6, lanes): o, n, d of the state that enters each chunk from the left, then from the right. On the CPU,
  // n is that of v less its reference.
  double* state;
  double* gstate;   // backward: the same for the states of (gy / den, y gy / den)
  double* partial;  // backward: (B, chunks, 2, lanes), each chunk's share of gw and gu
  bool accumulate;  // add to y, gk, gv and ggate instead of writing them
};

constexpr int kChunkTokens = 64;
constexpr int kLanes = 16;  // state rows are padded to a multiple of this

WKV_EVERYWHERE inline int64_t chunks(const Scan& s) { return (s.outer * s.inner + kChunkTokens - 1) / kChunkTokens; }
WKV_EVERYWHERE inline int64_t channel_groups(const Scan& s, int64_t width) { return (s.C + width - 1) / width; }
WKV_EVERYWHERE inline int64_t padded_channels(const Scan& s) { return channel_groups(s, kLanes) * kLanes; }

// What the CPU kernels work on: one scan, in chunks of tokens, or the sum of a row-major and a column-major one, in
// tiles of pixels. The views are those of the first scan, which is in row-major order; of the second, only what a scan
// has for itself counts: w, u, rates, state, gstate, partial. A scan's segments are its chunks, or the rows (columns)
// of the tiles; its state is (B, segments, 6, lanes), its partial (B, tiles, 2, lanes).
struct CpuJob {
  Scan scan[2];
  int orders;
  double* tops;        // (B, tiles, lanes): the scale of a tile's largest key; NaN where float will not do
  double* references;  // (B, lanes): what is subtracted from v and added to y
};

constexpr int kTileRows = 32, kTileColumns = 32;
constexpr int kNarrow = 16;  // images of no more columns have segments of several whole rows

inline int64_t tile_rows(const CpuJob& j) { return j.orders == 1 ? 1 : (j.scan[0].outer + kTileRows - 1) / kTileRows; }
inline int64_t tile_columns(const CpuJob& j) {
  return j.orders == 1 ? chunks(j.scan[0]) : (j.scan[0].inner + kTileColumns - 1) / kTileColumns;
}

// Rows in a segment of the first of two scans; a divisor of kTileRows.
inline int segment_rows(const CpuJob& j) {
  int rows = j.scan[0].inner <= kNarrow ? kTileRows : 1;
  while (rows > 1 && rows * j.scan[0].inner > kTileColumns) rows /= 2;
  return rows;
}

// Segments of scan i are chained line by line; all of a line but the last have the same number of tokens.
struct Line {
  int64_t tokens, segment, segments;  // of the line, of all segments but the last, of the line
  int64_t lines;

  Line(int64_t tokens_, int64_t segment_, int64_t lines_)
      : tokens(tokens_),
        segment(segment_),
        segments(tokens_ > 0 ? (tokens_ + segment_ - 1) / segment_ : 0),
        lines(lines_) {}
  int64_t last() const { return tokens - (segments - 1) * segment; }
  int64_t count() const { return segments * lines; }
};

inline Line line(const CpuJob& j, int i) {
  const Scan& s = j.scan[0];
  if (j.orders == 1) return {s.outer * s.inner, kChunkTokens, 1};
  if (i == 1) return {s.outer, kTileRows, s.inner};
  if (s.inner <= kNarrow) return {s.outer * s.inner, segment_rows(j) * s.inner, 1};
  return {s.inner, kTileColumns, s.outer};
}

// `prepare` for each scan and `refer` first; then the phases in this order: summary, carry, emit; then, for the
// gradients, backward_summary, carry (backward), backward_emit, reduce for each scan. Items of a phase are independent
// of each other and may run in any order, on any thread.
struct CpuKernel {
  const char* name;
  void (*prepare)(const Scan&);  // fills rates
  int64_t (*reference_items)(const CpuJob&);
  void (*refer)(const CpuJob&, int64_t begin, int64_t end);  // fills references
  int64_t (*items)(const CpuJob&);                           // of all phases but carry and reduce
  void (*summary)(const CpuJob&, int64_t begin, int64_t end);
  void (*carry)(const CpuJob&, bool backward, int64_t begin, int64_t end);  // items: 2 * orders * B * groups of kLanes
  void (*emit)(const CpuJob&, int64_t begin, int64_t end);
  void (*backward_summary)(const CpuJob&, int64_t begin, int64_t end);
  void (*backward_emit)(const CpuJob&, int64_t begin, int64_t end);
  void (*reduce)(const CpuJob&, int scan, double* gw, double* gu, int64_t begin, int64_t end);  // items: C
};

// The widest kernel this processor runs, or the one called `name`; null if it cannot run that one.
const CpuKernel* cpu_kernel(const char* name = nullptr);

}  // namespace wkv
