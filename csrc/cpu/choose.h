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
  std::vector<std::int32_t> kept;
  std::vector<std::uint64_t> order;
  std::vector<std::uint32_t> words;

  explicit ChoiceScratch(std::int64_t vocab)
      : scores(vocab), sorted(vocab), kept(vocab), order(vocab), words((vocab + 31) / 32 * 32) {}
};

// The random words of the first `vocab` entries, as from noise_words, several blocks at a time.
inline void draw_words(std::uint64_t seed, const Place& place, std::int64_t vocab, std::uint32_t* words) {
  constexpr std::uint32_t kBlocks = 8;
  std::uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
  for (std::uint32_t first = 0; first * 4 < vocab; first += kBlocks) {
    std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
    for (std::uint32_t j = 0; j < kBlocks; ++j)
      c0[j] = first + j, c1[j] = place.column, c2[j] = place.row, c3[j] = place.image;
    for (int round = 0; round < kPhiloxRounds; ++round, next_keys(key0, key1))
      for (std::uint32_t j = 0; j < kBlocks; ++j) philox_round(c0[j], c1[j], c2[j], c3[j], key0, key1);
    for (std::uint32_t j = 0; j < kBlocks; ++j, words += 4)
      words[0] = c0[j], words[1] = c1[j], words[2] = c2[j], words[3] = c3[j];
  }
}

// No word with a given highest byte has more noise than this, and the computed logarithm, which might not be monotone
// in its last bits, does not give it more either.
class MostNoise {
 public:
  static const MostNoise& table() {
    static const MostNoise one;
    return one;
  }
  float operator()(std::uint32_t word) const { return most_[word >> 24]; }

 private:
  MostNoise() {
    for (std::uint32_t byte = 0; byte < 256; ++byte) most_[byte] = gumbel(byte << 24 | 0xFFFFFFu) + 1e-4f;
  }
  float most_[256];
};

// The best score of a row of logits; NaN if one of them is. Written so that compilers use vectors.
inline float best_of(const float* logits, std::int64_t vocab) {
  constexpr std::int64_t kLanes = 16;
  float best[kLanes];
  std::uint32_t nan[kLanes];
  for (std::int64_t j = 0; j < kLanes; ++j) best[j] = -std::numeric_limits<float>::infinity(), nan[j] = 0;
  const std::int64_t rest = vocab % kLanes;
  for (std::int64_t v = rest; v < vocab; v += kLanes)
    for (std::int64_t j = 0; j < kLanes; ++j) {
      const float value = logits[v + j];
      best[j] = value > best[j] ? value : best[j];
      nan[j] |= value != value;
    }
  for (std::int64_t v = 0; v < rest; ++v) best[v] = std::max(best[v], logits[v]), nan[v] |= logits[v] != logits[v];
  for (std::int64_t j = 1; j < kLanes; ++j) best[0] = std::max(best[0], best[j]), nan[0] |= nan[j];
  return nan[0] ? std::numeric_limits<float>::quiet_NaN() : best[0];
}

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
  // Best first and, among equals, the lowest index: the score's order and the index in one number each.
  std::uint64_t* order = scratch.order.data();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int32_t v = scratch.kept[i];
    order[i] = static_cast<std::uint64_t>(~order_key(scores[v])) << 32 | static_cast<std::uint32_t>(v);
  }
  std::sort(order, order + count);
  const auto entry = [&](std::int64_t i) { return static_cast<std::int32_t>(order[i]); };
  const float best = count > 0 ? scores[entry(0)] : 0.0f;
  float total = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    scratch.sorted[i] = std::exp(scores[entry(i)] - best);
    total += scratch.sorted[i];
  }
  double reached = 0.0;
  std::int64_t inside = 0;
  while (inside < count) {
    reached += scratch.sorted[inside++] / total;
    if (crosses(reached, p)) break;
  }
  for (std::int64_t i = 0; i < inside; ++i) scratch.kept[i] = entry(i);
  return inside;
}

// Adds noise to the scores of entries; keeps the best. Logarithms are taken only of noise that may be enough to win.
class Race {
 public:
  Race(const float* scores, const std::uint32_t* words) : scores_(scores), words_(words) {}

  void enter(std::int32_t v) {
    if (scores_[v] + most_(words_[v]) < best_.score) return;
    const Candidate candidate{scores_[v] + gumbel(words_[v]), v};
    if (beats(candidate, best_)) best_ = candidate;
  }
  std::int32_t winner() const { return best_.index; }

 private:
  const float* scores_;
  const std::uint32_t* words_;
  const MostNoise& most_ = MostNoise::table();
  Candidate best_ = no_candidate();
};

// The winner among the k best entries and those that tie with the k-th. Nothing is sorted: if fewer than k entries
// have a higher score than the winner of all, it is one of the k best; otherwise these have only higher scores.
inline std::int64_t race_top_k(const float* scores, std::int64_t vocab, std::int64_t k, std::int32_t top,
                               const std::uint32_t* words) {
  float above = -std::numeric_limits<float>::infinity();
  while (true) {
    Race race(scores, words);
    race.enter(top);
    for (std::int64_t v = 0; v < vocab; ++v)
      if (scores[v] > above) race.enter(static_cast<std::int32_t>(v));
    const std::int32_t winner = race.winner();
    if (k <= 0 || k >= vocab) return winner;
    std::int32_t higher = 0;
    for (std::int64_t v = 0; v < vocab; ++v) higher += scores[v] > scores[winner];
    if (higher < k) return winner;
    above = scores[winner];
  }
}

// Returns the chosen entry, the lowest among equals, or kChoiceNan or kChoiceNothing.
inline std::int64_t choose(const float* logits, std::int64_t vocab, const Choice& choice, const Place& place,
                           ChoiceScratch& scratch) {
  const float best = best_of(logits, vocab);
  if (std::isnan(best)) return kChoiceNan;
  if (!(best > -std::numeric_limits<float>::infinity())) return kChoiceNothing;
  const std::int64_t top = std::find(logits, logits + vocab, best) - logits;
  if (choice.greedy) return top;
  const Scale scaled(best, choice.temperature);
  float* scores = scratch.scores.data();
  for (std::int64_t v = 0; v < vocab; ++v) scores[v] = scaled(logits[v]);
  draw_words(choice.seed, place, vocab, scratch.words.data());
  if (!(choice.top_p < 1.0))
    return race_top_k(scores, vocab, choice.top_k, static_cast<std::int32_t>(top), scratch.words.data());
  const std::int64_t kept = keep_top_k(scores, vocab, choice.top_k, scratch);
  const std::int64_t count = keep_top_p(scores, kept, choice.top_p, scratch);
  Race race(scores, scratch.words.data());
  for (std::int64_t i = 0; i < count; ++i) race.enter(scratch.kept[i]);
  return race.winner();
}

}  // namespace tamingfast
