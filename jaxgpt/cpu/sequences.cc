// Products and attention over whole sequences, forward and backward: matrix products by a library (MKL), which
// `JaxgptUseLibrary` names, and between them what one thread does while the numbers are in its cache.
//
// Each thread of XLA's pool calls the library for a piece of its own, in one thread. Attention never holds more than
// one block of scores per thread (Dao et al. 2022, FlashAttention). sequences.py loads the library and calls this file.

#include "vectors.h"

#include <mutex>

namespace {

// MKL's CBLAS. Its matrices are row-major here, and its products C = alpha op(A) op(B) + beta C.
enum Layout { kRowMajor = 101 };
enum Operation { kPlain = 111, kFlipped = 112, kPackedForm = 151 };
enum Operand { kLeft = 161, kRight = 162 };
template <typename T>
using Gemm = void (*)(Layout, Operation, Operation, int, int, int, float, const T*, int, const T*, int, float, float*,
                      int);

struct Library {
  Gemm<float> floats;
  Gemm<BF16> halves;
  size_t (*pack_size)(Operand, int, int, int);
  void (*pack)(Layout, Operand, Operation, int, int, int, const BF16*, int, BF16*);
  Gemm<BF16> packed;  // for operands that are packed
};
Library library = {};

template <typename T>
Gemm<T> GemmOf() {
  if constexpr (std::is_same_v<T, float>)
    return library.floats;
  else
    return library.halves;
}

// A matrix in an array whose rows are `stride` apart; flipped if the array holds its columns.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;
  bool flipped = false;

  Matrix from(int64_t row, int64_t column) const {
    return {flipped ? data + column * stride + row : data + row * stride + column, stride, flipped};
  }
  Matrix transpose() const { return {data, stride, !flipped}; }
  Operation operation() const { return flipped ? kFlipped : kPlain; }
};

// c [M, N] = a [M, K] b [K, N], added to what c holds if `add`.
template <typename T>
void Multiply(int64_t M, int64_t N, int64_t K, Matrix<T> a, Matrix<T> b, float* c, int64_t stride, bool add = false) {
  GemmOf<T>()(kRowMajor, a.operation(), b.operation(), M, N, K, 1, a.data, a.stride, b.data, b.stride, add, c, stride);
}

// Calls use(T{}) for the type of a buffer, float32 or bfloat16.
template <typename Use>
ffi::Error ForType(ffi::DataType type, const Use& use) {
  if (library.floats == nullptr) return ffi::Error::Internal("JaxgptUseLibrary has not been called");
  if (type == ffi::F32) return use(float{}), ffi::Error::Success();
  if (type == ffi::BF16) return use(BF16{}), ffi::Error::Success();
  return ffi::Error::InvalidArgument("operands must be float32 or bfloat16");
}

// An array that grows when it must, and whose pages are touched only where it is used.
class Room {
 public:
  template <typename T>
  T* of(int64_t size) {
    const size_t needed = Quotient(size * sizeof(T), sizeof(Line));
    if (needed > length) {
      lines.reset();
      lines.reset(new Line[needed]);
      length = needed;
    }
    return reinterpret_cast<T*>(lines.get());
  }

 private:
  struct alignas(kLine) Line {
    char bytes[kLine];
  };
  std::unique_ptr<Line[]> lines;
  size_t length = 0;
};

// Rooms stay when their users are done, because fresh pages cost more than what is computed in them: those of a thread,
// and those that threads share.
thread_local Room rooms[4];

class SharedRoom {
 public:
  SharedRoom() {
    const std::lock_guard lock(mutex);
    if (!kept.empty()) room = std::move(kept.back()), kept.pop_back();
  }
  ~SharedRoom() {
    const std::lock_guard lock(mutex);
    kept.push_back(std::move(room));
  }
  Room room;

 private:
  static inline std::mutex mutex;
  static inline std::vector<Room> kept;
};

constexpr int64_t kTile = 512;         // rows and columns of a tile, which stays in a core's cache
constexpr int64_t kMostSummed = 4096;  // length of the sums in a tile
constexpr int64_t kPacked = 32 << 20;  // bytes of the left operand that are packed at a time

