// The operations of a decode step: products with few rows, attention over the key/value cache, and LayerNorm.
//
// A product y = x W^T of few rows of x takes as long as reading W. XLA's code for it converts W in narrower vectors
// and, with several rows of x, runs as a general matrix product; here all of XLA's threads together read W once, in
// the type it is stored in, and the rows that come next are prefetched. W in int8 is multiplied as integers, by x
// rounded to 16 bits. XLA runs attention's products on one thread; here the threads share the heads. kernel.py builds
// and loads this file.
//
// A row's result has the same bits whatever rows come with it, however many threads there are, and at whatever slot of
// the cache it starts: each element is one sum in one order, written with explicit fused multiply-adds (kernel.py
// forbids the compiler to make any itself), or a sum of integers.

#include "vectors.h"

namespace {

constexpr int64_t kBlock = 2 << 20;      // most bytes of W that a thread takes at a time
constexpr int kMostRows = 32;            // of x
constexpr int kTile = kRegisters / 4;    // most rows of x at a time
constexpr int kPiece = 24;               // a thread takes a multiple of so many rows of W

constexpr int Divisor(int n, int most) {  // of n, the largest up to `most`
  while (n % most != 0) --most;
  return most;
}

// How rows of x of a type are multiplied: `Load` reads `kWidth` numbers of x or W, and `kMost` is the longest sum.
template <typename X>
struct As;

template <>
struct As<float> {
  using Sums = Floats;
  static constexpr int64_t kWidth = kLanes, kMost = INT64_MAX;
  template <typename T>
  static Floats Load(const T* p) { return ::Load(p); }
  static Floats Add(Floats w, Floats x, Floats sums) { return Fma(w, x, sums); }
};

// Sums of integers are exact, and the processor multiplies more of them at a time.
template <>
struct As<int16_t> {
  using Sums = Ints;
  static constexpr int64_t kWidth = 2 * kLanes, kMost = 256 * kWidth;  // 256 * 2 * 128 * 32767 < 2^31
  template <typename T>
  static Shorts Load(const T* p) { return LoadShorts(p); }
  static Ints Add(Shorts w, Shorts x, Ints sums) { return MultiplyAdd(w, x, sums); }
};

// Rounds a row of x to integers q of 16 bits. Returns their step: x is about step q. If x holds a NaN or an infinity,
// the step is such that step q is NaN. Where all of x is below 1e-34, q is 0.
float ToIntegers(const float* x, int64_t D, int16_t* q) {
  const Floats zero = {}, magic = zero + 0x1.8p23f;  // adding `magic` rounds to an integer, in the lower bits
  Floats highest = zero;
  for (int64_t d = 0; d < D; d += kLanes) {
    const Floats value = Load(x + d, D - d), size = value < 0 ? -value : value;
    highest = Larger(size, highest);
  }
  const float most = Largest(highest);
  const float per_step = most > 0 ? 32767 / most : 0;
  for (int64_t d = 0; d < D; d += kLanes) {
    const auto shifted = (Ints)Fma(Load(x + d, D - d), zero + per_step, magic);
    const auto rounded = __builtin_convertvector(shifted, Vector<int16_t>);
    std::memcpy(q + d, &rounded, std::min(D - d, kLanes) * sizeof(int16_t));
  }
  return most / 32767;
}

// y[b, o] for B rows of x and R rows of W: the same bits for any B and R. This is one of `tiles` for these rows of W,
// each of which fetches a part of the rows that come `next`. Returns the part of the tile that follows.
template <int B, int R, typename X, typename W>
const char* Tile(const X* x, const W* w, float* y, int64_t D, int64_t O, int64_t tiles, const char* next) {
  constexpr int64_t kPerLine = kLine / sizeof(W), kWidth = As<X>::kWidth;
  int64_t turn = tiles;
  for (int64_t d = 0; d < D;) {
    const int64_t start = d, end = d + std::min(D - d, As<X>::kMost);
    typename As<X>::Sums sums[B][R] = {};
    const auto step = [&](int64_t d, const auto& load) {
      decltype(load(w)) ws[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) ws[r] = load(w + r * D + d);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        const auto xs = load(x + b * D + d);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[b][r] = As<X>::Add(ws[r], xs, sums[b][r]);
      }
    };
    const auto whole = [](const auto* p) { return As<X>::Load(p); };
    for (; d + kPerLine <= end; d += kPerLine) {
      // In the order in which they lie: memory is read faster so. Fewer rows of x than kTile are alone, or the last.
      if (B < kTile || ++turn > tiles) {
        for (int r = 0; r < R; ++r, next += kLine) __builtin_prefetch(next);
        turn = 1;
      }
      for (int64_t v = 0; v < kPerLine; v += kWidth) step(d + v, whole);
    }
    for (; d + kWidth <= end; d += kWidth) step(d, whole);
    if (d < end)
      step(d, [n = end - d, whole](const auto* p) { return LoadFew<As<X>::kWidth>(p, n, whole); });
    d = end;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        y[b * O + r] = (start > 0 ? y[b * O + r] : 0) + Sum(__builtin_convertvector(sums[b][r], Floats));
  }
  return next;
}

