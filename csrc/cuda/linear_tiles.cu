// Linear layers of one to eight rows in bfloat16 and float16, by tensor cores.
//
// A block computes one to four tiles of 8 output columns. Its warps share the inner dimension in pieces of 32 elements,
// in turn. In a piece, lane 4 i + j has 8 consecutive elements of row i of x and of row i of the tile's weights: those
// from 8 j on. The order of elements within a product is free as long as it is the same for both, so that each lane
// copies 16 contiguous bytes of weights into its own place in shared memory, and nobody else reads them. One
// instruction takes all rows, so their number changes neither the time nor, as every sum has one order, a single bit.
#include <algorithm>
#include <cstring>

#include "linear.h"
#include "ptx.h"

namespace tamingfast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kSide = 8;                        // rows of x, and output columns, of a tile
constexpr int kInTile = kSide * kSide;          // outputs of a tile
constexpr int kMostTiles = kThreads / kInTile;  // of a block, so that a thread has one output
constexpr int kPiece = 4 * kVector;             // elements of the inner dimension that a warp takes at once
constexpr int kRound = kWarps * kPiece;         // and that the block takes at once
constexpr int kTogether = 4;                    // rounds of a stage; statistics hold as many in registers
constexpr int kStages = 4;                      // that are in flight: 64 KB of weights per block
constexpr int kBlocks = 128;                    // enough for one on nearly every multiprocessor of the largest devices

// Of a warp's elements of a row: their mean, and the sum of the squares of their distances to it.
struct Part {
  float mean, squares;
};

// Where things are in the block's shared memory, in bytes from its begin, where the weights are.
struct Places {
  int rounds, stages;  // of the inner dimension; of all tiles
  int x;               // uint4 (rounds, kWarps, rows, 4): the rows in T, normalised
  int gain;            // float (kTogether, kRound), of the first rounds
  int shift;
  int moments;  // Part (kWarps, kSide)
  int parts;    // float (tiles, kWarps, kInTile), of outputs
  int size;

  __host__ __device__ explicit Places(const LinearParams& p) {
    rounds = (p.inner + kRound - 1) / kRound;
    stages = p.tiles * ((rounds + kTogether - 1) / kTogether);
    x = int{sizeof(uint4)} * (stages < kStages ? stages : kStages) * kTogether * kThreads;
    gain = x + int{sizeof(uint4)} * rounds * kWarps * p.rows_each * 4;
    shift = gain + (p.gain ? int{sizeof(float)} * kTogether * kRound : 0);
    moments = shift + (p.gain ? int{sizeof(float)} * kTogether * kRound : 0);
    parts = moments + (p.gain ? int{sizeof(Part)} * kWarps * kSide : 0);
    size = parts + int{sizeof(float)} * p.tiles * kWarps * kInTile;
  }
};

__device__ inline uint4* words(int place) { return reinterpret_cast<uint4*>(shared_memory() + place); }
__device__ inline float* floats(int place) { return reinterpret_cast<float*>(shared_memory() + place); }

// A thread's place: lane 4 row + quarter of a warp.
struct Lane {
  int warp, row, quarter;
  __device__ Lane() : warp(threadIdx.x / kWarp), row(threadIdx.x % kWarp / 4), quarter(threadIdx.x % 4) {}
  // The first element of the inner dimension that its warp has in that round, and the first of its own 8.
  __device__ int piece(int round) const { return round * kRound + warp * kPiece; }
  __device__ int element(int round) const { return piece(round) + quarter * kVector; }
};

// Copies the block's weights, stage after stage: the rounds of the first tile, then those of the next one.
template <class T>
class Stream {
 public:
  __device__ Stream(const LinearParams& p, const Places& places, const Lane& lane)
      : p_(p), places_(places), lane_(lane), column_(blockIdx.x * p.tiles * kSide + lane.row) {}

