// Included once per instruction set, in place of kernels.inl, whose vectors it uses; the rules of that file hold here
// too.
#include "convolution_kernels.h"
#include "kernels.inl"

namespace tamingfast {
namespace TF_ISA {
namespace {

constexpr int kProductPieces = 2;                       // vectors per row of a product's tile
constexpr int kProductRows = kLanes == 16 ? 8 : 6;      // so that a tile's sums fill the registers
constexpr int kProductPanel = kProductPieces * kLanes;  // output channels per panel
constexpr int64_t kProductDepth = 256;                  // inner dimension per pass: a panel of it stays in L1
// Terms that are summed on their own before they join the sum of all: n in a row round as much as about n / 2 sums of
// two, and n in groups of the square root of n as about that many.
constexpr int64_t kProductTerms = 64;

// --- products --------------------------------------------------------------------------------------------------------

// Fetches a value of every `step` from `next` on into the second-level cache.
template <int Rows, bool Add>
[[gnu::always_inline]] inline void product_tile(const float* a, int64_t lda, const float* panel, int64_t k, float* c,
                                                int64_t ldc, const float* next, int64_t step) {
  for (int64_t first = 0; first < k; first += kProductTerms) {
    const int64_t last = first + kProductTerms < k ? first + kProductTerms : k;
    Floats sum[Rows][kProductPieces] = {};
#pragma GCC unroll 4
    for (int64_t i = first; i < last; ++i) {
      Floats b[kProductPieces];
      for (int v = 0; v < kProductPieces; ++v) b[v] = load(panel + i * kProductPanel + v * kLanes);
      __builtin_prefetch(next + i * step, 0, 2);
      for (int r = 0; r < Rows; ++r) {
        const Floats x = spread(a[r * lda + i]);
        for (int v = 0; v < kProductPieces; ++v) sum[r][v] = fused(x, b[v], sum[r][v]);
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kProductPieces; ++v) {
        float* at = c + r * ldc + v * kLanes;
        store(at, Add || first > 0 ? load(at) + sum[r][v] : sum[r][v]);
      }
  }
}

template <bool Add>
void product_rows(int rows, const float* a, int64_t lda, const float* panel, int64_t k, float* c, int64_t ldc,
                  const float* next, int64_t step) {
  switch (rows) {
    case 1:
      return product_tile<1, Add>(a, lda, panel, k, c, ldc, next, step);
    case 2:
      return product_tile<2, Add>(a, lda, panel, k, c, ldc, next, step);
    case 3:
      return product_tile<3, Add>(a, lda, panel, k, c, ldc, next, step);
    case 4:
      return product_tile<4, Add>(a, lda, panel, k, c, ldc, next, step);
    case 5:
      return product_tile<5, Add>(a, lda, panel, k, c, ldc, next, step);
    case 6:
      return product_tile<6, Add>(a, lda, panel, k, c, ldc, next, step);
#if TF_LANES == 16
    case 7:
      return product_tile<7, Add>(a, lda, panel, k, c, ldc, next, step);
    case 8:
      return product_tile<8, Add>(a, lda, panel, k, c, ldc, next, step);
#endif
  }
}

void product(const ProductParams& p) {
  const int64_t tiles = (p.rows + kProductRows - 1) / kProductRows;
  for (int64_t first = 0; first < p.k; first += kProductDepth) {
    const int64_t depth = p.k - first < kProductDepth ? p.k - first : kProductDepth;
    for (int64_t panel = 0; panel < p.count; ++panel) {
      const float* b = p.panels + panel * p.panel_stride + first * kProductPanel;
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of almost equal numbers of rows
        const int64_t top = p.rows * tile / tiles, rows = p.rows * (tile + 1) / tiles - top;
        const float* a = p.a + top * p.lda + first;
        float* c = p.c + top * p.ldc + panel * kProductPanel;
        // The tiles of a panel fetch the next one, which follows in memory, in equal parts.
        const int64_t step = kProductPanel / tiles;
        const float* next = b + p.k * kProductPanel + tile * depth * step;
        if (first == 0)
          product_rows<false>(static_cast<int>(rows), a, p.lda, b, depth, c, p.ldc, next, step);
        else
          product_rows<true>(static_cast<int>(rows), a, p.lda, b, depth, c, p.ldc, next, step);
      }
    }
  }
}

// --- products of split values ----------------------------------------------------------------------------------------
//
// A value is high + middle + low, three bfloat16 of 8 bits each, and a product the sum of the six products of these
// parts that are not below float32's precision. AMX computes sixteen of them in the time of one in float32.
// A tile of AMX is 1 KiB: 16 rows of 32 positions of the inner dimension, or 16 pairs of positions of 16 columns.

#if TF_AMX
constexpr Storage kStorage{16, 32, true};
constexpr int64_t kAmxTile = 512;  // uint16_t

struct alignas(64) AmxShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The registers of AMX are named by constants. 0 to 3 hold the sums, 4 and 5 rows of A, 6 and 7 columns of B.
template <int Rows>
[[gnu::always_inline]] inline void amx_load_rows(const uint16_t* a, int64_t row_tile) {
  _tile_loadd(4, a, 64);
  if constexpr (Rows == 2) _tile_loadd(5, a + row_tile, 64);
}

[[gnu::always_inline]] inline void amx_load_columns(const uint16_t* b) {
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b + kAmxTile, 64);
}

template <int Rows>
[[gnu::always_inline]] inline void amx_multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (Rows == 2) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// 16 * Rows rows of A, `row_tile` apart, by a panel. The large products come last: what is added before them is small,
// and so is its rounding. Fetches one of `parts` of the next panel, which follows in memory, into the second-level
// cache.
template <int Rows>
void amx_product(const uint16_t* a, int64_t row_tile, const uint16_t* b, int64_t chunks, float* c, int64_t ldc,
                 int64_t part, int64_t parts) {
  constexpr int64_t kA = Storage::kSplit * kAmxTile, kB = 2 * kA;  // of 32 positions
  constexpr int64_t kNextB = 2 * kAmxTile, kLinesB = kB / 32;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < chunks; ++i) {
    const uint16_t *x = a + i * kA, *y = b + i * kB;
    amx_load_rows<Rows>(x, row_tile);
    amx_load_columns(y + 2 * kNextB);
    amx_multiply<Rows>();  // high, low
    for (int64_t line = kLinesB * part / parts; line < kLinesB * (part + 1) / parts; ++line)
      __builtin_prefetch(y + chunks * kB + line * 32, 0, 2);
    amx_load_columns(y + kNextB);
    amx_multiply<Rows>();  // high, middle
    amx_load_rows<Rows>(x + kAmxTile, row_tile);
    amx_multiply<Rows>();  // middle, middle
    amx_load_columns(y);
    amx_multiply<Rows>();  // middle, high
    amx_load_rows<Rows>(x + 2 * kAmxTile, row_tile);
    amx_multiply<Rows>();  // low, high
  }
  for (int64_t i = 0; i < chunks; ++i) {
    amx_load_rows<Rows>(a + i * kA, row_tile);
    amx_load_columns(b + i * kB);
    amx_multiply<Rows>();
  }
  const int64_t bytes = ldc * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kLanes, bytes);
  if constexpr (Rows == 2) {
    _tile_stored(2, c + 16 * ldc, bytes);
    _tile_stored(3, c + 16 * ldc + kLanes, bytes);
  }
}

