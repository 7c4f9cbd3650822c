// What the kernels of linear layers share.
#pragma once

#include "device.h"

namespace tamingfast::cuda {

// The layers of bfloat16 and float16, by tensor cores.
void linear_by_tiles(Dtype dtype, const LinearParams& params, const Queue& queue);

template <class T>
__device__ inline void put(const LinearParams& p, std::int64_t at, float value) {
  switch (p.epilogue) {
    case Epilogue::store:
      static_cast<T*>(p.out)[at] = from_float<T>(value);
      break;
    case Epilogue::gelu:
      static_cast<T*>(p.out)[at] = from_float<T>(gelu(value));
      break;
    case Epilogue::add:
    case Epilogue::store_float:
      static_cast<float*>(p.out)[at] = value;
      break;
  }
}

}  // namespace tamingfast::cuda
