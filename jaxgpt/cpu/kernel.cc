// The operations of a decode step: products with few rows, attention over the key/value cache, and LayerNorm.
//
// A product y = x W^T of few rows of x takes as long as reading W. XLA's code for it converts W in narrower vectors
// and, with several rows of x, runs as a general matrix product; here all of XLA's threads together read W once, in the
// type it is stored in, and the rows that come next are prefetched. XLA runs attention's products on one thread; here
// the threads share the heads. kernel.py builds and loads this file.
//
// A row's result has the same bits whatever rows come with it, however many threads there are, and at whatever slot of
// the cache it starts: each element is one sum in one order, written with explicit fused multiply-adds (kernel.py
// forbids the compiler to make any itself).

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 2 << 20;      // most bytes of W that a thread takes at a time
constexpr int kMostRows = 32;            // of x
constexpr int kTile = kRegisters / 4;    // most rows of x at a time
constexpr int kGroup = 24;               // rows of W that stay in cache for all rows of x

constexpr int Divisor(int n, int most) {  // of n, the largest up to `most`
  while (n % most != 0) --most;
  return most;
}

// y[b, o] for B rows of x and R rows of W: the same bits for any B and R.
template <int B, int R, typename W>
void Tile(const float* x, const W* w, float* y, int64_t D, int64_t O) {
  constexpr int64_t kPerLine = kLine / sizeof(W);
  Floats sums[B][R] = {};
  const auto step = [&](int64_t d, const auto& load) {
    Floats ws[R];
    for (int r = 0; r < R; ++r) ws[r] = load(w + r * D + d);
    for (int b = 0; b < B; ++b) {
      const Floats xs = load(x + b * D + d);
      for (int r = 0; r < R; ++r) sums[b][r] = Fma(ws[r], xs, sums[b][r]);
    }
  };
  const auto whole = [](const auto* p) { return Load(p); };
  int64_t d = 0;
  for (; d + kPerLine <= D; d += kPerLine) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(w + (R + r) * D + d);  // the next R rows
    for (int64_t v = 0; v < kPerLine; v += kLanes) step(d + v, whole);
  }
  for (; d + kLanes <= D; d += kLanes) step(d, whole);
  if (d < D) step(d, [n = D - d](const auto* p) { return LoadFew(p, n); });
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) y[b * O + r] = Sum(sums[b][r]);
}

// Rows [first, last) of W, for 1 to B rows of x.
template <int B = kTile, typename W>
void Rows(int64_t rows, const float* x, const W* w, float* y, int64_t D, int64_t O, int64_t first, int64_t last) {
  if constexpr (B > 1)
    if (rows < B) return Rows<B - 1>(rows, x, w, y, D, O, first, last);
  // As many rows of W at a time as their vectors, the sums and a vector of x find registers.
  constexpr int R = Divisor(kGroup, (kRegisters - 1) / (B + 1));
  int64_t o = first;
  for (; o + R <= last; o += R) Tile<B, R>(x, w + o * D, y + o, D, O);
  for (; o < last; ++o) Tile<B, 1>(x, w + o * D, y + o, D, O);
}

// A group of rows of W at a time, which comes from memory for the first rows of x and from cache for the others.
template <typename W>
void Block(int64_t B, const float* x, const W* w, float* y, int64_t D, int64_t O, int64_t first, int64_t last) {
  for (int64_t o = first; o < last; o += kGroup)
    for (int64_t b = 0; b < B; b += kTile)
      Rows(std::min<int64_t>(kTile, B - b), x + b * D, w, y + b * O, D, O, o, std::min(last, o + kGroup));
}

template <typename W>
void Product(ffi::ThreadPool& pool, int64_t B, const float* x, const W* w, float* y, int64_t D, int64_t O) {
  // Longer stretches are read faster, but every thread should get as much as the others.
  const int64_t threads = Threads(pool);
  const int64_t pieces = threads * Quotient(O * D * int64_t{sizeof(W)}, threads * kBlock);
  const int64_t rows = kGroup * Quotient(O, pieces * kGroup);
  Share(pool, Quotient(O, rows),
        [&](int64_t i) { Block(B, x, w, y, D, O, i * rows, std::min(O, (i + 1) * rows)); });
}

