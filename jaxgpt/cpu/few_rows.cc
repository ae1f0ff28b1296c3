// y = x W^T for 1 to 32 rows of x: all of XLA's threads together read W once, in the type it is stored in.
//
// Such a product takes as long as reading W, at least for few rows. XLA's code for it converts W in narrower vectors
// and, with several rows of x, runs as a general matrix product; here reading W is the only cost, and each of its cache
// lines is prefetched well before it is needed. kernel.py builds and loads this file.
//
// A row's result has the same bits whatever rows come with it and however many threads there are: each element is one
// sum in one order, written with explicit fused multiply-adds (kernel.py forbids the compiler to make any itself).

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16, kRegisters = 32;  // floats per vector; vectors that the processor holds
#else
constexpr int64_t kLanes = 8, kRegisters = 16;
#endif
constexpr int64_t kLine = 64;            // bytes per cache line
constexpr int64_t kAhead = 4096;         // bytes; 2048 to 8192 measured the same
constexpr int64_t kBlock = 2 << 20;      // most bytes of W that a thread takes at a time
constexpr int kMostRows = 32;            // of x
constexpr int kTile = kRegisters / 4;    // most rows of x at a time
constexpr int kGroup = 24;               // rows of W that stay in cache for all rows of x

template <typename T, int64_t N = kLanes>
using Vector [[gnu::vector_size(sizeof(T) * N)]] = T;
using Floats = Vector<float>;

struct BF16 {
  uint16_t bits;  // the upper half of a float32
};

template <typename T>
inline T Read(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline Floats Load(const float* p) { return Read<Floats>(p); }
#if defined(__AVX512F__)
inline Floats Load(const int8_t* p) { return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Read<__m128i>(p))); }
inline Floats Load(const BF16* p) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(Read<__m256i>(p)), 16);
}
inline Floats Fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__AVX2__) && defined(__FMA__)
inline Floats Load(const int8_t* p) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats Load(const BF16* p) {
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(Read<__m128i>(p)), 16);
}
inline Floats Fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline Floats Load(const int8_t* p) {
  // Doubles the width step by step: GCC makes scalar code of a single wider conversion.
  const auto wide = __builtin_convertvector(Read<Vector<int8_t>>(p), Vector<int16_t>);
  return __builtin_convertvector(__builtin_convertvector(wide, Vector<int32_t>), Floats);
}
inline Floats Load(const BF16* p) {
  return (Floats)(__builtin_convertvector(Read<Vector<uint16_t>>(p), Vector<uint32_t>) << 16);
}
inline Floats Fma(Floats a, Floats b, Floats c) {
#ifdef __FP_FAST_FMAF
  for (int64_t l = 0; l < kLanes; ++l) c[l] = std::fma(a[l], b[l], c[l]);
  return c;
#else
  return a * b + c;
#endif
}
#endif

// The first n of a vector's elements, then zeros.
template <typename T>
inline Floats LoadFew(const T* p, int64_t n) {
  T few[kLanes] = {};
  std::memcpy(few, p, n * sizeof(T));
  return Load(few);
}

inline float Sum(Floats x) {
  for (int64_t n = kLanes / 2; n > 0; n /= 2)
    for (int64_t l = 0; l < n; ++l) x[l] += x[l + n];
  return x[0];
}

constexpr int64_t Quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounded up

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
    for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char*>(w + r * D + d) + kAhead);
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

// Calls work(i) for i in [0, n) from this thread and the free threads of the pool. A pool thread that starts late
// finds nothing left, so this never waits for one that has not started: every caller may itself run on the pool.
template <typename Work>
void Share(ffi::ThreadPool& pool, int64_t n, const Work& work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  const auto take = [progress, n, &work] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < n; progress->done.fetch_add(1, std::memory_order_release))
      work(i);
  };
  for (int64_t t = std::min(n, pool.num_threads()); t > 1; --t) pool.Schedule([take] { take(); });
  take();
  while (progress->done.load(std::memory_order_acquire) < n) std::this_thread::yield();
}

template <typename W>
void Product(ffi::ThreadPool& pool, int64_t B, const float* x, const W* w, float* y, int64_t D, int64_t O) {
  // Longer stretches are read faster, but every thread should get as much as the others.
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t pieces = threads * Quotient(O * D * int64_t{sizeof(W)}, threads * kBlock);
  const int64_t rows = kGroup * Quotient(O, pieces * kGroup);
  Share(pool, Quotient(O, rows),
        [&](int64_t i) { Block(B, x, w, y, D, O, i * rows, std::min(O, (i + 1) * rows)); });
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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxgptFewRows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
