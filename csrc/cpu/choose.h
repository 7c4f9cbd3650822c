// The token choice on the host: temperature, top-k, top-p, Gumbel-max. cuda/choose.cu is its twin on the device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "choice.h"

namespace tamingfast {

// Room that a thread reuses from token to token.
struct ChoiceScratch {
  std::vector<float> scores;
  std::vector<float> sorted;
  std::vector<std::int32_t> kept;  // ascending indices
  std::vector<std::int32_t> order;

  explicit ChoiceScratch(std::int64_t vocab) : scores(vocab), sorted(vocab), kept(vocab), order(vocab) {}
};

inline std::int64_t keep_top_k(const float* scores, std::int64_t vocab, std::int64_t k, ChoiceScratch& scratch) {
  const bool all = k <= 0 || k >= vocab;
  float least = -std::numeric_limits<float>::infinity();
  if (!all) {
    std::copy(scores, scores + vocab, scratch.sorted.begin());
    const auto kth = scratch.sorted.begin() + (k - 1);
    std::nth_element(scratch.sorted.begin(), kth, scratch.sorted.begin() + vocab, std::greater<float>());
    least = *kth;
  }
  std::int64_t count = 0;
  for (std::int64_t v = 0; v < vocab; ++v)
    if (scores[v] >= least) scratch.kept[count++] = static_cast<std::int32_t>(v);  // ties with the k-th stay
  return count;
}

// The shortest run of kept entries, best first, whose probability exceeds p.
inline std::int64_t keep_top_p(const float* scores, std::int64_t count, double p, ChoiceScratch& scratch) {
  std::int32_t* order = scratch.order.data();
  std::copy_n(scratch.kept.data(), count, order);
  std::stable_sort(order, order + count, [&](std::int32_t a, std::int32_t b) { return scores[a] > scores[b]; });
  const float best = count > 0 ? scores[order[0]] : 0.0f;
  float total = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    scratch.sorted[i] = std::exp(scores[order[i]] - best);
    total += scratch.sorted[i];
  }
  double reached = 0.0;
  std::int64_t inside = 0;
  while (inside < count) {
    reached += scratch.sorted[inside++] / total;
    if (crosses(reached, p)) break;
  }
  std::copy_n(order, inside, scratch.kept.data());
  std::sort(scratch.kept.begin(), scratch.kept.begin() + inside);
  return inside;
}

// The chosen entry, the lowest among equals; kChoiceNan or kChoiceNothing when logits hold NaN or only -infinity.
inline std::int64_t choose(const float* logits, std::int64_t vocab, const Choice& options, const Place& place,
                           ChoiceScratch& scratch) {
  for (std::int64_t v = 0; v < vocab; ++v)
    if (std::isnan(logits[v])) return kChoiceNan;
  if (options.greedy) {
    const std::int64_t best = std::max_element(logits, logits + vocab) - logits;
    return logits[best] > -std::numeric_limits<float>::infinity() ? best : kChoiceNothing;
  }
  float* scores = scratch.scores.data();
  for (std::int64_t v = 0; v < vocab; ++v) scores[v] = logits[v] / options.temperature;
  std::int64_t count = keep_top_k(scores, vocab, options.top_k, scratch);
  if (options.top_p < 1.0) count = keep_top_p(scores, count, options.top_p, scratch);
  Candidate best = nobody();
  std::int32_t block = -1;
  Words words{};
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t v = scratch.kept[i];
    if (v / 4 != block) words = noise_words(options.seed, place, block = v / 4);
    const Candidate candidate{scores[v] + gumbel(words.at[v % 4]), v};
    if (std::isnan(candidate.score)) return kChoiceNan;
    if (beats(candidate, best)) best = candidate;
  }
  return best.index < 0 ? std::int64_t{kChoiceNothing} : best.index;
}

}  // namespace tamingfast
