// Products and attention over whole sequences, forward and backward: matrix products in bfloat16 by tiles.h, in float32
// by a library (MKL) that `JaxgptUseLibrary` names, and between them what one thread does while the numbers are in its
// cache.
//
// Each thread of XLA's pool takes pieces of its own, for which it calls the library in one thread. Attention never holds
// more than one block of scores per thread (Dao et al. 2022, FlashAttention). sequences.py calls this file.

#include "tiles.h"

#include <mutex>

namespace {

// MKL's CBLAS. Its matrices are row-major here, and its products C = alpha op(A) op(B) + beta C.
enum Layout { kRowMajor = 101 };
enum Operation { kPlain = 111, kFlipped = 112 };
using Gemm = void (*)(Layout, Operation, Operation, int, int, int, float, const float*, int, const float*, int, float,
                      float*, int);
Gemm library = nullptr;

// Calls use(T{}) for the type of a buffer, float32 or bfloat16.
template <typename Use>
ffi::Error ForType(ffi::DataType type, const Use& use) {
  if (type == ffi::F32) {
    if (library == nullptr) return ffi::Error::Internal("JaxgptUseLibrary has not been called");
    return use(float{}), ffi::Error::Success();
  }
#ifdef JAXGPT_TILES
  if (type == ffi::BF16 && TilesGranted()) return use(BF16{}), ffi::Error::Success();
#endif
  return ffi::Error::InvalidArgument("operands must be float32, or bfloat16 on a processor with AMX");
}

// An array that grows when it must, and whose pages are touched only where it is used.
class Room {
 public:
  template <typename T>
  T* of(int64_t size) {
    const size_t needed = Quotient(size * sizeof(T), sizeof(Line));
    if (needed > length) {
      length = 0;
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
thread_local Room rooms[11];

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
  static inline std::vector<Room>& kept = *new std::vector<Room>;  // threads may outlive what is destroyed at the end
};

// What a thread sets up for its products of a type.
template <typename T>
struct Units {};
#ifdef JAXGPT_TILES
template <>
struct Units<BF16> : TileUnits {};
#endif

// c [M, N] = a [M, K] b [K, N] in rows that are `stride` apart, added to what c holds if `add`; by one thread.
void Multiply(int64_t M, int64_t N, int64_t K, Matrix<float> a, Matrix<float> b, float* c, int64_t stride,
              bool add = false) {
  const auto operation = [](Matrix<float> x) { return x.flipped ? kFlipped : kPlain; };
  library(kRowMajor, operation(a), operation(b), M, N, K, 1, a.data, a.stride, b.data, b.stride, add, c, stride);
}

// c [M, N] = a [M, K] b [K, N], of which each thread takes some rows or columns.
void Product(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Matrix<float> a, Matrix<float> b, float* c) {
  const int64_t length = std::max(M, N), stripe = kLanes * Quotient(length, kLanes * Threads(pool));
  Share(pool, Quotient(length, stripe), [&](int64_t i) {
    const int64_t first = i * stripe, n = std::min(stripe, length - first);
    if (M >= N)
      Multiply(n, N, K, a.from(first, 0), b, c + first * N, N);
    else
      Multiply(M, n, K, a, b.from(0, first), c + first, N);
  });
}

constexpr int64_t kMostSummed = 4096;  // length of the sums for which operands are packed at a time

#ifdef JAXGPT_TILES
// c [M, N] from packed blocks of rows and of columns, which are `left_apart` and `right_apart` elements apart.
void MultiplyPacked(int64_t M, int64_t N, int64_t steps, const BF16* left, int64_t left_apart, const BF16* right,
                    int64_t right_apart, float* c, int64_t stride, bool add) {
  alignas(kLine) float sums[kBlock * kBlock];
  for (int64_t j = 0; j < N; j += kBlock, right += right_apart)
    for (int64_t i = 0; i < M; i += kBlock) {
      const BF16* rows = left + i / kBlock * left_apart;
      float* to = c + i * stride + j;
      if (i + kBlock <= M && j + kBlock <= N) {
        MultiplyBlock(rows, right, steps, to, stride, add);
        continue;
      }
      MultiplyBlock(rows, right, steps, sums, kBlock, false);
      for (int64_t r = 0; r < std::min(kBlock, M - i); ++r)
        for (int64_t n = 0; n < std::min(kBlock, N - j); ++n)
          to[r * stride + n] = sums[r * kBlock + n] + (add ? to[r * stride + n] : 0);
    }
}

void Multiply(int64_t M, int64_t N, int64_t K, Matrix<BF16> a, Matrix<BF16> b, float* c, int64_t stride,
              bool add = false) {
  BF16 *left = rooms[4].of<BF16>(PackedSize(M, K)), *right = rooms[5].of<BF16>(PackedSize(N, K));
  Pack(Side::kLeft, a, M, K, left);
  Pack(Side::kRight, b.transpose(), N, K, right);
  MultiplyPacked(M, N, Steps(K), left, PackedSize(kBlock, K), right, PackedSize(kBlock, K), c, stride, add);
}

// Rows and columns of which operands and sums stay in a core's cache, in chunks of so many steps.
constexpr int64_t kRows = 128, kColumns = 384, kChunk = 24;
constexpr int64_t kPacked = 32 << 20;  // bytes of the left operand that are packed at a time

// The number of columns that a thread takes of n: the largest that divides n, of at least half of `kColumns`, or else
// `kColumns`.
int64_t Columns(int64_t n) {
  for (int64_t size = kColumns; size >= kColumns / 2; size -= kBlock)
    if (n % size == 0) return size;
  return kColumns;
}

// a [M, K] b [K, N], part by part: of a, so much is packed as `kPacked` allows; of b, the columns that a thread takes
// are packed by itself. finish(sums, stride, row, column, m, n, add) takes the sums [m, n] that begin at a row and a
// column, in rows that are `stride` apart; `add` if others were there before, which is so only if K > `kMostSummed`.
template <typename A, typename B, typename Finish>
void Parts(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Matrix<A> a, Matrix<B> b, const Finish& finish) {
  const int64_t columns = Columns(N), across = Quotient(N, columns);
  SharedRoom shared;
  for (int64_t k = 0; k < K; k += kMostSummed) {
    const int64_t depth = std::min(K - k, kMostSummed), steps = Steps(depth);
    const int64_t most = std::max(kBlock, kPacked / int64_t(depth * sizeof(BF16)) / kBlock * kBlock);
    for (int64_t top = 0; top < M; top += most) {
      const int64_t rows = std::min(M - top, most), down = Quotient(rows, kBlock);
      BF16* left = shared.room.of<BF16>(PackedSize(rows, depth));
      Share(pool, down, [&](int64_t i) {
        Pack(Side::kLeft, a.from(top + i * kBlock, k), std::min(kBlock, rows - i * kBlock), depth,
             left + PackedSize(i * kBlock, depth));
      });
      // As many groups of rows as keep all threads busy. Longer sums are worth more rows, whose columns are read again.
      const int64_t groups = std::min(down, Quotient(2 * Threads(pool), across));
      const int64_t height = steps > kChunk ? 2 * kRows : kRows;
      Share(pool, across * groups, [&](int64_t task) {
        const TileUnits units;
        const int64_t column = task % across * columns, n = std::min(columns, N - column), group = task / across;
        BF16* right = rooms[0].of<BF16>(PackedSize(n, depth));
        float* sums = rooms[1].of<float>(height * columns);
        Pack(Side::kRight, b.from(k, column).transpose(), n, depth, right);
        const int64_t end = down * (group + 1) / groups * kBlock;
        for (int64_t row = down * group / groups * kBlock; row < end; row += height) {
          const int64_t m = std::min(height, end - row);
          for (int64_t step = 0; step < steps; step += kChunk)
            for (int64_t j = 0; j < n; j += kBlock)
              for (int64_t i = 0; i < m; i += kBlock)
                MultiplyBlock(left + PackedSize(row + i, depth) + step * 2 * kTile,
                              right + PackedSize(j, depth) + step * 2 * kTile, std::min(kChunk, steps - step),
                              sums + i * columns + j, columns, step > 0);
          finish(sums, columns, top + row, column, std::min(m, rows - row), n, k > 0);
        }
      });
    }
  }
}

template <typename A, typename B>
void Product(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Matrix<A> a, Matrix<B> b, float* c) {
  Parts(pool, M, N, K, a, b,
        [=](const float* sums, int64_t stride, int64_t row, int64_t column, int64_t m, int64_t n, bool add) {
          for (int64_t r = 0; r < m; ++r, sums += stride) {
            float* to = c + (row + r) * N + column;
            if (add)
              for (int64_t i = 0; i < n; ++i) to[i] += sums[i];
            else
              std::memcpy(to, sums, n * sizeof(float));
          }
        });
}
#endif

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
  // Where one of them is in bfloat16, the other is rounded to it.
  const bool rounded = x.element_type() == ffi::BF16 || y.element_type() == ffi::BF16;
  return ForType(rounded ? ffi::BF16 : ffi::F32, [&](auto type) {
    if constexpr (std::is_same_v<decltype(type), BF16>) {
      const auto with = [&](auto left, auto right) {
        Product(pool, M, N, K, left(x, xs, x_flipped), right(y, ys, y_flipped), result->typed_data());
      };
      if (x.element_type() == ffi::F32)
        with(MatrixOf<float>, MatrixOf<BF16>);
      else if (y.element_type() == ffi::F32)
        with(MatrixOf<BF16>, MatrixOf<float>);
      else
        with(MatrixOf<BF16>, MatrixOf<BF16>);
    } else {
      Product(pool, M, N, K, MatrixOf<float>(x, xs, x_flipped), MatrixOf<float>(y, ys, y_flipped), result->typed_data());
    }
  });
}

// gelu(x y^T + bias), rounded to bfloat16, for x [M, K], y [N, K] and bias [N].
ffi::Error GeluOfProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> y,
                         ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::BF16> result) {
  const auto xs = x.dimensions(), ys = y.dimensions(), sizes = result->dimensions();
  if (xs.size() != 2 || ys.size() != 2 || sizes.size() != 2 || xs[1] != ys[1] || sizes[0] != xs[0] ||
      sizes[1] != ys[0] || int64_t(bias.element_count()) != ys[0] || xs[1] > kMostSummed)
    return ffi::Error::InvalidArgument("x must be [M, K], y [N, K], bias [N], the result [M, N], and K at most 4096");
  return ForType(x.element_type(), [&](auto type) {
#ifdef JAXGPT_TILES
    if constexpr (std::is_same_v<decltype(type), BF16>) {
      const int64_t M = xs[0], N = ys[0], K = xs[1];
      const float* shift = bias.typed_data();
      BF16* out = reinterpret_cast<BF16*>(result->typed_data());
      const auto operand = [K](ffi::Buffer<ffi::BF16>& x) {
        return Matrix<BF16>{reinterpret_cast<const BF16*>(x.typed_data()), K};
      };
      Parts(pool, M, N, K, operand(x), operand(y).transpose(),
            [=](const float* sums, int64_t stride, int64_t row, int64_t column, int64_t m, int64_t n, bool) {
              for (int64_t r = 0; r < m; ++r, sums += stride)
                for (int64_t i = 0; i < n; i += kLanes)
                  Put(out + (row + r) * N + column + i, Gelu(Load(sums + i) + Load(shift + column + i, n - i)), n - i);
            });
    }
#endif
  });
}

constexpr int64_t kStart = 32;  // what the keys that a block sees start at a multiple of, and are filled up to
constexpr int64_t Padded(int64_t n) { return kStart * Quotient(n, kStart); }
// How far rows of n numbers are apart: not at a power of two, where they would fall into the same places of the cache.
constexpr int64_t Apart(int64_t n) { return Padded(n) + kLanes; }

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
  Floats factor = {};
  for (int64_t l = 0; l < std::min(n, kLanes); ++l) factor[l] = kept[l];
  return x * factor;
}

