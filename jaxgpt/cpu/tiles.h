// Matrix products of packed tiles, whose sums are float32: in float32 by the vectors of a processor with AVX2 or
// AVX-512, in bfloat16 by those of one with AVX512_BF16, or by the tile units of one with AMX. Without these, numbers
// in bfloat16 become float32 as they are packed.
//
// A tile has as many rows as a vector has floats, of one vector each: with AVX-512, 16 of 64 bytes, which is also what
// a tile unit holds. One of the left operand holds its rows. One of the right operand holds as many columns; a row of
// it has of each column a number, or in bfloat16 two that follow each other in a sum, which one instruction multiplies.
// Source: Intel's Architecture Instruction Set Extensions Programming Reference, chapter 3.

#pragma once

#include "vectors.h"

namespace {

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
};

}  // namespace

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define JAXGPT_TILES
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define JAXGPT_BF16_TILES
#if defined(__AMX_BF16__) && defined(__linux__)
#define JAXGPT_TILE_UNITS
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace {

constexpr int64_t kSide = kLanes;      // rows of a tile
constexpr int64_t kBlock = 2 * kSide;  // rows and columns of a block of sums, which is 2 x 2 tiles
template <typename T>
constexpr int64_t kStep = sizeof(Floats) / sizeof(T);  // length of the sums that two tiles add
template <typename T>
constexpr int64_t kTile = kSide * kStep<T>;  // elements of an operand's tile

constexpr int64_t kAhead = 512;  // bytes of a row that are fetched ahead of their use

using Words = Vector<uint32_t>;  // each is a number, or two neighbours of a sum

// Of every 2 d words, exchanges the upper d of `a` and the lower d of `b`.
inline void Exchange(Words& a, Words& b, uint32_t d) {
#ifdef __AVX512F__
  const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Words upper = (Words)((lane & d) != 0), first = (upper & (16 - d + lane)) | (~upper & lane);
  const Words second = (upper & (16 + lane)) | (~upper & (lane + d));
  const auto x = (__m512i)a, y = (__m512i)b;
  a = (Words)_mm512_permutex2var_epi32(x, (__m512i)first, y);
  b = (Words)_mm512_permutex2var_epi32(x, (__m512i)second, y);
#else
  const auto x = (__m256i)a, y = (__m256i)b;
  if (d == 4)
    a = (Words)_mm256_permute2x128_si256(x, y, 0x20), b = (Words)_mm256_permute2x128_si256(x, y, 0x31);
  else if (d == 2)
    a = (Words)_mm256_unpacklo_epi64(x, y), b = (Words)_mm256_unpackhi_epi64(x, y);
  else
    a = (Words)_mm256_blend_epi32(x, _mm256_slli_epi64(y, 32), 0xaa),
    b = (Words)_mm256_blend_epi32(_mm256_srli_epi64(x, 32), y, 0xaa);
#endif
}

inline void Transpose(Words (&rows)[kSide]) {
#pragma GCC unroll 4
  for (uint32_t d = kSide / 2; d > 0; d /= 2)
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kSide; ++i)
      if ((i & d) == 0) Exchange(rows[i], rows[i + d], d);
}

enum class Side { kLeft, kRight };

template <typename T>
constexpr int64_t Steps(int64_t K) {
  return Quotient(K, kStep<T>);
}
// Elements of a packed operand of n rows.
template <typename T>
constexpr int64_t PackedSize(int64_t n, int64_t K) {
  return Quotient(n, kBlock) * Steps<T>(K) * 2 * kTile<T>;
}

// A number in float32 that is read as the nearest one in bfloat16.
struct Rounded {
  float number;
};

inline Floats Load(const Rounded* p) {
  BF16 rounded[kLanes];
  Put(rounded, Read<Floats>(p));
  return Load(rounded);
}

// What numbers in bfloat16 are packed as.
#ifdef JAXGPT_BF16_TILES
using FromBF16 = BF16;
#else
using FromBF16 = float;
#endif