void tile_product(const ProductParams& p) {
  const AmxShape shape;
  _tile_loadconfig(&shape);
  const int64_t chunks = p.k / kStorage.depth_step, tiles = (p.rows + 15) / 16;
  const int64_t row_tile = chunks * Storage::kSplit * kAmxTile;
  const uint16_t* a = reinterpret_cast<const uint16_t*>(p.a);
  for (int64_t panel = 0; panel < p.count; ++panel) {
    const uint16_t* b = reinterpret_cast<const uint16_t*>(p.panels + panel * p.panel_stride);
    float* c = p.c + panel * kProductPanel;
    const int64_t pairs = (tiles + 1) / 2;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const auto multiply = 2 * pair + 1 < tiles ? amx_product<2> : amx_product<1>;
      multiply(a + 2 * pair * row_tile, row_tile, b, chunks, c + 32 * pair * p.ldc, p.ldc, pair, pairs);
    }
  }
  _tile_release();
}

// Where the input transform writes kStaged vectors of a tile's channels at each position: the k-th pair of the inner
// dimension has the k-th channels of both vectors.
constexpr int kStaged = 2;
struct Slot {
  uint32_t* at;
  int64_t stride;
  Slot(const TileParams& p, int64_t tile, int64_t channel) {
    const int64_t chunks = (p.channels + 31) / 32, row = p.first + tile;
    at = reinterpret_cast<uint32_t*>(p.values) + (row / 16 * chunks + channel / 32) * Storage::kSplit * kAmxTile / 2 +
         row % 16 * kLanes;
    stride = p.position_stride;
  }
  void put(int64_t position, Floats first, Floats second) const {
    uint32_t* to = at + position * stride;
    for (int64_t part = 0; part < Storage::kSplit; ++part, to += kAmxTile / 2) {
      // Rounds halves away from zero; what is left for the last part fits it.
      const Words a = ((Words)first + 0x8000u) & 0xffff0000u, b = ((Words)second + 0x8000u) & 0xffff0000u;
      __builtin_prefetch(to + kLanes, 1);  // the next tile's
      *reinterpret_cast<Words*>(to) = a >> 16 | b;
      first -= (Floats)a;
      second -= (Floats)b;
    }
  }
};
#else
constexpr Storage kStorage{1, 1, false};

