// How far decoding looks ahead: what a pass costs, how often guesses are right, and how many rows each sequence gets.
// These decide widths, never tokens. tamingfast/sampling/lookahead.py has the same rules.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

namespace tamingfast {

constexpr std::int64_t kWidest = 64;  // rows per sequence, and rows of guesses per pass, that are chosen automatically

// Seconds of a pass by its number of rows: measured at some sizes, interpolated between, extrapolated above.
class PassCost {
 public:
  static constexpr std::array<std::int64_t, 6> kSizes{1, 2, 4, 8, 16, 32};

  // time_pass(rows) runs a pass and returns its seconds.
  static PassCost measure(const std::function<double(std::int64_t rows)>& time_pass);

  double at(std::int64_t rows) const;
  PassCost times(std::int64_t copies) const;  // of passes with that many rows for each

 private:
  std::array<double, kSizes.size()> seconds_{};
};

// A number for each depth.
using Depths = std::array<double, kWidest>;

// How often at least d guesses in a row are right, before any was checked: of guesses from the logits around them
// (counted on trained priors; deep ones have often been corrected already), and of those by a copy of the model.
Depths expected_of_guesses();
Depths expected_of_drafts();

// How often at least d guesses in a row were right lately.
class Survival {
 public:
  explicit Survival(const Depths& expected = expected_of_guesses()) : expected_(expected), share_(expected) {}

  // Of `guesses` guesses, the first `right` were right and the next, if any, was wrong.
  void observe(std::int64_t right, std::int64_t guesses);
  double at(std::int64_t depth) const { return share_[depth]; }

 private:
  Depths expected_, share_;
  std::int64_t passes_ = 0;
};

// A sequence that takes part in a pass.
struct Contender {
  const Survival* survival;
  std::int64_t most;  // rows
};

// The rows of each sequence, and the tokens per second that they promise.
struct Shares {
  std::vector<std::int64_t> rows;
  double rate;
};

// The rows of each sequence, at least one, that promise the most tokens per second. A pass has `known` rows before any
// guess, one of each sequence among them; a row of guesses takes `extra` seconds besides its part of the pass.
Shares share_rows(const PassCost& cost, double extra, std::int64_t known, const std::vector<Contender>& contenders);

// The same number of guesses for all sequences, one of kDrafts or as many as there is room for, that promises most.
constexpr std::array<std::int64_t, 3> kDrafts{4, 8, 16};
Shares share_drafts(const PassCost& cost, double extra, std::int64_t known, const std::vector<Contender>& contenders);

}  // namespace tamingfast
