// The token choice on the host: temperature, top-k, top-p, Gumbel-max. cuda/choose.cu is the device's implementation.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "../token_choice.h"

namespace tamingfast {

// Buffers that a thread reuses from token to token.
struct ChoiceScratch {
  std::vector<float> scores;
  std::vector<float> sorted;
  std::vector<std::int32_t> kept;  // ascending indices
  std::vector<std::int32_t> order;

  explicit ChoiceScratch(std::int64_t vocab) : scores(vocab), sorted(vocab), kept(vocab), order(vocab) {}
};

// Writes the indices of the k best entries, and of all that tie with the k-th, to scratch.kept; returns their number.
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
    if (scores[v] >= least) scratch.kept[count++] = static_cast<std::int32_t>(v);
  return count;
}

// Narrows scratch.kept to the nucleus: the fewest entries, best first, whose probability exceeds p. Returns their
// number.
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

// Returns the chosen entry, the lowest among equals, or kChoiceNan or kChoiceNothing.
inline std::int64_t choose(const float* logits, std::int64_t vocab, const Choice& choice, const Place& place,
                           ChoiceScratch& scratch) {
  for (std::int64_t v = 0; v < vocab; ++v)
    if (std::isnan(logits[v])) return kChoiceNan;
  const float* top = std::max_element(logits, logits + vocab);
  if (!(*top > -std::numeric_limits<float>::infinity())) return kChoiceNothing;
  if (choice.greedy) return top - logits;
  const Scale scaled(*top, choice.temperature);
  float* scores = scratch.scores.data();
  for (std::int64_t v = 0; v < vocab; ++v) scores[v] = scaled(logits[v]);
  std::int64_t count = keep_top_k(scores, vocab, choice.top_k, scratch);
  if (choice.top_p < 1.0) count = keep_top_p(scores, count, choice.top_p, scratch);
  Candidate best = no_candidate();
  std::int32_t block = -1;
  Words words{};
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t v = scratch.kept[i];
    if (v / 4 != block) words = noise_words(choice.seed, place, block = v / 4);
    const Candidate candidate{scores[v] + gumbel(words.at[v % 4]), v};
    if (beats(candidate, best)) best = candidate;
  }
  return best.index;
}

}  // namespace tamingfast
