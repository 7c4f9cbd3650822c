// KV-cached decoding of a GPT on the CPU: the engine's inputs and operations. Its memory layout is private.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../token_choice.h"
#include "isa.h"
#include "kernels.h"
#include "lookahead.h"

namespace tamingfast {

// The sizes and the kind of a GPT. The defaults are GPT2's: LayerNorm, exact GELU, learned positions, biases.
struct Geometry {
  std::int64_t vocab_size;
  std::int64_t block_size;
  std::int64_t n_layer;
  std::int64_t n_head;
  std::int64_t n_embd;
  std::int64_t n_unmasked;        // leading positions that attend to one another
  std::int64_t extra_tokens = 0;  // that can be fed but not chosen, numbered behind the vocabulary
  std::int64_t hidden = 0;        // width of the MLP; 0 is 4 n_embd
  bool rms_norm = false;          // RMSNorm, without biases
  bool gated = false;             // the MLP is down(silu(up(x)) * gate(x))
  bool rotary = false;            // queries and keys are turned by their position
  bool biases = true;             // of the linear layers in blocks
  bool qk_norm = false;           // queries and keys of each head are normed by RMSNorm

  std::int64_t mlp_width() const { return hidden ? hidden : 4 * n_embd; }
  std::int64_t tokens() const { return vocab_size + extra_tokens; }
};

struct Linear {
  const float* weight;  // (out, in), contiguous
  const float* bias;    // (out,) or null
};

struct LayerWeights {
  const float *ln1_weight, *ln1_bias, *ln2_weight, *ln2_bias;  // biases are null with RMSNorm
  Linear query, key, value, proj, up, down;
  Linear gate{nullptr, nullptr};                           // if the MLP is gated
  const float *query_norm = nullptr, *key_norm = nullptr;  // (n_embd / n_head,), with qk_norm
};

// Addresses of the model's parameters, read by the engine's constructor and not kept.
struct GPTWeights {
  const float* tok_emb;  // (vocab_size + extra_tokens, n_embd)
  const float* pos_emb;  // (block_size, n_embd); with rotary positions the cosine and sine of each pair of a head,
                         // (block_size, n_embd / n_head)
  std::vector<LayerWeights> layers;
  const float *ln_f_weight, *ln_f_bias;
  Linear head;
};

// Consecutive tokens of one slot, at positions start to start + count - 1. A step returns the logits of the last
// `asked`.
struct Span {
  std::int64_t slot;
  std::int64_t start;
  std::int64_t count;
  std::int64_t asked;
};

// Sequences to decode side by side. The token at position steps[i] of each wanted sequence is chosen from the logits of
// the position before it and written into `sequences`; every earlier token must be known or be a step itself.
struct DecodeParams {
  std::int64_t batch;
  const std::int64_t* slots;  // (batch,), distinct
  std::int64_t* sequences;    // (batch, length)
  std::int64_t length;
  std::int64_t fed;              // leading positions that every slot already holds, with these tokens
  std::int64_t count;            // number of steps
  const std::int64_t* steps;     // (count,), increasing, at least 1
  const std::uint8_t* wanted;    // (batch, count): 0 keeps the sequence's token
  const std::uint32_t* rows;     // (count,), grid rows for the noise
  const std::uint32_t* columns;  // (count,), grid columns for the noise
  const std::uint32_t* images;   // (batch,), image numbers for the noise
  std::int64_t choices;          // only the first `choices` vocabulary entries may be chosen
  Choice choice;
  // Positions fed per sequence and pass, from the last known token on: 1 decodes one token after the other, more guess
  // tokens, 0 takes what is fastest. The tokens are the same.
  std::int64_t lookahead;
  // Classifier-free guidance, none if null: a second slot of each sequence holds `null_token` at its first `prefix`
  // positions and the same tokens behind them, and a token is chosen from the logits null + (own - null) * scale.
  const std::int64_t* null_slots = nullptr;  // (batch,), distinct, also from `slots`
  std::int64_t null_token = 0;
  std::int64_t prefix = 0;
  const float* scales = nullptr;  // (length,), of the token at each position
};

// What `decode` did since the engine was made.
struct Counts {
  std::int64_t passes, rows, tokens;  // `rows` whose logits were computed, `tokens` that were chosen
};

// Throws std::invalid_argument, which names the size, unless an engine can have these sizes.
void check_geometry(const Geometry& geometry);

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

class Engine {
 public:
  // Called about every 20 ms on the calling thread. Returning true stops the work: Interrupted is thrown,
  // and the slots keep their valid positions.
  using Poll = std::function<bool()>;
  using Progress = std::function<void(std::int64_t done)>;

  Engine(const GPTWeights& weights, const Geometry& geometry, Dtype dtype, int threads, Isa isa);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Gives `decode` a copy of the model with smaller weights to guess with; reserve() drops it if its cache does not
  // fit.
  void set_draft(std::unique_ptr<Engine> draft);
  Engine* draft() const;
  std::size_t draft_bytes() const;

  const Geometry& geometry() const;
  std::size_t weight_bytes() const;  // read for every token
  std::size_t cache_bytes() const;
  int threads() const;
  void set_threads(int threads);

  // Replaces the cache with an empty one for `slots` sequences of `length` positions.
  // Throws OutOfMemory, which states the bytes, and keeps the old cache if there is not enough memory.
  void reserve(std::int64_t slots, std::int64_t length);
  std::int64_t slots() const;
  std::int64_t capacity() const;  // positions per slot
  std::int64_t length(std::int64_t slot) const;
  void truncate(std::int64_t slot, std::int64_t length);
  void copy(std::int64_t source, std::int64_t target, std::int64_t length);

  // Feeds the spans, whose tokens follow one another in `tokens`, in one pass over the weights per 512 tokens. A span
  // that starts before its slot's end truncates the slot. `out` is float32 (all spans' `asked`, vocab_size).
  // Throws std::invalid_argument, which names the argument.
  void step(const std::vector<Span>& spans, const std::int64_t* tokens, float* out, const Poll& poll);

  // Calls progress(i + 1) once step i is done in all sequences. Throws std::invalid_argument, which names the argument.
  // Stops at a step for which a row of logits holds NaN, or nothing above -infinity, and returns kFoundNan and
  // kFoundNothing or-ed, else 0.
  std::int32_t decode(const DecodeParams& params, const Poll& poll, const Progress& progress);
  const Counts& counts() const;
  void count_pass(std::int64_t rows, std::int64_t tokens);

  // Measured when it is first asked for, and again after the number of threads has changed.
  const PassCost& pass_cost(const Poll& poll);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tamingfast
