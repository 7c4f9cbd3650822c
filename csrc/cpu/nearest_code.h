// Nearest codebook entry of each vector: argmin_j |z_i - c_j|^2, ties to the lowest index.
#pragma once

#include <cstdint>

#include "isa.h"

namespace tamingfast {

struct NearestCodeParams {
  const float* z;         // (n, d), contiguous
  const float* codebook;  // (k, d), contiguous
  std::int64_t* out;      // (n,)
  std::int64_t n;
  std::int64_t k;  // at least 1
  std::int64_t d;  // at least 1
  int threads;     // at least 1; does not affect the result
};

// Allocates one packed copy of the codebook and a fixed amount of scratch per thread, never n x k values.
// Throws std::invalid_argument, which names the argument, if z or codebook holds NaN or an infinity.
void nearest_code(const NearestCodeParams& params, Isa isa);

}  // namespace tamingfast
