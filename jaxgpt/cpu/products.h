// Matrix products with float32 sums, in two ways that have the same functions: `ByTiles`, which packs numbers as
// float32 or bfloat16, and `ByLibrary`, of float32 by Intel's MKL.
//
// Their `Product` shares the work between the threads of XLA's pool; the rest is for one thread.

#pragma once

#include "tiles.h"

#include <mutex>

namespace {

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

constexpr int64_t kStart = 32;  // what the keys that a block sees start at a multiple of, and are filled up to
constexpr int64_t Padded(int64_t n) { return kStart * Quotient(n, kStart); }
// How far rows of n numbers are apart: not at a power of two, where they would fall into the same places of the cache.
constexpr int64_t Apart(int64_t n) { return Padded(n) + kLanes; }

// MKL's CBLAS. Its matrices are row-major here, and its products C = alpha op(A) op(B) + beta C.
enum Layout { kRowMajor = 101 };
enum Operation { kPlain = 111, kFlipped = 112 };
using Gemm = void (*)(Layout, Operation, Operation, int, int, int, float, const float*, int, const float*, int, float,
                      float*, int);
Gemm library = nullptr;

struct ByLibrary {
  using Number = float;
  struct Units {};

  // c [M, N] = a [M, K] b [K, N] in rows that are `stride` apart, added to what c holds if `add`.
  static void Multiply(int64_t M, int64_t N, int64_t K, Matrix<float> a, Matrix<float> b, float* c, int64_t stride,
                       bool add = false) {
    const auto operation = [](Matrix<float> x) { return x.flipped ? kFlipped : kPlain; };
    library(kRowMajor, operation(a), operation(b), M, N, K, 1, a.data, a.stride, b.data, b.stride, add, c, stride);
  }

  // c [M, N] = a [M, K] b [K, N], of which each thread takes some rows or columns.
  static void Product(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Matrix<float> a, Matrix<float> b,
                      float* c) {
    const int64_t length = std::max(M, N), stripe = kLanes * Quotient(length, kLanes * Threads(pool));
    Share(pool, Quotient(length, stripe), [&](int64_t i) {
      const int64_t first = i * stripe, n = std::min(stripe, length - first);
      if (M >= N)
        Multiply(n, N, K, a.from(first, 0), b, c + first * N, N);
      else
        Multiply(M, n, K, a, b.from(0, first), c + first, N);
    });
  }

  // The keys or the values of a row and head, [T, K], which products take some rows of.
  class Rows {
   public:
    Rows(Matrix<float> x, int64_t, int64_t K, Room*, Room*) : x(x), K(K) {}
    // c [m, n] = q [m, K] x^T, for n rows of x.
    void Scores(Matrix<float> q, int64_t m, int64_t start, int64_t n, float* c, int64_t stride) const {
      Multiply(m, n, K, q, x.from(start, 0).transpose(), c, stride);
    }
    // Where the weight of row j belongs in row r of those that `Sum` takes, which may be packed, as a left operand is.
    static int64_t Place(int64_t r, int64_t j, int64_t n) { return r * Apart(n) + j; }
    // c [m, K] = w [m, n] x, for n rows of x.
    void Sum(const float* w, int64_t m, int64_t start, int64_t n, float* c, int64_t stride) const {
      Multiply(m, K, n, {w, Place(1, 0, n)}, x.from(start, 0), c, stride);
    }

   private:
    Matrix<float> x;
    int64_t K;
  };
  static constexpr bool kPlaced = false;  // whether `Sum` takes weights in another order than that of rows
};

constexpr int64_t kMostSummed = 4096;  // length of the sums for which operands are packed at a time

#ifdef JAXGPT_TILES
// Rows and columns of which operands and sums stay in a core's cache, in chunks of so many steps.
constexpr int64_t kRows = 128, kColumns = 384, kChunk = 24;
constexpr int64_t kPacked = 32 << 20;  // bytes of the left operand that are packed at a time

// The number of columns that a thread takes of n: the largest that divides n, of at least half of `kColumns`, or else
// `kColumns`.
inline int64_t Columns(int64_t n) {
  for (int64_t size = kColumns; size >= kColumns / 2; size -= kBlock)
    if (n % size == 0) return size;
  return kColumns;
}

template <typename T>
struct ByTiles {
  using Number = T;
  using Units = ::Units<T>;

  template <typename A, typename B>
  static void Multiply(int64_t M, int64_t N, int64_t K, Matrix<A> a, Matrix<B> b, float* c, int64_t stride,
                       bool add = false) {
    T *left = rooms[4].of<T>(PackedSize<T>(M, K)), *right = rooms[5].of<T>(PackedSize<T>(N, K));
    Pack(Side::kLeft, a, M, K, left);
    Pack(Side::kRight, b.transpose(), N, K, right);
    MultiplyPacked(M, N, Steps<T>(K), left, PackedSize<T>(kBlock, K), right, PackedSize<T>(kBlock, K), c, stride, add);
  }

