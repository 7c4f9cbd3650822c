// Philox4x32-10 and the sampler's noise; tamingfast/ops/choice.py has the same definition in torch.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 4.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace tamingfast {

struct Words {
  std::uint32_t at[4];
};

constexpr int kPhiloxRounds = 10;

TAMINGFAST_HOST_DEVICE inline void philox_round(std::uint32_t& c0, std::uint32_t& c1, std::uint32_t& c2,
                                                std::uint32_t& c3, std::uint32_t key0, std::uint32_t key1) {
  const std::uint64_t product0 = static_cast<std::uint64_t>(c0) * 0xD2511F53u;
  const std::uint64_t product1 = static_cast<std::uint64_t>(c2) * 0xCD9E8D57u;
  c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
  c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
  c1 = static_cast<std::uint32_t>(product1);
  c3 = static_cast<std::uint32_t>(product0);
}

TAMINGFAST_HOST_DEVICE inline void next_keys(std::uint32_t& key0, std::uint32_t& key1) {
  key0 += 0x9E3779B9u;
  key1 += 0xBB67AE85u;
}

TAMINGFAST_HOST_DEVICE inline Words philox4x32(Words counter, std::uint32_t key0, std::uint32_t key1) {
  // Written out: with `philox_round` and `next_keys`, nvcc puts the words on the stack of the kernel that draws them.
  std::uint32_t* c = counter.at;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product0 = static_cast<std::uint64_t>(c[0]) * 0xD2511F53u;
    const std::uint64_t product1 = static_cast<std::uint64_t>(c[2]) * 0xCD9E8D57u;
    c[0] = static_cast<std::uint32_t>(product1 >> 32) ^ c[1] ^ key0;
    c[2] = static_cast<std::uint32_t>(product0 >> 32) ^ c[3] ^ key1;
    c[1] = static_cast<std::uint32_t>(product1);
    c[3] = static_cast<std::uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// A token's image and grid position. Its noise depends on these, the seed and the vocabulary entry alone.
struct Place {
  std::uint32_t image;
  std::uint32_t row;
  std::uint32_t column;
};

// The random words of vocabulary entries 4 * block to 4 * block + 3.
TAMINGFAST_HOST_DEVICE inline Words noise_words(std::uint64_t seed, const Place& place, std::uint32_t block) {
  return philox4x32({{block, place.column, place.row, place.image}}, static_cast<std::uint32_t>(seed),
                    static_cast<std::uint32_t>(seed >> 32));
}

// Standard Gumbel noise from one random word. The logarithms are taken in float64, so that rounding to float32 gives
// the same bits on every machine.
TAMINGFAST_HOST_DEVICE inline float gumbel(std::uint32_t word) {
  const double u = (static_cast<double>(word >> 8) + 0.5) * 0x1p-24;
  return static_cast<float>(-::log(-::log(u)));
}

}  // namespace tamingfast
