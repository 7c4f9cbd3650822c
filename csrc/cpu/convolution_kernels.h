// The inner loops of convolutions, compiled from convolution.inl once per instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tamingfast {

// How the matrices of Winograd's products are stored: transformed inputs (rows, depth) and panels of weights (depth,
// panel), both rounded up to whole steps. A split value is the sum of three bfloat16, which hold all its bits.
struct Storage {
  std::int64_t row_step, depth_step;
  bool split;
  std::int64_t floats(std::int64_t values) const { return split ? values / 2 * kSplit : values; }  // of memory
  static constexpr std::int64_t kSplit = 3;
};

// Rows of A (rows, lda) times panels of B, each (k, panel), into C (rows, ldc). Every sum runs over k in order.
struct ProductParams {
  const float* a;
  std::int64_t lda, rows, k;
  const float* panels;  // of the first panel; one follows the other after `panel_stride` floats
  std::int64_t panel_stride;
  std::int64_t count;  // panels
  float* c;
  std::int64_t ldc;
};

// A block of an input map, prepared for a transform: act(x) of `rows` x `columns` pixels, zeros where the map ends.
struct StageParams {
  const float* x;  // (rows in memory, width, channels), from row `first` on
  std::int64_t first, width, channels;
  std::int64_t height, shown_width;  // of the map as the convolution sees it
  int doubling;                      // 1 if every pixel is seen twice in both directions
  std::int64_t top, left, rows, columns;
  const float *scale, *shift;  // (channels,) or null
  bool silu;
  float* out;  // (rows, columns, ldo)
  std::int64_t ldo;
};

// Tiles of one block between the pixels and the `positions` matrices of transformed values.
struct TileParams {
  std::int64_t tile_rows, tile_columns;
  std::int64_t channels;
  float* values;  // positions matrices (tiles, channels), `position_stride` floats apart
  std::int64_t position_stride;
  std::int64_t first;   // row of the matrices that the block's first tile has
  const float* staged;  // input transform: (m * tile_rows + 2, m * tile_columns + 2, lds)
  std::int64_t lds;
};

struct StoreParams {
  std::int64_t rows, columns;  // pixels of the block
  std::int64_t channels;
  const float* bias;      // (channels rounded up to a panel)
  const float* residual;  // as out, or null
  float* out;             // first pixel of the block; rows are `row_stride` floats apart
  std::int64_t row_stride;
  float* moments;  // (3, channels) or null; pivot, sums and squares are initialised by the first pixel
};

struct ConvolutionKernels {
  std::int64_t panel;  // output channels side by side in packed weights
  std::int64_t lanes;  // channels of a map that goes through a transform are a multiple of this
  Storage storage;
  void (*product)(const ProductParams& params);
  // The product of transformed inputs and weights as `storage` has them; lda is the depth.
  void (*tile_product)(const ProductParams& params);
  void (*stage)(const StageParams& params);
  void (*input_transform)(int m, const TileParams& params);
  void (*output_transform)(int m, const TileParams& params, const StoreParams& store);
  // Pixels (rows * columns, ldv) to the map: bias, residual and moments as in the output transform.
  void (*store)(const float* values, std::int64_t ldv, const StoreParams& params);
};

const ConvolutionKernels& convolution_kernels_for(Isa isa);

namespace generic {
extern const ConvolutionKernels convolution_kernels;
}
namespace avx2 {
extern const ConvolutionKernels convolution_kernels;
}
namespace avx512 {
extern const ConvolutionKernels convolution_kernels;
}
namespace avx512bf16 {
extern const ConvolutionKernels convolution_kernels;  // with AMX
}

}  // namespace tamingfast
