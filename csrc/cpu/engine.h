// KV-cached decoding of a GPT: what the engine is given, and what it does. The layout of its memory is its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "choose.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

namespace tamingfast {

struct Geometry {
  std::int64_t vocab_size;
  std::int64_t block_size;
  std::int64_t n_layer;
  std::int64_t n_head;
  std::int64_t n_embd;
  std::int64_t n_unmasked;  // leading positions that see one another
};

struct Linear {
  const float* weight;  // (out, in), contiguous
  const float* bias;    // (out,) or null
};

struct LayerWeights {
  const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;
  Linear query, key, value, proj, up, down;
};

// Addresses of the parameters as they lie in the model; read while the engine is made, not kept.
struct GPTWeights {
  const float* tok_emb;  // (vocab_size, n_embd)
  const float* pos_emb;  // (block_size, n_embd)
  std::vector<LayerWeights> layers;
  const float *ln_f_weight, *ln_f_bias;
  Linear head;
};

// Tokens of one slot at positions start .. start + count - 1.
struct Feed {
  std::int64_t slot;
  std::int64_t start;
  const std::int64_t* tokens;
  std::int64_t count;
};

enum class Logits { none, last, all };

// Decoding of sequences side by side. Position steps[i] of each wanted sequence is chosen from the logits of the one
// before it and written into `sequences`, where everything else that precedes a step must be known.
struct Decoding {
  std::int64_t batch;
  const std::int64_t* slots;  // (batch,), distinct
  std::int64_t* sequences;    // (batch, length)
  std::int64_t length;
  std::int64_t fed;              // leading positions of every slot that hold these tokens already
  std::int64_t count;            // of steps
  const std::int64_t* steps;     // (count,), rising, from 1 on
  const std::uint8_t* wanted;    // (batch, count): 0 keeps the token that is there
  const std::uint32_t* rows;     // (count,), of the noise
  const std::uint32_t* columns;  // (count,)
  const std::uint32_t* images;   // (batch,)
  std::int64_t choices;          // vocabulary entries that may be chosen: the first ones
  Choice options;
};

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

class Engine {
 public:
  // Asked about every 20 ms on the calling thread; true stops the work with Interrupted, the slots cut to what is
  // valid.
  using Poll = std::function<bool()>;
  using Progress = std::function<void(std::int64_t done)>;

  Engine(const GPTWeights& weights, const Geometry& geometry, Dtype dtype, int threads, Isa isa);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Geometry& geometry() const;
  std::size_t weight_bytes() const;  // read for every token
  std::size_t cache_bytes() const;
  int threads() const;
  void set_threads(int threads);

  // Replaces the cache by one for `slots` sequences of `length` positions; all slots are empty then.
  // Throws OutOfMemory, with the bytes, and keeps the old cache when there is not enough memory.
  void reserve(std::int64_t slots, std::int64_t length);
  std::int64_t slots() const;
  std::int64_t capacity() const;  // positions of a slot
  std::int64_t length(std::int64_t slot) const;
  void truncate(std::int64_t slot, std::int64_t length);
  void copy(std::int64_t source, std::int64_t target, std::int64_t length);

  // One pass over the weights for all feeds together (more where they hold over 512 tokens). `out`, float32
  // (rows, vocab_size), has one row for each feed that is asked for its last logits, or one for each token.
  // A feed may start before its slot's end, which cuts the slot. Throws std::invalid_argument that names the argument.
  void step(const std::vector<Feed>& feeds, Logits logits, float* out, const Poll& poll);
  std::int64_t logits_rows(const std::vector<Feed>& feeds, Logits logits) const;

  // Calls progress(i + 1) after each step i. Throws std::domain_error when logits hold NaN.
  void decode(const Decoding& decoding, const Poll& poll, const Progress& progress);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tamingfast
