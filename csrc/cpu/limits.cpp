#include "limits.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "team.h"

namespace tamingfast {
namespace {

using Clock = std::chrono::steady_clock;

// The highest rate over the repeats, in units of work per second; all threads start and end together.
template <class Work>
double best_rate(int threads, int repeats, Work&& work) {
  double best = 0.0;
  Barrier barrier;
  parallel(threads, [&](int thread, int of) {
    for (int i = 0; i < repeats; ++i) {
      barrier.wait(of, [] {});
      const Clock::time_point start = Clock::now();
      const double done = work(thread, of);
      barrier.wait(of, [] {});
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      if (thread == 0) best = std::max(best, done * of / seconds);
    }
  });
  return best;
}

}  // namespace

double read_bandwidth(std::size_t bytes, int threads, int repeats) {
  const Memory memory(bytes);
  const std::int64_t words = static_cast<std::int64_t>(bytes / sizeof(std::uint64_t));
  std::vector<std::uint64_t> sums(1024);
  return best_rate(threads, repeats, [&](int thread, int of) {
    const Range mine = share(words, thread, of);
    const std::uint64_t* at = memory.as<std::uint64_t>();
    std::uint64_t sum[8] = {};  // reading one word fetches the whole cache line
    for (std::int64_t i = mine.first; i + 64 <= mine.last; i += 64) {
      for (int j = 0; j < 8; ++j) {
        __builtin_prefetch(at + i + 8 * j + 512, 0, 3);
        sum[j] += at[i + 8 * j];
      }
    }
    for (int j = 0; j < 8; ++j) sums[thread] += sum[j];
    return static_cast<double>(mine.last - mine.first) * sizeof(std::uint64_t);
  });
}

double arithmetic_rate(Dtype dtype, int threads, int repeats, Isa isa) {
  const Kernels& kernels = kernels_for(isa);
  return best_rate(threads, repeats, [&](int, int) { return kernels.exercise(dtype, 20000); });
}

}  // namespace tamingfast
