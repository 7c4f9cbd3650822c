// Drives the engine and nearest_code without Python, so that sanitizers see only our code; run by test_cpu.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu/engine.h"
#include "cpu/nearest_code.h"

using namespace tamingfast;

namespace {

std::mt19937 generator(0);
std::vector<std::vector<float>> arrays;

const float* random_array(std::int64_t n) {
  std::normal_distribution<float> normal(0.0f, 0.3f);
  arrays.emplace_back(n);
  for (float& value : arrays.back()) value = normal(generator);
  return arrays.back().data();
}

// Ends the program unless `good`.
void expect(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

GPTWeights random_weights(const Geometry& g) {
  const std::int64_t c = g.n_embd;
  const auto linear = [](std::int64_t out, std::int64_t in) {
    return Linear{random_array(out * in), random_array(out)};
  };
  GPTWeights weights{
      random_array(g.vocab_size * c),           random_array(g.block_size * c), {}, random_array(c), random_array(c),
      {random_array(g.vocab_size * c), nullptr}};
  for (std::int64_t i = 0; i < g.n_layer; ++i)
    weights.layers.push_back({random_array(c), random_array(c), random_array(c), random_array(c), linear(c, c),
                              linear(c, c), linear(c, c), linear(c, c), linear(4 * c, c), linear(c, 4 * c)});
  return weights;
}

std::vector<std::int64_t> decode(Engine& engine, std::int64_t batch, std::int64_t length, std::int64_t lookahead) {
  engine.reserve(batch, length);
  std::vector<std::int64_t> slots, sequences(batch * length, 0), steps;
  std::vector<std::uint32_t> places(length), images(batch);
  for (std::int64_t b = 0; b < batch; ++b) slots.push_back(b), images[b] = static_cast<std::uint32_t>(b);
  for (std::int64_t i = 1; i < length; ++i) steps.push_back(i), places[i] = static_cast<std::uint32_t>(i % 8);
  const std::vector<std::uint8_t> wanted(batch * steps.size(), 1);
  DecodeParams params{};
  params.batch = batch;
  params.slots = slots.data();
  params.sequences = sequences.data();
  params.length = length;
  params.count = static_cast<std::int64_t>(steps.size());
  params.steps = steps.data();
  params.wanted = wanted.data();
  params.rows = params.columns = places.data();
  params.images = images.data();
  params.choices = engine.geometry().vocab_size;
  params.choice = {false, 0.9f, 10, 0.9, 7};
  params.lookahead = lookahead;
  engine.decode(params, [] { return false; }, [](std::int64_t) {});
  return sequences;
}

void check(const Geometry& g) {
  const GPTWeights weights = random_weights(g);
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::int8})
    for (const std::string& isa : supported_isas()) {
      Engine one(weights, g, dtype, 1, parse_isa(isa)), three(weights, g, dtype, 3, parse_isa(isa));
      const auto alone = decode(one, 1, g.block_size, 1), together = decode(three, 3, g.block_size, 1);
      for (const std::int64_t lookahead : {0, 2, 7, 100})
        expect(decode(three, 3, g.block_size, lookahead) == together, "the same tokens with lookahead");
      expect(std::equal(alone.begin(), alone.end(), together.begin()), "the same tokens alone and in a batch");
      three.set_draft(std::make_unique<Engine>(weights, g, Dtype::int8, 3, parse_isa(isa)));
      for (const std::int64_t lookahead : {0, 3, 9})
        expect(decode(three, 3, g.block_size, lookahead) == together, "the same tokens with drafts");
      std::vector<float> logits(g.block_size * g.vocab_size);
      one.step({{0, 0, g.block_size, g.block_size}}, alone.data(), logits.data(), [] { return false; });
      for (const float value : logits) expect(std::isfinite(value), "finite logits");
      three.copy(0, 2, g.block_size / 2);
      three.truncate(0, 0);
      bool refused = false;
      try {
        three.step({{9, 0, 1, 0}}, alone.data(), nullptr, [] { return false; });
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      expect(refused, "an unknown slot is refused");
    }
}

}  // namespace

int main() {
  check({37, 21, 2, 3, 33, 4});
  check({64, 40, 1, 2, 96, 0});
  check({5, 3, 1, 1, 1, 0});
  for (const std::string& isa : supported_isas()) {
    std::vector<std::int64_t> out(101, -1);
    nearest_code({random_array(101 * 7), random_array(50 * 7), out.data(), 101, 50, 7, 3}, parse_isa(isa));
    for (const std::int64_t index : out) expect(index >= 0 && index < 50, "an index of the codebook");
  }
  std::puts("good");
}
