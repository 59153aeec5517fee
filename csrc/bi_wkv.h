// The arithmetic of bidirectional WKV, shared by the CPU and the CUDA kernels. Knows neither torch nor Python.
//
// Per batch and channel, over tokens t = 0..T-1 (arXiv 2412.03814; the formula stands in rwkvir_arch/bi_wkv.py):
//
//     y_t = (L_t.n + R_t.n + e^(u + k_t) v_t) / (L_t.d + R_t.d + e^(u + k_t))
//     L_0 = 0,      L_{t+1} = e^-w L_t + e^k_t (v_t, 1)
//     R_{T-1} = 0,  R_{t-1} = e^-w R_t + e^k_t (v_t, 1)
//
// Tokens are cut into chunks of kChunk. Three phases: `summary` adds up each chunk on its own from both sides, `carry`
// runs over the chunks and leaves in their place the states that enter them, `emit` walks each chunk once more and
// writes the output. Only `carry` is sequential, and it touches one element in kChunk.
//
// Inside a chunk there are two ways to the same result:
//   lanes  float states that share one power-of-two scale for the whole chunk; one exponential per element. Taken
//          where kMax* below guarantee that nothing over- or underflows.
//   exact  double states with a scale each (the running maximum). Right for any finite input, several times slower.
// Summaries and carries are double, their scales whole numbers, so that rescaling never rounds.
//
// This file is included once per instruction set, inside the namespace WKV_NAMESPACE; hence no include guard.

namespace WKV_NAMESPACE {

constexpr int kChunk = 64;
constexpr double kLog2e = 1.4426950408889634074;
constexpr double kEmpty = -1e300;  // the scale of a state that has seen no token

// Where the lanes are safe. A chunk may then grow or shrink a state by at most e^20 and the bonus u by e^20 more, which
// together with a spread of 2^kMaxSpread between the states that meet in it stays inside float's range.
constexpr float kMaxDecay = 20.0f / kChunk;                 // |w|
constexpr float kMaxBonus = 20.0f;                          // |u|
constexpr float kMaxKey = 4096.0f;                          // |k|: the range reduction below is exact up to here
constexpr double kMaxSpread = 60;                           // binary digits
constexpr float kMinValue = 0x1p-80f, kMaxValue = 0x1p40f;  // |v|, |gy|: the largest of a chunk, or it is zero

// A state (n, d) times 2^o. The lanes keep o apart (one per chunk), the exact way keeps it here.
template <class F>
struct Pair {
  F n, d;
};

struct Scaled {
  double o, n, d;
};

// ---- lanes: F is float, or a vector of floats with one channel each ----

// s <- e^-w s + (p, q), with delta = expm1(-w): e^-w itself would have rounded a small decay away.
template <class F>
WKV_FN void push(Pair<F>& s, F p, F q, F delta) {
  s.n = (s.n + delta * s.n) + p;
  s.d = (s.d + delta * s.d) + q;
}

// e^k = r * 2^i with r in [0.70, 1.42], to one rounding of r. Returns r.
template <class F, class I>
WKV_FN F split_exp(F k, I& i) {
  const F shifted = k * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
  const F whole = shifted - 12582912.0f;
  i = to_int(whole);
  const F x = (k - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts, the first of 10 bits
  // Relative error 4.3e-9 on |x| <= 0.348 (weighted least squares, made to equioscillate).
  F p = x * 0.0013813878f + 0.008369064f;
  p = p * x + 0.041668423f;
  p = p * x + 0.16666518f;
  p = p * x + 0.49999994f;
  return (p * x) * x + (x + 1.0f);
}

// Both sums of a chunk of n items (p, q): as a left state behind its end, as a right state before its start.
template <class F>
WKV_FN void summarize(const F* p, const F* q, int n, F delta, Pair<F>& left, Pair<F>& right) {
  for (int t = 0; t < n; ++t) push(left, p[t], q[t], delta);
  for (int t = n - 1; t >= 0; --t) push(right, p[t], q[t], delta);
}

// ---- exact: one channel, double ----

// 2^x; a scale that is not comparable (both infinite) belongs to a masked or a NaN state and counts as nothing.
WKV_FN double pow2_exact(double x) { return x >= -1200 ? (x <= 1100 ? ::exp2(x) : ::exp2(1100.0)) : (x < 0 ? 0.0 : x); }

// s <- 2^-w2 s + 2^e (p, q)
WKV_FN void push(Scaled& s, double e, double p, double q, double w2) {
  const double decayed = s.o > kEmpty ? s.o - w2 : s.o;
  const double o = decayed > e ? decayed : e;  // NaN in e goes through
  if (o <= kEmpty) {
    s = {kEmpty, 0, 0};
    return;
  }
  const double a = pow2_exact(decayed - o), b = pow2_exact(e - o);
  s.n = b > 0 ? a * s.n + b * p : a * s.n + b;  // a key of -inf masks its value, whatever it is
  s.d = b > 0 ? a * s.d + b * q : a * s.d + b;
  s.o = o;
}

// Makes the scale a whole number, as summaries have it.
WKV_FN Scaled with_whole_scale(Scaled s) {
  if (!(s.o > kEmpty)) return s;
  const double o = ::ceil(s.o), f = pow2_exact(s.o - o);
  return {o, s.n * f, s.d * f};
}

// ---- carry: double, whole scales, no branches ----

// 2^x for whole x <= 1023; below the range of normal numbers, zero.
WKV_FN double pow2_whole(double x) {
  const int64_t e = static_cast<int64_t>(x > -1023 ? x : -1023.0) + 1023;
  return bits_to_double(e << 52);
}

// What the decay does over a whole chunk: 2^(-64 w2) = f * 2^o with o whole.
WKV_FN void chunk_decay(double w, double& o, double& f) {
  const double x = -w * kLog2e * kChunk;
  o = ::rint(x);
  f = ::exp2(x - o);
}

// The state behind a chunk, from the one before it and the chunk's own sum; brought back to |n|, |d| < 1.
WKV_FN Scaled carry_over(Scaled before, Scaled sum, double decay_o, double decay_f) {
  const double decayed = before.o > kEmpty ? before.o + decay_o : kEmpty;
  const double o = decayed > sum.o ? decayed : sum.o;
  const double a = decay_f * pow2_whole(decayed - o), b = pow2_whole(sum.o - o);
  const double n = a * before.n + b * sum.n, d = a * before.d + b * sum.d;
  const double size = magnitude(n) > magnitude(d) ? magnitude(n) : magnitude(d);
  const double e = size > 0 ? static_cast<double>((double_to_bits(size) >> 52) - 1022) : 0.0;
  const double renormed = o + e, f = pow2_whole(o - renormed);  // for a huge o, as much of e as it can hold
  return {renormed, n * f, d * f};
}

}  // namespace WKV_NAMESPACE