  // a [M, K] b [K, N], part by part: of a, so much is packed as `kPacked` allows; of b, the columns that a thread takes
  // are packed by itself. The sums are added up in c [M, N], or, where that is null, taken by finish(sums, stride, row,
  // column, m, n, add): those [m, n] that begin at a row and a column, in rows that are `stride` apart; `add` if others
  // were there before, which is so only if K > `kMostSummed`.
  template <typename A, typename B, typename Finish>
  static void Parts(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Matrix<A> a, Matrix<B> b, float* c,
                    const Finish& finish) {
    const int64_t columns = Columns(N), across = Quotient(N, columns);
    SharedRoom shared;
    for (int64_t k = 0; k < K; k += kMostSummed) {
      const int64_t depth = std::min(K - k, kMostSummed), steps = Steps<T>(depth), apart = PackedSize<T>(kBlock, depth);
      const int64_t most = std::max(kBlock, kPacked / int64_t(depth * sizeof(T)) / kBlock * kBlock);
      for (int64_t top = 0; top < M; top += most) {
        const int64_t rows = std::min(M - top, most), down = Quotient(rows, kBlock);
        T* left = shared.room.of<T>(PackedSize<T>(rows, depth));
        Share(pool, down, [&](int64_t i) {
          Pack(Side::kLeft, a.from(top + i * kBlock, k), std::min(kBlock, rows - i * kBlock), depth, left + i * apart);
        });
        // As many groups of rows as keep all threads busy. Longer sums are worth more rows, whose columns are read
        // again.
        const int64_t groups = std::min(down, Quotient(2 * Threads(pool), across));
        const int64_t height = steps > kChunk ? 2 * kRows : kRows;
        Share(pool, across * groups, [&](int64_t task) {
          const Units units;
          const int64_t column = task % across * columns, n = std::min(columns, N - column), group = task / across;
          T* right = rooms[0].of<T>(PackedSize<T>(n, depth));
          Pack(Side::kRight, b.from(k, column).transpose(), n, depth, right);
          const int64_t end = down * (group + 1) / groups * kBlock;
          for (int64_t row = down * group / groups * kBlock; row < end; row += height) {
            const int64_t m = std::min({height, end - row, rows - row});
            // In a room of their own, sums are of whole blocks.
            const int64_t whole_m = Quotient(m, kBlock) * kBlock, whole_n = Quotient(n, kBlock) * kBlock;
            float* sums = c ? c + (top + row) * N + column : rooms[1].of<float>(height * columns);
            for (int64_t step = 0; step < steps; step += kChunk)
              MultiplyPacked(c ? m : whole_m, c ? n : whole_n, std::min(kChunk, steps - step),
                             left + row / kBlock * apart + step * 2 * kTile<T>, apart,
                             right + step * 2 * kTile<T>, apart, sums, c ? N : columns, step > 0 || (c && k > 0));
            if (!c) finish(sums, columns, top + row, column, m, n, k > 0);
          }
        });
      }
    }
  }

  template <typename A, typename B>
  static void Product(ffi::ThreadPool& pool, int64_t M, int64_t N, int64_t K, Matrix<A> a, Matrix<B> b, float* c) {
    // Tile units store a block in 32 pages of c, which costs them more than to copy whole rows.
    Parts(pool, M, N, K, a, b, kHasUnits<T> ? nullptr : c,
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

  // They are packed once, for as many of the functions as have a room.
  class Rows {
   public:
    template <typename In>
    Rows(Matrix<In> x, int64_t length, int64_t K, Room* scores, Room* sums)
        : for_scores(Packed(scores, x, length, K)),
          for_sums(Packed(sums, x.transpose(), K, length)),
          length(length),
          K(K) {}
    template <typename In>
    void Scores(Matrix<In> q, int64_t m, int64_t start, int64_t n, float* c, int64_t stride) const {
      T* left = rooms[4].of<T>(PackedSize<T>(m, K));
      Pack(Side::kLeft, q, m, K, left);
      const int64_t apart = PackedSize<T>(kBlock, K);
      MultiplyPacked(m, n, Steps<T>(K), left, apart, for_scores + PackedSize<T>(start, K), apart, c, stride, false);
    }
    static int64_t Place(int64_t r, int64_t j, int64_t n) {
      return PackedSize<T>(r / kBlock * kBlock, Padded(n)) + (j / kStep<T> * 2 + r % kBlock / kSide) * kTile<T> +
             r % kSide * kStep<T> + j % kStep<T>;
    }
    void Sum(const T* w, int64_t m, int64_t start, int64_t n, float* c, int64_t stride) const {
      MultiplyPacked(m, K, Steps<T>(n), w, PackedSize<T>(kBlock, Padded(n)), for_sums + PackedSize<T>(kBlock, start),
                     PackedSize<T>(kBlock, length), c, stride, false);
    }

   private:
    template <typename In>
    static const T* Packed(Room* room, Matrix<In> x, int64_t n, int64_t K) {
      if (room == nullptr) return nullptr;
      T* to = room->of<T>(PackedSize<T>(n, K));
      Pack(Side::kRight, x, n, K, to);
      return to;
    }

    const T *for_scores, *for_sums;
    int64_t length, K;
  };
  static constexpr bool kPlaced = true;

 private:
  // c [M, N] from packed blocks of rows and of columns, which are `left_apart` and `right_apart` elements apart.
  static void MultiplyPacked(int64_t M, int64_t N, int64_t steps, const T* left, int64_t left_apart, const T* right,
                             int64_t right_apart, float* c, int64_t stride, bool add) {
    alignas(kLine) float sums[kBlock * kBlock];
    for (int64_t j = 0; j < N; j += kBlock, right += right_apart)
      for (int64_t i = 0; i < M; i += kBlock) {
        const T* rows = left + i / kBlock * left_apart;
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
};
#endif

}  // namespace
