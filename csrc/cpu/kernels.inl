// Included once per instruction set, with TF_ISA (the namespace), TF_LANES (floats per vector) and TF_DOT (whether
// there are bfloat16 dot products). Uses nothing from the C++ standard library: the linker might keep an inline
// function that was compiled here, for a newer instruction set, as the only copy, and older processors would then
// execute it.
#include <stdint.h>
#include <string.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 reports its own _mm512_undefined_epi32
#endif
#if TF_LANES > 4
#include <immintrin.h>
#endif

#include "kernels.h"

// Pins v in a vector register so that the chain is not optimised away.
#if defined(__x86_64__)
#define TF_KEEP(v) "+v"(v)
#elif defined(__aarch64__)
#define TF_KEEP(v) "+w"(v)
#else
#define TF_KEEP(v) "+m"(v)
#endif

namespace tamingfast {
namespace TF_ISA {
namespace {

constexpr int kLanes = TF_LANES;
constexpr int kPieces = static_cast<int>(kPanel) / kLanes;          // vectors per row of a panel
constexpr int kBlockPieces = static_cast<int>(kBlock) / kLanes;     // vectors per block of positions
constexpr int kWide = kLanes == 4 ? 2 : kPieces;                    // vectors per row of a tile with several rows
constexpr int kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 3 : 4;  // so that a tile's sums fill the registers
constexpr int64_t kRowBlock = 96;                                   // rows whose activations fit into L2
constexpr bool kDot = TF_DOT;
// Where tiles are low, several take turns with so many positions of the inner dimension.
constexpr bool kParts = kTileRows < 8;
constexpr int64_t kPart = 128;

typedef float Floats __attribute__((vector_size(TF_LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(TF_LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(TF_LANES * 4), aligned(4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Floats spread(float value) { return Floats{} + value; }
inline Floats pick(Ints condition, Floats yes, Floats no) {
  return (Floats)((condition & (Ints)yes) | (~condition & (Ints)no));
}

// a * b + c with a single rounding on every instruction set. Without a fused instruction it is computed in float64,
// where the second rounding almost never matters. Elementwise work uses it, so that results round to the same bfloat16.
inline Floats fused(Floats a, Floats b, Floats c) {
#if TF_LANES > 4 || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return a * b + c;
#else
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = static_cast<float>(static_cast<double>(a[i]) * b[i] + c[i]);
  return result;
#endif
}

// --- bfloat16 and int8 -----------------------------------------------------------------------------------------------

// Rounds to nearest, ties to even; NaN stays NaN. The result is in the upper half of each word, the lower half is zero.
inline Words round_bfloat16(Floats v) {
  const Words bits = (Words)v;
  const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (Words)pick(v == v, (Floats)rounded, (Floats)(bits | 0x400000u)) & 0xffff0000u;
}

inline uint16_t to_bfloat16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (v != v) return static_cast<uint16_t>((bits | 0x400000u) >> 16);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bfloat16(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline void store_bfloat16(uint16_t* p, Floats v) {
  const Words words = round_bfloat16(v);
#if TF_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)(words >> 16)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint16_t>(words[i] >> 16);
#endif
}

inline Floats load_bfloat16(const uint16_t* p) {
#if TF_LANES == 16
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif TF_LANES == 8
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
  Words words;
  for (int i = 0; i < kLanes; ++i) words[i] = static_cast<uint32_t>(p[i]) << 16;
  return (Floats)words;
#endif
}

inline Floats load_int8(const int8_t* p) {
#if TF_LANES == 16
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif TF_LANES == 8
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// Stores activations in the type that linear layers with these weights read.
inline void store_activation(Dtype dtype, void* out, int64_t i, Floats v) {
  if (dtype == Dtype::float32)
    store(static_cast<float*>(out) + i, v);
  else if (kDot)
    store_bfloat16(static_cast<uint16_t*>(out) + i, v);
  else
    store(static_cast<float*>(out) + i, (Floats)round_bfloat16(v));
}

// Stores exactly n activations and writes nothing past them.
inline void store_activations(Dtype dtype, void* out, int64_t at, const float* values, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_activation(dtype, out, at + i, load(values + i));
  for (; i < n; ++i) {
    if (dtype == Dtype::float32)
      static_cast<float*>(out)[at + i] = values[i];
    else if (kDot)
      static_cast<uint16_t*>(out)[at + i] = to_bfloat16(values[i]);
    else
      static_cast<float*>(out)[at + i] = from_bfloat16(to_bfloat16(values[i]));
  }
}

inline void store_bfloat16s(uint16_t* out, const float* values, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_bfloat16(out + i, load(values + i));
  for (; i < n; ++i) out[i] = to_bfloat16(values[i]);
}

// --- elementary functions --------------------------------------------------------------------------------------------

// exp(x) to about 1 ulp for x <= 88. Clamps below -87, where exp is 1e-38. NaN stays NaN.
inline Floats exponential(Floats x) {
  x = pick(x < -87.0f, spread(-87.0f), x);
  const Floats shifted = fused(x, spread(1.44269504f), spread(12582912.0f));  // x / ln 2, rounded, in the low bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = fused(n, spread(-1.42860677e-6f), fused(n, spread(-0.693145752f), x));  // ln 2 in two parts
  Floats p = spread(1.0f / 5040);
  const float rest[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float c : rest) p = fused(p, r, spread(c));
  const Ints power = ((Ints)shifted - 0x4B400000 + 127) << 23;
  return p * (Floats)power;
}

// GELU, x Phi(x), with erf by formula 7.1.26 of Abramowitz and Stegun (error below 1.5e-7).
inline Floats gelu(Floats x) {
  const Floats z = x * 0.70710678f;
  const Floats size = (Floats)((Words)z & 0x7fffffffu);
  const Floats t = 1.0f / fused(spread(0.3275911f), size, spread(1.0f));
  Floats p = spread(1.061405429f);
  const float rest[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  for (const float c : rest) p = fused(p, t, spread(c));
  const Floats tail = p * t * exponential(-(z * z));  // 1 - erf(|z|)
  return 0.5f * x * pick(x < 0.0f, tail, 2.0f - tail);
}

// Sixteen partial sums, added pairwise by halves, in the same order for every vector length.
struct Sums {
  Floats piece[kBlockPieces];

  float total() const {
    float lane[kBlock];
    for (int v = 0; v < kBlockPieces; ++v) store(lane + v * kLanes, piece[v]);
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }
};

void layer_norm(Dtype dtype, const float* x, int64_t n, const float* gain, const float* bias, void* out) {
  const int64_t whole = n / kBlock * kBlock;
  float last[kBlock] = {};
  memcpy(last, x + whole, (n - whole) * sizeof(float));
  Sums sum{};
  for (int64_t i = 0; i < whole; i += kBlock)
    for (int v = 0; v < kBlockPieces; ++v) sum.piece[v] += load(x + i + v * kLanes);
  for (int v = 0; v < kBlockPieces; ++v) sum.piece[v] += load(last + v * kLanes);
  const float mean = sum.total() / static_cast<float>(n);
  for (int64_t i = n - whole; i < kBlock; ++i) last[i] = mean;
  Sums square{};
  for (int64_t i = 0; i < whole; i += kBlock)
    for (int v = 0; v < kBlockPieces; ++v) {
      const Floats difference = load(x + i + v * kLanes) - mean;
      square.piece[v] = fused(difference, difference, square.piece[v]);
    }
  for (int v = 0; v < kBlockPieces; ++v) {
    const Floats difference = load(last + v * kLanes) - mean;
    square.piece[v] = fused(difference, difference, square.piece[v]);
  }
  const float scale = 1.0f / __builtin_sqrtf(square.total() / static_cast<float>(n) + 1e-5f);
  for (int64_t i = 0; i < round_up(n, kBlock); i += kLanes)  // gain and bias are padded with zeros
    store_activation(dtype, out, i, fused((load(x + i) - mean) * scale, load(gain + i), load(bias + i)));
}

void rms_norm(Dtype dtype, const float* x, int64_t n, const float* gain, void* out) {
  const int64_t whole = n / kBlock * kBlock;
  float last[kBlock] = {};
  memcpy(last, x + whole, (n - whole) * sizeof(float));
  Sums square{};
  for (int64_t i = 0; i <= whole; i += kBlock)
    for (int v = 0; v < kBlockPieces; ++v) {
      const Floats value = load((i < whole ? x + i : last) + v * kLanes);
      square.piece[v] = fused(value, value, square.piece[v]);
    }
  const float scale = 1.0f / __builtin_sqrtf(square.total() / static_cast<float>(n) + 1e-5f);
  for (int64_t i = 0; i < round_up(n, kBlock); i += kLanes)  // gain is padded with zeros
    store_activation(dtype, out, i, load(x + i) * scale * load(gain + i));
}

void gate(Dtype dtype, const float* a, const float* b, int64_t n, void* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats value = load(a + i);
    // Beyond -87 the exponential would overflow, and the result is 0 in float32.
    const Floats bounded = pick(value < -87.0f, spread(-87.0f), value);
    store_activation(dtype, out, i, value / (1.0f + exponential(-bounded)) * load(b + i));
  }
}

// --- linear layers ---------------------------------------------------------------------------------------------------

// Element offset of weight (k, channel) within its panel.
inline int64_t place_of(Dtype dtype, int64_t k, int64_t channel) {
  if (dtype == Dtype::float32 || (dtype == Dtype::int8 && !kDot)) return k * kPanel + channel;
  if (dtype == Dtype::bfloat16) return k / 2 * 2 * kPanel + 2 * channel + k % 2;
  // dot_tile unpacks a vector of 64 bytes in groups of 8, interleaving low and high halves into 8 bfloat16 each.
  const int64_t group = channel % 16 / 4 * 2 + channel / 16;
  return k / 2 * 2 * kPanel + group * 8 + channel % 4 * 2 + k % 2;
}

void pack(Dtype dtype, const float* weight, int64_t rows, int64_t k, const float* scale, void* panel) {
  for (int64_t channel = 0; channel < rows; ++channel)
    for (int64_t i = 0; i < k; ++i) {
      const float value = weight[channel * k + i];
      const int64_t at = place_of(dtype, i, channel);
      if (dtype == Dtype::float32)
        static_cast<float*>(panel)[at] = value;
      else if (dtype == Dtype::bfloat16)
        static_cast<uint16_t*>(panel)[at] = to_bfloat16(value);
      else
        static_cast<int8_t*>(panel)[at] = static_cast<int8_t>(__builtin_rintf(value / scale[channel]));
    }
}

// Prefetches weights while a tile computes, so that memory is never idle. A single tile of rows prefetches from its own
// panel; if several tiles read the same panel, each prefetches its share of the next one.
struct Ahead {
  const char* at;
  int64_t stride;  // bytes per iteration of a tile's loop

  template <int64_t Bytes>
  [[gnu::always_inline]] inline void fetch() {
    for (int64_t i = 0; i < Bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += stride;
  }
};

#if TF_DOT
// Lookup tables from the magnitude of an int8 (0 to 127) to the low and high byte of its bfloat16.
struct Halves {
  __m512i low[2], high[2];
  Halves() {
    alignas(64) uint8_t bytes[2][128];
    for (int i = 0; i < 128; ++i) {
      const uint16_t value = to_bfloat16(static_cast<float>(i));
      bytes[0][i] = static_cast<uint8_t>(value);
      bytes[1][i] = static_cast<uint8_t>(value >> 8);
    }
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(bytes[0] + 64 * i);
      high[i] = _mm512_load_si512(bytes[1] + 64 * i);
    }
  }
};

inline __m512 dot(__m512 sum, __m512i weight, __m512i x) {
  return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
}

template <Dtype D, int Rows>
[[gnu::always_inline]] inline void dot_tile(const uint16_t* x, int64_t ldx, int64_t k, const void* panel, Ahead ahead,
                                            float* sums) {
  __m512 sum[Rows][2];
  for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  [[maybe_unused]] const Halves table;
  const char* at = static_cast<const char*>(panel);
  constexpr int64_t kStep = D == Dtype::bfloat16 ? 128 : 64;
  for (int64_t i = 0; i < k; i += 2, at += kStep) {
    ahead.fetch<kStep>();
    __m512i weight[2];
    if constexpr (D == Dtype::bfloat16) {
      weight[0] = _mm512_loadu_si512(at);
      weight[1] = _mm512_loadu_si512(at + 64);
    } else {
      const __m512i raw = _mm512_loadu_si512(at);
      const __m512i magnitude = _mm512_abs_epi8(raw);
      const __m512i low = _mm512_permutex2var_epi8(table.low[0], magnitude, table.low[1]);
      const __m512i high = _mm512_permutex2var_epi8(table.high[0], magnitude, table.high[1]);
      const __m512i sign = _mm512_set1_epi8(-128);
      const __m512i signed_high = _mm512_ternarylogic_epi64(high, raw, sign, 0xF8);  // high | (raw & sign)
      weight[0] = _mm512_unpacklo_epi8(low, signed_high);
      weight[1] = _mm512_unpackhi_epi8(low, signed_high);
    }
    for (int r = 0; r < Rows; ++r) {
      uint32_t pair;
      memcpy(&pair, x + r * ldx + i, 4);
      const __m512i both = _mm512_set1_epi32(static_cast<int>(pair));
      sum[r][0] = dot(sum[r][0], weight[0], both);
      sum[r][1] = dot(sum[r][1], weight[1], both);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    _mm512_storeu_ps(sums + r * kPanel, sum[r][0]);
    _mm512_storeu_ps(sums + r * kPanel + 16, sum[r][1]);
  }
}
#endif

// Channels from `channel` on at position i (even, unless D is float32) of the inner dimension, or at i + 1 if Odd.
template <Dtype D, bool Odd>
[[gnu::always_inline]] inline Floats load_weight(const void* panel, int64_t i, int64_t channel) {
  if constexpr (D == Dtype::float32) {
    return load(static_cast<const float*>(panel) + (i + Odd) * kPanel + channel);
  } else if constexpr (D == Dtype::bfloat16) {
    const Words pair = *reinterpret_cast<const Words*>(static_cast<const uint16_t*>(panel) + i * kPanel + 2 * channel);
    return (Floats)(Odd ? pair & 0xffff0000u : pair << 16);
  } else {
    return load_int8(static_cast<const int8_t*>(panel) + (i + Odd) * kPanel + channel);
  }
}

// Adds the products with the weights at position i, or i + 1 if Odd. The shorter side of the tile stays in registers.
template <Dtype D, bool Odd, int Rows, int Pieces>
[[gnu::always_inline]] inline void add_products(const float* x, int64_t ldx, int64_t i, const void* panel,
                                                int64_t offset, Floats (&sum)[Rows][Pieces]) {
  if constexpr (Rows < Pieces) {
    Floats own[Rows];
    for (int r = 0; r < Rows; ++r) own[r] = spread(x[r * ldx + i + Odd]);
    for (int v = 0; v < Pieces; ++v) {
      const Floats weight = load_weight<D, Odd>(panel, i, offset + v * kLanes);
      for (int r = 0; r < Rows; ++r) sum[r][v] += own[r] * weight;
    }
  } else {
    Floats weight[Pieces];
    for (int v = 0; v < Pieces; ++v) weight[v] = load_weight<D, Odd>(panel, i, offset + v * kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Pieces; ++v) sum[r][v] += x[r * ldx + i + Odd] * weight[v];
  }
}

// A tile of Rows x (Pieces vectors) sums, kept in registers over the inner dimension; `go_on` adds to `sums`. The odd
// element of a pair is added first, as the dot product instruction does.
template <Dtype D, int Rows, int Pieces, bool Pairs = D != Dtype::float32>
[[gnu::always_inline]] inline void float_tile(const float* x, int64_t ldx, int64_t k, const void* panel, int64_t offset,
                                              Ahead ahead, float* sums, bool go_on = false) {
  Floats sum[Rows][Pieces] = {};
  if (go_on)
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Pieces; ++v) sum[r][v] = load(sums + r * kPanel + offset + v * kLanes);
  constexpr int64_t kStep = Pairs ? 2 : 1;
  // Converted weights, pairs of float, are in the cache; what is fetched ahead is a part of those to convert next.
  constexpr int64_t kSize = D == Dtype::float32 ? 4 : D == Dtype::bfloat16 ? 2 : 1;
  constexpr int64_t kBytes = D == Dtype::float32 && Pairs ? 64 : kStep * kPanel * kSize;
  for (int64_t i = 0; i < k; i += kStep) {
    ahead.fetch<kBytes>();
    if constexpr (Pairs) add_products<D, true>(x, ldx, i, panel, offset, sum);
    add_products<D, false>(x, ldx, i, panel, offset, sum);
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Pieces; ++v) store(sums + r * kPanel + offset + v * kLanes, sum[r][v]);
}

template <Dtype D, int Rows>
void tile(const void* x, int64_t ldx, int64_t k, const void* panel, Ahead ahead, float* sums) {
#if TF_DOT
  if constexpr (D != Dtype::float32) {
    dot_tile<D, Rows>(static_cast<const uint16_t*>(x), ldx, k, panel, ahead, sums);
    return;
  }
#endif
  constexpr int kColumns = Rows == 1 ? kPieces : kWide;
  for (int v = 0; v < kPieces; v += kColumns)
    float_tile<D, Rows, kColumns>(static_cast<const float*>(x), ldx, k, panel, v * kLanes, ahead, sums);
}

template <Dtype D, int Rows = kTileRows>
inline void any_tile(int rows, const void* x, int64_t ldx, int64_t k, const void* panel, Ahead ahead, float* sums) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return any_tile<D, Rows - 1>(rows, x, ldx, k, panel, ahead, sums);
  }
  tile<D, Rows>(x, ldx, k, panel, ahead, sums);
}

// As any_tile, for weights that are float or were converted to it, in pairs, of positions whose products are added to
// `sums`.
template <bool Pairs, int Rows = kTileRows>
inline void part_tile(int rows, const float* x, int64_t ldx, int64_t k, const float* weights, Ahead ahead, float* sums,
                      bool go_on) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return part_tile<Pairs, Rows - 1>(rows, x, ldx, k, weights, ahead, sums, go_on);
  }
  constexpr int kColumns = Rows == 1 ? kPieces : kWide;
  for (int v = 0; v < kPieces; v += kColumns)
    float_tile<Dtype::float32, Rows, kColumns, Pairs>(x, ldx, k, weights, v * kLanes, ahead, sums, go_on);
}

template <Dtype D>
void convert(const void* panel, int64_t first, int64_t count, float* weights) {
  for (int64_t i = 0; i < count; i += 2)
    for (int v = 0; v < kPieces; ++v) {
      store(weights + i * kPanel + v * kLanes, load_weight<D, false>(panel, first + i, v * kLanes));
      store(weights + (i + 1) * kPanel + v * kLanes, load_weight<D, true>(panel, first + i, v * kLanes));
    }
}

inline void finish(Dtype dtype, const LinearParams& p, const Matrix& m, const float* sums, int64_t panel, int64_t row) {
  for (int v = 0; v < kPieces; ++v) {
    const int64_t channel = panel * kPanel + v * kLanes;
    const int64_t at = row * p.ldo + channel;
    Floats value = load(sums + v * kLanes);
    const Floats bias = m.bias ? load(m.bias + channel) : Floats{};
    value = m.scale ? fused(value, load(m.scale + channel), bias) : value + bias;
    float* out = static_cast<float*>(p.out);
    if (p.epilogue == Epilogue::gelu)
      store_activation(dtype, p.out, at, gelu(value));
    else
      store(out + at, p.epilogue == Epilogue::add ? load(out + at) + value : value);
  }
}

// The sums of all rows, at most kRowBlock, with one panel; tiles of nearly equal height.
template <Dtype D>
void panel_sums(const void* x, int64_t ldx, int64_t rows, int64_t k, const char* panel, int64_t panel_size,
                float* sums) {
  const int64_t element = D != Dtype::float32 && kDot ? 2 : 4;
  const int64_t turn = kPanel * (D == Dtype::int8 ? 2 : 4);  // bytes of weights per iteration of a tile's loop
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  int64_t row = 0;
  for (int64_t t = tiles; t > 0; --t) {
    const int here = static_cast<int>((rows - row + t - 1) / t);
    const Ahead ahead{tiles == 1 ? panel + 4096 : panel + panel_size + (tiles - t) * panel_size / tiles, turn / tiles};
    any_tile<D>(here, static_cast<const char*>(x) + row * ldx * element, ldx, k, panel, ahead, sums + row * kPanel);
    row += here;
  }
}

// As panel_sums, for several low tiles. They take turns for a part of the inner dimension at a time, whose weights stay
// in the first-level cache and are converted once for all of them.
template <Dtype D>
void sums_by_parts(const float* x, int64_t ldx, int64_t rows, int64_t k, const char* panel, float* sums) {
  constexpr bool kConvert = D != Dtype::float32;
  float converted[kConvert ? kPart * kPanel : 1];
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t size = kPanel * (D == Dtype::int8 ? 1 : D == Dtype::bfloat16 ? 2 : 4);  // bytes of a position
  constexpr int64_t kStep = kConvert ? 2 : 1;  // positions per iteration of a tile's loop
  for (int64_t first = 0; first < k; first += kPart) {
    const int64_t count = k - first < kPart ? k - first : kPart;
    const float* weights = converted;
    if constexpr (kConvert)
      convert<D>(panel, first, count, converted);
    else
      weights = reinterpret_cast<const float*>(panel) + first * kPanel;
    int64_t row = 0;
    for (int64_t t = tiles; t > 0; --t) {
      const int here = static_cast<int>((rows - row + t - 1) / t);
      const char* next = panel + (first + count) * size + (tiles - t) * count * size / tiles;
      part_tile<kConvert>(here, x + row * ldx + first, ldx, count, weights, {next, kStep * size / tiles},
                          sums + row * kPanel, first > 0);
      row += here;
    }
  }
}

template <Dtype D>
void linear_typed(const LinearParams& p, const Matrix& m, int64_t first, int64_t last) {
  const int64_t element = D != Dtype::float32 && kDot ? 2 : 4;
  float sums[kRowBlock * kPanel];
  for (int64_t block = 0; block < p.rows; block += kRowBlock) {
    const int64_t rows = p.rows - block < kRowBlock ? p.rows - block : kRowBlock;
    const char* x = static_cast<const char*>(p.x) + block * p.ldx * element;
    for (int64_t panel = first; panel < last; ++panel) {
      const char* weights = static_cast<const char*>(m.panels) + panel * m.panel_size;
      if constexpr (kParts && (!kDot || D == Dtype::float32)) {
        if (rows > kTileRows)
          sums_by_parts<D>(reinterpret_cast<const float*>(x), p.ldx, rows, m.k, weights, sums);
        else
          panel_sums<D>(x, p.ldx, rows, m.k, weights, m.panel_size, sums);
      } else {
        panel_sums<D>(x, p.ldx, rows, m.k, weights, m.panel_size, sums);
      }
      for (int64_t r = 0; r < rows; ++r) finish(D, p, m, sums + r * kPanel, panel, block + r);
    }
  }
}

void linear(Dtype dtype, const LinearParams& p, const Matrix& m, int64_t first, int64_t last) {
  if (dtype == Dtype::float32) return linear_typed<Dtype::float32>(p, m, first, last);
  if (dtype == Dtype::bfloat16) return linear_typed<Dtype::bfloat16>(p, m, first, last);
  linear_typed<Dtype::int8>(p, m, first, last);
}

// --- attention -------------------------------------------------------------------------------------------------------

// weigh_values reads positions in pairs, so the second of a pair is cleared until it is written: a zero weight times
// what another sequence left there, which may be NaN, would not be zero.
void append(Dtype dtype, const float* k, const float* v, int64_t d, int64_t position, void* keys, void* values) {
  const int64_t block = position / kBlock, lane = position % kBlock, width = round_up(d, kBlock);
  const int64_t row = width * (dtype == Dtype::float32 ? sizeof(float) : sizeof(uint16_t));
  if (position % 2 == 0) memset(static_cast<char*>(values) + (position + 1) * row, 0, row);
  if (dtype == Dtype::float32) {
    float* to = static_cast<float*>(keys) + block * d * kBlock + lane;
    for (int64_t i = 0; i < d; ++i) to[i * kBlock] = k[i];
    memcpy(static_cast<float*>(values) + position * width, v, d * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(keys) + block * round_up(d, 2) * kBlock + 2 * lane;
  for (int64_t first = 0; first < d; first += kPanel) {
    uint16_t rounded[kPanel];
    const int64_t here = d - first < kPanel ? d - first : kPanel;
    store_bfloat16s(rounded, k + first, here);
    for (int64_t i = 0; i < here; ++i) to[(first + i) / 2 * 2 * kBlock + i % 2] = rounded[i];
  }
  store_bfloat16s(static_cast<uint16_t*>(values) + position * width, v, d);
}

// Scores of Queries rows against Blocks blocks of positions.
template <int Queries, int Blocks>
[[gnu::always_inline]] inline void score_blocks(const float* q, int64_t ldq, int64_t d, const float* keys,
                                                float* scores, int64_t lds) {
  constexpr int kSums = Blocks * kBlockPieces;
  Floats sum[Queries][kSums] = {};
  for (int64_t i = 0; i < d; ++i) {
    Floats key[kSums];
    for (int b = 0; b < kSums; ++b)
      key[b] = load(keys + (b / kBlockPieces * d + i) * kBlock + b % kBlockPieces * kLanes);
    for (int r = 0; r < Queries; ++r)
      for (int b = 0; b < kSums; ++b) sum[r][b] += q[r * ldq + i] * key[b];
  }
  for (int r = 0; r < Queries; ++r)
    for (int b = 0; b < kSums; ++b) store(scores + r * lds + b * kLanes, sum[r][b]);
}

template <int Queries, int Blocks>
[[gnu::always_inline]] inline void score_blocks(const float* q, int64_t ldq, int64_t d, const uint16_t* keys,
                                                float* scores, int64_t lds) {
  constexpr int kSums = Blocks * kBlockPieces;
  Floats sum[Queries][kSums] = {};
  for (int64_t i = 0; i < d; i += 2)
    for (int b = 0; b < kSums; ++b) {
      const uint16_t* at = keys + (b / kBlockPieces * d + i) * kBlock + b % kBlockPieces * 2 * kLanes;
      const Words pair = *reinterpret_cast<const Words*>(at);
      for (int r = 0; r < Queries; ++r) {
#if TF_DOT
        const Words rounded = (Words)spread(q[r * ldq + i / 2]);  // a pair, see round_queries
        sum[r][b] = dot(sum[r][b], (__m512i)pair, (__m512i)rounded);
#else
        sum[r][b] += q[r * ldq + i + 1] * (Floats)(pair & 0xffff0000u);
        sum[r][b] += q[r * ldq + i] * (Floats)(pair << 16);
#endif
      }
    }
  for (int r = 0; r < Queries; ++r)
    for (int b = 0; b < kSums; ++b) store(scores + r * lds + b * kLanes, sum[r][b]);
}

inline Floats load_stored(const float* p) { return load(p); }
inline Floats load_stored(const uint16_t* p) { return load_bfloat16(p); }

// Sums weights times values over the positions that each query sees. Even and odd positions accumulate separately,
// which gives two independent chains of additions. A position that a query does not see is left out, not weighted with
// zero: its value may be NaN.
template <int Queries, int Pieces, class Stored>
[[gnu::always_inline]] inline void weigh_values(const float* weights, int64_t lds, const int64_t* visible,
                                                const Stored* values, int64_t width, const char* ahead,
                                                float (*out)[kPanel * 2]) {
  int64_t common = visible[0];
  for (int r = 1; r < Queries; ++r) common = visible[r] < common ? visible[r] : common;
  common -= common % 2;
  Floats sum[2][Queries][Pieces] = {};
  for (int64_t j = 0; j < common; j += 2, ahead += 2 * Pieces * sizeof(Floats) * sizeof(Stored) / sizeof(float)) {
    for (uint64_t line = 0; line < 2 * Pieces * sizeof(Floats) * sizeof(Stored) / sizeof(float); line += 64)
      __builtin_prefetch(ahead + line, 0, 2);
    for (int half = 0; half < 2; ++half)
      for (int v = 0; v < Pieces; ++v) {
        const Floats value = load_stored(values + (j + half) * width + v * kLanes);
        for (int r = 0; r < Queries; ++r)
          sum[half][r][v] = fused(spread(weights[r * lds + j + half]), value, sum[half][r][v]);
      }
  }
  float rest[2][Queries][Pieces * kLanes];  // in memory, so that `sum` stays in registers
  for (int half = 0; half < 2; ++half)
    for (int r = 0; r < Queries; ++r)
      for (int v = 0; v < Pieces; ++v) store(rest[half][r] + v * kLanes, sum[half][r][v]);
  for (int r = 0; r < Queries; ++r) {
    for (int64_t j = common; j < visible[r]; ++j)
      for (int v = 0; v < Pieces; ++v) {
        float* to = rest[j % 2][r] + v * kLanes;
        store(to, fused(spread(weights[r * lds + j]), load_stored(values + j * width + v * kLanes), load(to)));
      }
    for (int v = 0; v < Pieces; ++v)
      store(out[r] + v * kLanes, load(rest[0][r] + v * kLanes) + load(rest[1][r] + v * kLanes));
  }
}

// Replaces the first n scores by exp(scale (score - largest)) and the rest, up to `end`, by 0. Returns 1 / the sum.
inline float softmax(float* scores, int64_t n, int64_t end, float scale) {
  for (int64_t i = n; i < round_up(n, kBlock); ++i) scores[i] = -__builtin_inff();
  Floats most[kBlockPieces];
  for (int v = 0; v < kBlockPieces; ++v) most[v] = load(scores + v * kLanes);
  for (int64_t i = kBlock; i < n; i += kBlock)
    for (int v = 0; v < kBlockPieces; ++v) {
      const Floats score = load(scores + i + v * kLanes);
      most[v] = pick(score > most[v], score, most[v]);
    }
  float largest = most[0][0];
  for (int v = 0; v < kBlockPieces; ++v)
    for (int i = 0; i < kLanes; ++i) largest = most[v][i] > largest ? most[v][i] : largest;
  Sums sum{};
  for (int64_t i = 0; i < n; i += kBlock) {
    for (int v = 0; v < kBlockPieces; ++v) {
      float* at = scores + i + v * kLanes;
      store(at, exponential((load(at) - largest) * scale));
    }
    for (int64_t j = n; j < i + kBlock; ++j) scores[j] = 0.0f;
    for (int v = 0; v < kBlockPieces; ++v) sum.piece[v] += load(scores + i + v * kLanes);
  }
  for (int64_t i = round_up(n, kBlock); i < end; ++i) scores[i] = 0.0f;
  return 1.0f / sum.total();
}

// Rounds queries to what the score loops read: rows of d floats, or of d / 2 pairs of bfloat16.
inline void round_queries(Dtype dtype, const AttentionParams& a, int64_t row, int queries, int64_t d, float* rounded) {
  for (int r = 0; r < queries; ++r) {
    rounded[r * d + d - 1] = 0.0f;  // the padding of an odd head
    if (kDot && dtype != Dtype::float32) rounded[r * d + d / 2 - 1] = 0.0f;
    store_activations(dtype, rounded + r * d, 0, a.q + (row + r) * a.ldq, a.d);
  }
}

template <class Stored, int Queries>
void attend_rows(Dtype dtype, const AttentionParams& a, int64_t row, int64_t stop) {
  const int64_t d = sizeof(Stored) == 4 ? a.d : round_up(a.d, 2);
  const int64_t width = round_up(a.d, kBlock);
  const Stored* keys = static_cast<const Stored*>(a.keys);
  const Stored* values = static_cast<const Stored*>(a.values);
  int64_t visible[Queries], most = 0;
  for (int r = 0; r < Queries; ++r) {
    const int64_t position = a.start + row + r;
    visible[r] = position + 1;
    if (position < a.n_unmasked) visible[r] = a.n_unmasked < stop ? a.n_unmasked : stop;
    most = visible[r] > most ? visible[r] : most;
  }
  const int64_t lds = round_up(most, kBlock);
  float* rounded = a.scratch;
  float* scores = rounded + Queries * round_up(d, 2);
  round_queries(dtype, a, row, Queries, d, rounded);
  constexpr int kAtOnce = Queries == 1 ? 4 : 2;
  int64_t block = 0;
  const char* line = reinterpret_cast<const char*>(values);
  for (; block + kAtOnce <= lds / kBlock; block += kAtOnce) {
    for (const char* end = line + kAtOnce * kBlock * width * sizeof(Stored); line < end; line += 64)
      __builtin_prefetch(line, 0, 2);
    score_blocks<Queries, kAtOnce>(rounded, d, d, keys + block * d * kBlock, scores + block * kBlock, lds);
  }
  for (; block < lds / kBlock; ++block)
    score_blocks<Queries, 1>(rounded, d, d, keys + block * d * kBlock, scores + block * kBlock, lds);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.d));
  float over[Queries];
  for (int r = 0; r < Queries; ++r) over[r] = softmax(scores + r * lds, visible[r], lds, scale);
  for (int64_t first = 0; first < width; first += 3 * kBlock) {
    float out[Queries][kPanel * 2];
    const int64_t blocks = (width - first) / kBlock;
    const Stored* value = values + first;
    const char* ahead = static_cast<const char*>(a.next) + first * lds * sizeof(Stored);
    if (blocks >= 3)
      weigh_values<Queries, 3 * kBlockPieces>(scores, lds, visible, value, width, ahead, out);
    else if (blocks == 2)
      weigh_values<Queries, 2 * kBlockPieces>(scores, lds, visible, value, width, ahead, out);
    else
      weigh_values<Queries, kBlockPieces>(scores, lds, visible, value, width, ahead, out);
    const int64_t end = width - first < 3 * kBlock ? width - first : 3 * kBlock;
    for (int r = 0; r < Queries; ++r)
      for (int64_t i = 0; i < end; i += kLanes) store(out[r] + i, load(out[r] + i) * over[r]);
    // Heads are adjacent without padding, so the last vector of one must not spill into the next.
    const int64_t wanted = a.d - first < end ? a.d - first : end;
    for (int r = 0; r < Queries; ++r) store_activations(dtype, a.out, (row + r) * a.ldo + first, out[r], wanted);
  }
}

template <class Stored>
void attend_typed(Dtype dtype, const AttentionParams& a) {
  const int64_t stop = a.start + a.rows;
  int64_t row = 0;
  for (; row + kQueries <= a.rows; row += kQueries) attend_rows<Stored, kQueries>(dtype, a, row, stop);
  for (; row < a.rows; ++row) attend_rows<Stored, 1>(dtype, a, row, stop);
}

void attend(Dtype dtype, const AttentionParams& a) {
  if (dtype == Dtype::float32) return attend_typed<float>(dtype, a);
  attend_typed<uint16_t>(dtype, a);
}

// --- peak arithmetic -------------------------------------------------------------------------------------------------

double exercise(Dtype dtype, int64_t times) {
  constexpr int kSums = 16;  // enough independent chains to hide the latency of one operation
  Floats sum[kSums] = {};
  Floats x = spread(0.5f), y = spread(0.25f);
  (void)dtype;
  for (int64_t i = 0; i < times * 1024 / kSums; ++i)
    for (int j = 0; j < kSums; ++j) {
#if TF_DOT
      if (dtype != Dtype::float32)
        sum[j] = dot(sum[j], (__m512i)x, (__m512i)y);
      else
#endif
        sum[j] = sum[j] * x + y;
      asm volatile("" : TF_KEEP(sum[j]));
    }
  return static_cast<double>(times) * 1024 * kLanes * (kDot && dtype != Dtype::float32 ? 4 : 2);
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {kDot, pack, linear, layer_norm, rms_norm, gate, append, attend, exercise};

}  // namespace TF_ISA
}  // namespace tamingfast
