// Definitions of the token choice that host (cpu/choose.h) and device (cuda/choose.cu) share. tamingfast/ops/choice.py
// is the reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "philox.h"

namespace tamingfast {

struct Choice {
  bool greedy = false;
  float temperature = 1.0f;
  std::int64_t top_k = 0;  // 0 keeps all
  double top_p = 1.0;      // 1 keeps all
  std::uint64_t seed = 0;
};

// Returned in place of a token when a row of logits holds NaN, or nothing above -infinity.
enum : std::int64_t { kChoiceNan = -1, kChoiceNothing = -2 };
// How a caller reports such rows.
enum : std::int32_t { kFoundNan = 1, kFoundNothing = 2 };

// The score of a logit, given the best logit of its row, which is above -infinity. Where the best divided by the
// temperature is not finite, distances from it are divided: logits near the largest float do not overflow, and an
// infinite one is certain.
struct Scale {
  float best, temperature;
  bool distances;

  TAMINGFAST_HOST_DEVICE Scale(float best_, float temperature_)
      : best(best_), temperature(temperature_), distances(!(fabsf(best_ / temperature_) < INFINITY)) {}
  TAMINGFAST_HOST_DEVICE float operator()(float logit) const {
    if (!distances) return logit / temperature;
    return logit == best ? 0.0f : (logit - best) / temperature;  // infinity minus itself would be NaN
  }
};

// A vocabulary entry and its score: the logit, with noise once that is added.
struct Candidate {
  float score;
  std::int32_t index;
};

// The neutral element of `beats`: it loses to every score above -infinity.
TAMINGFAST_HOST_DEVICE inline Candidate no_candidate() {
  Candidate candidate;
  candidate.score = -INFINITY;
  candidate.index = -1;
  return candidate;
}

// Whether a has the higher score or, at equal scores, the lower index. Neither score may be NaN.
TAMINGFAST_HOST_DEVICE inline bool beats(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// Whether the best entries complete the nucleus of top-p, if together they hold this share of the probability.
TAMINGFAST_HOST_DEVICE inline bool crosses(double share, double p) {
  return static_cast<float>(share) > static_cast<float>(p);
}

// Maps floats to unsigned integers of the same order; -0 and +0 map to one key. The value must not be NaN.
TAMINGFAST_HOST_DEVICE inline std::uint32_t order_key(float value) {
  const float number = value + 0.0f;
  std::uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace tamingfast
