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
// together with a spread of 2^kMaxSpread between the states that meet in it stays inside float's range. The narrowest
// place is e^u h = e^u gy y / den: y is a mean of values, den no less than e^-20 / (2 kMaxValue), which leaves 2^8.
constexpr float kMaxDecay = 20.0f / kChunk;                     // |w|
constexpr float kMaxBonus = 20.0f;                              // |u|
constexpr float kMaxKey = 4096.0f;                              // |k|: the range reduction below is exact up to here
constexpr double kMaxSpread = 60;                               // binary digits
constexpr float kMaxValue = 0x1p20f;                            // |v|, |gy|: the largest of a chunk
constexpr float kMinValue = 0x1p-40f, kMinGradient = 0x1p-60f;  // of v and of gy, unless all of them are zero

// A state (n, d) times 2^o. The lanes keep o apart (one per chunk), the exact way keeps it here.
template <class F>
struct Pair {
  F n, d;
};

struct Scaled {
  double o, n, d;
};

// Whether the values a state has summed were, in the mean, such as the lanes take. They may be of other chunks.
WKV_FN bool is_moderate(const Scaled& s) { return magnitude(s.n) <= kMaxValue * s.d; }

// ---- lanes: F is float, or a vector of floats with one channel each ----

// s <- e^-w s + (p, q), with delta = expm1(-w): e^-w itself would have rounded a small decay away.
template <class F>
WKV_FN void push(Pair<F>& s, F p, F q, F delta) {
  s.n = (s.n + delta * s.n) + p;
  s.d = (s.d + delta * s.d) + q;
}

// e^x = 1 + x + x^2 p(x) for |x| <= 0.348, to float's last digit. Relative error 4.3e-9 before rounding (weighted least
// squares, made to equioscillate).
template <class F>
WKV_FN F exp_reduced(F x) {
  F p = x * 0.0013813878f + 0.008369064f;
  p = p * x + 0.041668423f;
  p = p * x + 0.16666518f;
  p = p * x + 0.49999994f;
  return (p * x + 1.0f) * x + 1.0f;
}

// k less `whole` binary digits; ln 2 in two parts, the first of 10 bits.
template <class F>
WKV_FN F reduced(F k, F whole) {
  return (k - whole * 0.693359375f) + whole * 2.12194440e-4f;
}

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number

// e^k = r * 2^i with r in [0.70, 1.42]. Returns r.
template <class F, class I>
WKV_FN F split_exp(F k, I& i) {
  const F shifted = k * 1.44269504f + kRounding;
  const F whole = shifted - kRounding;
  i = to_int(whole);
  return exp_reduced(reduced(k, whole));
}

// Both sums of n items (p, q): as a left state behind their end, as a right state before their start.
template <class F>
WKV_FN void summarize(const F* p, const F* q, int n, F delta, Pair<F>& left, Pair<F>& right) {
  for (int t = 0; t < n; ++t) push(left, p[t], q[t], delta);
  for (int t = n - 1; t >= 0; --t) push(right, p[t], q[t], delta);
}

// What the walks below share: n tokens with e^k and v, and the states that enter them. Given one scale for all of them,
// `left` and `right` come out behind the tokens, `lefts` holds the left state of each.
template <class F>
WKV_FN void walk_left(const F* e, const F* v, int n, F delta, Pair<F>& left, Pair<F>* lefts) {
  for (int t = 0; t < n; ++t) {
    lefts[t] = left;
    push(left, e[t] * v[t], e[t], delta);
  }
}

template <class F>
WKV_FN void emit_outputs(const F* e, const F* v, int n, F delta, F bonus, const Pair<F>* lefts, Pair<F> right, F* y) {
  for (int t = n - 1; t >= 0; --t) {
    const F ev = e[t] * v[t];
    y[t] = (lefts[t].n + right.n + bonus * ev) / (lefts[t].d + right.d + bonus * e[t]);
    push(right, ev, e[t], delta);
  }
}