  // Asks for the next stage, if there is one; it is a group of copies in any case.
  __device__ void ask(Copies& copies) {
    if (asked_ < places_.stages) {
      const T* weight = static_cast<const T*>(p_.weight) + static_cast<std::int64_t>(column_) * p_.inner;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int element = lane_.element(round_ + i);
        if (column_ < p_.columns && element < p_.inner) copies.stream(slot(asked_, i), weight + element);
      }
      round_ += kTogether;
      if (round_ >= places_.rounds) round_ = 0, column_ += kSide;
      ++asked_;
    }
    copies.end_group();
  }

  __device__ uint4* slot(int stage, int i) const {
    return words(0) + (stage % kStages * kTogether + i) * kThreads + threadIdx.x;
  }

 private:
  const LinearParams& p_;
  const Places& places_;
  const Lane& lane_;
  int asked_ = 0, round_ = 0, column_;
};

// The sum over the four lanes of a row, in each of them.
__device__ inline float over_lanes(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}

// How many of a row's elements a warp has.
__device__ inline int share(int inner, int warp) {
  const int rest = inner % kRound - warp * kPiece;
  return inner / kRound * kPiece + (rest < 0 ? 0 : rest < kPiece ? rest : kPiece);
}

// The mean of a row, and one over its standard deviation, from the parts of all warps, (kWarps, kSide). One pass over
// the warps, and nothing cancels if the mean is large. Source: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise
// Algorithm for Computing Sample Variances", 1979, equation 2.1.
struct Moments {
  float mean, over;
  __device__ Moments(const Part* parts, int row, int inner, float epsilon) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += share(inner, warp) * parts[warp * kSide + row].mean;
    mean = sum / inner;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const Part part = parts[warp * kSide + row];
      squares += part.squares + share(inner, warp) * (part.mean - mean) * (part.mean - mean);
    }
    over = 1.0f / sqrtf(squares / inner + epsilon);
  }
};

__device__ inline void load_floats(float (&to)[kVector], const float* from) { unpack(load(from), to); }

// Writes the norm of the thread's elements of x, which is null for a lane without a row. Waits for the copies of gain
// and shift, the oldest group.
template <class T>
__device__ void normalise(const LinearParams& p, const Places& places, const Lane& lane, const float* x, uint4* to,
                          int stride, Copies& copies) {
  float held[kTogether][kVector];
#pragma unroll
  for (int i = 0; i < kTogether; ++i)
    if (x && lane.element(i) < p.inner) load_floats(held[i], x + lane.element(i));
  const auto each = [&](const auto& work) {
    if (!x) return;
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (lane.element(i) < p.inner) work(i, held[i]);
#pragma unroll 1
    for (int i = kTogether; lane.element(i) < p.inner; ++i) {
      float piece[kVector];
      load_floats(piece, x + lane.element(i));
      work(i, piece);
    }
  };
  float sum = 0.0f, squares = 0.0f;
  each([&](int, const float (&piece)[kVector]) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum += piece[j];
  });
  const int count = share(p.inner, lane.warp);
  const float mean = count > 0 ? over_lanes(sum) / count : 0.0f;
  each([&](int, const float (&piece)[kVector]) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) squares += (piece[j] - mean) * (piece[j] - mean);
  });
  squares = over_lanes(squares);
  Part* parts = reinterpret_cast<Part*>(shared_memory() + places.moments);
  if (lane.quarter == 0) parts[lane.warp * kSide + lane.row] = {mean, squares};
  copies.template wait<kStages>();  // before the barrier that lets other threads read them
  __syncthreads();
  const Moments of(parts, lane.row, p.inner, p.epsilon);
  each([&](int i, const float (&piece)[kVector]) {
    const int element = lane.element(i);
    float gain[kVector], shift[kVector];
    load_floats(gain, i < kTogether ? floats(places.gain) + element : p.gain + element);
    load_floats(shift, i < kTogether ? floats(places.shift) + element : p.shift + element);
    T rounded[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) rounded[j] = from_float<T>((piece[j] - of.mean) * of.over * gain[j] + shift[j]);
    memcpy(to + i * stride, rounded, sizeof rounded);
  });
}

