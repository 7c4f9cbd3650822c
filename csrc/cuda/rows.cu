// Row-wise operations between the matrix products of large batches.
#include "device.h"

namespace tamingfast::cuda {
namespace {

constexpr int kThreads = 256;

// One block per row; a thread reads and writes the same elements in every pass.
template <class T>
__global__ void __launch_bounds__(kThreads) add_norm_kernel(AddNormParams p) {
  follow();
  float* scratch = reinterpret_cast<float*>(shared_memory());  // one element per warp
  const std::int64_t row = blockIdx.x;
  float* x = p.x + row * p.ldx;
  const T* y = p.y ? static_cast<const T*>(p.y) + row * p.ldy : nullptr;
  T* out = static_cast<T*>(p.out) + row * p.ldo;
  float sum = 0.0f, squares = 0.0f;
  for (int i = threadIdx.x; i < p.width; i += kThreads) {
    float value = x[i];
    if (y) {
      value += to_float(y[i]);
      if (p.bias) value += p.bias[i];
      x[i] = value;
    }
    sum += value;
  }
  const float mean = block_sum(sum, scratch) / p.width;
  for (int i = threadIdx.x; i < p.width; i += kThreads) squares += (x[i] - mean) * (x[i] - mean);
  const float over = 1.0f / sqrtf(block_sum(squares, scratch) / p.width + p.epsilon);
  for (int i = threadIdx.x; i < p.width; i += kThreads)
    out[i] = from_float<T>((x[i] - mean) * over * p.gain[i] + p.shift[i]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gelu_kernel(GeluParams p) {
  follow();
  T* x = static_cast<T*>(p.x) + blockIdx.x * p.ldx;
  const int first = (blockIdx.y * kThreads + threadIdx.x) * kVector;
  const int last = first + kVector < p.width ? first + kVector : p.width;
  if (first + kVector <= p.width && p.ldx % kVector == 0) {
    float value[kVector];
    T to[kVector];
    unpack(load(x + first), value);
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[j] = from_float<T>(gelu(value[j] + p.bias[first + j]));
    Packed<T> packed;
    memcpy(packed.words, to, sizeof to);
    store(x + first, packed);
    return;
  }
  for (int i = first; i < last; ++i) x[i] = from_float<T>(gelu(to_float(x[i]) + p.bias[i]));
}

}  // namespace

void add_norm(Dtype dtype, const AddNormParams& params, const Queue& queue) {
  for_dtype(dtype, [&](auto sample) {
    using T = decltype(sample);
    launch("residual and norm", &add_norm_kernel<T>, dim3(params.rows), kThreads, kThreads / kWarp * sizeof(float),
           queue, params);
  });
}

void bias_gelu(Dtype dtype, const GeluParams& params, const Queue& queue) {
  for_dtype(dtype, [&](auto sample) {
    using T = decltype(sample);
    launch("bias and GELU", &gelu_kernel<T>, dim3(params.rows, pieces(params.width, kThreads * kVector)), kThreads, 0,
           queue, params);
  });
}

}  // namespace tamingfast::cuda