// The gradients. With den_t at the tokens' scale, g_t = gy_t / den_t and h_t = g_t y_t are summed from both sides like
// e^k (v, 1) were, at the negative of that scale. GL, GR (of g) and HL, HR (of h) are those states:
//     gv_t = e^k_t (e^u g_t + GL_t + GR_t)       gk_t = v_t gv_t - e^k_t (e^u h_t + HL_t + HR_t)
//     gu = sum_t e^(u + k_t) g_t (v_t - y_t)
//     gw = -e^-w sum_t [GR_t Ln_t - HR_t Ld_t + GL_t Rn_t - HL_t Rd_t]
// `g` comes in as gy, times the gate where there is one. `rights` and `outputs` (y) may be null where they are not
// wanted.
template <class F>
WKV_FN void emit_items(const F* e, const F* v, int n, F delta, F bonus, const Pair<F>* lefts, Pair<F> right, F* g, F* h,
                       Pair<F>* rights, F* gu, F* outputs = nullptr) {
  for (int t = n - 1; t >= 0; --t) {
    const F ev = e[t] * v[t];
    const F inverse = 1.0f / (lefts[t].d + right.d + bonus * e[t]);
    const F y = (lefts[t].n + right.n + bonus * ev) * inverse;
    g[t] *= inverse;
    h[t] = g[t] * y;
    if (outputs != nullptr) outputs[t] = y;
    if (rights != nullptr) {
      rights[t] = right;
      *gu += bonus * (e[t] * g[t]) * (v[t] - y);
    }
    push(right, ev, e[t], delta);
  }
}

// gleft and gright: the states of (g, h) that enter the tokens. `out` may be `lefts`.
template <class F>
WKV_FN void emit_gradients(const F* e, const F* v, const F* g, const F* h, int n, F delta, F bonus,
                           const Pair<F>* lefts, const Pair<F>* rights, Pair<F> gleft, Pair<F> gright, Pair<F>* out,
                           F* gw) {
  for (int t = n - 1; t >= 0; --t) {
    *gw += gright.n * lefts[t].n - gright.d * lefts[t].d;
    out[t] = {bonus * g[t] + gright.n, bonus * h[t] + gright.d};
    push(gright, g[t], h[t], delta);
  }
  for (int t = 0; t < n; ++t) {
    *gw += gleft.n * rights[t].n - gleft.d * rights[t].d;
    const F gv = e[t] * (out[t].n + gleft.n);
    out[t] = {gv, v[t] * gv - e[t] * (out[t].d + gleft.d)};  // gv, gk
    push(gleft, g[t], h[t], delta);
  }
}

// ---- exact: one channel, double ----

WKV_FN double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }

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

// One channel of one chunk, with room for what a walk in one direction keeps for the walk back. Number i of token t is
// work[(i * kChunk + t) * stride].
struct ExactChunk {
  static constexpr int kNumbers = 14;
  double* work;
  int stride, tokens;
  double w2, u2;  // w and u in binary digits

  WKV_FN double& at(int number, int t) const { return work[(number * kChunk + t) * stride]; }
  WKV_FN double& key(int t) const { return at(0, t); }  // k in binary digits
  WKV_FN double& v(int t) const { return at(1, t); }
  WKV_FN double& g(int t) const { return at(2, t); }  // backward: in as gy, times the gate where there is one
  WKV_FN double& h(int t) const { return at(3, t); }
  WKV_FN double& scale(int t) const { return at(4, t); }
  WKV_FN double& y(int t) const { return at(13, t); }  // results
  WKV_FN double& gk(int t) const { return at(5, t); }
  WKV_FN double& gv(int t) const { return at(6, t); }
  WKV_FN Scaled kept(int side, int t) const { return {at(7 + 3 * side, t), at(8 + 3 * side, t), at(9 + 3 * side, t)}; }
  WKV_FN void keep(int side, int t, const Scaled& s) const {
    at(7 + 3 * side, t) = s.o, at(8 + 3 * side, t) = s.n, at(9 + 3 * side, t) = s.d;
  }

  WKV_FN void summarize(Scaled& left, Scaled& right) const {
    left = right = {kEmpty, 0, 0};
    for (int t = 0; t < tokens; ++t) push(left, key(t), v(t), 1.0, w2);
    for (int t = tokens - 1; t >= 0; --t) push(right, key(t), v(t), 1.0, w2);
  }

  // The denominator of a token and its output, from the states around it.
  WKV_FN double combine(const Scaled& left, const Scaled& right, int t, double& den, double& top) const {
    const double own = key(t) + u2;
    top = left.o > right.o ? left.o : right.o;
    top = top > own ? top : own;
    const double a = pow2_exact(left.o - top), b = pow2_exact(right.o - top), e = pow2_exact(own - top);
    den = a * left.d + b * right.d + e;
    return (a * left.n + b * right.n + (e > 0 ? e * v(t) : e)) / den;
  }

