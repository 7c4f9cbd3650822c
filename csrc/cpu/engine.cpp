#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

#include "../guard.h"
#include "choose.h"
#include "memory.h"
#include "team.h"

namespace tamingfast {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kPassRows = 512;  // tokens per pass over the weights
constexpr std::int64_t kMaxThreads = 256;
constexpr auto kPollEvery = std::chrono::milliseconds(20);

// Bytes that the system can still allocate, or infinity if it does not report them.
double available_memory() {
#if defined(__linux__)
  if (std::FILE* file = std::fopen("/proc/meminfo", "r")) {
    char line[128];
    double kilobytes = 0.0;
    bool found = false;
    while (!found && std::fgets(line, sizeof line, file))
      found = std::sscanf(line, "MemAvailable: %lf", &kilobytes) == 1;
    std::fclose(file);
    if (found) return kilobytes * 1024.0;
  }
#endif
  return std::numeric_limits<double>::infinity();
}

void require_memory(const char* what, double bytes) {
  const double free_bytes = available_memory();
  if (bytes > free_bytes)
    throw OutOfMemory(std::string(what) + ": " + bytes_text(bytes) + " are needed, but only " + bytes_text(free_bytes) +
                      " are free");
}

struct PackedMatrix {
  Memory panels, scale, bias;
  Matrix view{};
};

// (n,) float32, zero-padded to a whole panel.
struct Vector {
  Memory data;
  const float* at() const { return data.as<float>(); }
};

Vector padded(const float* values, std::int64_t n) {
  Vector vector{Memory(round_up(n, kPanel) * sizeof(float))};
  std::memcpy(vector.data.as<float>(), values, n * sizeof(float));
  return vector;
}

std::int64_t element_size(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::bfloat16 ? 2 : 1; }

// Linear layers with the same input and number of outputs, stacked into one.
struct Stack {
  std::vector<Linear> parts;
  std::int64_t rows;  // of each part
  const float* row(std::int64_t i, std::int64_t k) const { return parts[i / rows].weight + i % rows * k; }
};

// The quantisation scale of an output channel. int8 cannot represent NaN, so a weight that is not finite makes the
// scale, and thereby the output, NaN.
float int8_scale(const float* weight, std::int64_t k) {
  float most = 0.0f;
  for (std::int64_t i = 0; i < k; ++i) {
    if (!std::isfinite(weight[i])) return std::numeric_limits<float>::quiet_NaN();
    most = std::max(most, std::fabs(weight[i]));
  }
  return most > 0.0f ? most / 127.0f : 1.0f;
}

PackedMatrix pack(const Kernels& kernels, Dtype dtype, const Stack& stack, std::int64_t k, int threads) {
  const std::int64_t n = stack.rows * static_cast<std::int64_t>(stack.parts.size());
  const std::int64_t count = (n + kPanel - 1) / kPanel;
  const std::int64_t inner = dtype == Dtype::float32 ? k : round_up(k, 2);
  PackedMatrix packed;
  packed.view = {nullptr, nullptr, nullptr, inner, count, inner * kPanel * element_size(dtype)};
  packed.panels = Memory(count * packed.view.panel_size);
  packed.view.panels = packed.panels.as<char>();
  if (dtype == Dtype::int8) packed.scale = Memory(count * kPanel * sizeof(float));
  if (stack.parts[0].bias) {
    packed.bias = Memory(count * kPanel * sizeof(float));
    for (std::int64_t i = 0; i < n; ++i) packed.bias.as<float>()[i] = stack.parts[i / stack.rows].bias[i % stack.rows];
  }
  packed.view.scale = packed.scale.as<float>();
  packed.view.bias = packed.bias.as<float>();
  std::vector<float> rows(static_cast<std::size_t>(std::min<std::int64_t>(threads, kMaxThreads)) * kPanel * k);
  parallel(threads, [&](int thread, int of) {
    float* own = rows.data() + thread * kPanel * k;
    const Range panels = share(count, thread, of);
    for (std::int64_t panel = panels.first; panel < panels.last; ++panel) {
      const std::int64_t first = panel * kPanel, here = std::min(kPanel, n - first);
      float scales[kPanel] = {};
      for (std::int64_t i = 0; i < here; ++i) {
        const float* from = stack.row(first + i, k);
        std::copy_n(from, k, own + i * k);
        if (dtype == Dtype::int8) scales[i] = packed.scale.as<float>()[first + i] = int8_scale(from, k);
        if (std::isnan(scales[i])) std::fill_n(own + i * k, k, 0.0f);
      }
      kernels.pack(dtype, own, here, k, scales, packed.panels.as<char>() + panel * packed.view.panel_size);
    }
  });
  return packed;
}

struct Layer {
  Vector ln1_weight, ln1_bias, ln2_weight, ln2_bias;
  PackedMatrix qkv, proj, up, down;
};

}  // namespace

