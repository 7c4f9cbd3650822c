// Linear layers of one to eight rows, bound by the reading of the weights.
#include "device.h"

namespace tamingfast::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kStep = kThreads * kVector;  // of the inner dimension that a block covers at a time

// Output columns of a block. Activations are read once for each block, so many rows need many columns; and a norm is
// computed by every block, so there shall be few.
template <int Rows, bool Norm>
constexpr int kColumns = Norm || Rows == 8 ? 8
                         : Rows == 1       ? 2
                                           : 4;

// Blocks that a multiprocessor shall hold at least, which bounds the registers: few enough for what is asked for ahead
// to stay in them.
template <class T, int Rows>
constexpr int kResident = Rows < 8         ? 4
                          : sizeof(T) == 4 ? 3
                                           : 2;

template <class T>
std::size_t normalised_bytes(int rows, int inner) {
  return sizeof(T) * rows * inner;
}

// Adds up each of the N values over the lanes of a warp. Lanes halve their values as they exchange them, so that lane i
// ends with the totals whose indices `folded_index` gives in the first N / 32 values, at least one.
template <int Step, int N, int Size>
__device__ inline void fold(float (&values)[Size]) {
  if constexpr (Step > 0) {
    if constexpr (N > 1) {
      const bool upper = threadIdx.x & Step;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const float sent = upper ? values[i] : values[i + N / 2];
        const float kept = upper ? values[i + N / 2] : values[i];
        values[i] = kept + __shfl_xor_sync(kAllLanes, sent, Step);
      }
    } else {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], Step);
    }
    fold<Step / 2, (N > 1 ? N / 2 : 1)>(values);
  }
}

template <int N>
__device__ inline int folded_index(int lane) {
  int index = 0, left = N;
  for (int step = kWarp / 2; step > 0 && left > 1; step /= 2) {
    left /= 2;
    if (lane & step) index += left;
  }
  return index;
}

// One warp normalises each row into shared memory: (Rows, inner).
template <class T>
__device__ void normalise(const LinearParams& p, T* to) {
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp; row < p.rows; row += kWarps) {
    const float* x = static_cast<const float*>(p.x) + row * p.ldx;
    float sum = 0.0f, squares = 0.0f, piece[kVector];
    for (int i = lane * kVector; i < p.inner; i += kWarp * kVector) {
      unpack(load(x + i), piece);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum += piece[j];
    }
    const float mean = warp_sum(sum) / p.inner;
    for (int i = lane * kVector; i < p.inner; i += kWarp * kVector) {
      unpack(load(x + i), piece);
#pragma unroll
      for (int j = 0; j < kVector; ++j) squares += (piece[j] - mean) * (piece[j] - mean);
    }
    const float over = 1.0f / sqrtf(warp_sum(squares) / p.inner + p.epsilon);
    for (int i = lane * kVector; i < p.inner; i += kWarp * kVector) {
      unpack(load(x + i), piece);
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        to[row * p.inner + i + j] = from_float<T>((piece[j] - mean) * over * p.gain[i + j] + p.shift[i + j]);
    }
  }
}

template <class T>
__device__ inline void finish(const LinearParams& p, int row, int column, float value) {
  if (p.bias) value += p.bias[column];
  const std::int64_t at = row * p.ldo + column;
  switch (p.epilogue) {
    case Epilogue::store:
      static_cast<T*>(p.out)[at] = from_float<T>(value);
      break;
    case Epilogue::gelu:
      static_cast<T*>(p.out)[at] = from_float<T>(gelu(value));
      break;
    case Epilogue::add:
      static_cast<float*>(p.out)[at] += value;
      break;
    case Epilogue::store_float:
      static_cast<float*>(p.out)[at] = value;
      break;
  }
}

