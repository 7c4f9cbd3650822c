// Threads of a parallel region: how they share the work, and a barrier that spins because phases last microseconds.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

namespace tamingfast {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

inline void yield_processor() {
#if defined(__unix__) || defined(__APPLE__)
  sched_yield();
#endif
}

inline int processors() {
  static const int count = static_cast<int>(std::thread::hardware_concurrency());
  return count;
}

class Barrier {
 public:
  // Every one of the `threads` must call this; `idle` is called repeatedly while waiting.
  template <class Idle>
  void wait(int threads, Idle&& idle) {
    if (threads == 1) return;
    const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      idle();
      relax();
      // The last thread may need this processor to arrive, and certainly does if there are more threads than
      // processors.
      if (spins > (threads <= processors() ? 4000 : 0)) yield_processor();
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

struct Range {
  std::int64_t first, last;
};

// The part of `count` equal pieces that falls to one of the threads.
inline Range share(std::int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Whether this is a forked child: it lacks its parent's OpenMP threads, and waiting for them would hang.
inline bool forked() {
#if defined(__unix__) || defined(__APPLE__)
  static const pid_t loaded_by = getpid();
  return getpid() != loaded_by;
#else
  return false;
#endif
}

// Runs body(thread, of) on at most `threads` threads at once; `of` is how many there are.
template <class Body>
void parallel(int threads, Body&& body) {
#ifdef _OPENMP
  if (threads > 1 && !forked()) {
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)threads;
  body(0, 1);
}

}  // namespace tamingfast