void tile_product(const ProductParams& p) { product(p); }

constexpr int kStaged = 1;
struct Slot {
  float* at;
  int64_t stride;
  Slot(const TileParams& p, int64_t tile, int64_t channel)
      : at(p.values + (p.first + tile) * p.channels + channel), stride(p.position_stride) {}
  void put(int64_t position, Floats value) const { store(at + position * stride, value); }
};
#endif

// --- pixels of a block -----------------------------------------------------------------------------------------------

// 1 / x for x >= 1.
inline Floats inverse(Floats x) {
#if TF_LANES == 16
  // Faster than a division; one step of Newton's method makes all bits but the last of the fourteen.
  const Floats guess = (Floats)_mm512_rcp14_ps((__m512)x);
  return guess * fused(-x, guess, spread(2.0f));
#else
  return 1.0f / x;
#endif
}

inline Floats clipped(Floats x, float least, float most) {  // NaN stays NaN
#if TF_LANES == 16
  return (Floats)_mm512_min_ps(_mm512_set1_ps(most), _mm512_max_ps(_mm512_set1_ps(least), (__m512)x));
#elif TF_LANES == 8
  return (Floats)_mm256_min_ps(_mm256_set1_ps(most), _mm256_max_ps(_mm256_set1_ps(least), (__m256)x));
#else
  x = pick(x < least, spread(least), x);
  return pick(x > most, spread(most), x);
#endif
}

// x * sigmoid(x), the exponential to about 1e-7 absolutely of the result: 2^n times a polynomial (minimax) for 2^r.
inline Floats silu(Floats x) {
  const Floats t = clipped(-1.44269504f * x, -126.0f, 126.0f);
  const Floats shifted = t + 12582912.0f;  // the nearest integer, in the low bits
  const Floats r = t - (shifted - 12582912.0f);
  Floats p = spread(1.5403530e-4f);
  const float rest[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
  for (const float c : rest) p = fused(p, r, spread(c));
  const Floats power = (Floats)((Ints)p + ((Ints)shifted << 23));
  return x * inverse(1.0f + power);
}

inline Floats activated(const StageParams& p, const float* x, int64_t channel) {
  Floats v = load(x + channel);
  if (!p.scale) return v;
  v = fused(v, load(p.scale + channel), load(p.shift + channel));
  return p.silu ? silu(v) : v;
}

constexpr int64_t kAhead = 1024;  // floats; maps are larger than the caches, and no row of a block follows the last
inline void stage_pixel(const StageParams& p, const float* x, float* out) {
  int64_t c = 0;
  for (; c + kLanes <= p.channels; c += kLanes) {
    __builtin_prefetch(x + c + kAhead);
    store(out + c, activated(p, x, c));
  }
  if (c == p.channels) return;
  // The last channels, one vector that reads and writes nothing beyond them.
  float from[3][kLanes] = {};
  const int64_t bytes = (p.channels - c) * static_cast<int64_t>(sizeof(float));
  memcpy(from[0], x + c, bytes);
  StageParams rest = p;
  if (p.scale) {
    memcpy(from[1], p.scale + c, bytes);
    memcpy(from[2], p.shift + c, bytes);
    rest.scale = from[1];
    rest.shift = from[2];
  }
  store(from[0], activated(rest, from[0], 0));
  memcpy(out + c, from[0], bytes);
}

void stage(const StageParams& p) {
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t c = 0; c < p.columns; ++c) {
      const int64_t y = p.top + r, x = p.left + c;
      float* out = p.out + (r * p.columns + c) * p.ldo;
      if (y < 0 || y >= p.height || x < 0 || x >= p.shown_width)
        memset(out, 0, p.channels * sizeof(float));
      else
        stage_pixel(p, p.x + (((y >> p.doubling) - p.first) * p.width + (x >> p.doubling)) * p.channels, out);
    }
}