struct Engine::State {
  Geometry geometry;
  Dtype dtype;
  const Kernels& kernels;
  int threads;
  // n_embd, 4 n_embd, 3 n_embd and vocab_size, rounded up to whole panels.
  std::int64_t width, hidden, qkv_width, vocab;
  std::int64_t head_dim;

  Memory tok_emb, pos_emb;  // (vocab_size, width), (block_size, width)
  std::vector<Layer> layers;
  Vector ln_f_weight, ln_f_bias;
  PackedMatrix head;
  std::size_t weight_bytes = 0;

  // For each layer, slot and head: keys, then values.
  Memory cache;
  std::int64_t slots = 0, capacity = 0, keys_bytes = 0, head_bytes = 0;
  std::vector<std::int64_t> lengths;

  // Scratch of a pass. Row strides are not powers of two, so that rows do not compete for the same cache sets.
  std::int64_t scratch_rows = 0, logits_room = 0;
  Memory x, activation, qkv, joined, inner, logits;
  std::vector<Memory> attention_scratch;
  std::vector<ChoiceScratch> choice_scratch;

  Barrier barrier;
  std::atomic<bool> stop{false};
  Clock::time_point polled;

  State(const Geometry& g, Dtype dtype_, const Kernels& k) : geometry(g), dtype(dtype_), kernels(k) {}

  void load(const GPTWeights& weights);
  void check_spans(const std::vector<Span>& spans, const std::int64_t* tokens) const;
  void check_decode(const DecodeParams& d) const;
  void make_scratch(std::int64_t rows, std::int64_t logits_rows);
  void feed(const std::vector<Span>& spans, const std::int64_t* tokens, Logits logits, float* out, const Poll& poll);

  struct Pass;
  void run(Pass& pass);
  void work(Pass& pass, int thread, int of);
  void embed(const Pass& pass, Range rows);
  void normalize(const float* from, std::int64_t rows, const Vector& weight, const Vector& bias, int thread, int of);
  void linear(const PackedMatrix& matrix, const Memory& input, std::int64_t ldx, std::int64_t rows, Epilogue epilogue,
              Memory& out, std::int64_t ldo, int thread, int of);
  void attend(const Pass& pass, std::int64_t layer, int thread, int of);
  void head_logits(Pass& pass, int thread, int of);
  std::int32_t choose_rows(const DecodeParams& d, std::int64_t i, const std::vector<std::int64_t>& who,
                           const float* logits);

  char* cache_of(std::int64_t layer, std::int64_t slot, std::int64_t head) const {
    return cache.as<char>() + ((layer * slots + slot) * geometry.n_head + head) * head_bytes;
  }
  std::int64_t activation_size() const { return kernels.pairs && dtype != Dtype::float32 ? 2 : 4; }
  std::int64_t stride(std::int64_t columns) const { return columns + 16; }
  int usable_threads() const { return forked() ? 1 : threads; }
};

