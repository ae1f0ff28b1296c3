// Matrix products in bfloat16 by the tile units of a processor with AMX, whose sums are float32.
//
// A tile has 16 rows of 64 bytes. One instruction adds to a tile of 16 x 16 sums the product of a tile with 16 rows of
// the left operand and one with 16 columns of the right operand, both 32 long. Source: Intel's Architecture
// Instruction Set Extensions Programming Reference, chapter 3.

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

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define JAXGPT_TILES

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kSide = 16;            // rows of a tile
constexpr int64_t kBlock = 2 * kSide;    // rows and columns of a block of sums, which is 2 x 2 tiles
constexpr int64_t kStep = 32;            // length of the sums that one instruction adds
constexpr int64_t kTile = kSide * kStep;  // elements of an operand's tile

constexpr int64_t kAhead = 512;          // bytes of a row that are fetched ahead of their use

using Words = Vector<uint32_t>;  // each is two neighbours of a sum

// Whether the system lets this process use the tile units, which it must be asked for.
inline bool TilesGranted() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

// Sets this thread's tile units up, for as long as this lives.
class TileUnits {
 public:
  TileUnits() {
    struct alignas(kLine) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {kLine, kLine, kLine, kLine, kLine, kLine, kLine, kLine};
      uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
    } shape;
    asm volatile("" ::"r"(&shape) : "memory");  // the compiler believes that this reads 8 bytes of it
    _tile_loadconfig(&shape);
  }
  ~TileUnits() { _tile_release(); }
};

inline Words Interleave(__m256i even, __m256i odd) {
  return (Words)_mm512_cvtepu16_epi32(even) | (Words)_mm512_cvtepu16_epi32(odd) << 16;
}

inline void Transpose(Words (&rows)[kSide]) {
  const Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
  for (uint32_t d = 8; d > 0; d /= 2) {
    const Words upper = (Words)((lane & d) != 0), first = (upper & (16 - d + lane)) | (~upper & lane);
    const Words second = (upper & (16 + lane)) | (~upper & (lane + d));
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kSide; ++i)
      if ((i & d) == 0) {
        const Words a = rows[i], b = rows[i + d];
        rows[i] = (Words)_mm512_permutex2var_epi32((__m512i)a, (__m512i)first, (__m512i)b);
        rows[i + d] = (Words)_mm512_permutex2var_epi32((__m512i)a, (__m512i)second, (__m512i)b);
      }
  }
}

enum class Side { kLeft, kRight };

inline int64_t Steps(int64_t K) { return Quotient(K, kStep); }
// Elements of a packed operand of n rows.
inline int64_t PackedSize(int64_t n, int64_t K) { return Quotient(n, kBlock) * Steps(K) * 2 * kTile; }

// The first of 32 or of 16 numbers, in bfloat16, then zeros.
inline Words Line(const BF16* p, __mmask32 some) { return (Words)_mm512_maskz_loadu_epi16(some, p); }
inline Words Line(const float* p, __mmask32 some) {
  return (Words)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(some >> kSide, p + kSide), _mm512_maskz_loadu_ps(some, p));
}
inline __m256i Half(const BF16* p, __mmask16 some) { return _mm256_maskz_loadu_epi16(some, p); }
inline __m256i Half(const float* p, __mmask16 some) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, p));
}

// Packs x [n, K], the left operand of a product or the transpose of the right one, rounded to bfloat16: block by block
// of rows, step by step of K, two tiles each, filled up with zeros. The tiles of a left operand have its rows; those of
// a right operand have pairs of numbers that follow each other in a sum, in one row for all its columns.
template <typename T>
void Pack(Side side, Matrix<T> x, int64_t n, int64_t K, BF16* to) {
  const auto mask = [](int64_t left, int64_t width) {
    return left >= width ? ~uint32_t{0} : (uint32_t{1} << std::max<int64_t>(left, 0)) - 1;
  };
  for (int64_t row = 0; row < n; row += kBlock)
    for (int64_t k = 0; k < K; k += kStep)
      for (int64_t i = row; i < row + kBlock; i += kSide, to += kTile) {
        Words lines[kSide];
        if (x.flipped) {
          const __mmask16 some = mask(n - i, kSide);
          const auto line = [&](int64_t k) { return k < K ? Half(x.data + k * x.stride + i, some) : __m256i{}; };
#pragma GCC unroll 16
          for (int64_t r = 0; r < kSide; ++r) lines[r] = Interleave(line(k + 2 * r), line(k + 2 * r + 1));
        } else {
          const __mmask32 some = mask(K - k, kStep);
#pragma GCC unroll 16
          for (int64_t r = 0; r < kSide; ++r) {
            const T* line = x.data + (i + r) * x.stride + k;
            lines[r] = i + r < n ? Line(line, some) : Words{};
            _mm_prefetch(reinterpret_cast<const char*>(line) + kAhead, _MM_HINT_T0);
          }
        }
        if (x.flipped != (side == Side::kRight)) Transpose(lines);
        std::memcpy(to, lines, sizeof lines);
      }
}

// c [32, 32], in rows that are `stride` apart, from as many steps of a packed block of rows and one of columns; added to
// what c holds if `add`.
inline void MultiplyBlock(const BF16* a, const BF16* b, int64_t steps, float* c, int64_t stride, bool add) {
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
  for (int64_t s = 0; s < steps; ++s, a += 2 * kTile, b += 2 * kTile) {
    _tile_loadd(6, b, kLine);
    _tile_loadd(7, b + kTile, kLine);
    _tile_stream_loadd(4, a, kLine);  // the columns stay in the first cache, and the rows pass through
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, a + kTile, kLine);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kSide, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + kSide, bytes);
}

// x / 2 (1 + tanh(u)), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + exp(-2 u)). Source: Hendrycks & Gimpel 2016.
inline Floats Gelu(Floats x) {
  const Floats zero = {}, twice_u = x * Fma(x * x, zero + 0.0713548163f, zero + 1.59576912f);
  const Floats e = Exp(twice_u < 0 ? twice_u : -twice_u), sum = 1 + e;
  Floats inverse = (Floats)_mm512_rcp14_ps((__m512)sum);
  inverse *= 2 - sum * inverse;  // one step of Newton's method
  return x * inverse * (twice_u < 0 ? e : zero + 1);
}

}  // namespace

#endif
