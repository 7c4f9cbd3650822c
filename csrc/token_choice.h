// What the token choice is made of, alike on the host and on the device. tamingfast/ops/choice.py is its
// definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace tamingfast {

struct Choice {
  bool greedy = false;
  float temperature = 1.0f;
  std::int64_t top_k = 0;  // 0 keeps all
  double top_p = 1.0;      // 1 keeps all
  std::uint64_t seed = 0;
};

enum : std::int64_t { kChoiceNan = -1, kChoiceNothing = -2 };

// An entry of the vocabulary with the score that it competes with.
struct Candidate {
  float score;
  std::int32_t index;
};

// Loses to every score above -infinity.
TAMINGFAST_BOTH inline Candidate nobody() {
  Candidate candidate;
  candidate.score = -INFINITY;
  candidate.index = -1;
  return candidate;
}

// The higher score, the lower index among equals. Neither score is NaN.
TAMINGFAST_BOTH inline bool beats(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// Whether a run of entries, best first, that holds this share of the probability is the whole nucleus.
TAMINGFAST_BOTH inline bool crosses(double share, double p) {
  return static_cast<float>(share) > static_cast<float>(p);
}

// Ordered as the numbers are, which are not NaN; both zeros are one.
TAMINGFAST_BOTH inline std::uint32_t order_key(float value) {
  const float number = value + 0.0f;
  std::uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace tamingfast