// Tokens that go through all layers together, one row each.
struct Engine::State::Pass {
  std::vector<Span> spans;
  std::vector<std::int64_t> first_rows;         // of each span
  std::vector<std::int64_t> tokens, positions;  // of each row
  std::vector<std::int64_t> asked;              // rows whose logits are wanted
  float* out = nullptr;                         // (asked, vocab_size)
  const Poll* poll = nullptr;

  std::int64_t rows() const { return static_cast<std::int64_t>(tokens.size()); }
  void clear() {
    for (auto* values : {&first_rows, &tokens, &positions, &asked}) values->clear();
    spans.clear();
  }
};

void Engine::State::load(const GPTWeights& weights) {
  const std::int64_t c = geometry.n_embd;
  width = round_up(c, kPanel);
  hidden = round_up(4 * c, kPanel);
  qkv_width = round_up(3 * c, kPanel);
  vocab = round_up(geometry.vocab_size, kPanel);
  head_dim = c / geometry.n_head;
  const double matrices = 12.0 * c * c * geometry.n_layer + static_cast<double>(geometry.vocab_size) * c;
  const double tables = static_cast<double>(geometry.vocab_size + geometry.block_size) * width * 4.0;
  require_memory("weights", matrices * element_size(dtype) + tables);
  const auto table = [&](const float* from, std::int64_t rows) {
    Memory memory(rows * width * sizeof(float));
    for (std::int64_t i = 0; i < rows; ++i)
      std::memcpy(memory.as<float>() + i * width, from + i * c, c * sizeof(float));
    return memory;
  };
  tok_emb = table(weights.tok_emb, geometry.vocab_size);
  pos_emb = table(weights.pos_emb, geometry.block_size);
  const int team = usable_threads();
  for (const LayerWeights& from : weights.layers) {
    Layer layer;
    layer.ln1_weight = padded(from.ln1_weight, c);
    layer.ln1_bias = padded(from.ln1_bias, c);
    layer.ln2_weight = padded(from.ln2_weight, c);
    layer.ln2_bias = padded(from.ln2_bias, c);
    layer.qkv = pack(kernels, dtype, {{from.query, from.key, from.value}, c}, c, team);
    layer.proj = pack(kernels, dtype, {{from.proj}, c}, c, team);
    layer.up = pack(kernels, dtype, {{from.up}, 4 * c}, c, team);
    layer.down = pack(kernels, dtype, {{from.down}, c}, 4 * c, team);
    for (const PackedMatrix* matrix : {&layer.qkv, &layer.proj, &layer.up, &layer.down})
      weight_bytes += matrix->panels.size();
    layers.push_back(std::move(layer));
  }
  ln_f_weight = padded(weights.ln_f_weight, c);
  ln_f_bias = padded(weights.ln_f_bias, c);
  head = pack(kernels, dtype, {{weights.head}, geometry.vocab_size}, c, team);
  weight_bytes += head.panels.size();
}

void Engine::State::make_scratch(std::int64_t rows, std::int64_t logits_rows) {
  if (rows > scratch_rows) {
    x = Memory(rows * stride(width) * sizeof(float));
    activation = Memory(rows * stride(width) * sizeof(float));
    qkv = Memory(rows * stride(qkv_width) * sizeof(float));
    joined = Memory(rows * stride(width) * sizeof(float));
    inner = Memory(rows * stride(hidden) * sizeof(float));
    scratch_rows = rows;
  }
  if (logits_rows > logits_room) {
    logits = Memory(logits_rows * stride(vocab) * sizeof(float));
    logits_room = logits_rows;
  }
  while (static_cast<int>(choice_scratch.size()) < threads) choice_scratch.emplace_back(geometry.vocab_size);
  const std::size_t needed = kQueries * (head_dim + 2 + round_up(capacity, kBlock)) * sizeof(float);
  if (static_cast<int>(attention_scratch.size()) < threads || attention_scratch[0].size() < needed) {
    attention_scratch.clear();
    for (int i = 0; i < threads; ++i) attention_scratch.emplace_back(needed);
  }
}

