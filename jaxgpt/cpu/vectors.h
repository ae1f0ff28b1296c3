// Vectors of floats, and the sharing of work between the threads of XLA's pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__SSE2__)
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

constexpr int64_t kLine = 64;  // bytes per cache line

template <typename T, int64_t N = kLanes>
using Vector [[gnu::vector_size(sizeof(T) * N)]] = T;
using Floats = Vector<float>;
using Ints = Vector<int32_t>;
using Shorts = Vector<int16_t, 2 * kLanes>;

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

inline Shorts LoadShorts(const int16_t* p) { return Read<Shorts>(p); }
inline Shorts LoadShorts(const int8_t* p) {
#if defined(__AVX512BW__)
  return (Shorts)_mm512_cvtepi8_epi16(Read<__m256i>(p));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return (Shorts)_mm256_cvtepi8_epi16(Read<__m128i>(p));
#else
  return __builtin_convertvector(Read<Vector<int8_t, 2 * kLanes>>(p), Shorts);
#endif
}

// c and, added to each of its elements, the products of two neighbours; exact while that is below 2^31.
inline Ints MultiplyAdd(Shorts a, Shorts b, Ints c) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  c += (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
  asm("" : "+v"(c));  // GCC would add in another order, for which there are too few registers
  return c;
#elif defined(__AVX2__) && !defined(__AVX512F__)
  c += (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
  asm("" : "+x"(c));
  return c;
#elif defined(__SSE2__) && !defined(__AVX512F__)
  __m128i as[2], bs[2];
  std::memcpy(as, &a, sizeof a), std::memcpy(bs, &b, sizeof b);
  const __m128i sums[] = {_mm_madd_epi16(as[0], bs[0]), _mm_madd_epi16(as[1], bs[1])};
  return c + Read<Ints>(sums);
#else
  const auto upper = [](Shorts x) { return (Ints)x >> 16; };
  const auto lower = [](Shorts x) { return (Ints)((Vector<uint32_t>)x << 16) >> 16; };
  return c + upper(a) * upper(b) + lower(a) * lower(b);
#endif
}

// What `load` makes of the first n of N elements, and zeros for the rest.
template <int64_t N, typename T, typename L>
inline auto LoadFew(const T* p, int64_t n, const L& load) {
  T few[N] = {};
  std::memcpy(few, p, n * sizeof(T));
  return load(few);
}

template <typename T>
inline Floats Load(const T* p, int64_t n) {
  return n >= kLanes ? Load(p) : LoadFew<kLanes>(p, n, [](const T* few) { return Load(few); });
}

inline void Store(float* p, Floats x, int64_t n) { std::memcpy(p, &x, std::min(n, kLanes) * sizeof(float)); }

// The sum of a vector's elements, half by half.
inline float Sum(Vector<float, 4> x) { return (x[0] + x[2]) + (x[1] + x[3]); }
template <typename V>
inline float Sum(V x) {
  Vector<float, sizeof(V) / 8> halves[2];
  std::memcpy(halves, &x, sizeof x);
  return Sum(halves[0] + halves[1]);
}

// The larger of two numbers, lane by lane, and the largest of a vector's; NaN if one of them is.
inline Floats Larger(Floats a, Floats b) { return a > b || a != a ? a : b; }
inline float Largest(Floats x) {
  float most = x[0];
  for (int64_t l = 1; l < kLanes; ++l) most = x[l] > most || x[l] != x[l] ? x[l] : most;
  return most;
}

constexpr int64_t Quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }  // rounded up

inline int64_t Threads(ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

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

// exp(x) for x <= 0, to 1e-7 of its value; NaN for NaN. Source: the Cephes library, expf.
inline Floats Exp(Floats x) {
  const Floats zero = {}, least = zero - 87.0f, magic = zero + 0x1.8p23f;  // adding `magic` rounds to an integer
  x = x < least ? least : x;
  const Floats shifted = Fma(x, zero + 1.44269504f, magic), n = shifted - magic;  // x = n ln 2 + r
  const Floats r = Fma(n, zero + 2.12194440e-4f, Fma(n, zero - 0.693359375f, x));
  Floats y = zero + 1.9875691500e-4f;
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = Fma(y, r, zero + c);
  y = Fma(y, r * r, r) + 1.0f;
  return y * (Floats)(((Vector<int32_t>)shifted << 23) + 0x3f800000);
}

// Stores a whole vector, in float32 or rounded to bfloat16.
inline void Put(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline void Put(BF16* p, Floats x) {
#if defined(__AVX512BF16__)
  const auto rounded = _mm512_cvtneps_pbh((__m512)x);
#else
  using Bits = Vector<uint32_t>;
  const Bits bits = (Bits)x, even = bits + 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
  const auto rounded = __builtin_convertvector((x == x ? even : bits | 0x400000) >> 16, Vector<uint16_t>);
#endif
  std::memcpy(p, &rounded, sizeof rounded);
}

// Stores the first n of a vector's elements.
template <typename T>
inline void Put(T* p, Floats x, int64_t n) {
  if (n >= kLanes) return Put(p, x);
  T few[kLanes];
  Put(few, x);
  std::memcpy(p, few, n * sizeof(T));
}

}  // namespace