// The keys or the values of a row and head, [T, K], which products take some rows of.
template <typename T>
struct Rows {
  Matrix<T> x;
  int64_t K;

  Rows(Matrix<T> x, int64_t, int64_t K, Room*, Room*) : x(x), K(K) {}
  // c [m, n] = q [m, K] x^T, for n rows of x.
  void Scores(Matrix<T> q, int64_t m, int64_t start, int64_t n, float* c, int64_t stride) const {
    Multiply(m, n, K, q, x.from(start, 0).transpose(), c, stride);
  }
  // Where the weight of row j belongs, in row r of those that `Sum` takes.
  static int64_t Place(int64_t r, int64_t j, int64_t n) { return r * Apart(n) + j; }
  // c [m, K] = w [m, n] x, for n rows of x.
  void Sum(const T* w, int64_t m, int64_t start, int64_t n, float* c, int64_t stride) const {
    Multiply(m, K, n, {w, Place(1, 0, n)}, x.from(start, 0), c, stride);
  }
};

#ifdef JAXGPT_TILES
// They are packed once, for as many of these functions as have a room.
template <>
struct Rows<BF16> {
  const BF16 *for_scores, *for_sums;
  int64_t T, K;

  Rows(Matrix<BF16> x, int64_t T, int64_t K, Room* scores, Room* sums)
      : for_scores(Packed(scores, x, T, K)), for_sums(Packed(sums, x.transpose(), K, T)), T(T), K(K) {}
  void Scores(Matrix<BF16> q, int64_t m, int64_t start, int64_t n, float* c, int64_t stride) const {
    BF16* left = rooms[4].of<BF16>(PackedSize(m, K));
    Pack(Side::kLeft, q, m, K, left);
    const int64_t apart = PackedSize(kBlock, K);
    MultiplyPacked(m, n, Steps(K), left, apart, for_scores + PackedSize(start, K), apart, c, stride, false);
  }
  static int64_t Place(int64_t r, int64_t j, int64_t n) {
    return PackedSize(r / kBlock * kBlock, n) + (j / kStep * 2 + r % kBlock / kSide) * kTile + r % kSide * kStep + j % kStep;
  }
  void Sum(const BF16* w, int64_t m, int64_t start, int64_t n, float* c, int64_t stride) const {
    MultiplyPacked(m, K, Steps(n), w, PackedSize(kBlock, n), for_sums + PackedSize(kBlock, start),
                   PackedSize(kBlock, T), c, stride, false);
  }

