// The kernels of the CUDA engine: their parameters and launchers. Nothing here needs CUDA's headers, so that what binds
// them is compiled by any compiler; all pointers are to device memory. tamingfast/cuda_engine is their only caller
// and owns the checks of dtype, device and contiguity.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../choice.h"

namespace tamingfast::cuda {

// Of weights, activations and cache; sums are float32 everywhere.
enum class Number { float32, bfloat16, float16 };

// Where a kernel is launched: the index of the device and its stream, a cudaStream_t.
struct Queue {
  int device;
  void* stream;
};

enum class Epilogue { store, gelu, add, store_float };

constexpr int kMostLinearRows = 8;

// y = norm(x) W^T + bias for a few rows, reading W once. Source of the norm: Ba, Kiros, Hinton, "Layer Normalization",
// 2016, equation 4.
struct LinearParams {
  int rows;            // 1 to kMostLinearRows
  int inner;           // a multiple of 8
  int columns;         // of the output
  const void* x;       // (rows, inner), or float32 where it is normalised
  std::int64_t ldx;    // a multiple of 8
  const float* gain;   // (inner,), null where x is taken as it is
  const float* shift;  // (inner,)
  float epsilon;
  const void* weight;  // (columns, inner), contiguous, 16-byte aligned
  const float* bias;   // (columns,) or null
  Epilogue epilogue;   // `add` is to float32, `store_float` makes it
  void* out;           // (rows, columns)
  std::int64_t ldo;
};

// Attention of one query row each over its slot's cached positions 0 .. last.
struct AttentionParams {
  int rows;
  int heads;
  int width;        // of a head
  int stride;       // of a cached position: width rounded up to a multiple of 8, zeros behind the width
  int capacity;     // positions of a slot
  int splits;       // blocks that share a row and head; 1 needs neither `partial` nor `arrived`
  bool append;      // write the row's own key and value first; needs its position <= last, and each slot but once
  const void* qkv;  // (rows, 3 heads width): queries, keys, values
  std::int64_t ldq;
  bool whole_vectors;            // set by the launcher: heads of qkv begin and end at 16 bytes
  const std::int32_t* slot;      // (rows,)
  const std::int32_t* position;  // (rows,)
  const std::int32_t* last;      // (rows,)
  void* keys;                    // (slots, heads, capacity, stride), 16-byte aligned
  void* values;
  float* partial;          // (rows, heads, splits, stride + 2)
  std::uint32_t* arrived;  // (rows, heads), zero before and after
  void* out;               // (rows, heads width)
  std::int64_t ldo;
};

// x += y + bias; out = norm(x).
struct AddNormParams {
  int rows;
  int width;
  float* x;  // (rows, width)
  std::int64_t ldx;
  const void* y;  // (rows, width), or null: x stays
  std::int64_t ldy;
  const float* bias;  // (width,) or null
  const float* gain;
  const float* shift;
  float epsilon;
  void* out;  // (rows, width)
  std::int64_t ldo;
};

// x = gelu(x + bias), exact. Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016, section 2.
struct GeluParams {
  int rows;
  int width;
  void* x;  // (rows, width)
  std::int64_t ldx;
  const float* bias;
};

enum : std::int32_t { kFoundNan = 1, kFoundNothing = 2 };

// What every row of a choice shares; it lies on the device, so that a captured graph serves every call.
struct Options {
  Choice choice;
  std::int64_t choices;  // entries that may be chosen: the first ones
};

// Row i stands at position[i] of its sequence: the token after it is chosen from the logits, where it is wanted, and
// becomes the row's next input; the row moves on to it.
struct ChooseParams {
  int rows;
  int vocab;
  const void* logits;  // (rows, vocab)
  std::int64_t ldl;
  const Options* options;
  const std::int64_t* images;  // (rows,), of the noise
  const std::int64_t* places;  // (2, length): grid rows, then columns, of the noise, by position in the sequence
  const std::uint8_t* wanted;  // (rows, length)
  std::int64_t* sequence;      // (rows, length)
  int length;
  std::int32_t* position;  // (rows,), below length - 1
  const float* tok_emb;    // (vocab, width)
  const float* pos_emb;    // (positions, width)
  int positions;
  int width;
  float* x;  // (rows, width), written where the next position is one
  std::int64_t ldx;
  std::int32_t* errors;  // kFoundNan, kFoundNothing are added to it
};

// A failed launch throws std::runtime_error, which names the kernel.
void linear(Number number, const LinearParams& params, const Queue& queue);
void attention(Number number, const AttentionParams& params, const Queue& queue);
// Writes the rows' keys and values to their positions; queries, `last` and what follows `values` are not used.
void append(Number number, const AttentionParams& params, const Queue& queue);
void add_norm(Number number, const AddNormParams& params, const Queue& queue);
void bias_gelu(Number number, const GeluParams& params, const Queue& queue);
void choose(Number logits, const ChooseParams& params, const Queue& queue);

struct Devices {
  int count;
  std::string reason;  // why there are none
};
Devices devices();

}  // namespace tamingfast::cuda
