// Drives the CPU engine and nearest_code with random sizes and histories, without Python, and compares them with plain
// loops in float64. Built with sanitizers by test_sanitizers.py; every array is as long as it must be and no longer.
// Usage: engine_driver SEED ROUNDS
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/choose.h"
#include "cpu/engine.h"
#include "cpu/nearest_code.h"
#include "driver.h"

using namespace tamingfast;

namespace {

bool never() { return false; }

// --- a transformer in plain loops ------------------------------------------------------------------------------------

using Row = std::vector<double>;
using Tokens = std::vector<std::int64_t>;

struct Model {
  Geometry g;
  std::vector<std::vector<float>> arrays;
  GPTWeights weights;

  explicit Model(const Geometry& geometry) : g(geometry) {
    const std::int64_t c = g.n_embd, head = c / g.n_head, inside = g.mlp_width();
    arrays.reserve(20 * g.n_layer + 8);
    weights.tok_emb = add(g.tokens() * c, 1.0f);
    weights.pos_emb = add(g.block_size * (g.rotary ? head : c), 1.0f);
    const auto shift = [&] { return g.rms_norm ? nullptr : add(c, 1); };
    for (std::int64_t i = 0; i < g.n_layer; ++i) {
      weights.layers.push_back({add(c, 1), shift(), add(c, 1), shift(), linear(c, c), linear(c, c), linear(c, c),
                                linear(c, c), linear(inside, c), linear(c, inside)});
      LayerWeights& layer = weights.layers.back();
      if (g.gated) layer.gate = linear(inside, c);
      if (g.qk_norm) layer.query_norm = add(head, 1), layer.key_norm = add(head, 1);
    }
    weights.ln_f_weight = add(c, 1);
    weights.ln_f_bias = shift();
    weights.head = {add(g.vocab_size * c, 1.0f / std::sqrt(static_cast<float>(c))), nullptr};
  }
  Model(const Model&) = delete;

  const float* add(std::int64_t n, float spread) {
    arrays.push_back(random_values(n, spread));
    return arrays.back().data();
  }
  Linear linear(std::int64_t out, std::int64_t in) {
    return {add(out * in, 1.0f / std::sqrt(static_cast<float>(in))), g.biases ? add(out, 0.1f) : nullptr};
  }
};

Row normalized(const Row& x, const float* gain, const float* bias) {
  double mean = 0, square = 0;
  for (double value : x) mean += value / x.size();
  for (double value : x) square += (value - mean) * (value - mean) / x.size();
  Row out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = (x[i] - mean) / std::sqrt(square + 1e-5) * gain[i] + bias[i];
  return out;
}

Row multiplied(const Linear& layer, const Row& x, std::int64_t out) {
  Row y(out);
  for (std::int64_t i = 0; i < out; ++i) {
    y[i] = layer.bias ? layer.bias[i] : 0.0;
    for (std::size_t j = 0; j < x.size(); ++j) y[i] += layer.weight[i * x.size() + j] * x[j];
  }
  return y;
}

void add_to(Row& x, const Row& y) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

bool is_gpt2(const Geometry& g) {
  return !(g.extra_tokens || g.hidden || g.rms_norm || g.gated || g.rotary || g.qk_norm || !g.biases);
}

// The logits of every token; zeros for what is no GPT2, of which only memory and finiteness are checked.
std::vector<Row> logits_of(const Model& model, const Tokens& tokens) {
  const Geometry& g = model.g;
  if (!is_gpt2(g)) return std::vector<Row>(tokens.size(), Row(g.vocab_size));
  const std::int64_t c = g.n_embd, n = static_cast<std::int64_t>(tokens.size()), width = c / g.n_head;
  std::vector<Row> x(n, Row(c));
  for (std::int64_t t = 0; t < n; ++t)
    for (std::int64_t i = 0; i < c; ++i)
      x[t][i] = static_cast<double>(model.weights.tok_emb[tokens[t] * c + i]) + model.weights.pos_emb[t * c + i];
  for (const LayerWeights& layer : model.weights.layers) {
    std::vector<Row> q, k, v;
    for (const Row& row : x) {
      const Row normed = normalized(row, layer.ln1_weight, layer.ln1_bias);
      q.push_back(multiplied(layer.query, normed, c));
      k.push_back(multiplied(layer.key, normed, c));
      v.push_back(multiplied(layer.value, normed, c));
    }
    for (std::int64_t t = 0; t < n; ++t) {
      const std::int64_t seen = t < g.n_unmasked ? std::min(g.n_unmasked, n) : t + 1;
      Row joined(c);
      for (std::int64_t head = 0; head < g.n_head; ++head) {
        Row weight(seen);
        double largest = -INFINITY, total = 0;
        for (std::int64_t s = 0; s < seen; ++s) {
          for (std::int64_t i = head * width; i < (head + 1) * width; ++i) weight[s] += q[t][i] * k[s][i];
          largest = std::max(largest, weight[s] /= std::sqrt(static_cast<double>(width)));
        }
        for (double& value : weight) total += value = std::exp(value - largest);
        for (std::int64_t s = 0; s < seen; ++s)
          for (std::int64_t i = head * width; i < (head + 1) * width; ++i) joined[i] += weight[s] / total * v[s][i];
      }
      add_to(x[t], multiplied(layer.proj, joined, c));
      Row inner = multiplied(layer.up, normalized(x[t], layer.ln2_weight, layer.ln2_bias), 4 * c);
      for (double& value : inner) value *= 0.5 * std::erfc(-value / std::sqrt(2.0));
      add_to(x[t], multiplied(layer.down, inner, c));
    }
  }
  std::vector<Row> logits;
  for (const Row& row : x)
    logits.push_back(multiplied(model.weights.head, normalized(row, model.weights.ln_f_weight, model.weights.ln_f_bias),
                                g.vocab_size));
  return logits;
}

// --- the engine ------------------------------------------------------------------------------------------------------

struct Driven {
  const Model& model;
  Engine& engine;
  double tolerance;
  std::vector<Tokens> held;