// A block computes `Columns` outputs of all rows; its threads share the inner dimension.
template <class T, int Rows, bool Norm>
__global__ void __launch_bounds__(kThreads, (kResident<T, Rows>)) linear_kernel(LinearParams p) {
  constexpr int Columns = kColumns<Rows, Norm>, Sums = Rows * Columns;
  constexpr int Ahead = 8 / Columns;  // steps whose weights are asked for together
  T* normalised = reinterpret_cast<T*>(shared_memory());
  const int first = blockIdx.x * Columns;
  const T* weight[Columns];
#pragma unroll
  for (int c = 0; c < Columns; ++c) {
    const int column = first + c < p.columns ? first + c : p.columns - 1;  // what is beyond is not stored
    weight[c] = static_cast<const T*>(p.weight) + static_cast<std::int64_t>(column) * p.inner;
  }
  Packed<T> weights[Ahead][Columns];
  const auto ask = [&](int base) {
#pragma unroll
    for (int a = 0; a < Ahead; ++a) {
      const int i = base + a * kStep + threadIdx.x * kVector;
#pragma unroll
      for (int c = 0; c < Columns; ++c) weights[a][c] = i < p.inner ? load_streaming(weight[c] + i) : zeros<T>();
    }
  };
  ask(0);  // before the norm and the end of the kernel before, which then cost no time of the memory
  follow();
  if constexpr (Norm) {
    normalise(p, normalised);
    __syncthreads();
  }
  float sums[Sums] = {};
  for (int base = 0; base < p.inner; base += Ahead * kStep) {
    if (base > 0) ask(base);
#pragma unroll
    for (int a = 0; a < Ahead; ++a) {
      const int i = base + a * kStep + threadIdx.x * kVector;
      if (i >= p.inner) continue;
      float x[Rows][kVector];
#pragma unroll
      for (int row = 0; row < Rows; ++row) {
        const int there = row < p.rows ? row : p.rows - 1;
        if constexpr (Norm)
          unpack(load(normalised + there * p.inner + i), x[row]);
        else
          unpack(load(static_cast<const T*>(p.x) + there * p.ldx + i), x[row]);
      }
#pragma unroll
      for (int c = 0; c < Columns; ++c) {
        float w[kVector];
        unpack(weights[a][c], w);
#pragma unroll
        for (int row = 0; row < Rows; ++row)
#pragma unroll
          for (int j = 0; j < kVector; ++j) sums[c * Rows + row] += w[j] * x[row][j];
      }
    }
  }
  fold<kWarp / 2, Sums>(sums);
  if constexpr (Norm) __syncthreads();                          // the normalised rows make room for the warps' sums
  float* of_warps = reinterpret_cast<float*>(shared_memory());  // (kWarps, Sums)
  const int index = folded_index<Sums>(threadIdx.x % kWarp);
  constexpr int kAlike = Sums < kWarp ? kWarp / Sums : 1;  // lanes that hold the same total
  if (threadIdx.x % kAlike == 0)
#pragma unroll
    for (int i = 0; i < (Sums > kWarp ? Sums / kWarp : 1); ++i)
      of_warps[threadIdx.x / kWarp * Sums + index + i] = sums[i];
  __syncthreads();
  if (threadIdx.x < Sums) {
    const int column = first + threadIdx.x / Rows, row = threadIdx.x % Rows;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += of_warps[warp * Sums + threadIdx.x];
    if (row < p.rows && column < p.columns) finish<T>(p, row, column, total);
  }
}

template <class T, int Rows, bool Norm>
void launch_rows(const LinearParams& p, const Queue& queue) {
  constexpr int columns = kColumns<Rows, Norm>;
  const std::size_t sums = sizeof(float) * kWarps * Rows * columns;
  const std::size_t staged = Norm ? normalised_bytes<T>(p.rows, p.inner) : 0;
  launch(Norm ? "norm and linear layer" : "linear layer", &linear_kernel<T, Rows, Norm>,
         dim3(pieces(p.columns, columns)), kThreads, staged > sums ? staged : sums, queue, p);
}

template <class T, bool Norm>
void launch_norm(const LinearParams& p, const Queue& queue) {
  if (p.rows == 1) return launch_rows<T, 1, Norm>(p, queue);
  if (p.rows == 2) return launch_rows<T, 2, Norm>(p, queue);
  if (p.rows <= 4) return launch_rows<T, 4, Norm>(p, queue);
  launch_rows<T, 8, Norm>(p, queue);
}

}  // namespace

void linear(Number number, const LinearParams& params, const Queue& queue) {
  for_number(number, [&](auto sample) {
    using T = decltype(sample);
    params.gain ? launch_norm<T, true>(params, queue) : launch_norm<T, false>(params, queue);
  });
}

std::size_t linear_shared_bytes(Number number, int rows, int inner) {
  return (number == Number::float32 ? 4 : 2) * static_cast<std::size_t>(rows) * inner;
}

}  // namespace tamingfast::cuda