// How numbers are packed: `Row` takes the first n of those that follow each other, up to a whole row of a tile, and
// zeros for the rest; `Across` one or two rows of an array, which hold columns, of which n belong to the tile. `left`
// is how many rows there are.
template <typename T>
struct Packing {};

template <>
struct Packing<float> {
  template <typename T>
  static Words Row(const T* p, int64_t n) { return n > 0 ? (Words)Load(p, n) : Words{}; }
  template <typename T>
  static Words Across(const T* p, int64_t, int64_t left, int64_t n) { return left > 0 ? Row(p, n) : Words{}; }
};

#ifdef JAXGPT_BF16_TILES
template <>
struct Packing<BF16> {
  static Words Row(const BF16* p, int64_t n) { return (Words)_mm512_maskz_loadu_epi16(Few(n), p); }
  template <typename T>
  static Words Row(const T* p, int64_t n) {
    const __m512 upper = Wide(p + kSide, n - kSide);
    return (Words)_mm512_cvtne2ps_pbh(upper, Wide(p, n));
  }
  template <typename T>
  static Words Across(const T* p, int64_t stride, int64_t left, int64_t n) {
    const Words even = left > 0 ? Half(p, n) : Words{}, odd = left > 1 ? Half(p + stride, n) : Words{};
    return even | odd << 16;
  }

 private:
  static uint32_t Few(int64_t n) { return n >= 32 ? ~uint32_t{0} : (uint32_t{1} << std::max<int64_t>(n, 0)) - 1; }
  static Words Half(const BF16* p, int64_t n) {
    return (Words)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(Few(n), p));
  }
  template <typename T>
  static Words Half(const T* p, int64_t n) {
    return (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(Wide(p, n)));
  }
  // The first n of a vector of numbers, in float32, before they are rounded.
  static __m512 Wide(const Rounded* p, int64_t n) { return _mm512_maskz_loadu_ps(Few(n), p); }
  static __m512 Wide(const int8_t* p, int64_t n) { return (__m512)Packing<float>::Row(p, n); }
};
#endif

// Packs x [n, K], the left operand of a product or the transpose of the right one, as numbers of a type: block by block
// of rows, step by step of K, two tiles each, filled up with zeros.
template <typename P, typename T>
void Pack(Side side, Matrix<T> x, int64_t n, int64_t K, P* to) {
  constexpr int64_t kPerWord = kStep<P> / kSide;
  for (int64_t row = 0; row < n; row += kBlock)
    for (int64_t k = 0; k < K; k += kStep<P>)
      for (int64_t i = row; i < row + kBlock; i += kSide, to += kTile<P>) {
        Words lines[kSide];
        if (x.flipped) {
#pragma GCC unroll 16
          for (int64_t r = 0; r < kSide; ++r) {
            const int64_t at = k + r * kPerWord;
            lines[r] = Packing<P>::Across(x.data + at * x.stride + i, x.stride, K - at, n - i);
          }
        } else {
#pragma GCC unroll 16
          for (int64_t r = 0; r < kSide; ++r) {
            const T* line = x.data + (i + r) * x.stride + k;
            lines[r] = i + r < n ? Packing<P>::Row(line, K - k) : Words{};
            _mm_prefetch(reinterpret_cast<const char*>(line) + kAhead, _MM_HINT_T0);
          }
        }
        if (x.flipped != (side == Side::kRight)) Transpose(lines);
#pragma GCC unroll 16  // copied whole, they would leave their registers first
        for (int64_t r = 0; r < kSide; ++r) std::memcpy(to + r * kStep<P>, &lines[r], sizeof lines[r]);
      }
}

// c + a b, for one word of a left tile and a row of a right one. `*a - Floats{}` copies *a to all lanes; with + it
// would cost an addition, because -0 + 0 is +0.
inline Floats Added(Floats c, const float* a, Words b) { return Fma(*a - Floats{}, (Floats)b, c); }
#ifdef JAXGPT_BF16_TILES
inline Floats Added(Floats c, const BF16* a, Words b) {
  return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(Read<int>(a)), (__m512bh)b);
}
#endif