// --- transforms of Winograd's filtering ------------------------------------------------------------------------------
//
// M outputs of a 3-tap filter from M + 2 inputs d: Y = A' [(G g) * (B' d)], by interpolation at M + 1 points and
// infinity. Row i of B' holds the coefficients of the product of (x - p) over the other points p; of A', the powers of
// the points. M = 2: points 0, 1, -1. M = 4: points 0, +-a, +-b with a^2 = 1/2, b^2 = 2, whose rounding errors are
// smaller than those of the customary 0, +-1, +-2.

constexpr float kA = 0.70710678f, kB = 1.41421356f;  // a * b = 1

template <int M>
[[gnu::always_inline]] inline void transform_input(const Floats* d, Floats* out) {
  if constexpr (M == 2) {
    out[0] = d[2] - d[0];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[3] - d[1];
  } else {
    const Floats even_a = fused(spread(-2.0f), d[2], d[4]), odd_a = kA * fused(spread(-2.0f), d[1], d[3]);
    const Floats even_b = fused(spread(-0.5f), d[2], d[4]), odd_b = kB * fused(spread(-0.5f), d[1], d[3]);
    out[0] = fused(spread(-2.5f), d[2], d[0] + d[4]);
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = fused(spread(-2.5f), d[3], d[1] + d[5]);
  }
}

template <int M>
[[gnu::always_inline]] inline void transform_output(const Floats* m, Floats* out) {
  if constexpr (M == 2) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] + m[3];
  } else {
    const Floats sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    out[0] = m[0] + sum_a + sum_b;
    out[1] = fused(spread(kA), difference_a, kB * difference_b);
    out[2] = fused(spread(0.5f), sum_a, 2.0f * sum_b);
    out[3] = fused(spread(0.5f * kA), difference_a, fused(spread(2.0f * kB), difference_b, m[5]));
  }
}

