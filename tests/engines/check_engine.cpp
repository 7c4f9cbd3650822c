// Drives the engine and nearest_code without Python, so that sanitizers see only our code (tests/test_engine.py).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/nearest_code.h"
#include "engine.h"

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

void require(bool good, const char* what) {
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

std::vector<std::int64_t> decode(Engine& engine, std::int64_t batch, std::int64_t length) {
  engine.reserve(batch, length);
  std::vector<std::int64_t> slots, sequences(batch * length, 0), steps;
  std::vector<std::uint32_t> places(length), images(batch);
  for (std::int64_t b = 0; b < batch; ++b) slots.push_back(b), images[b] = static_cast<std::uint32_t>(b);
  for (std::int64_t i = 1; i < length; ++i) steps.push_back(i), places[i] = static_cast<std::uint32_t>(i);
  const std::vector<std::uint8_t> wanted(batch * steps.size(), 1);
  Decoding decoding{batch,
                    slots.data(),
                    sequences.data(),
                    length,
                    0,
                    static_cast<std::int64_t>(steps.size()),
                    steps.data(),
                    wanted.data(),
                    places.data(),
                    places.data(),
                    images.data(),
                    engine.geometry().vocab_size,
                    {false, 0.9f, 10, 0.9, 7}};
  engine.decode(decoding, [] { return false; }, [](std::int64_t) {});
  return sequences;
}

void check(const Geometry& g) {
  const GPTWeights weights = random_weights(g);
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::int8})
    for (const std::string& isa : supported_isas()) {
      Engine one(weights, g, dtype, 1, parse_isa(isa)), three(weights, g, dtype, 3, parse_isa(isa));
      const auto alone = decode(one, 1, g.block_size), together = decode(three, 3, g.block_size);
      require(std::equal(alone.begin(), alone.end(), together.begin()), "the same tokens alone and in a batch");
      std::vector<float> logits(g.block_size * g.vocab_size);
      one.step({{0, 0, alone.data(), g.block_size}}, Logits::all, logits.data(), [] { return false; });
      for (const float value : logits) require(std::isfinite(value), "finite logits");
      three.copy(0, 2, g.block_size / 2);
      three.truncate(0, 0);
      bool refused = false;
      try {
        three.step({{9, 0, alone.data(), 1}}, Logits::none, nullptr, [] { return false; });
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      require(refused, "a slot out of range is refused");
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
    for (const std::int64_t index : out) require(index >= 0 && index < 50, "an index of the codebook");
  }
  std::puts("good");
}