template <class T, bool Norm>
__global__ void __launch_bounds__(kThreads, 3) tiles_kernel(LinearParams p) {
  const Places places(p);
  const Lane lane;
  Copies copies;
  if constexpr (Norm) {
    for (int i = threadIdx.x * 4; i < p.inner && i < kTogether * kRound; i += kThreads * 4) {
      copies.add(floats(places.gain) + i, p.gain + i);
      copies.add(floats(places.shift) + i, p.shift + i);
    }
    copies.end_group();
  }
  Stream<T> stream(p, places, lane);
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) stream.ask(copies);

  const int first_row = blockIdx.y * p.rows_each, left = p.rows - first_row;
  const int rows = left < p.rows_each ? left : p.rows_each;
  const int of_tile = threadIdx.x % kInTile, tile_of_output = threadIdx.x / kInTile;  // of the thread's output
  const int column = (blockIdx.x * p.tiles + tile_of_output) * kSide + of_tile % kSide;
  const bool stores = tile_of_output < p.tiles && of_tile / kSide < rows && column < p.columns;
  const std::int64_t at = (first_row + of_tile / kSide) * p.ldo + column;
  const float bias = stores && p.bias ? p.bias[column] : 0.0f;
  lead();
  follow();
  const float there = stores && p.epilogue == Epilogue::add ? static_cast<const float*>(p.out)[at] : 0.0f;

  const bool has_row = lane.row < rows;
  const std::int64_t row_at = (first_row + lane.row) * p.ldx;
  const int stride = kWarps * p.rows_each * 4;  // from one round to the next
  uint4* own = words(places.x) + (lane.warp * p.rows_each + lane.row) * 4 + lane.quarter;
  if constexpr (Norm) {
    normalise<T>(p, places, lane, has_row ? static_cast<const float*>(p.x) + row_at : nullptr, own, stride, copies);
  } else {
    const T* x = static_cast<const T*>(p.x) + row_at;
    for (int round = 0; has_row && lane.element(round) < p.inner; ++round)
      copies.add(own + round * stride, x + lane.element(round));
    copies.end_group();
    copies.template wait<0>();
  }

  int stage = 0;
  for (int tile = 0; tile < p.tiles; ++tile) {
    float even[4] = {}, odd[4] = {};  // two chains of sums, so that no instruction waits for the one before
    for (int round = 0; round < places.rounds; round += kTogether, ++stage) {
      copies.template wait<kStages - 1>();
      uint4 x[kTogether], weights[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const bool there = lane.element(round + i) < p.inner;
        x[i] = there && has_row ? own[(round + i) * stride] : make_uint4(0, 0, 0, 0);
        weights[i] = there ? *stream.slot(stage, i) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (lane.piece(round + i) >= p.inner) continue;  // for the whole warp
        multiply<T>(even, x[i].x, x[i].y, weights[i].x, weights[i].y);
        multiply<T>(odd, x[i].z, x[i].w, weights[i].z, weights[i].w);
      }
      stream.ask(copies);
    }
    float* parts = floats(places.parts) + (tile * kWarps + lane.warp) * kInTile + threadIdx.x % kWarp * 2;
    parts[0] = even[0] + odd[0];
    parts[1] = even[1] + odd[1];
  }
  __syncthreads();
  if (!stores) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp)
    total += floats(places.parts)[(tile_of_output * kWarps + warp) * kInTile + of_tile];
  put<T>(p, at, there + (total + bias));
}

template <class T, bool Norm>
void launch_tiles(const LinearParams& params, const Queue& queue) {
  LinearParams p = params;
  const int all = pieces(p.columns, kSide);
  p.tiles = std::clamp(all / kBlocks, 1, kMostTiles);
  int most = 0;
  check("reading the shared memory of a block",
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device));
  p.rows_each = p.rows;
  while (p.rows_each > 1 && Places(p).size > most) p.rows_each = (p.rows_each + 1) / 2;
  launch(Norm ? "norm and linear layer" : "linear layer", &tiles_kernel<T, Norm>,
         dim3(pieces(all, p.tiles), pieces(p.rows, p.rows_each)), kThreads, Places(p).size, queue, p);
}

template <class T>
void launch_type(const LinearParams& p, const Queue& queue) {
  p.gain ? launch_tiles<T, true>(p, queue) : launch_tiles<T, false>(p, queue);
}

}  // namespace

void linear_by_tiles(Dtype dtype, const LinearParams& params, const Queue& queue) {
  dtype == Dtype::bfloat16 ? launch_type<Bf16>(params, queue) : launch_type<Half>(params, queue);
}

}  // namespace tamingfast::cuda