// Turns n scores into the weights exp(score - the highest score). Returns their sum.
float Weigh(float* scores, int64_t n) {
  Floats highest = Floats{} - 1e30f, sum = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    for (int64_t l = n - j; l < kLanes; ++l) scores[j + l] = -1e30f;  // the buffer has room for whole vectors
    const Floats s = Load(scores + j);
    highest = s > highest ? s : highest;
  }
  float most = highest[0];
  for (int64_t l = 1; l < kLanes; ++l) most = std::max(most, highest[l]);
  for (int64_t j = 0; j < n; j += kLanes) {
    const Floats weights = Exp(Load(scores + j) - most);
    Store(scores + j, weights, kLanes);
    sum += weights;
  }
  return Sum(sum);
}

// y[k] = sum_j weights[j] v[j, k] / total, over n rows of v, for C vectors of its columns, or for the `left` columns
// that make no whole one.
template <int C, typename W>
void Mix(const float* weights, float total, const W* v, float* y, int64_t n, int64_t K, int64_t left) {
  if constexpr (C > 1) left = kLanes;  // none of them is cut off
  Floats sums[C] = {};
  for (int64_t j = 0; j < n; ++j)
    for (int c = 0; c < C; ++c)
      sums[c] = Fma(Load(v + j * K + c * kLanes, left), Floats{} + weights[j], sums[c]);
  for (int c = 0; c < C; ++c) Store(y + c * kLanes, sums[c] / total, left);
}

// One query over the n keys and values that it sees. Each has its scale, if there are scales.
template <typename W>
void Attend(const float* q, const W* k, const float* k_scales, const W* v, const float* v_scales, float* y, int64_t n,
            int64_t K, float* scores) {
  const auto scale = [&](const float* scales) {
    for (int64_t j = 0; scales != nullptr && j < n; ++j) scores[j] *= scales[j];
  };
  Rows(1, q, k, scores, K, n, 0, n);
  scale(k_scales);
  const float total = Weigh(scores, n);
  scale(v_scales);
  constexpr int kColumns = 64 / kLanes;
  int64_t d = 0;
  for (; d + 64 <= K; d += 64) Mix<kColumns>(scores, total, v + d, y + d, n, K, K - d);
  for (; d < K; d += kLanes) Mix<1>(scores, total, v + d, y + d, n, K, K - d);
}

