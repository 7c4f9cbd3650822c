// Instructions that C++ has no name for, as functions. Source: PTX ISA, "cp.async" and "Matrix Fragments for
// mma.m16n8k16 with floating point type".
#pragma once

#ifdef __CUDACC__

#include "device.h"

namespace tamingfast::cuda {

// A thread's copies of 16 bytes each from global to shared memory, in groups; it alone sees their results when it has
// waited, the other threads of its block after the next barrier.
class Copies {
 public:
  __device__ void add(void* to, const void* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(from) : "memory");
  }
  // As `add`, of data that is read once: evicted from the caches first, and fetched in whole cache lines.
  __device__ void stream(void* to, const void* from) const {
    std::uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared(to)), "l"(from),
                 "l"(policy)
                 : "memory");
  }
  __device__ void end_group() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Waits for all groups but the last `Left`.
  template <int Left>
  __device__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
  }

 private:
  static __device__ unsigned shared(void* to) { return static_cast<unsigned>(__cvta_generic_to_shared(to)); }
};

// sums += x weights^T by tensor cores, of 8 rows of x and 8 of weights, 16 elements long. Lane 4 i + j has the elements
// 2 j, 2 j + 1 (`low`) and 2 j + 8, 2 j + 9 (`high`) of row i of both, and the sums of row i of x with rows 2 j and
// 2 j + 1 of weights. The instruction takes 16 rows of x; the last 8 are zeros here.
template <class T>
__device__ inline void multiply(float (&sums)[4], unsigned x_low, unsigned x_high, unsigned low, unsigned high);

template <>
__device__ inline void multiply<Bf16>(float (&sums)[4], unsigned x_low, unsigned x_high, unsigned low, unsigned high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(x_low), "r"(0), "r"(x_high), "r"(low), "r"(high));
}

template <>
__device__ inline void multiply<Half>(float (&sums)[4], unsigned x_low, unsigned x_high, unsigned low, unsigned high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(x_low), "r"(0), "r"(x_high), "r"(low), "r"(high));
}

}  // namespace tamingfast::cuda

#else
#include <ptx_on_host.h>
#endif