  std::int64_t slot() const { return any(0, static_cast<std::int64_t>(held.size()) - 1); }
  Tokens random_tokens(std::int64_t count) const {
    Tokens tokens(count);
    for (std::int64_t& token : tokens) token = any(0, model.g.vocab_size - 1);
    return tokens;
  }

  void compare(const float* got, const Row& expected) const {
    double error = 0, norm = 0;
    for (std::size_t v = 0; v < expected.size(); ++v) {
      expect(std::isfinite(got[v]), "logits are finite");
      error += (got[v] - expected[v]) * (got[v] - expected[v]);
      norm += expected[v] * expected[v];
    }
    expect(error <= tolerance * tolerance * (norm + expected.size()), "logits are those of the plain loops");
  }

  void reserve() {
    const std::int64_t length = any(1, model.g.block_size);
    held.assign(any(1, 5), {});
    engine.reserve(static_cast<std::int64_t>(held.size()), length);
  }

  void step() {
    std::map<std::int64_t, bool> slots;
    for (std::int64_t i = any(1, 4); i > 0; --i) slots[slot()] = true;
    std::vector<Span> spans;
    Tokens fed;
    for (const auto& entry : slots) {
      Tokens& own = held[entry.first];
      const std::int64_t n = model.g.n_unmasked, room = engine.capacity();
      std::int64_t start = std::min<std::int64_t>(any(0, static_cast<std::int64_t>(own.size())), room - 1);
      if (start < n) start = 0;
      const std::int64_t least = start == 0 ? std::max<std::int64_t>(n, 1) : 1;
      if (least > room - start) continue;
      const Tokens more = random_tokens(one_of<std::int64_t>({least, any(least, room - start)}));
      const std::int64_t count = static_cast<std::int64_t>(more.size());
      spans.push_back({entry.first, start, count, one_of<std::int64_t>({0, 1, count, any(0, count)})});
      own.resize(start);
      own.insert(own.end(), more.begin(), more.end());
      fed.insert(fed.end(), more.begin(), more.end());
    }
    std::int64_t rows = 0;
    for (const Span& span : spans) rows += span.asked;
    std::vector<float> out(rows * model.g.vocab_size);
    engine.step(spans, fed.data(), out.data(), never);
    const float* row = out.data();
    for (const Span& span : spans) {
      const std::vector<Row> expected = logits_of(model, held[span.slot]);
      const std::int64_t end = span.start + span.count;
      for (std::int64_t t = end - span.asked; t < end; ++t, row += model.g.vocab_size) compare(row, expected[t]);
    }
    expect(row == out.data() + out.size(), "every row was compared");
  }