 private:
  static const BF16* Packed(Room* room, Matrix<BF16> x, int64_t n, int64_t K) {
    if (room == nullptr) return nullptr;
    BF16* to = room->of<BF16>(PackedSize(n, K));
    Pack(Side::kRight, x, n, K, to);
    return to;
  }
};
#endif

template <typename T>
void Forward(const Shape& s, int64_t b, int64_t i, const T* q, const Rows<T>& k, const Rows<T>& v, Mask mask, float* y,
             float* stats) {
  const int64_t K = s.K, apart = s.H * K, t0 = i * s.block, t1 = s.end(i), start = s.start(b, i), n = t1 - start;
  const int64_t stride = Apart(n);
  float* scores = rooms[0].of<float>(s.block * stride);
  T* weights = rooms[1].of<T>(Padded(s.block) * stride);
  k.Scores({q + t0 * apart, apart}, t1 - t0, start, n, scores, stride);
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
    const auto out = [&](int64_t j) { return weights + Rows<T>::Place(t - t0, j, n); };
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

template <typename T>
void Backward(const Shape& s, int64_t b, const T* q, const T* keys, const T* values, const T* g, const float* inner,
              const float* stats, const std::vector<Mask>& masks, float* dq, float* dk, float* dv) {
  const int64_t K = s.K, apart = s.H * K;
  const Rows<T> k({keys, apart}, s.T, K, &rooms[6], &rooms[7]), v({values, apart}, s.T, K, &rooms[8], nullptr);
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
    // d_scores as the sum of keys reads them, which in float32 is how they lie anyway.
    constexpr bool kElsewhere = std::is_same_v<T, BF16>;
    T* placed = kElsewhere ? rooms[9].of<T>(Padded(s.block) * stride) : d_scores;
    const Matrix<T> qs{q + t0 * apart, apart}, gs{g + t0 * apart, apart};
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
        if (kElsewhere) Put(placed + Rows<T>::Place(t - t0, j, n), d_score);
      }
      for (; j < Padded(n); j += kLanes) {
        Put(weights + at + j, Floats{}), Put(d_scores + at + j, Floats{});
        if (kElsewhere) Put(placed + Rows<T>::Place(t - t0, j, n), Floats{});
      }
    }
    const Matrix<T> ws{weights, stride}, ds{d_scores, stride};
    k.Sum(placed, t1 - t0, start, n, dq + t0 * apart, apart);
    Multiply(n, K, t1 - t0, ds.transpose(), qs, dk_sums + start * K, K, true);
    Multiply(n, K, t1 - t0, ws.transpose(), gs, dv_sums + start * K, K, true);
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
    return ffi::Unexpected(ffi::Error::InvalidArgument("q must be [B, T, H, K], first [B, T], and block a multiple of 32 up to 512"));
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
  return ForType(q.element_type(), [&](auto type) {
    using T = decltype(type);
    const auto in = [](ffi::AnyBuffer& x) { return static_cast<const T*>(x.untyped_data()); };
    // As many groups of blocks as keep all threads busy. The last blocks have most to do, so they come first.
    const int64_t heads = s.B * s.H, groups = std::min(s.blocks(), Quotient(4 * Threads(pool), heads));
    Share(pool, heads * groups, [&](int64_t n) {
      const Units<T> units;
      const int64_t bh = n % heads, group = groups - 1 - n / heads, at = s.at(bh), apart = s.H * s.K;
      const int64_t blocks = s.blocks() * (group + 1) / groups, end = s.end(blocks - 1);
      const Rows<T> keys({in(k) + at, apart}, end, s.K, &rooms[2], nullptr);
      const Rows<T> values({in(v) + at, apart}, end, s.K, nullptr, &rooms[3]);
      for (int64_t i = s.blocks() * group / groups; i < blocks; ++i)
        Forward(s, bh / s.H, i, in(q) + at, keys, values, MaskOf(s, (*masks)[i], bh, i), y->typed_data() + at,
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
      const Units<T> units;
      std::vector<Mask> own(s.blocks());
      for (int64_t i = 0; i < s.blocks(); ++i) own[i] = MaskOf(s, (*masks)[i], bh, i);
      const int64_t at = s.at(bh);
      Backward(s, bh / s.H, in(q) + at, in(k) + at, in(v) + at, in(g) + at, inner.typed_data() + bh * s.T,
               stats.typed_data() + bh * s.T * 2, own, dq->typed_data() + at, dk->typed_data() + at,
               dv->typed_data() + at);
    });
  });
}

}  // namespace

// MKL's cblas_sgemm.
extern "C" void JaxgptUseLibrary(void* function) { library = reinterpret_cast<Gemm>(function); }

// Whether there are functions for bfloat16 here.
extern "C" int JaxgptHasTiles() {
#ifdef JAXGPT_TILES
  return TilesGranted();
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