template <int M>
[[gnu::always_inline]] inline void transform_tile(const float* pixels, int64_t row, int64_t column, Floats* values) {
  constexpr int kSide = M + 2;
  Floats half[kSide][kSide];  // [row of the transform][column of the tile]
#pragma GCC unroll 6
  for (int x = 0; x < kSide; ++x) {
    Floats d[kSide], out[kSide];
#pragma GCC unroll 6
    for (int y = 0; y < kSide; ++y) d[y] = load(pixels + y * row + x * column);
    transform_input<M>(d, out);
#pragma GCC unroll 6
    for (int y = 0; y < kSide; ++y) half[y][x] = out[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kSide; ++y) transform_input<M>(half[y], values + y * kSide);
}

template <int M>
void input_transform_of(const TileParams& p) {
  constexpr int kSide = M + 2, kPositions = kSide * kSide;
  const int64_t columns = M * p.tile_columns + 2;
  int64_t tile = 0;
  for (int64_t ty = 0; ty < p.tile_rows; ++ty)
    for (int64_t tx = 0; tx < p.tile_columns; ++tx, ++tile) {
      const float* pixels = p.staged + (ty * M * columns + tx * M) * p.lds;
      for (int64_t c = 0; c < p.channels; c += kStaged * kLanes) {
        const Slot slot(p, tile, c);
        Floats values[kStaged][kPositions];
        transform_tile<M>(pixels + c, columns * p.lds, p.lds, values[0]);
        if constexpr (kStaged == 1) {
#pragma GCC unroll 36
          for (int i = 0; i < kPositions; ++i) slot.put(i, values[0][i]);
        } else {
          if (c + kLanes < p.channels)
            transform_tile<M>(pixels + c + kLanes, columns * p.lds, p.lds, values[1]);
          else
            memset(values[1], 0, sizeof values[1]);
          for (int i = 0; i < kPositions; ++i) slot.put(i, values[0][i], values[1][i]);
        }
      }
    }
}

void input_transform(int m, const TileParams& p) { m == 4 ? input_transform_of<4>(p) : input_transform_of<2>(p); }

// --- the way out -----------------------------------------------------------------------------------------------------

// Moments of one vector of channels while the pixels of a block pass by, a tile at a time: the sum of a tile is small
// and so is its rounding.
struct Moments {
  float* at;  // (3, channels), or null
  int64_t channels;
  bool first;
  Floats pivot, sum, square;

  [[gnu::always_inline]] inline void begin(float* moments, int64_t all, int64_t channel, bool first_tile,
                                           Floats value) {
    at = moments ? moments + channel : nullptr;
    channels = all;
    first = first_tile;
    pivot = first || !at ? value : load(at);
    sum = square = Floats{};
  }
  [[gnu::always_inline]] inline void add(Floats value) {
    const Floats centred = value - pivot;
    sum += centred;
    square = fused(centred, centred, square);
  }
  [[gnu::always_inline]] inline void end() const {
    if (!at) return;
    store(at, pivot);
    store(at + channels, first ? sum : load(at + channels) + sum);
    store(at + 2 * channels, first ? square : load(at + 2 * channels) + square);
  }
};

// Adds the residual to the last channels of a pixel and stores them; there are fewer than a vector holds.
inline void store_last(const StoreParams& p, Floats value, int64_t offset, int64_t count) {
  float lane[kLanes];
  store(lane, value);
  for (int64_t i = 0; i < count; ++i) p.out[offset + i] = lane[i] + (p.residual ? p.residual[offset + i] : 0.0f);
}

template <int M>
void output_transform_of(const TileParams& t, const StoreParams& p) {
  constexpr int kSide = M + 2;
  const float* values = t.values + t.first * t.channels;
  for (int64_t ty = 0; ty < t.tile_rows; ++ty)
    for (int64_t tx = 0; tx < t.tile_columns; ++tx, values += t.channels) {
      const int64_t rows = p.rows - ty * M < M ? p.rows - ty * M : M;
      const int64_t columns = p.columns - tx * M < M ? p.columns - tx * M : M;
      const int64_t corner = ty * M * p.row_stride + tx * M * p.channels;
      const bool first = ty == 0 && tx == 0;
      for (int64_t c = 0; c < p.channels; c += kLanes) {
        Floats half[M][kSide];
#pragma GCC unroll 6
        for (int x = 0; x < kSide; ++x) {
          Floats m[kSide], out[M];
#pragma GCC unroll 6
          for (int y = 0; y < kSide; ++y) m[y] = load(values + (y * kSide + x) * t.position_stride + c);
          transform_output<M>(m, out);
#pragma GCC unroll 6
          for (int y = 0; y < M; ++y) half[y][x] = out[y];
        }
        const Floats bias = load(p.bias + c);
        const int64_t last = p.channels - c;
        Moments moments{};
#pragma GCC unroll 6
        for (int y = 0; y < M; ++y) {
          if (y >= rows) break;
          Floats out[M];
          transform_output<M>(half[y], out);
#pragma GCC unroll 6
          for (int x = 0; x < M; ++x) {
            if (x >= columns) break;
            const int64_t offset = corner + y * p.row_stride + x * p.channels + c;
            Floats value = out[x] + bias;
            if (last < kLanes) {
              store_last(p, value, offset, last);
              continue;
            }
            __builtin_prefetch(p.out + offset + M * p.channels, 1);  // the next tile's
            if (p.residual) value += load(p.residual + offset);
            store(p.out + offset, value);
            if (y == 0 && x == 0) moments.begin(p.moments, p.channels, c, first, value);
            moments.add(value);
          }
        }
        moments.end();
      }
    }
}

void output_transform(int m, const TileParams& t, const StoreParams& p) {
  m == 4 ? output_transform_of<4>(t, p) : output_transform_of<2>(t, p);
}

void store_pixels(const float* values, int64_t ldv, const StoreParams& p) {
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    const Floats bias = load(p.bias + c);
    const int64_t last = p.channels - c;
    Moments moments{};
    for (int64_t y = 0; y < p.rows; ++y)
      for (int64_t x = 0; x < p.columns; ++x) {
        const int64_t offset = y * p.row_stride + x * p.channels + c;
        Floats value = load(values + (y * p.columns + x) * ldv + c) + bias;
        if (last < kLanes) {
          store_last(p, value, offset, last);
          continue;
        }
        if (p.residual) value += load(p.residual + offset);
        store(p.out + offset, value);
        if (y == 0 && x == 0) moments.begin(p.moments, p.channels, c, true, value);
        moments.add(value);
      }
    moments.end();
  }
}

}  // namespace

const ConvolutionKernels convolution_kernels = {
    kProductPanel, kLanes, kStorage, product, tile_product, stage, input_transform, output_transform, store_pixels,
};

}  // namespace TF_ISA
}  // namespace tamingfast
