// Linear layers of one to eight rows, limited by the bandwidth at which weights are read: those of float32, and the
// choice between them and those of linear_tiles.cu.
#include <type_traits>

#include "linear.h"

namespace tamingfast::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kStep = kThreads * kVector;  // elements of the inner dimension that a block covers at once

// Output columns per block. Every block reads all activations, so many rows call for many columns per block. Every
// block also computes the norm, which calls for few blocks.
template <int Rows, bool Norm>
constexpr int kColumns = Norm || Rows == 8 ? 8
                         : Rows == 1       ? 2
                                           : 4;

// Fewest resident blocks per multiprocessor, which bounds the registers per thread: few enough that all outstanding
// loads have registers.
template <int Rows>
constexpr int kResident = Rows == 8  ? 2
                          : Rows > 1 ? 3
                                     : 4;

// A row of the input. Rows beyond the last one repeat it, because their outputs are not stored.
__device__ inline const float* row_of(const LinearParams& p, int row) {
  return static_cast<const float*>(p.x) + (row < p.rows ? row : p.rows - 1) * p.ldx;
}

// Sums each of N values over the lanes of a warp. In each step lanes exchange half of their values, so that a lane ends
// with N / 32 totals, or one if N < 32, in its first values. folded_index gives the index of the first of them.
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

// Sums each of N values over each warp and writes the sums to `of_warps`, (kWarps, N); `total` adds those of all warps.
template <int N>
__device__ inline void add_up(float (&values)[N], float* of_warps) {
  fold<kWarp / 2, N>(values);
  const int index = folded_index<N>(threadIdx.x % kWarp);
  constexpr int kAlike = N < kWarp ? kWarp / N : 1;  // lanes with the same total
  if (threadIdx.x % kAlike == 0)
#pragma unroll
    for (int i = 0; i < (N > kWarp ? N / kWarp : 1); ++i) of_warps[threadIdx.x / kWarp * N + index + i] = values[i];
  __syncthreads();
}

template <int N>
__device__ inline float total(const float* of_warps, int index) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp * N + index];
  return sum;
}

// Statistics of each row; the order of additions does not depend on the number of rows.
template <int Rows>
struct Moments {
  float mean[Rows], over[Rows];  // the mean and one over the standard deviation
};

// `held` is the thread's first vector of each row. `scratch` is (2, kWarps, Rows).
template <int Rows>
__device__ Moments<Rows> moments(const LinearParams& p, const Packed<float> (&held)[Rows], float* scratch) {
  const int first = threadIdx.x * kVector;
  const auto sums = [&](const auto& term, float* of_warps) {
    float parts[Rows];
#pragma unroll
    for (int row = 0; row < Rows; ++row) {
      parts[row] = 0.0f;
      for (int i = first; i < p.inner; i += kStep) {
        float piece[kVector];
        unpack(i == first ? held[row] : load(row_of(p, row) + i), piece);
#pragma unroll
        for (int j = 0; j < kVector; ++j) parts[row] += term(piece[j], row);
      }
    }
    add_up(parts, of_warps);
  };
  Moments<Rows> of;
  sums([](float x, int) { return x; }, scratch);
#pragma unroll
  for (int row = 0; row < Rows; ++row) of.mean[row] = total<Rows>(scratch, row) / p.inner;
  scratch += kWarps * Rows;
  sums([&](float x, int row) { return (x - of.mean[row]) * (x - of.mean[row]); }, scratch);
#pragma unroll
  for (int row = 0; row < Rows; ++row) of.over[row] = 1.0f / sqrtf(total<Rows>(scratch, row) / p.inner + p.epsilon);
  return of;
}