  void decode() {
    const std::int64_t batch = any(1, static_cast<std::int64_t>(held.size()));
    const std::int64_t least = std::max<std::int64_t>(model.g.n_unmasked, 1), most = engine.capacity() + 1;
    if (least >= most) return;
    const std::int64_t length = any(least + 1, most);
    Tokens slots(held.size());
    for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int64_t>(i);
    std::shuffle(slots.begin(), slots.end(), generator);
    Tokens nulls;
    if (2 * batch <= static_cast<std::int64_t>(slots.size()) && any(0, 1))
      nulls.assign(slots.begin() + batch, slots.begin() + 2 * batch);
    slots.resize(batch);
    Tokens sequences = random_tokens(batch * length), steps;
    for (std::int64_t i = least; i < length; ++i)
      if (any(0, 3)) steps.push_back(i);
    std::vector<std::uint8_t> wanted(batch * steps.size());
    for (std::uint8_t& value : wanted) value = any(0, 4) > 0;
    std::vector<std::uint32_t> places(steps.size(), 7), images(batch, 3);
    if (any(0, 1))
      for (std::size_t i = 0; i < places.size(); ++i) places[i] = static_cast<std::uint32_t>(i % 4);
    DecodeParams p{};
    p.batch = batch;
    p.slots = slots.data();
    p.sequences = sequences.data();
    p.length = length;
    p.count = static_cast<std::int64_t>(steps.size());
    p.steps = steps.data();
    p.wanted = wanted.data();
    p.rows = p.columns = places.data();
    p.images = images.data();
    p.choices = any(1, model.g.vocab_size);
    p.choice = {any(0, 2) == 0, one_of<float>({1.2e-38f, 0.5f, 1.0f, 3e38f}), any(0, model.g.vocab_size + 2),
                one_of<double>({1e-300, 0.3, 0.999, 1.0}), static_cast<std::uint64_t>(any(0, 1 << 20))};
    const std::vector<float> scales(length, one_of<float>({0.0f, 1.5f, 4.0f}));
    if (!nulls.empty()) {
      p.null_slots = nulls.data();
      p.null_token = any(0, model.g.tokens() - 1);
      p.prefix = 1;
      p.scales = scales.data();
    }
    p.lookahead = 1;
    Tokens ahead = sequences;
    expect(engine.decode(p, never, [](std::int64_t) {}) == 0, "tokens can be chosen");
    p.lookahead = one_of<std::int64_t>({0, 2, 3, 8, 100});
    p.sequences = ahead.data();
    expect(engine.decode(p, never, [](std::int64_t) {}) == 0, "tokens can be chosen, with lookahead");
    expect(ahead == sequences, "the same tokens with lookahead");
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t i = 0; i < length; ++i) {
        const std::int64_t token = sequences[b * length + i];
        expect(token >= 0 && token < model.g.vocab_size, "tokens are in the vocabulary");
      }
      Tokens& own = held[slots[b]];
      const std::int64_t now = engine.length(slots[b]);
      if (std::none_of(wanted.begin() + b * p.count, wanted.begin() + (b + 1) * p.count, [](auto w) { return w; }))
        continue;
      own.assign(sequences.begin() + b * length, sequences.begin() + b * length + now);
      if (nulls.empty()) continue;
      expect(engine.length(nulls[b]) == now, "both slots of a sequence are as long");
      held[nulls[b]] = own;
      if (now > 0) held[nulls[b]][0] = p.null_token;
    }
  }

  void move() {
    const std::int64_t from = slot(), to = slot();
    const std::int64_t least = std::min<std::int64_t>(model.g.n_unmasked, static_cast<std::int64_t>(held[from].size()));
    const std::int64_t length = one_of<std::int64_t>({0, any(least, static_cast<std::int64_t>(held[from].size()))});
    if (any(0, 1)) {
      engine.copy(from, to, length);
      held[to] = held[from];
      held[to].resize(length);
    } else {
      engine.truncate(from, length);
      held[from].resize(length);
    }
  }

  void mistakes() {
    const std::int64_t slots = static_cast<std::int64_t>(held.size()), far = std::numeric_limits<std::int64_t>::max();
    const Tokens token{0}, wrong{one_of<std::int64_t>({-1, model.g.tokens(), far, -far})};
    std::vector<float> out(model.g.vocab_size);
    const auto step = [&](const Span& span, const Tokens& tokens) {
      engine.step({span}, tokens.data(), out.data(), never);
    };
    const std::int64_t start = one_of<std::int64_t>({-1, engine.length(0) + 1, far, -far});
    expect_refused("a slot", [&] { step({one_of<std::int64_t>({-1, slots, far, -far}), 0, 1, 1}, token); });
    expect_refused("a start", [&] { step({0, start, 1, 1}, token); });
    expect_refused("a count", [&] { step({0, 0, one_of<std::int64_t>({0, -1, -far}), 0}, token); });
    expect_refused("too many tokens",
                   [&] { step({0, 0, one_of<std::int64_t>({engine.capacity() + 1, far}), 1}, token); });
    expect_refused("logits", [&] { step({0, 0, 1, one_of<std::int64_t>({2, -1, far, -far})}, token); });
    expect_refused("a token", [&] { step({0, 0, 1, 1}, wrong); });
    expect_refused("a length", [&] { engine.truncate(0, one_of<std::int64_t>({-1, far, engine.length(0) + 1})); });
    expect_refused("a copy", [&] { engine.copy(0, slots, 0); });
    expect_refused("a copy", [&] { engine.copy(0, 0, far); });
    expect_refused("a cache", [&] { engine.reserve(one_of<std::int64_t>({0, -1, far}), 1); });
    expect_refused("a cache", [&] { engine.reserve(1, one_of<std::int64_t>({0, model.g.block_size + 1, far})); });
    expect_refused("threads", [&] { engine.set_threads(one_of<int>({0, -1, 257})); });
  }
};

