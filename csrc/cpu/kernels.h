// The inner loops of the GPT engine, compiled from kernels.inl once per instruction set.
//
// Every output accumulates in the order of its inner dimension, whatever the number of rows, threads and vector lanes.
// With bfloat16 or int8 weights the activations are rounded to bfloat16, so that every product is exact in float32: a
// dot product instruction, a fused multiply-add and a multiplication followed by an addition give the same bits.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tamingfast {

// The type of the packed weights; with bfloat16 and int8 the cache is bfloat16.
enum class Dtype { float32, bfloat16, int8 };

constexpr std::int64_t kPanel = 32;  // output channels interleaved in a panel of a packed matrix
constexpr std::int64_t kBlock = 16;  // cache positions interleaved in a block; also the lanes of every reduction
constexpr int kQueries = 4;          // query rows per pass over the keys and values

constexpr std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

// The packed weights of a linear layer: panels of kPanel output channels, with the inner dimension running down a
// panel.
struct Matrix {
  const void* panels;
  const float* scale;       // (panels * kPanel,) for int8, else null
  const float* bias;        // (panels * kPanel,) or null
  std::int64_t k;           // inner dimension, even for bfloat16 and int8
  std::int64_t count;       // number of panels
  std::int64_t panel_size;  // bytes
};

enum class Epilogue { store, add, gelu };

// Activations are float, or bfloat16 if Kernels::pairs is set and the weights are not float32.
struct LinearParams {
  const void* x;  // (rows, ldx)
  std::int64_t ldx;
  std::int64_t rows;
  Epilogue epilogue;
  void* out;  // (rows, ldo): float for store and add, an activation for gelu
  std::int64_t ldo;
};

// One head of one slot. Keys are (blocks, d, kBlock), or in bfloat16 (blocks, d / 2, kBlock, 2) with d rounded up to
// even. Values are (positions, d rounded up to kBlock).
struct AttentionParams {
  const float* q;  // (rows, ldq)
  std::int64_t ldq;
  std::int64_t rows;
  std::int64_t start;  // position of the first row
  std::int64_t n_unmasked;
  std::int64_t d;
  const void* keys;
  const void* values;
  const void* next;  // the keys that this thread reads next, to prefetch
  float* scratch;    // kQueries * (d + 1 + length rounded up to kBlock) floats
  void* out;         // (rows, ldo), activations
  std::int64_t ldo;
};

struct Kernels {
  bool pairs;  // bfloat16 and int8 layers read activations as pairs of bfloat16
  // Packs one panel from (rows, k) weights, at most kPanel rows; `scale` is (rows,), read for int8 only.
  void (*pack)(Dtype dtype, const float* weight, std::int64_t rows, std::int64_t k, const float* scale, void* panel);
  // Computes the output channels of panels first to last - 1.
  void (*linear)(Dtype dtype, const LinearParams& params, const Matrix& matrix, std::int64_t first, std::int64_t last);
  // gain and bias are zero-padded to a multiple of kBlock.
  void (*layer_norm)(Dtype dtype, const float* x, std::int64_t n, const float* gain, const float* bias, void* out);
  // As layer_norm, without a mean and a bias: x / sqrt(mean of squares + 1e-5) * gain.
  void (*rms_norm)(Dtype dtype, const float* x, std::int64_t n, const float* gain, void* out);
  // silu(a) * b of n values, a multiple of kBlock, as activations.
  void (*gate)(Dtype dtype, const float* a, const float* b, std::int64_t n, void* out);
  // Writes the key and value of one position and head into the cache.
  void (*append)(Dtype dtype, const float* k, const float* v, std::int64_t d, std::int64_t position, void* keys,
                 void* values);
  void (*attend)(Dtype dtype, const AttentionParams& params);
  // Runs `times` x 1024 multiply-adds or dot products in registers; returns the number of floating-point operations.
  double (*exercise)(Dtype dtype, std::int64_t times);
};

const Kernels& kernels_for(Isa isa);

namespace generic {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}

}  // namespace tamingfast