// R rows of W, which come from memory for the first B rows of x and from cache for the others, B at a time and in the
// end fewer, down to kLeast.
template <int R, int B, int kLeast, typename X, typename W>
void Group(int64_t rows, const X* x, const W* w, float* y, int64_t D, int64_t O, int64_t tiles, const char* next) {
  for (; rows >= B; rows -= B, x += B * D, y += B * O) next = Tile<B, R>(x, w, y, D, O, tiles, next);
  if constexpr (B > kLeast)
    if (rows > 0) Group<R, B - 1, kLeast>(rows, x, w, y, D, O, tiles, next);
}

// Rows [first, last) of W.
template <int B = kTile, typename X, typename W>
void Rows(int64_t rows, const X* x, const W* w, float* y, int64_t D, int64_t O, int64_t first, int64_t last) {
  if constexpr (B > 1)
    if (rows < B) return Rows<B - 1>(rows, x, w, y, D, O, first, last);
  // As many rows of W at a time as their vectors, the sums and a vector of x find registers.
  constexpr int R = Divisor(kPiece, (kRegisters - 1) / (B + 1));
  constexpr int kLeast = B < kTile ? B : 1;  // more rows of x than a tile has may leave any number over
  const auto from = [w, D](int64_t o) { return reinterpret_cast<const char*>(w + o * D); };
  int64_t o = first;
  for (; o + R <= last; o += R)
    Group<R, B, kLeast>(rows, x, w + o * D, y + o, D, O, Quotient(rows, B), from(o + R));
  for (; o < last; ++o) Group<1, 1, 1>(rows, x, w + o * D, y + o, D, O, rows, from(o + 1));
}

// Calls finish(first, last) when y has what belongs to these rows of W.
template <typename X, typename W, typename Finish>
void Product(ffi::ThreadPool& pool, int64_t B, const X* x, const W* w, float* y, int64_t D, int64_t O,
             const Finish& finish) {
  // Longer stretches are read faster, but every thread should get as much as the others.
  const int64_t threads = Threads(pool);
  const int64_t pieces = threads * Quotient(O * D * int64_t{sizeof(W)}, threads * kBlock);
  const int64_t rows = kPiece * Quotient(O, pieces * kPiece);
  Share(pool, Quotient(O, rows), [&](int64_t i) {
    const int64_t first = i * rows, last = std::min(O, first + rows);
    Rows(B, x, w, y, D, O, first, last);
    finish(first, last);
  });
}

template <typename W>
void Product(ffi::ThreadPool& pool, int64_t B, const float* x, const W* w, float* y, int64_t D, int64_t O) {
  Product(pool, B, x, w, y, D, O, [](int64_t, int64_t) {});
}

void Product(ffi::ThreadPool& pool, int64_t B, const float* x, const int8_t* w, float* y, int64_t D, int64_t O) {
  std::vector<Shorts> room(Quotient(B * D, 2 * kLanes));  // aligned: vectors across two lines are read slowly
  const auto integers = reinterpret_cast<int16_t*>(room.data());
  std::vector<float> steps(B);
  for (int64_t b = 0; b < B; ++b) steps[b] = ToIntegers(x + b * D, D, integers + b * D);
  Product(pool, B, integers, w, y, D, O, [&](int64_t first, int64_t last) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t o = first; o < last; ++o) y[b * O + o] *= steps[b];
  });
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
  Rows<1>(1, q, k, scores, K, n, 0, n);
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