void drive_engine() {
  Geometry g{};
  g.n_head = any(1, 4);
  g.n_embd = g.n_head * one_of<std::int64_t>({1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 49, 65});
  g.n_layer = any(0, 3);
  g.vocab_size = one_of<std::int64_t>({1, 2, 31, 32, 33, 64, 97});
  g.block_size = one_of<std::int64_t>({1, 2, 15, 16, 17, 33, 50});
  g.n_unmasked = one_of<std::int64_t>({0, 0, any(0, g.block_size)});
  const bool other = any(0, 2) == 0;  // than GPT2, which alone has a reference here
  if (other) {
    g.extra_tokens = any(0, 3);
    g.rms_norm = any(0, 1);
    g.gated = any(0, 1);
    g.rotary = any(0, 1) && g.n_embd / g.n_head % 2 == 0;
    g.biases = any(0, 1);
    g.qk_norm = any(0, 1);
    g.hidden = g.gated ? one_of<std::int64_t>({32, 64}) : one_of<std::int64_t>({0, 5, 33});
  }
  const Model model(g);
  const Dtype dtype = one_of<Dtype>({Dtype::float32, Dtype::bfloat16, Dtype::int8});
  const std::string isa = one_of(supported_isas());
  situation = isa + ", dtype " + std::to_string(static_cast<int>(dtype)) + ", vocab " + std::to_string(g.vocab_size) +
              ", block " + std::to_string(g.block_size) + ", layers " + std::to_string(g.n_layer) + ", heads " +
              std::to_string(g.n_head) + ", width " + std::to_string(g.n_embd) + ", prefix " +
              std::to_string(g.n_unmasked);
  Engine engine(model.weights, g, dtype, static_cast<int>(any(1, 4)), parse_isa(isa));
  // Half types round the inputs of every layer. Norms of one or two values enlarge any difference without limit.
  const double loose = g.n_embd < 8 || !is_gpt2(g) ? INFINITY : dtype == Dtype::bfloat16 ? 0.2 : 0.5;
  Driven driven{model, engine, dtype == Dtype::float32 ? (g.n_embd < 3 || !is_gpt2(g) ? INFINITY : 2e-3) : loose, {}};
  if (any(0, 1))
    engine.set_draft(std::make_unique<Engine>(model.weights, g, Dtype::int8, engine.threads(), parse_isa(isa)));
  driven.reserve();
  for (std::int64_t i = 0; i < 12; ++i) {
    const std::int64_t action = any(0, 9);
    if (action < 5) driven.step();
    if (action == 5) driven.decode();
    if (action == 6 || action == 7) driven.move();
    if (action == 8) engine.set_threads(static_cast<int>(any(1, 5)));
    if (action == 9 && any(0, 2) == 0) driven.reserve();
    for (std::size_t slot = 0; slot < driven.held.size(); ++slot)
      expect(engine.length(slot) == static_cast<std::int64_t>(driven.held[slot].size()), "slots have their lengths");
  }
  driven.mistakes();
}

// --- the nearest code and the token choice ---------------------------------------------------------------------------

