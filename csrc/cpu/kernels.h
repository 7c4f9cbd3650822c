// The inner loops of the GPT engine, compiled once for each instruction set from kernels.inl.
//
// Every output is accumulated in one fixed order, that of its inner dimension, whatever the number of rows, threads and
// vector lanes. With bfloat16 or int8 weights the activations are rounded to bfloat16, so that every product is exact
// in float32: a fused dot product, a fused multiply-add and a product then a sum all give the same bits.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tamingfast {

enum class Dtype { float32, bfloat16, int8 };

constexpr std::int64_t kPanel = 32;  // output channels that lie side by side in a packed matrix
constexpr std::int64_t kBlock = 16;  // cache positions that lie side by side; also the lanes of every reduction
constexpr int kQueries = 4;          // query rows that share one reading of the keys and values

constexpr std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

// A linear layer, packed: panels of kPanel output channels, the inner dimension running down a panel.
struct Matrix {
  const void* panels;
  const float* scale;       // (panels * kPanel,) for int8, else null
  const float* bias;        // (panels * kPanel,) or null
  std::int64_t k;           // inner dimension, even for bfloat16 and int8
  std::int64_t count;       // of panels
  std::int64_t panel_size;  // bytes
};

enum class Epilogue { store, add, gelu };

// Rows of activations are `float`, or with Kernels::pairs and half-width weights bfloat16.
struct Product {
  const void* x;  // (rows, ldx)
  std::int64_t ldx;
  std::int64_t rows;
  Epilogue epilogue;
  void* out;  // (rows, ldo): float for store and add, an activation for gelu
  std::int64_t ldo;
};

// One head of one sequence. Its keys are (blocks, d, kBlock), in bfloat16 (blocks, d / 2, kBlock, 2) with d rounded up
// to even; its values (positions, d rounded up to kBlock).
struct Attention {
  const float* q;  // (rows, ldq)
  std::int64_t ldq;
  std::int64_t rows;
  std::int64_t start;  // position of the first row
  std::int64_t n_unmasked;
  std::int64_t d;
  const void* keys;
  const void* values;
  const void* next;  // the keys that will be read after these, if any: they are prefetched
  float* scratch;    // kQueries * (d + 1 + length rounded up to kBlock) floats
  void* out;         // (rows, ldo), activations
  std::int64_t ldo;
};

struct Kernels {
  bool pairs;  // bfloat16 and int8 take their activations as bfloat16
  // The weight (n, k) of one panel from its first output channel on, with at most kPanel rows left.
  void (*pack)(Dtype dtype, const float* weight, std::int64_t rows, std::int64_t k, const float* scale, void* panel);
  void (*multiply)(Dtype dtype, const Product& product, const Matrix& matrix, std::int64_t first, std::int64_t last);
  void (*layer_norm)(Dtype dtype, const float* x, std::int64_t n, const float* gain, const float* bias, void* out);
  void (*remember)(Dtype dtype, const float* k, const float* v, std::int64_t d, std::int64_t position, void* keys,
                   void* values);
  void (*attend)(Dtype dtype, const Attention& attention);
  // Does that many times 1024 multiply-adds or dot products in registers; returns the floating-point operations.
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
