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
#include "decode.h"
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

// (n,) float32, zero-padded to a whole panel; zeros where a model has none.
struct Vector {
  Memory data;
  const float* at() const { return data.as<float>(); }
};

Vector padded(const float* values, std::int64_t n) {
  Vector vector{Memory(round_up(n, kPanel) * sizeof(float))};
  if (values) std::memcpy(vector.data.as<float>(), values, n * sizeof(float));
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
  Vector ln1_weight, ln1_bias, ln2_weight, ln2_bias, query_norm, key_norm;
  PackedMatrix qkv, proj, up, down;
};

}  // namespace

struct Engine::State {
  Geometry geometry;
  Dtype dtype;
  const Kernels& kernels;
  int threads;
  // n_embd, the MLP's width, 3 n_embd and vocab_size, rounded up to whole panels.
  std::int64_t width, hidden, qkv_width, vocab;
  std::int64_t head_dim;

  Memory tok_emb, pos_emb;  // (tokens, width), (block_size, width, or head_dim with rotary positions)
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
  Memory x, activation, qkv, joined, inner, gates, logits;
  std::vector<Memory> attention_scratch;

  Barrier barrier;
  std::atomic<bool> stop{false};
  Clock::time_point polled;

  std::unique_ptr<Engine> draft;
  Counts counts{};
  PassCost cost;
  int cost_threads = 0;            // with which it was measured
  std::int64_t cost_capacity = 0;  // likewise

  State(const Geometry& g, Dtype dtype_, const Kernels& k) : geometry(g), dtype(dtype_), kernels(k) {}

  void load(const GPTWeights& weights);
  void check_spans(const std::vector<Span>& spans, const std::int64_t* tokens) const;
  void make_scratch(std::int64_t rows, std::int64_t logits_rows);
  void feed(const std::vector<Span>& spans, const std::int64_t* tokens, float* out, const Poll& poll);
  double time_pass(std::int64_t rows, const Poll& poll);

  struct Pass;
  void run(Pass& pass);
  void work(Pass& pass, int thread, int of);
  void embed(const Pass& pass, Range rows);
  void norm(const float* from, const Vector& weight, const Vector& bias, void* out) const;
  void normalize(const float* from, std::int64_t rows, const Vector& weight, const Vector& bias, int thread, int of);
  void gate(std::int64_t rows, int thread, int of);
  void norm_head(float* head, const float* gain) const;
  void turn(float* head, std::int64_t position) const;
  void linear(const PackedMatrix& matrix, const Memory& input, std::int64_t ldx, std::int64_t rows, Epilogue epilogue,
              Memory& out, std::int64_t ldo, int thread, int of);
  void attend(const Pass& pass, std::int64_t layer, int thread, int of);
  void head_logits(Pass& pass, int thread, int of);

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
  const std::int64_t inside = geometry.mlp_width();
  hidden = round_up(inside, kPanel);
  qkv_width = round_up(3 * c, kPanel);
  vocab = round_up(geometry.vocab_size, kPanel);
  head_dim = c / geometry.n_head;
  const double block = 4.0 * c * c + (geometry.gated ? 3.0 : 2.0) * inside * c;
  const double matrices = block * geometry.n_layer + static_cast<double>(geometry.vocab_size) * c;
  const double tables = static_cast<double>(geometry.tokens() + geometry.block_size) * width * 4.0;
  require_memory("weights", matrices * element_size(dtype) + tables);
  const auto table = [&](const float* from, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
    Memory memory(rows * stride * sizeof(float));
    for (std::int64_t i = 0; i < rows; ++i)
      std::memcpy(memory.as<float>() + i * stride, from + i * columns, columns * sizeof(float));
    return memory;
  };
  tok_emb = table(weights.tok_emb, geometry.tokens(), c, width);
  pos_emb = geometry.rotary ? table(weights.pos_emb, geometry.block_size, head_dim, head_dim)
                            : table(weights.pos_emb, geometry.block_size, c, width);
  const int team = usable_threads();
  for (const LayerWeights& from : weights.layers) {
    Layer layer;
    layer.ln1_weight = padded(from.ln1_weight, c);
    layer.ln1_bias = padded(from.ln1_bias, c);
    layer.ln2_weight = padded(from.ln2_weight, c);
    layer.ln2_bias = padded(from.ln2_bias, c);
    if (geometry.qk_norm) {
      layer.query_norm = padded(from.query_norm, head_dim);
      layer.key_norm = padded(from.key_norm, head_dim);
    }
    layer.qkv = pack(kernels, dtype, {{from.query, from.key, from.value}, c}, c, team);
    layer.proj = pack(kernels, dtype, {{from.proj}, c}, c, team);
    std::vector<Linear> up{from.up};
    if (geometry.gated) up.push_back(from.gate);
    layer.up = pack(kernels, dtype, {up, inside}, c, team);
    layer.down = pack(kernels, dtype, {{from.down}, c}, inside, team);
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
    if (geometry.gated) gates = Memory(rows * stride(2 * hidden) * sizeof(float));
    scratch_rows = rows;
  }
  if (logits_rows > logits_room) {
    logits = Memory(logits_rows * stride(vocab) * sizeof(float));
    logits_room = logits_rows;
  }
  const std::size_t needed = kQueries * (head_dim + 2 + round_up(capacity, kBlock)) * sizeof(float);
  if (static_cast<int>(attention_scratch.size()) < threads || attention_scratch[0].size() < needed) {
    attention_scratch.clear();
    for (int i = 0; i < threads; ++i) attention_scratch.emplace_back(needed);
  }
}