// The size of tiles for n rows or columns: the largest that divides n, of at least half of `kTile`, or else `kTile`.
int64_t TileSize(int64_t n) {
  for (int64_t size = kTile; size >= kTile / 2; size -= 16)
    if (n % size == 0) return size;
  return kTile;
}

// c [M, N] = a [M, K] b [K, N] in bfloat16, tile by tile. The library packs both operands as it reads them fastest: so
// much of a as `kPacked` allows, and the columns of b by the thread that takes them, with some of the rows. A tile is
// copied when all its sums are complete; the library alone reads and writes c several times, and waits for memory.
void Tiles(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Matrix<BF16> a, Matrix<BF16> b, float* c) {
  const int64_t rows = TileSize(M), columns = TileSize(N), across = Quotient(N, columns);
  const auto size = [&](Operand which) {
    return kLine / sizeof(BF16) * Quotient(library.pack_size(which, rows, columns, K), kLine);
  };
  const auto pack = [&](Operand which, Matrix<BF16> x, BF16* to) {
    library.pack(kRowMajor, which, x.operation(), rows, columns, K, x.data, x.stride, to);
  };
  SharedRoom shared;
  const int64_t most = std::max<int64_t>(1, kPacked / int64_t(rows * K * sizeof(BF16)));
  for (int64_t top = 0; top < M; top += most * rows) {
    const int64_t bottom = std::min(M, top + most * rows), whole = (bottom - top) / rows;
    BF16* packed = shared.room.of<BF16>(whole * size(kLeft));
    Share(pool, whole, [&](int64_t i) { pack(kLeft, a.from(top + i * rows, 0), packed + i * size(kLeft)); });
    // As many groups of rows as keep all threads busy.
    const int64_t down = Quotient(bottom - top, rows), groups = std::min(down, Quotient(2 * Threads(pool), across));
    Share(pool, across * groups, [&](int64_t task) {
      const int64_t column = task % across * columns, n = std::min(columns, N - column), group = task / across;
      BF16* own = rooms[0].of<BF16>(size(kRight));
      float* tile = rooms[1].of<float>(rows * columns);
      if (n == columns && whole > 0) pack(kRight, b.from(0, column), own);
      for (int64_t i = down * group / groups; i < down * (group + 1) / groups; ++i) {
        const int64_t row = top + i * rows, m = std::min(rows, M - row);
        if (m == rows && n == columns)
          library.packed(kRowMajor, kPackedForm, kPackedForm, m, n, K, 1, packed + i * size(kLeft), K, own, K, 0, tile,
                         columns);
        else
          Multiply(m, n, K, a.from(row, 0), b.from(0, column), tile, columns);
        for (int64_t r = 0; r < m; ++r) std::memcpy(c + (row + r) * N + column, tile + r * columns, n * sizeof(float));
      }
    });
  }
}

// c [M, N] = a [M, K] b [K, N], of which each thread takes some rows or columns.
template <typename T>
void Stripes(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Matrix<T> a, Matrix<T> b, float* c) {
  const int64_t length = std::max(M, N), stripe = kLanes * Quotient(length, kLanes * Threads(pool));
  Share(pool, Quotient(length, stripe), [&](int64_t i) {
    const int64_t first = i * stripe, n = std::min(stripe, length - first);
    if (M >= N)
      Multiply(n, N, K, a.from(first, 0), b, c + first * N, N);
    else
      Multiply(M, n, K, a, b.from(0, first), c + first, N);
  });
}

// x [M, K] times y [K, N]; the array of a flipped one holds its transpose.
ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer y, bool x_flipped, bool y_flipped,
                   ffi::ResultBuffer<ffi::F32> result) {
  const auto xs = x.dimensions(), ys = y.dimensions(), sizes = result->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || sizes.size() != 2 || x.element_type() != y.element_type())
    return ffi::Error::InvalidArgument("x and y must be matrices of one type");
  const int64_t M = sizes[0], N = sizes[1], K = xs[x_flipped ? 0 : 1];
  if (xs[x_flipped ? 1 : 0] != M || ys[y_flipped ? 0 : 1] != N || ys[y_flipped ? 1 : 0] != K)
    return ffi::Error::InvalidArgument("x must be [M, K], y [K, N] and the result [M, N]");
  return ForType(x.element_type(), [&](auto type) {
    using T = decltype(type);
    const Matrix<T> a{static_cast<const T*>(x.untyped_data()), xs[1], x_flipped};
    const Matrix<T> b{static_cast<const T*>(y.untyped_data()), ys[1], y_flipped};
    if constexpr (std::is_same_v<T, BF16>)
      if (std::min(M, N) >= kTile / 2 && K <= kMostSummed) return Tiles(pool, M, N, K, a, b, result->typed_data());
    Stripes(pool, M, N, K, a, b, result->typed_data());
  });
}