// A block computes `Columns` outputs of all rows; its threads share the inner dimension.
template <int Rows, bool Norm>
__global__ void __launch_bounds__(kThreads, kResident<Rows>) linear_kernel(LinearParams p) {
  constexpr int Columns = kColumns<Rows, Norm>, Sums = Rows * Columns;
  constexpr int Ahead = 8 / Columns;  // steps that are loaded together
  // Whether inputs stay in registers until they are multiplied; otherwise they are read again, from the L1 cache.
  constexpr bool kHolds = !Norm || Rows <= 2;
  float* of_warps = reinterpret_cast<float*>(shared_memory());  // (kWarps, Sums)
  const int first = blockIdx.x * Columns;
  const auto weight = [&](int c) {
    const int column = first + c < p.columns ? first + c : p.columns - 1;  // further columns are not stored
    return static_cast<const float*>(p.weight) + static_cast<std::int64_t>(column) * p.inner;
  };
  Packed<float> weights[Ahead][Columns];
  Packed<float> gain, shift;
  Packed<float> inputs[Ahead][Rows];
  const auto load_weights = [&](int base) {
#pragma unroll
    for (int a = 0; a < Ahead; ++a) {
      const int i = base + a * kStep + threadIdx.x * kVector;
#pragma unroll
      for (int c = 0; c < Columns; ++c) weights[a][c] = i < p.inner ? load_streaming(weight(c) + i) : zeros<float>();
      if constexpr (Norm) {
        static_assert(Ahead == 1);
        gain = i < p.inner ? load(p.gain + i) : zeros<float>();
        shift = i < p.inner ? load(p.shift + i) : zeros<float>();
      }
    }
  };
  const auto load_inputs = [&](int base) {
#pragma unroll
    for (int a = 0; a < Ahead; ++a) {
      const int i = base + a * kStep + threadIdx.x * kVector;
#pragma unroll
      for (int row = 0; row < Rows; ++row) inputs[a][row] = i < p.inner ? load(row_of(p, row) + i) : zeros<float>();
    }
  };
  const int column = first + threadIdx.x / Rows, row = threadIdx.x % Rows;  // of this thread's output
  const bool stores = threadIdx.x < Sums && row < p.rows && column < p.columns;
  const std::int64_t at = row * p.ldo + column;
  load_weights(0);  // before the norm and the end of the previous kernel, so that the memory is busy meanwhile
  const float bias = stores && p.bias ? p.bias[column] : 0.0f;
  lead();
  follow();
  load_inputs(0);
  const float there = stores && p.epilogue == Epilogue::add ? static_cast<const float*>(p.out)[at] : 0.0f;
  Moments<Rows> of;
  if constexpr (Norm) of = moments(p, inputs[0], of_warps + kWarps * Sums);
  float sums[Sums] = {};
  for (int base = 0; base < p.inner; base += Ahead * kStep) {
    if (base > 0) {
      load_weights(base);
      if constexpr (kHolds) load_inputs(base);
    }
#pragma unroll
    for (int a = 0; a < Ahead; ++a) {
      if (base + a * kStep >= p.inner) break;  // for all threads of the block
      if constexpr (!kHolds) load_inputs(base);
      float x[Rows][kVector];
#pragma unroll
      for (int row = 0; row < Rows; ++row) {
        unpack(inputs[a][row], x[row]);
        if constexpr (Norm) {
          float by[kVector], plus[kVector];
          unpack(gain, by);
          unpack(shift, plus);
#pragma unroll
          for (int j = 0; j < kVector; ++j) x[row][j] = (x[row][j] - of.mean[row]) * of.over[row] * by[j] + plus[j];
        }
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
  add_up(sums, of_warps);
  if (stores) put<float>(p, at, there + (total<Sums>(of_warps, threadIdx.x) + bias));
}

template <int Rows, bool Norm>
void launch_rows(const LinearParams& p, const Queue& queue) {
  constexpr int columns = kColumns<Rows, Norm>;
  constexpr std::size_t values = kWarps * Rows * (columns + (Norm ? 2 : 0));
  launch(Norm ? "norm and linear layer" : "linear layer", &linear_kernel<Rows, Norm>, dim3(pieces(p.columns, columns)),
         kThreads, values * sizeof(float), queue, p);
}

template <bool Norm>
void launch_norm(const LinearParams& p, const Queue& queue) {
  if (p.rows == 1) return launch_rows<1, Norm>(p, queue);
  if (p.rows == 2) return launch_rows<2, Norm>(p, queue);
  if (p.rows <= 4) return launch_rows<4, Norm>(p, queue);
  launch_rows<8, Norm>(p, queue);
}

}  // namespace

void linear(Dtype dtype, const LinearParams& params, const Queue& queue) {
  if (dtype != Dtype::float32) return linear_by_tiles(dtype, params, queue);
  params.gain ? launch_norm<true>(params, queue) : launch_norm<false>(params, queue);
}

}  // namespace tamingfast::cuda