void Engine::State::embed(const Pass& pass, Range rows) {
  for (std::int64_t r = rows.first; r < rows.last; ++r) {
    const float* token = tok_emb.as<float>() + pass.tokens[r] * width;
    float* to = x.as<float>() + r * stride(width);
    if (geometry.rotary) {
      std::memcpy(to, token, width * sizeof(float));
      continue;
    }
    const float* position = pos_emb.as<float>() + pass.positions[r] * width;
    for (std::int64_t i = 0; i < width; ++i) to[i] = token[i] + position[i];
  }
}

void Engine::State::norm(const float* from, const Vector& weight, const Vector& bias, void* out) const {
  if (geometry.rms_norm)
    kernels.rms_norm(dtype, from, geometry.n_embd, weight.at(), out);
  else
    kernels.layer_norm(dtype, from, geometry.n_embd, weight.at(), bias.at(), out);
}

void Engine::State::normalize(const float* from, std::int64_t rows, const Vector& weight, const Vector& bias,
                              int thread, int of) {
  const Range mine = share(rows, thread, of);
  for (std::int64_t r = mine.first; r < mine.last; ++r)
    norm(from + r * stride(width), weight, bias, activation.as<char>() + r * stride(width) * activation_size());
  barrier.wait(of, [] {});
}

void Engine::State::linear(const PackedMatrix& matrix, const Memory& input, std::int64_t ldx, std::int64_t rows,
                           Epilogue epilogue, Memory& out, std::int64_t ldo, int thread, int of) {
  const Range panels = share(matrix.view.count, thread, of);
  kernels.linear(dtype, {input.as<char>(), ldx, rows, epilogue, out.as<char>(), ldo}, matrix.view, panels.first,
                 panels.last);
  barrier.wait(of, [] {});
}

// The inner activations of a gated MLP, in pieces of a panel.
void Engine::State::gate(std::int64_t rows, int thread, int of) {
  const std::int64_t pieces = hidden / kPanel;
  const Range mine = share(rows * pieces, thread, of);
  for (std::int64_t i = mine.first; i < mine.last; ++i) {
    const std::int64_t row = i / pieces, at = i % pieces * kPanel;
    const float* up = gates.as<float>() + row * stride(2 * hidden) + at;
    kernels.gate(dtype, up, up + hidden, kPanel, inner.as<char>() + (row * stride(hidden) + at) * activation_size());
  }
  barrier.wait(of, [] {});
}

// RMSNorm of a head's values.
void Engine::State::norm_head(float* head, const float* gain) const {
  float squares = 0.0f;
  for (std::int64_t i = 0; i < head_dim; ++i) squares += head[i] * head[i];
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(head_dim) + 1e-5f);
  for (std::int64_t i = 0; i < head_dim; ++i) head[i] *= scale * gain[i];
}

// Turns each pair of a head's values by the angle of its position.
void Engine::State::turn(float* head, std::int64_t position) const {
  const float* angle = pos_emb.as<float>() + position * head_dim;
  for (std::int64_t i = 0; i < head_dim; i += 2) {
    const float a = head[i], b = head[i + 1];
    head[i] = a * angle[i] - b * angle[i + 1];
    head[i + 1] = b * angle[i] + a * angle[i + 1];
  }
}