// The sizes of an attention, and what each query sees: query t the keys from first[b, t] up to t.
struct Shape {
  int64_t B, H, T, K, block;
  const int32_t* first;

  int64_t blocks() const { return Quotient(T, block); }
  int64_t end(int64_t i) const { return std::min(T, (i + 1) * block); }
  int64_t first_of(int64_t b, int64_t t) const { return std::clamp<int64_t>(first[b * T + t], 0, t); }
  // The first key that any query of a block sees, at the start of a vector.
  int64_t start(int64_t b, int64_t i) const {
    int64_t least = T;
    for (int64_t t = i * block; t < end(i); ++t) least = std::min(least, first_of(b, t));
    return least / kLanes * kLanes;
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
  Floats factor = {};
  for (int64_t l = 0; l < std::min(n, kLanes); ++l) factor[l] = kept[l];
  return x * factor;
}

template <typename T>
void Forward(const Shape& s, int64_t b, int64_t i, const T* q, const T* k, const T* v, Mask mask, float* y,
             float* stats) {
  const int64_t K = s.K, t0 = i * s.block, t1 = s.end(i), start = s.start(b, i), n = t1 - start;
  const int64_t stride = kLanes * Quotient(n, kLanes);
  float* scores = rooms[0].of<float>(s.block * stride);
  T* weights = rooms[1].of<T>(s.block * stride);
  Multiply<T>(t1 - t0, n, K, {q + t0 * K, K}, {k + start * K, K, true}, scores, stride);
  float totals[kMostQueries];
  for (int64_t t = t0; t < t1; ++t) {
    float* row = scores + (t - t0) * stride;
    const int64_t from = s.first_of(b, t) - start, to = t - start;
    Floats highest = Floats{} + kUnseen, sum = {};
    for (int64_t j = 0; j <= to; j += kLanes) {
      const Floats x = Only(Load(row + j), j, from, to, kUnseen);
      highest = x > highest || x != x ? x : highest;
    }
    float most = highest[0];
    for (int64_t l = 1; l < kLanes; ++l) most = highest[l] > most || highest[l] != highest[l] ? highest[l] : most;
    T* out = weights + (t - t0) * stride;
    int64_t j = 0;
    for (; j <= to; j += kLanes) {
      Floats x = Only(Exp(Load(row + j) - most), j, from, to, 0);
      sum += x;
      if (mask.kept) x = Keep(x, mask.kept + (t - t0) * t1 + start + j, t1 - start - j);
      Put(out + j, x);
    }
    for (; j < stride; j += kLanes) Put(out + j, Floats{});
    totals[t - t0] = Sum(sum);
    stats[2 * t] = most;
    stats[2 * t + 1] = totals[t - t0];
  }
  Multiply<T>(t1 - t0, K, n, {weights, stride}, {v + start * K, K}, y + t0 * K, K);
  for (int64_t t = t0; t < t1; ++t) {
    const float factor = mask.factor / totals[t - t0];
    for (int64_t d = 0; d < K; ++d) y[t * K + d] *= factor;
  }
}

template <typename T>
void Backward(const Shape& s, int64_t b, const T* q, const T* k, const T* v, const T* g, const float* inner,
              const float* stats, const std::vector<Mask>& masks, float* dq, float* dk, float* dv) {
  const int64_t K = s.K;
  std::memset(dk, 0, s.T * K * sizeof(float));
  std::memset(dv, 0, s.T * K * sizeof(float));
  for (int64_t i = 0; i < s.blocks(); ++i) {
    const int64_t t0 = i * s.block, t1 = s.end(i), start = s.start(b, i), n = t1 - start;
    const int64_t stride = kLanes * Quotient(n, kLanes);
    float* scores = rooms[0].of<float>(s.block * stride);
    float* d_weights = rooms[1].of<float>(s.block * stride);
    T* weights = rooms[2].of<T>(s.block * stride);
    T* d_scores = rooms[3].of<T>(s.block * stride);
    const Matrix<T> qs{q + t0 * K, K}, gs{g + t0 * K, K}, ks{k + start * K, K}, vs{v + start * K, K};
    Multiply(t1 - t0, n, K, qs, ks.transpose(), scores, stride);
    Multiply(t1 - t0, n, K, gs, vs.transpose(), d_weights, stride);
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
        Put(d_scores + at + j, Only(w * (d - within), j, from, to, 0));
      }
      for (; j < stride; j += kLanes) Put(weights + at + j, Floats{}), Put(d_scores + at + j, Floats{});
    }
    const Matrix<T> ws{weights, stride}, ds{d_scores, stride};
    Multiply(t1 - t0, K, n, ds, ks, dq + t0 * K, K);
    Multiply(n, K, t1 - t0, ds.transpose(), qs, dk + start * K, K, true);
    Multiply(n, K, t1 - t0, ws.transpose(), gs, dv + start * K, K, true);
  }
}

