// Convolutions of encoders and decoders for inference on the CPU, on feature maps stored as (image, row, column,
// channel) in float32:
//
//   out = convolution(act(x)) + bias (+ residual),   act(x) = silu(x * scale + shift), x * scale + shift, or x
//
// 3x3 convolutions of stride 1 use Winograd's minimal filtering (Lavin and Gray 2016), all others a product with
// patches of the input. A call computes a band of output rows. Whatever the band, the number of images and the number
// of threads, every output has the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "isa.h"

namespace tamingfast {

// winograd4: 4x4 outputs from 6x6 inputs, 36 products in place of 144; winograd2: 2x2 from 4x4, 16 in place of 36, with
// less than half the weights in memory; winograd: the faster of the two; patches: any kernel size and stride.
enum class Method { patches, winograd2, winograd4, winograd };

struct ConvolutionWeights {
  const float* weight;  // (out, in, kernel, kernel), contiguous
  const float* bias;    // (out,) or null
  std::int64_t out, in, kernel, stride;
};

// A feature map of `height` rows, of which `rows` rows from `first` on are in memory, for every image.
struct MapView {
  const float* data;  // (images, rows, width, channels)
  std::int64_t first, rows, height, width;
};

struct ConvolutionParams {
  std::int64_t images;
  MapView x;
  bool upsample;               // the convolution sees every pixel of x twice in both directions
  std::int64_t padding;        // zeros above and to the left; below and to the right as far as the output reaches
  const float* scale;          // (images, in) or null
  const float* shift;          // (images, in), if there is a scale
  bool silu;                   // with a scale
  const float* residual;       // as out, may be out itself; or null
  float* out;                  // (images, bottom - top, width, out)
  std::int64_t height, width;  // of the whole output
  std::int64_t top, bottom;    // the band; `top` and, unless it is the height, `bottom` are multiples of band_rows()
  float* moments;  // (images, blocks(height, width), 3, out), of which the band's blocks are written; or null
};

// Moments of a feature map: blocks of it, each with three values per channel: a pivot p, the sum of x - p, and the sum
// of (x - p)^2. Blocks are `rows` x `columns` pixels, smaller at the lower and the right edge.
struct Blocks {
  std::int64_t rows, columns;
  std::int64_t count(std::int64_t height, std::int64_t width) const {
    return ((height + rows - 1) / rows) * ((width + columns - 1) / columns);
  }
};

class Convolution {
 public:
  Convolution(const ConvolutionWeights& weights, Method method, int threads, Isa isa);
  ~Convolution();
  Convolution(const Convolution&) = delete;
  Convolution& operator=(const Convolution&) = delete;

  // Throws std::invalid_argument, which names the argument.
  void run(const ConvolutionParams& params, int threads) const;

  std::size_t bytes() const;  // of the packed weights
  Blocks blocks() const;      // whose moments a run writes; blocks().rows is also the unit of bands
  // blocks() of a convolution that is still to be made; its weights and bias are not read.
  static Blocks planned_blocks(const ConvolutionWeights& weights, Method method, Isa isa);
  std::int64_t out() const;
  std::int64_t in() const;

 private:
  struct Packed;
  std::unique_ptr<Packed> packed_;
};

// Writes the moments of rows `top` to `bottom` - 1, x (images, bottom - top, width, channels), for blocks of whole
// rows.
struct MomentsParams {
  const float* x;
  std::int64_t images, height, width, channels, top, bottom;
  Blocks blocks;   // `columns` at least the width
  float* moments;  // (images, blocks, 3, channels)
};
void measure_moments(const MomentsParams& params);

// Turns moments into the scale and shift of a group normalisation: scale = gain / sqrt(variance + eps), shift = bias -
// mean * scale.
struct NormParams {
  const float* moments;  // (images, blocks, 3, channels)
  std::int64_t images, height, width, channels, groups;
  Blocks blocks;
  double eps;
  const float *gain, *bias;  // (channels,)
  float *scale, *shift;      // (images, channels)
};
void normalisation(const NormParams& params);

}  // namespace tamingfast