void Engine::State::embed(const Pass& pass, Range rows) {
  for (std::int64_t r = rows.first; r < rows.last; ++r) {
    const float* token = tok_emb.as<float>() + pass.tokens[r] * width;
    const float* position = pos_emb.as<float>() + pass.positions[r] * width;
    float* to = x.as<float>() + r * stride(width);
    for (std::int64_t i = 0; i < width; ++i) to[i] = token[i] + position[i];
  }
}

void Engine::State::normalize(const float* from, std::int64_t rows, const Vector& weight, const Vector& bias,
                              int thread, int of) {
  const Range mine = share(rows, thread, of);
  for (std::int64_t r = mine.first; r < mine.last; ++r)
    kernels.layer_norm(dtype, from + r * stride(width), geometry.n_embd, weight.at(), bias.at(),
                       activation.as<char>() + r * stride(width) * activation_size());
  barrier.wait(of, [] {});
}

void Engine::State::linear(const PackedMatrix& matrix, const Memory& input, std::int64_t ldx, std::int64_t rows,
                           Epilogue epilogue, Memory& out, std::int64_t ldo, int thread, int of) {
  const Range panels = share(matrix.view.count, thread, of);
  kernels.linear(dtype, {input.as<char>(), ldx, rows, epilogue, out.as<char>(), ldo}, matrix.view, panels.first,
                 panels.last);
  barrier.wait(of, [] {});
}

void Engine::State::attend(const Pass& pass, std::int64_t layer, int thread, int of) {
  const std::int64_t c = geometry.n_embd, heads = geometry.n_head, ldq = stride(qkv_width);
  const Range tasks = share(static_cast<std::int64_t>(pass.spans.size()) * heads, thread, of);
  for (std::int64_t task = tasks.first; task < tasks.last; ++task) {
    const Span& span = pass.spans[task / heads];
    const std::int64_t row = pass.first_rows[task / heads], head_index = task % heads;
    char* keys = cache_of(layer, span.slot, head_index);
    const float* q = qkv.as<float>() + row * ldq + head_index * head_dim;
    for (std::int64_t i = 0; i < span.count; ++i)
      kernels.append(dtype, q + i * ldq + c, q + i * ldq + 2 * c, head_dim, span.start + i, keys, keys + keys_bytes);
    char* out = joined.as<char>() + (row * stride(width) + head_index * head_dim) * activation_size();
    const bool more = task + 1 < tasks.last;
    const char* next = more ? cache_of(layer, pass.spans[(task + 1) / heads].slot, (task + 1) % heads) : keys;
    kernels.attend(dtype, {q, ldq, span.count, span.start, geometry.n_unmasked, head_dim, keys, keys + keys_bytes, next,
                           attention_scratch[thread].as<float>(), out, stride(width)});
  }
  barrier.wait(of, [] {});
}

void Engine::State::head_logits(Pass& pass, int thread, int of) {
  const std::int64_t count = static_cast<std::int64_t>(pass.asked.size());
  if (count == 0) return;
  const Range mine = share(count, thread, of);
  for (std::int64_t i = mine.first; i < mine.last; ++i)
    kernels.layer_norm(dtype, x.as<float>() + pass.asked[i] * stride(width), geometry.n_embd, ln_f_weight.at(),
                       ln_f_bias.at(), activation.as<char>() + i * stride(width) * activation_size());
  barrier.wait(of, [] {});
  linear(head, activation, stride(width), count, Epilogue::store, logits, stride(vocab), thread, of);
  if (!pass.out) return;
  for (std::int64_t i = mine.first; i < mine.last; ++i)
    std::memcpy(pass.out + i * geometry.vocab_size, logits.as<float>() + i * stride(vocab),
                geometry.vocab_size * sizeof(float));
}