ffi::ErrorOr<Shape> Sizes(const ffi::AnyBuffer& q, std::initializer_list<ffi::AnyBuffer> others,
                          const ffi::Buffer<ffi::S32>& first, int64_t block) {
  const auto qs = q.dimensions();
  for (const auto& other : others)
    if (!std::equal(qs.begin(), qs.end(), other.dimensions().begin(), other.dimensions().end()) ||
        other.element_type() != q.element_type())
      return ffi::Unexpected(ffi::Error::InvalidArgument("q, k, v and the gradient must have one shape and type"));
  if (qs.size() != 4 || first.element_count() != size_t(qs[0] * qs[2]) || block < 1 || block > kMostQueries)
    return ffi::Unexpected(ffi::Error::InvalidArgument("q must be [B, H, T, K], first [B, T], and block 1 to 512"));
  return Shape{qs[0], qs[1], qs[2], qs[3], block, first.typed_data()};
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
  return ForType(q.element_type(), [&](auto type) {
    using T = decltype(type);
    const auto in = [](ffi::AnyBuffer& x) { return static_cast<const T*>(x.untyped_data()); };
    Share(pool, s.B * s.H * s.blocks(), [&](int64_t n) {
      // The last blocks have most to do, so they come first.
      const int64_t bh = n % (s.B * s.H), i = s.blocks() - 1 - n / (s.B * s.H), at = bh * s.T * s.K;
      Forward(s, bh / s.H, i, in(q) + at, in(k) + at, in(v) + at, MaskOf(s, (*masks)[i], bh, i), y->typed_data() + at,
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
  return ForType(q.element_type(), [&](auto type) {
    using T = decltype(type);
    const auto in = [](ffi::AnyBuffer& x) { return static_cast<const T*>(x.untyped_data()); };
    Share(pool, s.B * s.H, [&](int64_t bh) {
      std::vector<Mask> own(s.blocks());
      for (int64_t i = 0; i < s.blocks(); ++i) own[i] = MaskOf(s, (*masks)[i], bh, i);
      const int64_t at = bh * s.T * s.K;
      Backward(s, bh / s.H, in(q) + at, in(k) + at, in(v) + at, in(g) + at, inner.typed_data() + bh * s.T,
               stats.typed_data() + bh * s.T * 2, own, dq->typed_data() + at, dk->typed_data() + at,
               dv->typed_data() + at);
    });
  });
}

}  // namespace

// MKL's functions, in the order of `Library`.
extern "C" void JaxgptUseLibrary(void* const* functions) { std::memcpy(&library, functions, sizeof library); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxgptProduct, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<bool>("x_flipped")
                                  .Attr<bool>("y_flipped")
                                  .Ret<ffi::Buffer<ffi::F32>>());

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
