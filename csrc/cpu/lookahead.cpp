#include "lookahead.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

namespace tamingfast {
namespace {

constexpr int kRounds = 3;           // passes of each size that are timed; the first warms up
constexpr double kFirstRight = 0.6;  // the share of the first guess, and the power with which deeper ones fade
constexpr double kFading = -0.7;
constexpr double kDraftsRight = 0.97;  // each draft
constexpr double kSlowest = 1.0 / 64;  // weight of the latest pass in the long run, and at first
constexpr double kFastest = 1.0 / 5;
constexpr double kLeast = 1e-9;            // of a share, so that ratios stay defined
constexpr double kForgotten = 1.0 / 1024;  // how fast a sequence without guesses returns to what is expected

}  // namespace

PassCost PassCost::measure(const std::function<double(std::int64_t rows)>& time_pass) {
  PassCost cost;
  cost.seconds_.fill(std::numeric_limits<double>::infinity());
  for (int round = 0; round < kRounds; ++round)
    for (std::size_t i = 0; i < kSizes.size(); ++i) cost.seconds_[i] = std::min(cost.seconds_[i], time_pass(kSizes[i]));
  for (std::size_t i = 1; i < kSizes.size(); ++i) cost.seconds_[i] = std::max(cost.seconds_[i], cost.seconds_[i - 1]);
  return cost;
}

double PassCost::at(std::int64_t rows) const {
  std::size_t i = 1;
  while (i + 1 < kSizes.size() && kSizes[i] < rows) ++i;
  const double slope = (seconds_[i] - seconds_[i - 1]) / static_cast<double>(kSizes[i] - kSizes[i - 1]);
  return seconds_[i - 1] + slope * static_cast<double>(rows - kSizes[i - 1]);
}

PassCost PassCost::times(std::int64_t copies) const {
  PassCost cost;
  for (std::size_t i = 0; i < kSizes.size(); ++i) cost.seconds_[i] = at(copies * kSizes[i]);
  return cost;
}

Depths expected_of_guesses() {
  Depths share{1.0};
  for (std::int64_t d = 1; d < kWidest; ++d) share[d] = kFirstRight * std::pow(static_cast<double>(d), kFading);
  return share;
}

Depths expected_of_drafts() {
  Depths share{1.0};
  for (std::int64_t d = 1; d < kWidest; ++d) share[d] = share[d - 1] * kDraftsRight;
  return share;
}

void Survival::observe(std::int64_t right, std::int64_t guesses) {
  if (guesses == 0) {
    for (std::int64_t d = 1; d < kWidest; ++d) share_[d] += kForgotten * (expected_[d] - share_[d]);
    return;
  }
  const double weight = std::max(kSlowest, 1.0 / (1.0 / kFastest + static_cast<double>(passes_++)));
  const double checked = share_[std::min(guesses, kWidest - 1)];
  for (std::int64_t d = 1; d < kWidest; ++d) {
    // Where all guesses were right, deeper ones would have been as often as before.
    const double seen = d <= right ? 1.0 : right < guesses ? 0.0 : share_[d] / checked;
    share_[d] = std::max(share_[d] + weight * (seen - share_[d]), kLeast);
  }
}

Shares share_rows(const PassCost& cost, double extra, std::int64_t known, const std::vector<Contender>& contenders) {
  std::vector<std::int64_t> rows(contenders.size(), 1), best = rows;
  double tokens = static_cast<double>(contenders.size()), most = tokens / cost.at(known);
  for (std::int64_t added = 1; added < kWidest; ++added) {
    std::size_t next = contenders.size();
    double gain = 0.0;
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const Contender& one = contenders[i];
      if (rows[i] < std::min(one.most, kWidest) && one.survival->at(rows[i]) > gain)
        gain = one.survival->at(rows[i]), next = i;
    }
    if (next == contenders.size()) break;
    ++rows[next];
    tokens += gain;
    const double rate = tokens / (cost.at(known + added) + extra * static_cast<double>(added));
    if (rate > most) most = rate, best = rows;
  }
  return {best, most};
}

Shares share_drafts(const PassCost& cost, double extra, std::int64_t known, const std::vector<Contender>& contenders) {
  Shares best{{}, 0.0};
  for (const std::int64_t depth : kDrafts) {
    Shares found{{}, 0.0};
    std::int64_t added = 0;
    for (const Contender& one : contenders) {
      found.rows.push_back(std::min(one.most, depth + 1));
      for (std::int64_t d = 0; d < found.rows.back(); ++d) found.rate += one.survival->at(d);
      added += found.rows.back() - 1;
    }
    found.rate /= cost.at(known + added) + extra * static_cast<double>(added);
    if (found.rate > best.rate) best = found;
  }
  return best;
}

}  // namespace tamingfast
