// csrc/cuda/ptx.h on the CPU.
#pragma once

#include <string.h>

#include <deque>
#include <vector>

#include "cuda/device.h"

namespace tamingfast::cuda {

// Threads with an even number copy as late as they may, when the group is waited for, so that shared memory holds
// poison until then; the others at once, over what they may still have to read.
class Copies {
 public:
  void add(void* to, const void* from) {
    if (threadIdx.x % 2 == 0)
      open_.push_back({to, from});
    else
      memcpy(to, from, sizeof(uint4));
  }
  void stream(void* to, const void* from) { add(to, from); }
  void end_group() {
    groups_.push_back(open_);
    open_.clear();
  }
  template <int Left>
  void wait() {
    for (; groups_.size() > Left; groups_.pop_front())
      for (const Copy& copy : groups_.front()) memcpy(copy.to, copy.from, sizeof(uint4));
  }

 private:
  struct Copy {
    void* to;
    const void* from;
  };
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

// Products are exact in float32; their order of addition is this one, whatever the hardware's is.
template <class T>
void multiply(float (&sums)[4], unsigned x_low, unsigned x_high, unsigned low, unsigned high) {
  struct Words {
    unsigned low, high;
  };
  const unsigned lane = threadIdx.x % kWarp, row = lane / 4, column = lane % 4 * 2;
  for (unsigned j = 0; j < 4; ++j) {
    const Words x = __shfl_sync(kAllLanes, Words{x_low, x_high}, static_cast<int>(4 * row + j));
    float a[4], b[4];
    unpack_word(x.low, a, T{});
    unpack_word(x.high, a + 2, T{});
    for (unsigned i = 0; i < 2; ++i) {
      const Words weights = __shfl_sync(kAllLanes, Words{low, high}, static_cast<int>(4 * (column + i) + j));
      unpack_word(weights.low, b, T{});
      unpack_word(weights.high, b + 2, T{});
      for (unsigned k = 0; k < 4; ++k) sums[i] += a[k] * b[k];
    }
  }
}

}  // namespace tamingfast::cuda