ffi::Error FewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions(), ws = w.dimensions();
  if (xs.size() != 2 || ws.size() != 2 || xs[1] != ws[1] || xs[0] < 1 || xs[0] > kMostRows)
    return ffi::Error::InvalidArgument("x must be [1 to 32, D] and W [O, D]");
  const int64_t B = xs[0], D = xs[1], O = ws[0];
  const float* x_data = x.typed_data();
  float* y_data = y->typed_data();
  switch (w.element_type()) {
    case ffi::F32: Product(pool, B, x_data, static_cast<const float*>(w.untyped_data()), y_data, D, O); break;
    case ffi::BF16: Product(pool, B, x_data, static_cast<const BF16*>(w.untyped_data()), y_data, D, O); break;
    case ffi::S8: Product(pool, B, x_data, static_cast<const int8_t*>(w.untyped_data()), y_data, D, O); break;
    default: return ffi::Error::InvalidArgument("W must be float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

// Query t of q [B, H, T, K] is at `slot` + t and sees the keys from its row's start to its own slot, at most `window`.
ffi::Error Attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::Buffer<ffi::F32> k_scale,
                     ffi::AnyBuffer v, ffi::Buffer<ffi::F32> v_scale, ffi::Buffer<ffi::S32> slot,
                     ffi::Buffer<ffi::S32> start, int64_t window, ffi::ResultBuffer<ffi::F32> y) {
  const auto qs = q.dimensions(), ks = k.dimensions();
  if (qs.size() != 4 || ks.size() < 2 || ks.back() != qs[3] || k.element_count() != v.element_count() ||
      k.element_count() != size_t(qs[0] * qs[1] * ks[ks.size() - 2] * qs[3]) || k.element_type() != v.element_type() ||
      slot.element_count() != 1 || start.element_count() != size_t(qs[0]) || window < 1)
    return ffi::Error::InvalidArgument("q must be [B, H, T, K], k and v [B, H, S, K] of one type, and start [B]");
  const int64_t B = qs[0], H = qs[1], T = qs[2], K = qs[3], S = ks[ks.size() - 2];
  const size_t scales = k.element_type() == ffi::S8 ? B * H * S : 0;
  if (k_scale.element_count() != scales || v_scale.element_count() != scales)
    return ffi::Error::InvalidArgument("k and v have scales [B, H, S] if they are int8, and else none");
  const auto attend = [&](const auto* keys, const auto* values) {
    Share(pool, B * H, [&](int64_t i) {
      std::vector<float> scores(S + kLanes);
      for (int64_t t = 0; t < T; ++t) {
        const int64_t end = std::min<int64_t>(S, slot.typed_data()[0] + t + 1);
        const int64_t lowest = std::max<int64_t>(0, end - window);
        const int64_t first = std::clamp<int64_t>(start.typed_data()[i / H], lowest, end - 1);
        const int64_t at = (i * T + t) * K, seen = (i * S + first) * K;
        const auto from_first = [&](const ffi::Buffer<ffi::F32>& scale) {
          return scales == 0 ? nullptr : scale.typed_data() + i * S + first;
        };
        Attend(q.typed_data() + at, keys + seen, from_first(k_scale), values + seen, from_first(v_scale),
               y->typed_data() + at, end - first, K, scores.data());
      }
    });
  };
  const auto as = [](const ffi::AnyBuffer& buffer, auto type) {
    return static_cast<const decltype(type)*>(buffer.untyped_data());
  };
  switch (k.element_type()) {
    case ffi::F32: attend(as(k, float{}), as(v, float{})); break;
    case ffi::BF16: attend(as(k, BF16{}), as(v, BF16{})); break;
    case ffi::S8: attend(as(k, int8_t{}), as(v, int8_t{})); break;
    default: return ffi::Error::InvalidArgument("k and v must be float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

// (x - mean) / sqrt(variance + eps) scale + shift of each row.
ffi::Error LayerNorm(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> shift, float eps,
                     ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions();
  if (xs.size() != 2 || scale.element_count() != size_t(xs[1]) || shift.element_count() != size_t(xs[1]))
    return ffi::Error::InvalidArgument("x must be [R, D], and scale and shift [D]");
  const int64_t D = xs[1];
  for (int64_t r = 0; r < xs[0]; ++r) {
    const float* row = x.typed_data() + r * D;
    float* out = y->typed_data() + r * D;
    Floats sum = {}, squares = {};
    for (int64_t d = 0; d < D; d += kLanes) sum += Load(row + d, D - d);
    const float mean = Sum(sum) / D;
    for (int64_t d = 0; d < D; d += kLanes) {
      Store(out + d, Load(row + d, D - d) - mean, D - d);
      const Floats centred = Load(out + d, D - d);  // zeros past the row's end
      squares = Fma(centred, centred, squares);
    }
    const float factor = 1 / std::sqrt(Sum(squares) / D + eps);
    for (int64_t d = 0; d < D; d += kLanes) {
      const Floats scaled = Load(out + d, D - d) * factor;
      Store(out + d, Fma(scaled, Load(scale.typed_data() + d, D - d), Load(shift.typed_data() + d, D - d)), D - d);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxgptFewRows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxgptAttention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxgptLayerNorm, LayerNorm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Ret<ffi::Buffer<ffi::F32>>());
