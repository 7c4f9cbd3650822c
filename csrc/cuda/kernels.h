// Parameters and launchers of the CUDA engine's kernels. This header does not include CUDA's, so that any compiler can
// compile the bindings. All pointers are to device memory. tamingfast/engines/cuda is the only caller and checks dtype,
// device and contiguity.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../token_choice.h"

namespace tamingfast::cuda {

// The type of weights, activations and cache; sums are always float32.
enum class Dtype { float32, bfloat16, float16 };

// Where a kernel is launched: a device index and a stream of that device (a cudaStream_t).
struct Queue {
  int device;
  void* stream;
};

enum class Epilogue { store, gelu, add, store_float };

constexpr int kMostLinearRows = 8;

// out = norm(x) weight^T + bias for a few rows, reading the weight once. Source of the norm: Ba, Kiros, Hinton, "Layer
// Normalization", 2016, equation 4.
struct LinearParams {
  int rows;            // 1 to kMostLinearRows
  int inner;           // a multiple of 8
  int columns;         // of the output
  const void* x;       // (rows, inner); float32 if it is normalised
  std::int64_t ldx;    // a multiple of 8
  const float* gain;   // (inner,), or null: no norm
  const float* shift;  // (inner,)
  float epsilon;
  const void* weight;  // (columns, inner), contiguous, 16-byte aligned
  const float* bias;   // (columns,) or null
  Epilogue epilogue;   // `add` and `store_float` write float32
  void* out;           // (rows, columns)
  std::int64_t ldo;
  int tiles;      // set by the launcher: of 8 columns each, of a block
  int rows_each;  // set by the launcher: of a block
};

// Each query row attends to the cached positions 0 to last of its slot.
struct AttentionParams {
  int rows;
  int heads;
  int width;        // of a head
  int stride;       // elements per cached position: width rounded up to a multiple of 8, zero-padded
  int capacity;     // positions per slot
  int splits;       // blocks per row and head; 1 needs neither `partial` nor `arrived`
  bool append;      // also cache the row's own key and value; needs position <= last and distinct slots
  const void* qkv;  // (rows, 3 heads width): queries, keys, values
  std::int64_t ldq;
  bool whole_vectors;            // set by the launcher: heads of qkv begin and end at multiples of 16 bytes
  const std::int32_t* slot;      // (rows,)
  const std::int32_t* position;  // (rows,)
  const std::int32_t* last;      // (rows,)
  void* keys;                    // (slots, heads, capacity, stride), 16-byte aligned
  void* values;
  float* partial;          // (rows, heads, splits, stride + 2)
  std::uint32_t* arrived;  // (rows, heads), zero before and after a launch
  void* out;               // (rows, heads width)
  std::int64_t ldo;
};

// x += y + bias; out = norm(x).
struct AddNormParams {
  int rows;
  int width;
  float* x;  // (rows, width)
  std::int64_t ldx;
  const void* y;  // (rows, width), or null: x is left as it is
  std::int64_t ldy;
  const float* bias;  // (width,) or null
  const float* gain;
  const float* shift;
  float epsilon;
  void* out;  // (rows, width)
  std::int64_t ldo;
};

// x = gelu(x + bias), the exact GELU. Source: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016, section 2.
struct GeluParams {
  int rows;
  int width;
  void* x;  // (rows, width)
  std::int64_t ldx;
  const float* bias;
};

// What all rows of a choice share. It is in device memory, so that one captured graph serves every call.
struct Options {
  Choice choice;
  std::int64_t choices;  // only the first `choices` vocabulary entries may be chosen
};

// Row i is at position[i] of its sequence. If the next token is wanted, it is chosen from the logits and written. The
// row's position then advances to that token, and the token's embedding becomes the row's next input.
struct ChooseParams {
  int rows;
  int vocab;
  const void* logits;  // (rows, vocab)
  std::int64_t ldl;
  const Options* options;
  const std::int64_t* images;  // (rows,), image numbers for the noise
  const std::int64_t* places;  // (2, length): grid rows, then columns, for the noise, by position in the sequence
  const std::uint8_t* wanted;  // (rows, length)
  std::int64_t* sequence;      // (rows, length)
  int length;
  std::int32_t* position;  // (rows,), below length - 1
  const float* tok_emb;    // (vocab, width)
  const float* pos_emb;    // (positions, width)
  int positions;
  int width;
  float* x;  // (rows, width), written if the next position is below `positions`
  std::int64_t ldx;
  std::int32_t* errors;  // (rows,); kFoundNan or kFoundNothing is or-ed into the row's
};

// A failed launch throws std::runtime_error, which names the kernel.
void linear(Dtype dtype, const LinearParams& params, const Queue& queue);
void attention(Dtype dtype, const AttentionParams& params, const Queue& queue);
// Writes the rows' keys and values to their positions. Queries, `last` and the fields after `values` are not used.
void append(Dtype dtype, const AttentionParams& params, const Queue& queue);
void add_norm(Dtype dtype, const AddNormParams& params, const Queue& queue);
void bias_gelu(Dtype dtype, const GeluParams& params, const Queue& queue);
void choose(Dtype logits, const ChooseParams& params, const Queue& queue);

struct Devices {
  int count;
  std::string reason;  // why there are none
};
Devices devices();

}  // namespace tamingfast::cuda