void Engine::State::attend(const Pass& pass, std::int64_t layer, int thread, int of) {
  const std::int64_t c = geometry.n_embd, heads = geometry.n_head, ldq = stride(qkv_width);
  const Range tasks = share(static_cast<std::int64_t>(pass.spans.size()) * heads, thread, of);
  for (std::int64_t task = tasks.first; task < tasks.last; ++task) {
    const Span& span = pass.spans[task / heads];
    const std::int64_t row = pass.first_rows[task / heads], head_index = task % heads;
    char* keys = cache_of(layer, span.slot, head_index);
    float* q = qkv.as<float>() + row * ldq + head_index * head_dim;
    if (geometry.qk_norm)
      for (std::int64_t i = 0; i < span.count; ++i) {
        norm_head(q + i * ldq, layers[layer].query_norm.at());
        norm_head(q + i * ldq + c, layers[layer].key_norm.at());
      }
    if (geometry.rotary)
      for (std::int64_t i = 0; i < span.count; ++i)
        for (float* values : {q + i * ldq, q + i * ldq + c}) turn(values, span.start + i);
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
    norm(x.as<float>() + pass.asked[i] * stride(width), ln_f_weight, ln_f_bias,
         activation.as<char>() + i * stride(width) * activation_size());
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
    if (geometry.gated) {
      linear(layer.up, activation, ld, rows, Epilogue::store, gates, stride(2 * hidden), thread, of);
      gate(rows, thread, of);
    } else {
      linear(layer.up, activation, ld, rows, Epilogue::gelu, inner, stride(hidden), thread, of);
    }
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
    require_range("asked", span.asked, 0, span.count);
    for (std::int64_t i = 0; i < span.count; ++i) require_range("token", *tokens++, 0, geometry.tokens() - 1);
  }
}

// Splits the spans into passes. The unmasked prefix stays in one pass, because its first token attends to its last.
void Engine::State::feed(const std::vector<Span>& spans, const std::int64_t* tokens, float* out, const Poll& poll) {
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
      pass.spans.push_back({span.slot, start, count, 0});
      pass.first_rows.push_back(pass.rows());
      taken += count;
      for (std::int64_t i = 0; i < count; ++i) {
        if (start + i >= span.start + span.count - span.asked) pass.asked.push_back(pass.rows());
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

// Seconds of a pass over that many tokens of the first slot, behind those that it holds and at least in the middle of
// the cache, where attention costs as much as on average. Where there is no room, attention is left out.
double Engine::State::time_pass(std::int64_t rows, const Poll& poll) {
  Pass pass;
  pass.poll = &poll;
  pass.tokens.assign(rows, 0);
  const std::int64_t held = slots > 0 ? lengths[0] : 0;
  const std::int64_t first = std::max(held, std::min(capacity / 2, capacity - rows));
  const bool room = first + rows <= capacity;
  if (room) pass.spans.push_back({0, first, rows, rows}), pass.first_rows.push_back(0);
  for (std::int64_t i = 0; i < rows; ++i) {
    pass.positions.push_back(room ? first + i : 0);
    pass.asked.push_back(i);
  }
  const Clock::time_point begun = Clock::now();
  run(pass);
  const double seconds = std::chrono::duration<double>(Clock::now() - begun).count();
  if (room) lengths[0] = held;
  return seconds;
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
  require_range("extra_tokens", g.extra_tokens, 0, most);
  require_range("hidden", g.hidden, 0, std::int64_t{1} << 22);
  require(!g.gated || g.mlp_width() % kPanel == 0, "hidden", g.hidden,
          "a multiple of " + std::to_string(kPanel) + " for a gated MLP");
  require(!g.rotary || g.n_embd / g.n_head % 2 == 0, "n_head", g.n_head, "heads of even width for rotary positions");
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
  if (state_->draft) state_->draft->set_threads(threads);
}

void Engine::set_draft(std::unique_ptr<Engine> draft) { state_->draft = std::move(draft); }
Engine* Engine::draft() const { return state_->draft.get(); }

std::size_t Engine::draft_bytes() const {
  return state_->draft ? state_->draft->weight_bytes() + state_->draft->cache_bytes() : 0;
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
  if (!s.draft) return;
  try {
    s.draft->reserve(slots, length);
  } catch (const OutOfMemory&) {
    s.draft.reset();
  }
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

void Engine::step(const std::vector<Span>& spans, const std::int64_t* tokens, float* out, const Poll& poll) {
  state_->check_spans(spans, tokens);
  state_->feed(spans, tokens, out, poll);
}

std::int32_t Engine::decode(const DecodeParams& params, const Poll& poll, const Progress& progress) {
  state_->polled = Clock::now();
  return Decoding(*this, params, poll).run(progress);
}

const Counts& Engine::counts() const { return state_->counts; }

void Engine::count_pass(std::int64_t rows, std::int64_t tokens) {
  Counts& counts = state_->counts;
  ++counts.passes;
  counts.rows += rows;
  counts.tokens += tokens;
}

const PassCost& Engine::pass_cost(const Poll& poll) {
  State& s = *state_;
  const auto [less, more] = std::minmax(s.cost_capacity, s.capacity);
  if (s.cost_threads != s.threads || more > 2 * less) {
    s.cost = PassCost::measure([&](std::int64_t rows) { return s.time_pass(rows, poll); });
    s.cost_threads = s.threads;
    s.cost_capacity = s.capacity;
  }
  return s.cost;
}

}  // namespace tamingfast