void Engine::State::work(Pass& pass, int thread, int of) {
  const std::int64_t rows = pass.rows(), ld = stride(width);
  embed(pass, share(rows, thread, of));
  barrier.wait(of, [] {});
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    normalize(x.as<float>(), rows, layer.ln1_weight, layer.ln1_bias, thread, of);
    linear(layer.qkv, activation, ld, rows, Epilogue::store, qkv, stride(qkv_width), thread, of);
    attend(pass, static_cast<std::int64_t>(i), thread, of);
    linear(layer.proj, joined, ld, rows, Epilogue::add, x, ld, thread, of);
    normalize(x.as<float>(), rows, layer.ln2_weight, layer.ln2_bias, thread, of);
    linear(layer.up, activation, ld, rows, Epilogue::gelu, inner, stride(hidden), thread, of);
    if (thread == 0 && *pass.poll && Clock::now() - polled > kPollEvery) {
      if ((*pass.poll)()) stop = true;
      polled = Clock::now();
    }
    linear(layer.down, inner, stride(hidden), rows, Epilogue::add, x, ld, thread, of);
    if (stop) return;  // set before the barrier above, so that all threads return together
  }
  head_logits(pass, thread, of);
}

void Engine::State::run(Pass& pass) {
  make_scratch(pass.rows(), static_cast<std::int64_t>(pass.asked.size()));
  stop = false;
  parallel(usable_threads(), [&](int thread, int of) { work(pass, thread, of); });
  if (stop) throw Interrupted();
  for (const Span& span : pass.spans) lengths[span.slot] = span.start + span.count;
}

void Engine::State::check_spans(const std::vector<Span>& spans, const std::int64_t* tokens) const {
  std::vector<bool> seen(slots, false);
  for (const Span& span : spans) {
    require_range("slot", span.slot, 0, slots - 1);
    require(!seen[span.slot], "slot", span.slot, "every slot at most once in a step");
    seen[span.slot] = true;
    const std::string slot = "slot " + std::to_string(span.slot), held = std::to_string(lengths[span.slot]);
    require(span.count >= 1, "tokens of " + slot, span.count, "at least one");
    require(span.start >= 0 && span.start <= lengths[span.slot], "start", span.start,
            "0 to " + held + ", the length of " + slot);
    require(span.count <= capacity - span.start, "position", span.start + span.count - 1,
            "at most " + std::to_string(capacity - 1) + ", the last that the cache holds");
    require(span.start == 0 || span.start >= geometry.n_unmasked, "start", span.start,
            "0 or from " + std::to_string(geometry.n_unmasked) +
                " on; feed the unmasked prefix in one piece, because its tokens attend to one another");
    for (std::int64_t i = 0; i < span.count; ++i) require_range("token", *tokens++, 0, geometry.vocab_size - 1);
  }
}

// Splits the spans into passes. The unmasked prefix stays in one pass, because its first token attends to its last.
void Engine::State::feed(const std::vector<Span>& spans, const std::int64_t* tokens, Logits wanted, float* out,
                         const Poll& poll) {
  for (const Span& span : spans) lengths[span.slot] = span.start;
  std::int64_t done_rows = 0;
  std::size_t at = 0;
  std::int64_t taken = 0;  // tokens of spans[at] that are already in a pass
  Pass pass;
  pass.poll = &poll;
  while (at < spans.size()) {
    pass.clear();
    while (at < spans.size() && pass.rows() < kPassRows) {
      const Span& span = spans[at];
      const std::int64_t start = span.start + taken, room = kPassRows - pass.rows();
      const std::int64_t whole = start == 0 ? geometry.n_unmasked : 0;
      const std::int64_t count = std::min(span.count - taken, std::max(room, whole));
      pass.spans.push_back({span.slot, start, count});
      pass.first_rows.push_back(pass.rows());
      taken += count;
      for (std::int64_t i = 0; i < count; ++i) {
        const bool last = taken == span.count && i == count - 1;
        if (wanted == Logits::all || (wanted == Logits::last && last)) pass.asked.push_back(pass.rows());
        pass.tokens.push_back(*tokens++);
        pass.positions.push_back(start + i);
      }
      if (taken == span.count) ++at, taken = 0;
    }
    pass.out = out ? out + done_rows * geometry.vocab_size : nullptr;
    done_rows += static_cast<std::int64_t>(pass.asked.size());
    run(pass);
  }
}

