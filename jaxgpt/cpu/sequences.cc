// Products and attention over whole sequences, forward and backward: the matrix products of products.h, and between
// them what one thread does while the numbers are in its cache.
//
// Each thread of XLA's pool takes pieces of its own. Attention never holds more than one block of scores per thread
// (Dao et al. 2022, FlashAttention). sequences.py calls this file.

#include "products.h"

namespace {

ffi::Error NoTiles() {
  return ffi::Error::InvalidArgument(
      "operands must be float32 or bfloat16, or the second of a product int8, on a processor with AVX2 and FMA");
}

// Calls use(way, number) with the way to multiply that there is for a type, `ByTiles` or `ByLibrary`, and a number of
// it.
template <typename Use>
ffi::Error ForType(ffi::DataType type, const Use& use) {
  if (type == ffi::F32 && library != nullptr) return use(ByLibrary{}, float{}), ffi::Error::Success();
#ifdef JAXGPT_TILES
  if (type == ffi::F32) return use(ByTiles<float>{}, float{}), ffi::Error::Success();
  if (type == ffi::BF16) return use(ByTiles<FromBF16>{}, BF16{}), ffi::Error::Success();
#endif
  return NoTiles();
}

template <typename T>
Matrix<T> MatrixOf(ffi::AnyBuffer& x, ffi::Span<const int64_t> sizes, bool flipped) {
  return {static_cast<const T*>(x.untyped_data()), sizes[1], flipped};
}

// x [M, K] times y [K, N]; the array of a flipped one holds its transpose.
ffi::Error ProductOf(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer y, bool x_flipped, bool y_flipped,
                     ffi::ResultBuffer<ffi::F32> result) {
  const auto xs = x.dimensions(), ys = y.dimensions(), sizes = result->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || sizes.size() != 2)
    return ffi::Error::InvalidArgument("x, y and the result must be matrices");
  const int64_t M = sizes[0], N = sizes[1], K = xs[x_flipped ? 0 : 1];
  if (xs[x_flipped ? 1 : 0] != M || ys[y_flipped ? 0 : 1] != N || ys[y_flipped ? 1 : 0] != K)
    return ffi::Error::InvalidArgument("x must be [M, K], y [K, N] and the result [M, N]");
  const auto x_type = x.element_type(), y_type = y.element_type();
  const auto with = [&](auto by, auto left, auto right) {
    by.Product(pool, M, N, K, left(x, xs, x_flipped), right(y, ys, y_flipped), result->typed_data());
    return ffi::Error::Success();
  };
  if (x_type == y_type)
    return ForType(x_type, [&](auto by, auto number) {
      using T = decltype(number);
      with(by, MatrixOf<T>, MatrixOf<T>);
    });
#ifdef JAXGPT_TILES
  // Where one of them is in bfloat16, the other is rounded to it; integers become the type that is beside them.
  const auto are = [&](auto one, auto other) { return x_type == one && y_type == other; };
  const ByTiles<float> floats;
  const ByTiles<FromBF16> halves;
  if (are(ffi::BF16, ffi::F32)) return with(halves, MatrixOf<BF16>, MatrixOf<Rounded>);
  if (are(ffi::F32, ffi::BF16)) return with(halves, MatrixOf<Rounded>, MatrixOf<BF16>);
  if (are(ffi::F32, ffi::S8)) return with(floats, MatrixOf<float>, MatrixOf<int8_t>);
  if (are(ffi::BF16, ffi::S8)) return with(halves, MatrixOf<BF16>, MatrixOf<int8_t>);
#endif
  return NoTiles();
}

// gelu(x y^T + bias), rounded to bfloat16, for x [M, K], y [N, K] and bias [N].
ffi::Error GeluOfProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> y,
                         ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::BF16> result) {
  const auto xs = x.dimensions(), ys = y.dimensions(), sizes = result->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || sizes.size() != 2 || xs[1] != ys[1] || sizes[0] != xs[0] ||
      sizes[1] != ys[0] || int64_t(bias.element_count()) != ys[0] || xs[1] > kMostSummed)
    return ffi::Error::InvalidArgument("x must be [M, K], y [N, K], bias [N], the result [M, N], and K at most 4096");
#ifdef JAXGPT_TILES
  const int64_t N = ys[0], K = xs[1];
  const float* shift = bias.typed_data();
  BF16* out = reinterpret_cast<BF16*>(result->typed_data());
  const auto operand = [K](ffi::Buffer<ffi::BF16>& x) {
    return Matrix<BF16>{reinterpret_cast<const BF16*>(x.typed_data()), K};
  };
  ByTiles<FromBF16>::Parts(pool, xs[0], N, K, operand(x), operand(y).transpose(), nullptr,
                       [=](const float* sums, int64_t stride, int64_t row, int64_t column, int64_t m, int64_t n, bool) {
                         for (int64_t r = 0; r < m; ++r, sums += stride)
                           for (int64_t i = 0; i < n; i += kLanes)
                             Put(out + (row + r) * N + column + i,
                                 Gelu(Load(sums + i) + Load(shift + column + i, n - i)), n - i);
                       });
  return ffi::Error::Success();
