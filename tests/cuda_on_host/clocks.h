// What ThreadSanitizer is told of the threads of kernels: each is a fiber with a clock of its own, and only `release`
// and `acquire` order what one did before what another does. Without CUDA_ON_HOST_TSAN nobody is told.
#pragma once

#ifdef CUDA_ON_HOST_TSAN

// Source: <sanitizer/tsan_interface.h>; __tsan_ignore_thread_begin stands in tsan_interface.h of the runtime only.
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_ignore_thread_begin(void);
void __tsan_ignore_thread_end(void);
}

namespace cuda_on_host {

constexpr bool kDetectsRaces = true;
using Clock = void*;
// What comes first in a new clock is what came first for the caller.
inline Clock new_clock() { return __tsan_create_fiber(0); }
inline Clock present_clock() { return __tsan_get_current_fiber(); }
inline void delete_clock(Clock clock) { __tsan_destroy_fiber(clock); }
inline void switch_to(Clock clock) { __tsan_switch_to_fiber(clock, 1); }  // 1: without ordering anything
inline void release(void* address) { __tsan_release(address); }
inline void acquire(void* address) { __tsan_acquire(address); }

// While one lives, what its thread reads, writes and frees is not the kernels', and no race.
struct Unrecorded {
  Unrecorded() { __tsan_ignore_thread_begin(); }
  Unrecorded(const Unrecorded&) = delete;
  Unrecorded& operator=(const Unrecorded&) = delete;
  ~Unrecorded() { __tsan_ignore_thread_end(); }
};

}  // namespace cuda_on_host

#else

namespace cuda_on_host {

constexpr bool kDetectsRaces = false;
struct Clock {};
inline Clock new_clock() { return {}; }
inline Clock present_clock() { return {}; }
inline void delete_clock(Clock) {}
inline void switch_to(Clock) {}
inline void release(void*) {}
inline void acquire(void*) {}
struct Unrecorded {
  ~Unrecorded() {}  // not trivial, so that an unused one draws no warning
};

}  // namespace cuda_on_host

#endif