void drive_nearest_code() {
  const std::int64_t n = any(0, 130), k = any(1, 120), d = any(1, 40);
  const std::string isa = one_of(supported_isas());
  situation =
      "nearest_code, " + isa + ", n " + std::to_string(n) + ", k " + std::to_string(k) + ", d " + std::to_string(d);
  std::vector<float> z = random_values(n * d, 1.0f), codes = random_values(k * d, 1.0f);
  const float offset = one_of<float>({0.0f, 1000.0f}), scale = one_of<float>({1.0f, 1e-18f, 1e18f});
  for (std::int64_t j = 1; j < k; ++j)  // copies, of which the first wins
    if (any(0, 2) == 0) std::copy_n(codes.begin() + any(0, j - 1) * d, d, codes.begin() + j * d);
  for (std::int64_t i = 0; i < n; ++i)
    if (any(0, 2) == 0) std::copy_n(codes.begin() + any(0, k - 1) * d, d, z.begin() + i * d);
  for (auto* values : {&z, &codes})
    for (float& value : *values) value = (value + offset) * scale;
  std::vector<std::int64_t> out(n, -1);
  nearest_code({z.data(), codes.data(), out.data(), n, k, d, static_cast<int>(any(1, 5))}, parse_isa(isa));
  for (std::int64_t i = 0; i < n; ++i) {
    const auto distance = [&](std::int64_t j) {
      double sum = 0;
      for (std::int64_t c = 0; c < d; ++c) {
        const double difference = static_cast<double>(z[i * d + c]) - codes[j * d + c];
        sum += difference * difference;
      }
      return sum;
    };
    expect(out[i] >= 0 && out[i] < k, "an index of the codebook");
    const double own = distance(out[i]);
    for (std::int64_t j = 0; j < k; ++j) {
      expect(own <= distance(j) * (1 + 1e-12), "no code is nearer");
      if (std::equal(codes.begin() + j * d, codes.begin() + (j + 1) * d, codes.begin() + out[i] * d))
        expect(j >= out[i], "the first of equal codes");
    }
  }
  if (n == 0) return;
  (any(0, 1) ? z : codes)[any(0, d - 1)] = one_of<float>({INFINITY, -INFINITY, NAN});
  expect_refused("a value that is not finite",
                 [&] { nearest_code({z.data(), codes.data(), out.data(), n, k, d, 2}, parse_isa(isa)); });
}

void drive_choice() {
  const std::int64_t vocab = any(1, 70);
  situation = "choose, vocab " + std::to_string(vocab);
  std::vector<float> logits = random_values(vocab, one_of<float>({0.0f, 1.0f, 1e30f}));
  for (float& logit : logits)
    if (any(0, 3) == 0) logit = one_of<float>({3e38f, -3e38f, 0.0f, -0.0f, 1e-45f, -INFINITY, INFINITY});
  if (any(0, 5) == 0) std::fill(logits.begin(), logits.end(), one_of<float>({-3e38f, 3e38f, -INFINITY, INFINITY}));
  if (any(0, 5) == 0) logits[any(0, vocab - 1)] = NAN;
  const Choice choice{any(0, 3) == 0, one_of<float>({1.2e-38f, 1e-3f, 0.5f, 1.0f, 100.0f, 3e38f}), any(-1, vocab + 2),
                      one_of<double>({-1.0, 1e-300, 1e-9, 0.5, 0.99999999, 1.0, 7.0, NAN}), 5};
  ChoiceScratch scratch(vocab);
  const std::int64_t token = choose(logits.data(), vocab, choice, {1, 2, 3}, scratch);
  const bool nan = std::any_of(logits.begin(), logits.end(), [](float logit) { return std::isnan(logit); });
  const float best = nan ? NAN : *std::max_element(logits.begin(), logits.end());
  if (nan) return expect(token == kChoiceNan, "NaN is reported");
  if (best == -INFINITY) return expect(token == kChoiceNothing, "a row without numbers is reported");
  expect(token >= 0 && token < vocab, "a token of the vocabulary");
  const float own = logits[token];
  expect(own > -INFINITY, "an entry that is not excluded");
  if (choice.greedy || best == INFINITY) expect(own == best, "the best");
  std::vector<float> sorted(logits);
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  // Dividing may make neighbours equal, so only entries that are clearly below the k-th are too low.
  if (best < INFINITY && choice.top_k > 0 && choice.top_k < vocab && !choice.greedy) {
    const double kth = sorted[choice.top_k - 1], slack = 1e-6 * std::fabs(kth) + 1e-37 * choice.temperature;
    expect(own >= kth - slack, "one of the best k");
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return 2;
  const std::int64_t seed = std::atoll(words[1]), rounds = std::atoll(words[2]);
  for (std::int64_t round = 0; round < rounds; ++round) {
    generator.seed(seed + round);
    drive_engine();
    drive_nearest_code();
    for (int i = 0; i < 20; ++i) drive_choice();
  }
  std::printf("%lld rounds\n", static_cast<long long>(rounds));
}