#else
  return NoTiles();
#endif
}

// The sizes of an attention, and what each query sees: query t the keys from first[b, t] up to t.
struct Shape {
  int64_t B, H, T, K, block;
  const int32_t* first;

  int64_t blocks() const { return Quotient(T, block); }
  int64_t at(int64_t bh) const { return (bh / H * T * H + bh % H) * K; }  // of a row and head in q
  int64_t end(int64_t i) const { return std::min(T, (i + 1) * block); }
  int64_t first_of(int64_t b, int64_t t) const { return std::clamp<int64_t>(first[b * T + t], 0, t); }
  // The first key that any query of a block sees, at the start of a vector and of a block of products.
  int64_t start(int64_t b, int64_t i) const {
    int64_t least = T;
    for (int64_t t = i * block; t < end(i); ++t) least = std::min(least, first_of(b, t));
    return least / kStart * kStart;
  }
};

constexpr float kUnseen = -1e30f;
constexpr int64_t kMostQueries = 512;  // of a block

// x, of which the elements at [at, at + kLanes) that do not lie in [from, to] become `otherwise`.
inline Floats Only(Floats x, int64_t at, int64_t from, int64_t to, float otherwise) {
  if (at < from || at + kLanes - 1 > to)
    for (int64_t l = 0; l < kLanes; ++l) x[l] = at + l < from || at + l > to ? otherwise : x[l];
  return x;
}

// The dropout mask of a block, [B, H, queries, keys up to the block's end], or none.
struct Mask {
  const uint8_t* kept = nullptr;
  float factor = 1;
};

inline Floats Keep(Floats x, const uint8_t* kept, int64_t n) {
  return x * Load(reinterpret_cast<const int8_t*>(kept), n);
}

template <typename By, typename In, typename T = typename By::Number>
void Forward(const Shape& s, int64_t b, int64_t i, const In* q, const typename By::Rows& k, const typename By::Rows& v,
             Mask mask, float* y, float* stats) {
  const int64_t K = s.K, apart = s.H * K, t0 = i * s.block, t1 = s.end(i), start = s.start(b, i), n = t1 - start;
  const int64_t stride = Apart(n);
  float* scores = rooms[0].of<float>(s.block * stride);
  T* weights = rooms[1].of<T>(Padded(s.block) * stride);
  k.Scores(Matrix<In>{q + t0 * apart, apart}, t1 - t0, start, n, scores, stride);
  float totals[kMostQueries];
  for (int64_t t = t0; t < t1; ++t) {
    float* row = scores + (t - t0) * stride;
    const int64_t from = s.first_of(b, t) - start, to = t - start;
    Floats highest = Floats{} + kUnseen, sum = {};
    for (int64_t j = 0; j <= to; j += kLanes) {
      const Floats x = Only(Load(row + j), j, from, to, kUnseen);
      highest = Larger(x, highest);
    }
    const float most = Largest(highest);
    const auto out = [&](int64_t j) { return weights + By::Rows::Place(t - t0, j, n); };
    int64_t j = 0;
    for (; j <= to; j += kLanes) {
      Floats x = Only(Exp(Load(row + j) - most), j, from, to, 0);
      sum += x;
      if (mask.kept) x = Keep(x, mask.kept + (t - t0) * t1 + start + j, t1 - start - j);
      Put(out(j), x);
    }
    for (; j < Padded(n); j += kLanes) Put(out(j), Floats{});
    totals[t - t0] = Sum(sum);
    stats[2 * t] = most;
    stats[2 * t + 1] = totals[t - t0];
  }
  v.Sum(weights, t1 - t0, start, n, y + t0 * apart, apart);
  for (int64_t t = t0; t < t1; ++t) {
    const float factor = mask.factor / totals[t - t0];
    for (int64_t d = 0; d < K; ++d) y[t * apart + d] *= factor;
  }
}