  WKV_FN void walk_left(Scaled left) const {
    for (int t = 0; t < tokens; ++t) {
      keep(0, t, left);
      push(left, key(t), v(t), 1.0, w2);
    }
  }

  WKV_FN void emit_outputs(const Scaled& left, Scaled right) const {
    walk_left(left);
    for (int t = tokens - 1; t >= 0; --t) {
      double den, top;
      y(t) = combine(kept(0, t), right, t, den, top);
      push(right, key(t), v(t), 1.0, w2);
    }
  }

  // y, g from gy, h, scale and the states on both sides of each token.
  WKV_FN double emit_items(const Scaled& left, Scaled right) const {
    double gu = 0;
    walk_left(left);
    for (int t = tokens - 1; t >= 0; --t) {
      double den;
      y(t) = combine(kept(0, t), right, t, den, scale(t));
      g(t) /= den;
      h(t) = g(t) * y(t);
      gu += pow2_exact(key(t) + u2 - scale(t)) * g(t) * (v(t) - y(t));
      keep(1, t, right);
      push(right, key(t), v(t), 1.0, w2);
    }
    return gu;
  }

  WKV_FN void summarize_items(Scaled& gleft, Scaled& gright) const {
    gleft = gright = {kEmpty, 0, 0};
    for (int t = 0; t < tokens; ++t) push(gleft, -scale(t), g(t), h(t), w2);
    for (int t = tokens - 1; t >= 0; --t) push(gright, -scale(t), g(t), h(t), w2);
  }

  WKV_FN double emit_gradients(Scaled gleft, Scaled gright) const {
    double gw = 0;
    for (int t = tokens - 1; t >= 0; --t) {
      const Scaled left = kept(0, t);
      const double a = pow2_exact(key(t) + u2 - scale(t)), b = pow2_exact(key(t) + gright.o);
      gw -= pow2_exact(gright.o + left.o - w2) * (gright.n * left.n - gright.d * left.d);
      gv(t) = a * g(t) + b * gright.n;
      gk(t) = a * h(t) + b * gright.d;
      push(gright, -scale(t), g(t), h(t), w2);
    }
    for (int t = 0; t < tokens; ++t) {
      const Scaled right = kept(1, t);
      const double b = pow2_exact(key(t) + gleft.o);
      gw -= pow2_exact(gleft.o + right.o - w2) * (gleft.n * right.n - gleft.d * right.d);
      gv(t) += b * gleft.n;
      gk(t) = v(t) * gv(t) - (gk(t) + b * gleft.d);
      push(gleft, -scale(t), g(t), h(t), w2);
    }
    return gw;
  }
};

// ---- carry: double, whole scales, no branches ----

// 2^x for whole x <= 1023; below the range of normal numbers, zero. Adding 1.5 * 2^52 puts x into the lowest bits.
WKV_FN double pow2_whole(double x) {
  const double shifted = (x > -1023 ? x : -1023.0) + 6755399441055744.0;
  return bits_to_double(static_cast<int64_t>(static_cast<uint64_t>(double_to_bits(shifted) + 1023) << 52));
}

// What the decay does over whole chunks: e^(-w kChunk chunks) = f * 2^o with o whole.
WKV_FN void chunk_decay(double w, double chunks, double& o, double& f) {
  const double x = -w * kLog2e * kChunk * chunks;
  o = ::rint(x);
  f = ::exp2(x - o);
}

// The state behind a chunk, from the one before it and the chunk's own sum; brought back to |n|, |d| < 1.
WKV_FN Scaled carry_over(Scaled before, Scaled sum, double decay_o, double decay_f) {
  const double decayed = before.o + decay_o;  // kEmpty takes up any decay
  const double o = decayed > sum.o ? decayed : sum.o;
  const double a = decay_f * pow2_whole(decayed - o), b = pow2_whole(sum.o - o);
  const double n = a * before.n + b * sum.n, d = a * before.d + b * sum.d;
  const double size = magnitude(n) > magnitude(d) ? magnitude(n) : magnitude(d);
  const uint64_t exponent = static_cast<uint64_t>(double_to_bits(size)) >> 52;  // not all vectors can shift signed ones
  const double e = bits_to_double(static_cast<int64_t>(exponent) + double_to_bits(0x1p52)) - (0x1p52 + 1022);
  const double renormed = o + e, f = pow2_whole(o - renormed);  // for a huge o, as much of e as it can hold
  return {renormed, n * f, d * f};
}

}  // namespace WKV_NAMESPACE
