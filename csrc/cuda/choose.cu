// The token choice on the device: temperature, top-k, top-p, Gumbel-max. cpu/choose.h is the host's implementation.
//
// Thresholds are found by radix selection over the ordered bits of the scores, eight bits per pass. top-k counts
// entries; top-p sums probabilities in fixed point, so that the order of additions does not matter. Shared memory has
// native 32-bit atomic additions only, so sums are kept in two halves.
#include "device.h"

namespace tamingfast::cuda {
namespace {

using Mass = unsigned long long;  // a probability in fixed point, relative to that of the best entry

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kDigits = 256, kDigitBits = 8;
constexpr int kQuad = 4;               // entries per Philox block
constexpr int kMostCached = 16 << 10;  // vocabularies up to this size have their scores in shared memory
static_assert(kThreads == kDigits, "each thread clears one digit");

struct Shared {
  std::uint32_t low[kDigits], high[kDigits];  // halves of the mass of each digit, see Split
  Mass above;
  std::uint32_t key;
  int found;
  Mass sums[kWarps];
  int counts[kWarps];
  Candidate best[kWarps];
};

// How masses are scaled and split, so that neither half overflows when `entries` of them are summed.
struct Split {
  int bits;  // of the low half
  int best;  // log2 of the best entry's mass

  explicit __device__ Split(std::int64_t entries) {
    int log = 0;
    while ((std::int64_t{1} << log) < entries) ++log;
    bits = 32 - log;
    best = 63 - 2 * log < 38 ? 63 - 2 * log : 38;
  }
  __device__ void add(Shared& shared, int digit, Mass mass) const {
    const auto low = static_cast<std::uint32_t>(mass & ((Mass{1} << bits) - 1));
    const auto high = static_cast<std::uint32_t>(mass >> bits);
    if (low) atomicAdd(&shared.low[digit], low);
    if (high) atomicAdd(&shared.high[digit], high);
  }
  __device__ Mass sum(const Shared& shared, int digit) const {
    return (static_cast<Mass>(shared.high[digit]) << bits) + shared.low[digit];
  }
};

// Returns the block's best candidate to every thread; its score is NaN if any thread saw NaN.
__device__ Candidate block_best(Candidate mine, bool nan, Shared& shared) {
  if (nan) mine.score = NAN;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    Candidate other;
    other.score = __shfl_xor_sync(kAllLanes, mine.score, step);
    other.index = __shfl_xor_sync(kAllLanes, mine.index, step);
    if (isnan(other.score) || (!isnan(mine.score) && beats(other, mine))) mine = other;
  }
  if (threadIdx.x % kWarp == 0) shared.best[threadIdx.x / kWarp] = mine;
  __syncthreads();
  Candidate best = shared.best[0];
  for (int warp = 1; warp < kWarps; ++warp) {
    const Candidate other = shared.best[warp];
    if (isnan(other.score) || (!isnan(best.score) && beats(other, best))) best = other;
  }
  __syncthreads();
  return best;
}

struct Threshold {
  bool found;
  std::uint32_t key;
  Mass above;  // total mass of the entries with higher keys
};

// Finds the highest key for which reached(mass) holds, with the mass of all entries of that key and above.
// entry(v, key, mass) sets the key and mass of entry v and returns whether it takes part.
template <class Entry, class Reached>
__device__ Threshold select(std::int64_t entries, const Entry& entry, const Reached& reached, Shared& shared) {
  const Split split(entries);
  Threshold at{true, 0, 0};
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    shared.low[threadIdx.x] = shared.high[threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.found = 0;
    __syncthreads();
    for (std::int64_t v = threadIdx.x; v < entries; v += kThreads) {
      std::uint32_t key;
      Mass mass;
      if (!entry(v, key, mass)) continue;
      const bool same = shift + kDigitBits == 32 || key >> (shift + kDigitBits) == at.key >> (shift + kDigitBits);
      if (same) split.add(shared, static_cast<int>(key >> shift & (kDigits - 1)), mass);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {  // lane i has the 8 digits from (31 - i) * 8 on, so lane 0 has the highest
      constexpr int kEach = kDigits / kWarp;
      const int lane = threadIdx.x, first = (kWarp - 1 - lane) * kEach;
      Mass mine = 0;
      for (int i = 0; i < kEach; ++i) mine += split.sum(shared, first + i);
      Mass through = mine;  // the mass of this lane's digits and all higher ones
      for (int step = 1; step < kWarp; step *= 2) {
        const Mass before = __shfl_up_sync(kAllLanes, through, step);
        if (lane >= step) through += before;
      }
      Mass above = at.above + through - mine;
      if (reached(above + mine) && !reached(above)) {
        int digit = first + kEach - 1;
        while (digit > first && !reached(above + split.sum(shared, digit))) above += split.sum(shared, digit--);
        shared.key = at.key | static_cast<std::uint32_t>(digit) << shift;
        shared.above = above;
        shared.found = 1;
      }
    }
    __syncthreads();
    at.found = shared.found;
    if (at.found) at.key = shared.key, at.above = shared.above;
    __syncthreads();
    if (!at.found) break;
  }
  return at;
}

// The entries to keep: all with higher keys, and those with this key below an index.
struct Kept {
  std::uint32_t key;
  std::int64_t before;
  __device__ bool holds(std::uint32_t other, std::int64_t v) const {
    return other > key || (other == key && v < before);
  }
};

// Narrows `kept` to the nucleus: the fewest entries, best first and lowest index first among equals, whose probability
// exceeds p.
template <class Score>
__device__ Kept nucleus(const Score& score, std::int64_t entries, double p, Kept kept, float best, Shared& shared) {
  const float mass_of_best = static_cast<float>(Mass{1} << Split(entries).best);
  const auto entry = [&](std::int64_t v, std::uint32_t& key, Mass& mass) {
    const float value = score(v);
    key = order_key(value);
    const float relative = expf(value - best);
    mass = static_cast<Mass>(relative * mass_of_best);
    return kept.holds(key, v);
  };
  Mass mine = 0;
  for (std::int64_t v = threadIdx.x; v < entries; v += kThreads) {
    std::uint32_t key;
    Mass mass;
    if (entry(v, key, mass)) mine += mass;
  }
  const double total = static_cast<double>(block_sum(mine, shared.sums));
  const auto reached = [&](Mass mass) { return crosses(static_cast<double>(mass) / total, p); };
  const Threshold at = select(entries, entry, reached, shared);
  if (!at.found) return kept;
  int equals = 0;
  Mass each = 0;
  for (std::int64_t v = threadIdx.x; v < entries; v += kThreads) {
    std::uint32_t key;
    Mass mass;
    if (entry(v, key, mass) && key == at.key) ++equals, each = mass;
  }
  const int count = block_sum(equals, shared.counts);
  each = block_sum(equals ? each : Mass{0}, shared.sums) / block_sum(equals ? 1 : 0, shared.counts);
  int low = 1, high = count;  // bisects for the fewest equal entries that reach p
  while (low < high) {
    const int middle = (low + high) / 2;
    if (reached(at.above + middle * each))
      high = middle;
    else
      low = middle + 1;
  }
  if (low == count) return {at.key, kept.before};
  std::int64_t from = 1, to = entries;  // bisects for the lowest index below which `low` of them lie
  while (from < to) {
    const std::int64_t middle = (from + to) / 2;
    int below = 0;
    for (std::int64_t v = threadIdx.x; v < middle; v += kThreads) below += order_key(score(v)) == at.key;
    if (block_sum(below, shared.counts) >= low)
      to = middle;
    else
      from = middle + 1;
  }
  return {at.key, from};
}

// Returns the chosen entry, kChoiceNan or kChoiceNothing to every thread.
template <class T>
__device__ std::int64_t choose_entry(const T* logits, const Options& options, const Place& place, Shared& shared) {
  const Choice& choice = options.choice;
  const std::int64_t entries = options.choices;
  float* scores = reinterpret_cast<float*>(&shared + 1);
  const bool cached = entries <= kMostCached;
  Candidate mine = no_candidate();
  bool nan = false;
  for (std::int64_t v = threadIdx.x; v < entries; v += kThreads) {
    const Candidate candidate = {to_float(logits[v]), static_cast<std::int32_t>(v)};
    if (cached) scores[v] = candidate.score;
    nan = nan || isnan(candidate.score);
    if (beats(candidate, mine)) mine = candidate;
  }
  const Candidate top = block_best(mine, nan, shared);
  if (isnan(top.score)) return kChoiceNan;
  if (top.index < 0) return kChoiceNothing;
  if (choice.greedy) return top.index;

  const Scale scaled(top.score, choice.temperature);
  const auto score = [&](std::int64_t v) { return cached ? scores[v] : scaled(to_float(logits[v])); };
  if (cached)
    for (std::int64_t v = threadIdx.x; v < entries; v += kThreads) scores[v] = scaled(scores[v]);
  __syncthreads();

  Kept kept{0, entries};
  if (choice.top_k > 0 && choice.top_k < entries) {
    const auto entry = [&](std::int64_t v, std::uint32_t& key, Mass& mass) {
      key = order_key(score(v));
      mass = 1;
      return true;
    };
    const Mass k = static_cast<Mass>(choice.top_k);
    kept.key = select(entries, entry, [&](Mass count) { return count >= k; }, shared).key;
  }
  if (choice.top_p < 1.0) kept = nucleus(score, entries, choice.top_p, kept, scaled(top.score), shared);

  mine = no_candidate();
  for (std::int64_t quad = threadIdx.x; quad * kQuad < entries; quad += kThreads) {
    bool drawn = false;
    Words words;
    for (int i = 0; i < kQuad && quad * kQuad + i < entries; ++i) {
      const std::int64_t v = quad * kQuad + i;
      const float value = score(v);
      if (!kept.holds(order_key(value), v)) continue;
      if (!drawn) words = noise_words(choice.seed, place, static_cast<std::uint32_t>(quad));
      drawn = true;
      const Candidate candidate = {value + gumbel(words.at[i]), static_cast<std::int32_t>(v)};
      if (beats(candidate, mine)) mine = candidate;
    }
  }
  return block_best(mine, false, shared).index;
}

template <class T>
__global__ void __launch_bounds__(kThreads) choose_kernel(ChooseParams p) {
  follow();
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const std::int64_t row = blockIdx.x;
  const std::int64_t next = p.position[row] + 1, at = row * p.length + next;
  std::int64_t token = p.sequence[at];
  if (p.wanted[at]) {
    const Place place = {static_cast<std::uint32_t>(p.images[row]), static_cast<std::uint32_t>(p.places[next]),
                         static_cast<std::uint32_t>(p.places[p.length + next])};
    token = choose_entry(static_cast<const T*>(p.logits) + row * p.ldl, *p.options, place, shared);
    if (token < 0 && threadIdx.x == 0) atomicOr(p.errors + row, token == kChoiceNan ? kFoundNan : kFoundNothing);
  }
  if (token < 0 || token >= p.vocab) token = 0;  // the error is reported, so any valid token will do
  __syncthreads();                               // before overwriting what other threads read
  if (threadIdx.x == 0) {
    p.sequence[at] = token;
    p.position[row] = static_cast<std::int32_t>(next);
  }
  if (next >= p.positions) return;
  for (int i = threadIdx.x; i < p.width; i += kThreads)
    p.x[row * p.ldx + i] = p.tok_emb[token * p.width + i] + p.pos_emb[next * p.width + i];
}

}  // namespace

void choose(Dtype logits, const ChooseParams& params, const Queue& queue) {
  for_dtype(logits, [&](auto sample) {
    using T = decltype(sample);
    const std::size_t scores = (params.vocab < kMostCached ? params.vocab : kMostCached) * sizeof(float);
    launch("token choice", &choose_kernel<T>, dim3(params.rows), kThreads, sizeof(Shared) + scores, queue, params);
  });
}

}  // namespace tamingfast::cuda