template <typename By, typename In, typename T = typename By::Number>
void Backward(const Shape& s, int64_t b, const In* q, const In* keys, const In* values, const In* g, const float* inner,
              const float* stats, const std::vector<Mask>& masks, float* dq, float* dk, float* dv) {
  const int64_t K = s.K, apart = s.H * K;
  const typename By::Rows k(Matrix<In>{keys, apart}, s.T, K, &rooms[6], &rooms[7]);
  const typename By::Rows v(Matrix<In>{values, apart}, s.T, K, &rooms[8], nullptr);
  // Those of keys and values are summed close together, [2, T, K].
  float *dk_sums = rooms[10].of<float>(2 * s.T * K), *dv_sums = dk_sums + s.T * K;
  std::memset(dk_sums, 0, 2 * s.T * K * sizeof(float));
  for (int64_t i = 0; i < s.blocks(); ++i) {
    const int64_t t0 = i * s.block, t1 = s.end(i), start = s.start(b, i), n = t1 - start;
    const int64_t stride = Apart(n);
    float* scores = rooms[0].of<float>(s.block * stride);
    float* d_weights = rooms[1].of<float>(s.block * stride);
    T* weights = rooms[2].of<T>(s.block * stride);
    T* d_scores = rooms[3].of<T>(s.block * stride);
    // d_scores as the sum of keys reads them, which may be how they lie anyway.
    T* placed = By::kPlaced ? rooms[9].of<T>(Padded(s.block) * stride) : d_scores;
    const Matrix<In> qs{q + t0 * apart, apart}, gs{g + t0 * apart, apart};
    k.Scores(qs, t1 - t0, start, n, scores, stride);
    v.Scores(gs, t1 - t0, start, n, d_weights, stride);
    const Mask mask = masks[i];
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t at = (t - t0) * stride, from = s.first_of(b, t) - start, to = t - start;
      const float most = stats[2 * t], factor = 1 / stats[2 * t + 1], within = inner[t];
      int64_t j = 0;
      for (; j <= to; j += kLanes) {
        const Floats w = Only(Exp(Load(scores + at + j) - most) * factor, j, from, to, 0);
        Floats d = Load(d_weights + at + j), dropped = w;
        if (mask.kept) {
          const uint8_t* kept = mask.kept + (t - t0) * t1 + start + j;
          const int64_t left = t1 - start - j;
          dropped = Keep(w, kept, left) * mask.factor;
          d = Keep(d, kept, left) * mask.factor;
        }
        Put(weights + at + j, dropped);
        const Floats d_score = Only(w * (d - within), j, from, to, 0);
        Put(d_scores + at + j, d_score);
        if (By::kPlaced) Put(placed + By::Rows::Place(t - t0, j, n), d_score);
      }
      for (; j < Padded(n); j += kLanes) {
        Put(weights + at + j, Floats{}), Put(d_scores + at + j, Floats{});
        if (By::kPlaced) Put(placed + By::Rows::Place(t - t0, j, n), Floats{});
      }
    }
    const Matrix<T> ws{weights, stride}, ds{d_scores, stride};
    k.Sum(placed, t1 - t0, start, n, dq + t0 * apart, apart);
    By::Multiply(n, K, t1 - t0, ds.transpose(), qs, dk_sums + start * K, K, true);
    By::Multiply(n, K, t1 - t0, ws.transpose(), gs, dv_sums + start * K, K, true);
  }
  for (int64_t t = 0; t < s.T; ++t) {
    std::memcpy(dk + t * apart, dk_sums + t * K, K * sizeof(float));
    std::memcpy(dv + t * apart, dv_sums + t * K, K * sizeof(float));
  }
}

ffi::ErrorOr<Shape> Sizes(const ffi::AnyBuffer& q, std::initializer_list<ffi::AnyBuffer> others,
                          const ffi::Buffer<ffi::S32>& first, int64_t block) {
  const auto qs = q.dimensions();
  for (const auto& other : others)
    if (!std::equal(qs.begin(), qs.end(), other.dimensions().begin(), other.dimensions().end()) ||
        other.element_type() != q.element_type())
      return ffi::Unexpected(ffi::Error::InvalidArgument("q, k, v and the gradient must have one shape and type"));
  if (qs.size() != 4 || first.element_count() != size_t(qs[0] * qs[1]) || block < kStart ||
      block > kMostQueries || block % kStart != 0)
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("q must be [B, T, H, K], first [B, T], and block a multiple of 32 up to 512"));
  return Shape{qs[0], qs[2], qs[1], qs[3], block, first.typed_data()};
}

// The masks of all blocks, for all rows and heads; or none.
ffi::ErrorOr<std::vector<Mask>> Masks(const Shape& s, ffi::RemainingArgs& args, float factor) {
  std::vector<Mask> masks(s.blocks());
  if (args.size() == 0) return masks;
  if (int64_t(args.size()) != s.blocks()) return ffi::Unexpected(ffi::Error::InvalidArgument("one mask per block"));
  for (int64_t i = 0; i < s.blocks(); ++i) {
    const auto mask = args.get<ffi::Buffer<ffi::PRED>>(i);
    if (mask.has_error()) return ffi::Unexpected(mask.error());
    if (mask->element_count() != size_t(s.B * s.H * (s.end(i) - i * s.block) * s.end(i)))
      return ffi::Unexpected(ffi::Error::InvalidArgument("a mask is [B, H, queries, keys up to the block's end]"));
    masks[i] = {reinterpret_cast<const uint8_t*>(mask->typed_data()), factor};
  }
  return masks;
}