void check_geometry(const Geometry& g) {
  const std::int64_t most = std::int64_t{1} << 24;
  require_range("vocab_size", g.vocab_size, 1, most);
  require_range("block_size", g.block_size, 1, most);
  require_range("n_layer", g.n_layer, 0, 10000);
  require_range("n_embd", g.n_embd, 1, std::int64_t{1} << 20);
  require_range("n_head", g.n_head, 1, g.n_embd);
  require(g.n_embd % g.n_head == 0, "n_head", g.n_head, "a divisor of n_embd=" + std::to_string(g.n_embd));
  require_range("n_unmasked", g.n_unmasked, 0, g.block_size);
}

Engine::Engine(const GPTWeights& weights, const Geometry& g, Dtype dtype, int threads, Isa isa) {
  check_geometry(g);
  require_range("threads", threads, 1, kMaxThreads);
  state_ = std::make_unique<State>(g, dtype, kernels_for(isa));
  state_->threads = threads;
  state_->load(weights);
}

Engine::~Engine() = default;

const Geometry& Engine::geometry() const { return state_->geometry; }
std::size_t Engine::weight_bytes() const { return state_->weight_bytes; }
std::size_t Engine::cache_bytes() const { return state_->cache.size(); }
int Engine::threads() const { return state_->threads; }
std::int64_t Engine::slots() const { return state_->slots; }
std::int64_t Engine::capacity() const { return state_->capacity; }

void Engine::set_threads(int threads) {
  require_range("threads", threads, 1, kMaxThreads);
  state_->threads = threads;
}

void Engine::reserve(std::int64_t slots, std::int64_t length) {
  State& s = *state_;
  require_range("slots", slots, 1, std::int64_t{1} << 24);
  require_range("length", length, 1, s.geometry.block_size);
  const std::int64_t size = s.dtype == Dtype::float32 ? 4 : 2;
  const std::int64_t positions = round_up(length, kBlock);
  const std::int64_t keys = round_up(positions * round_up(s.head_dim, 2) * size, 64);
  const std::int64_t head = keys + round_up(positions * round_up(s.head_dim, kBlock) * size, 64);
  const double total = static_cast<double>(head) * s.geometry.n_head * s.geometry.n_layer * slots;
  require_memory("cache", total);
  Memory cache(static_cast<std::size_t>(total));
  std::vector<std::int64_t> lengths(slots, 0);  // all that may fail comes before any change
  s.cache = std::move(cache);
  s.lengths = std::move(lengths);
  s.slots = slots;
  s.capacity = length;
  s.keys_bytes = keys;
  s.head_bytes = head;
}

std::int64_t Engine::length(std::int64_t slot) const {
  require_range("slot", slot, 0, state_->slots - 1);
  return state_->lengths[slot];
}

void Engine::truncate(std::int64_t slot, std::int64_t length) {
  require_range("slot", slot, 0, state_->slots - 1);
  require_range("length", length, 0, state_->lengths[slot]);
  state_->lengths[slot] = length;
}

void Engine::copy(std::int64_t source, std::int64_t target, std::int64_t length) {
  State& s = *state_;
  require_range("source", source, 0, s.slots - 1);
  require_range("target", target, 0, s.slots - 1);
  require_range("length", length, 0, s.lengths[source]);
  if (source != target)
    for (std::int64_t layer = 0; layer < s.geometry.n_layer; ++layer)
      std::memcpy(s.cache_of(layer, target, 0), s.cache_of(layer, source, 0), s.head_bytes * s.geometry.n_head);
  s.lengths[target] = length;
}

