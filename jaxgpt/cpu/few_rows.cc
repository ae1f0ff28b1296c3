// y = x W^T for 1 to 8 rows of x: all of XLA's threads together read W once, in the type it is stored in.
//
// Such a product takes as long as reading W. XLA's code for it converts W in narrower vectors and, with several rows of
// x, runs as a general matrix product; here reading W is the only cost, and each of its cache lines is prefetched well
// before it is needed. kernel.py builds and loads this file.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 16, kLine = 64;  // floats per vector; bytes per cache line
constexpr int64_t kAhead = 4096;            // bytes; 2048 to 8192 measured the same
constexpr int64_t kBlock = 2 << 20;         // most bytes of W that a thread takes at a time

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
#ifdef __AVX512F__
inline Floats Load(const int8_t* p) { return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(Read<__m128i>(p))); }
inline Floats Load(const BF16* p) {
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(Read<__m256i>(p)), 16);
}
#else
inline Floats Load(const int8_t* p) {
  // Doubles the width step by step: GCC makes scalar code of a single wider conversion.
  const auto wide = __builtin_convertvector(Read<Vector<int8_t>>(p), Vector<int16_t>);
  return __builtin_convertvector(__builtin_convertvector(wide, Vector<int32_t>), Floats);
}
inline Floats Load(const BF16* p) {
  return (Floats)(__builtin_convertvector(Read<Vector<uint16_t>>(p), Vector<uint32_t>) << 16);
}
#endif

inline float Value(float w) { return w; }
inline float Value(int8_t w) { return w; }
inline float Value(BF16 w) {
  const uint32_t bits = uint32_t{w.bits} << 16;
  return Read<float>(&bits);
}

// y[b, o] for B rows of x and R rows of W.
template <int B, int R, typename W>
void Tile(const float* x, const W* w, float* y, int64_t D, int64_t O) {
  constexpr int64_t kPerLine = kLine / sizeof(W);
  // One sum per vector of a line if there is room for it: an addition takes longer than a load.
  constexpr int64_t kSums = B * R == 1 ? kPerLine / kLanes : 1;
  Floats sums[B][R][kSums] = {};
  int64_t d = 0;
  const auto step = [&](int64_t d, int64_t s) {
    Floats ws[R];
    for (int r = 0; r < R; ++r) ws[r] = Load(w + r * D + d);
    for (int b = 0; b < B; ++b) {
      const Floats xs = Load(x + b * D + d);
      for (int r = 0; r < R; ++r) sums[b][r][s] += ws[r] * xs;
    }
  };
  for (; d + kPerLine <= D; d += kPerLine) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char*>(w + r * D + d) + kAhead);
    for (int64_t v = 0; v < kPerLine / kLanes; ++v) step(d + v * kLanes, v % kSums);
  }
  for (; d + kLanes <= D; d += kLanes) step(d, 0);
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t s = 1; s < kSums; ++s) sums[b][r][0] += sums[b][r][s];
      for (int64_t l = 0; l < kLanes; ++l) sum += sums[b][r][0][l];
      for (int64_t e = d; e < D; ++e) sum += Value(w[r * D + e]) * x[b * D + e];
      y[b * O + r] = sum;
    }
}

// Rows [first, last) of W.
template <int B, int R, typename W>
void Rows(const float* x, const W* w, float* y, int64_t D, int64_t O, int64_t first, int64_t last) {
  int64_t o = first;
  for (; o + R <= last; o += R) Tile<B, R>(x, w + o * D, y + o, D, O);
  for (; o < last; ++o) Tile<B, 1>(x, w + o * D, y + o, D, O);
}

template <typename W>
void Block(int64_t B, const float* x, const W* w, float* y, int64_t D, int64_t O, int64_t first, int64_t last) {
  switch (B) {
    case 1: return Rows<1, 1>(x, w, y, D, O, first, last);
    case 2: return Rows<2, 4>(x, w, y, D, O, first, last);
    case 3: return Rows<3, 4>(x, w, y, D, O, first, last);
    case 4: return Rows<4, 4>(x, w, y, D, O, first, last);
    case 5: return Rows<5, 2>(x, w, y, D, O, first, last);
    case 6: return Rows<6, 2>(x, w, y, D, O, first, last);
    case 7: return Rows<7, 2>(x, w, y, D, O, first, last);
    case 8: return Rows<8, 2>(x, w, y, D, O, first, last);
  }
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
  // Longer stretches are read faster, but every thread should get some.
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), share = (O + threads - 1) / threads;
  const int64_t rows = std::max<int64_t>(8, std::min(kBlock / (D * int64_t{sizeof(W)}), share) / 8 * 8);
  Share(pool, (O + rows - 1) / rows,
        [&](int64_t i) { Block(B, x, w, y, D, O, i * rows, std::min(O, (i + 1) * rows)); });
}

ffi::Error FewRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y) {
  const auto xs = x.dimensions(), ws = w.dimensions();
  if (xs.size() != 2 || ws.size() != 2 || xs[1] != ws[1] || xs[0] < 1 || xs[0] > 8)
    return ffi::Error::InvalidArgument("x must be [1 to 8, D] and W [O, D]");
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