// That of one row and head.
Mask MaskOf(const Shape& s, const Mask& mask, int64_t bh, int64_t i) {
  return mask.kept ? Mask{mask.kept + bh * (s.end(i) - i * s.block) * s.end(i), mask.factor} : mask;
}

ffi::Error SequenceAttention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                             ffi::Buffer<ffi::S32> first, ffi::RemainingArgs dropout, int64_t block, float factor,
                             ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> stats) {
  const auto shape = Sizes(q, {k, v}, first, block);
  if (shape.has_error()) return shape.error();
  const Shape s = *shape;
  const auto masks = Masks(s, dropout, factor);
  if (masks.has_error()) return masks.error();
  return ForType(q.element_type(), [&](auto by, auto number) {
    using By = decltype(by);
    using In = decltype(number);
    const auto in = [](ffi::AnyBuffer& x) { return static_cast<const In*>(x.untyped_data()); };
    // As many groups of blocks as keep all threads busy. The last blocks have most to do, so they come first.
    const int64_t heads = s.B * s.H, groups = std::min(s.blocks(), Quotient(4 * Threads(pool), heads));
    Share(pool, heads * groups, [&](int64_t n) {
      const typename By::Units units;
      const int64_t bh = n % heads, group = groups - 1 - n / heads, at = s.at(bh), apart = s.H * s.K;
      const int64_t blocks = s.blocks() * (group + 1) / groups, end = s.end(blocks - 1);
      const typename By::Rows keys(Matrix<In>{in(k) + at, apart}, end, s.K, &rooms[2], nullptr);
      const typename By::Rows values(Matrix<In>{in(v) + at, apart}, end, s.K, nullptr, &rooms[3]);
      for (int64_t i = s.blocks() * group / groups; i < blocks; ++i)
        Forward<By>(s, bh / s.H, i, in(q) + at, keys, values, MaskOf(s, (*masks)[i], bh, i), y->typed_data() + at,
                stats->typed_data() + bh * s.T * 2);
    });
  });
}

ffi::Error SequenceAttentionGradients(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                      ffi::AnyBuffer g, ffi::Buffer<ffi::S32> first, ffi::Buffer<ffi::F32> inner,
                                      ffi::Buffer<ffi::F32> stats, ffi::RemainingArgs dropout, int64_t block,
                                      float factor, ffi::ResultBuffer<ffi::F32> dq, ffi::ResultBuffer<ffi::F32> dk,
                                      ffi::ResultBuffer<ffi::F32> dv) {
  const auto shape = Sizes(q, {k, v, g}, first, block);
  if (shape.has_error()) return shape.error();
  const Shape s = *shape;
  if (inner.element_count() != size_t(s.B * s.H * s.T) || stats.element_count() != size_t(2 * s.B * s.H * s.T))
    return ffi::Error::InvalidArgument("inner must be [B, H, T], and stats [B, H, T, 2]");
  const auto masks = Masks(s, dropout, factor);
  if (masks.has_error()) return masks.error();
  return ForType(q.element_type(), [&](auto by, auto number) {
    using By = decltype(by);
    using In = decltype(number);
    const auto in = [](ffi::AnyBuffer& x) { return static_cast<const In*>(x.untyped_data()); };
    Share(pool, s.B * s.H, [&](int64_t bh) {
      const typename By::Units units;
      std::vector<Mask> own(s.blocks());
      for (int64_t i = 0; i < s.blocks(); ++i) own[i] = MaskOf(s, (*masks)[i], bh, i);
      const int64_t at = s.at(bh);
      Backward<By>(s, bh / s.H, in(q) + at, in(k) + at, in(v) + at, in(g) + at, inner.typed_data() + bh * s.T,
               stats.typed_data() + bh * s.T * 2, own, dq->typed_data() + at, dk->typed_data() + at,
               dv->typed_data() + at);
    });
  });
}

}  // namespace

// MKL's cblas_sgemm.
extern "C" void JaxgptUseLibrary(void* function) { library = reinterpret_cast<Gemm>(function); }

// Whether numbers are multiplied here without a library.
extern "C" int JaxgptHasTiles() {
#ifdef JAXGPT_TILES
  return 1;
#else
  return 0;
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxgptProduct, ProductOf,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<bool>("x_flipped")
                                  .Attr<bool>("y_flipped")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxgptGeluOfProduct, GeluOfProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxgptSequenceAttention, SequenceAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Attr<int64_t>("block")
                                  .Attr<float>("factor")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxgptSequenceAttentionGradients, SequenceAttentionGradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Attr<int64_t>("block")
                                  .Attr<float>("factor")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