// c, a block of sums in rows that are `stride` apart, from as many steps of a packed block of rows and one of columns;
// added to what c holds if `add`.
template <typename T>
void MultiplyBlock(const T* a, const T* b, int64_t steps, float* c, int64_t stride, bool add) {
  constexpr int64_t kRows = kRegisters / 4;  // whose sums, and a row of both right tiles, fit into the registers
  for (int64_t row = 0; row < kBlock; row += kRows, c += kRows * stride) {
    Floats sums[kRows][2] = {};
    const T *left = a + row / kSide * kTile<T> + row % kSide * kStep<T>, *right = b;
    for (int64_t s = 0; s < steps; ++s, left += 2 * kTile<T>, right += 2 * kTile<T>)
#pragma GCC unroll 16
      for (int64_t k = 0; k < kSide; ++k) {
        Words columns[] = {Read<Words>(right + k * kStep<T>), Read<Words>(right + kTile<T> + k * kStep<T>)};
        asm("" : "+v"(columns[0]), "+v"(columns[1]));  // they stay in registers: GCC would read them for each row again
#pragma GCC unroll 8
        for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int64_t half = 0; half < 2; ++half)
            sums[r][half] = Added(sums[r][half], left + r * kStep<T> + k * (kStep<T> / kSide), columns[half]);
      }
    // What c holds comes last: it may be the larger part.
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int64_t half = 0; half < 2; ++half) {
        float* to = c + r * stride + half * kSide;
        Put(to, add ? sums[r][half] + Load(to) : sums[r][half]);
      }
  }
}

// What a thread sets up for products of numbers of a type, and whether that is the processor's tile units.
template <typename T>
struct Units {};
template <typename T>
constexpr bool kHasUnits = false;

#ifdef JAXGPT_TILE_UNITS
template <>
constexpr bool kHasUnits<BF16> = true;

// Whether the system lets this process use the tile units, which it must be asked for.
inline bool Granted() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

// Sets this thread's tile units up, for as long as this lives.
template <>
class Units<BF16> {
 public:
  Units() {
    struct alignas(kLine) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {kLine, kLine, kLine, kLine, kLine, kLine, kLine, kLine};
      uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
    } shape;
    asm volatile("" ::"r"(&shape) : "memory");  // the compiler believes that this reads 8 bytes of it
    if (Granted()) _tile_loadconfig(&shape);
  }
  ~Units() {
    if (Granted()) _tile_release();
  }
};

inline void MultiplyBlock(const BF16* a, const BF16* b, int64_t steps, float* c, int64_t stride, bool add) {
  if (!Granted()) return MultiplyBlock<BF16>(a, b, steps, c, stride, add);
  const int64_t bytes = stride * sizeof(float);
  float* lower = c + kSide * stride;
  asm volatile("" ::: "memory");  // what was stored, is: the compiler does not know that tiles read memory
  if (add) {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + kSide, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + kSide, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  constexpr int64_t kSize = kTile<BF16>;
  for (int64_t s = 0; s < steps; ++s, a += 2 * kSize, b += 2 * kSize) {
    _tile_loadd(6, b, kLine);
    _tile_loadd(7, b + kSize, kLine);
    _tile_stream_loadd(4, a, kLine);  // the columns stay in the first cache, and the rows pass through
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, a + kSize, kLine);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kSide, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + kSide, bytes);
}
#endif

// x / 2 (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + exp(-2 u)). Source: Hendrycks & Gimpel
// 2016.
inline Floats Gelu(Floats x) {
  const Floats zero = {}, twice_u = x * Fma(x * x, zero + 0.0713548163f, zero + 1.59576912f);
  const Floats e = Exp(twice_u < 0 ? twice_u : -twice_u), sum = 1 + e;
#ifdef __AVX512F__
  Floats inverse = (Floats)_mm512_rcp14_ps((__m512)sum);
  inverse *= 2 - sum * inverse;  // one step of Newton's method
#else
  const Floats inverse = 1 / sum;
#endif
  return x * inverse * (twice_u < 0 ? e : zero + 1);
}

}  // namespace

#endif