std::int64_t Engine::logits_rows(const std::vector<Span>& spans, Logits logits) const {
  std::int64_t rows = 0;
  for (const Span& span : spans) rows += logits == Logits::all ? span.count : logits == Logits::last ? 1 : 0;
  return rows;
}

void Engine::step(const std::vector<Span>& spans, const std::int64_t* tokens, Logits logits, float* out,
                  const Poll& poll) {
  state_->check_spans(spans, tokens);
  state_->feed(spans, tokens, logits, out, poll);
}

// Chooses step i of the sequences `who` from their rows of logits; returns what `decode` does.
std::int32_t Engine::State::choose_rows(const DecodeParams& d, std::int64_t i, const std::vector<std::int64_t>& who,
                                        const float* logits) {
  const std::int64_t count = static_cast<std::int64_t>(who.size());
  std::atomic<std::int32_t> found{0};
  parallel(static_cast<int>(std::min<std::int64_t>(usable_threads(), count)), [&](int thread, int of) {
    const Range mine = share(count, thread, of);
    for (std::int64_t r = mine.first; r < mine.last; ++r) {
      const std::int64_t b = who[r];
      const Place place{d.images[b], d.rows[i], d.columns[i]};
      const std::int64_t token =
          choose(logits + r * geometry.vocab_size, d.choices, d.choice, place, choice_scratch[thread]);
      if (token == kChoiceNan) found |= kFoundNan;
      if (token == kChoiceNothing) found |= kFoundNothing;
      if (token >= 0) d.sequences[b * d.length + d.steps[i]] = token;
    }
  });
  return found;
}

void Engine::State::check_decode(const DecodeParams& d) const {
  require_range("choices", d.choices, 1, geometry.vocab_size);
  require(d.fed >= 0, "fed", d.fed, "at least 0");
  std::vector<bool> seen(slots, false);
  for (std::int64_t b = 0; b < d.batch; ++b) {
    require_range("slot", d.slots[b], 0, slots - 1);
    require(!seen[d.slots[b]], "slot", d.slots[b], "every slot at most once");
    seen[d.slots[b]] = true;
    require(d.fed <= lengths[d.slots[b]], "fed", d.fed, "at most the length of every slot");
  }
  for (std::int64_t i = 0; i < d.count; ++i) {
    require_range("steps", d.steps[i], i == 0 ? 1 : d.steps[i - 1] + 1, d.length - 1);
    require(d.steps[i] <= capacity, "steps", d.steps[i],
            "at most " + std::to_string(capacity) + ", one more than the cache holds");
  }
}

std::int32_t Engine::decode(const DecodeParams& d, const Poll& poll, const Progress& progress) {
  State& s = *state_;
  s.check_decode(d);
  std::vector<std::int64_t> fed(d.batch, d.fed), tokens, who;
  std::vector<Span> spans;
  std::vector<float> logits;
  s.polled = Clock::now();
  for (std::int64_t i = 0; i < d.count; ++i) {
    const std::int64_t length = d.steps[i];
    spans.clear(), tokens.clear(), who.clear();
    for (std::int64_t b = 0; b < d.batch; ++b) {
      if (!d.wanted[b * d.count + i]) continue;
      // The last token is fed again if the slot holds it already, because its logits are needed.
      std::int64_t start = std::min(fed[b], length - 1);
      if (start < s.geometry.n_unmasked) start = 0;
      const std::int64_t* sequence = d.sequences + b * d.length;
      spans.push_back({d.slots[b], start, length - start});
      tokens.insert(tokens.end(), sequence + start, sequence + length);
      who.push_back(b);
      fed[b] = length;
    }
    if (!spans.empty()) {
      s.check_spans(spans, tokens.data());
      logits.resize(spans.size() * s.geometry.vocab_size);
      s.feed(spans, tokens.data(), Logits::last, logits.data(), poll);
      if (const std::int32_t found = s.choose_rows(d, i, who, logits.data())) return found;
    }
    if (progress) progress(i + 1);
  }
  return 0;
}

}  // namespace tamingfast
