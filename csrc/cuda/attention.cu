// Attention of single query rows over cached keys and values, split along the sequence.
// Source of the split: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023.
#include "../softmax.h"
#include "device.h"

namespace tamingfast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;  // positions whose keys and values a group of lanes asks for together
constexpr int kLeast = 64;  // positions that are worth a block

// Runs of a split's shared memory, for groups of `Lanes` lanes, each of which looks at one position at a time.
template <int Lanes>
struct Shared {
  static constexpr int kGroups = kThreads / Lanes;
  float most[kGroups];
  float sum[kGroups];
  float out[kGroups][Lanes * kVector];
  int last;  // whether this block finishes the row
};

template <class T>
__device__ inline void store_position(const AttentionParams& p, int row, int head, int slot, int position, int lane,
                                      int lanes) {
  const int whole = p.heads * p.width;
  const T* from = static_cast<const T*>(p.qkv) + row * p.ldq + head * p.width;
  const std::int64_t to = ((static_cast<std::int64_t>(slot) * p.heads + head) * p.capacity + position) * p.stride;
  for (int d = lane; d < p.width; d += lanes) {
    static_cast<T*>(p.keys)[to + d] = from[whole + d];
    static_cast<T*>(p.values)[to + d] = from[2 * whole + d];
  }
}

// Joins the splits of a row and head, in their order, whichever block came last.
template <class T>
__device__ void join(const AttentionParams& p, int row, int head, int active) {
  const std::int64_t pair = static_cast<std::int64_t>(row) * p.heads + head;
  const float* parts = p.partial + pair * p.splits * (p.stride + 2);
  float most = -INFINITY, sum = 0.0f;
  for (int s = 0; s < active; ++s) most = fmaxf(most, __ldcg(parts + s * (p.stride + 2)));
  for (int s = 0; s < active; ++s)
    sum += __ldcg(parts + s * (p.stride + 2) + 1) * rescale(__ldcg(parts + s * (p.stride + 2)), most);
  for (int d = threadIdx.x; d < p.width; d += kThreads) {
    float out = 0.0f;
    for (int s = 0; s < active; ++s)
      out += __ldcg(parts + s * (p.stride + 2) + 2 + d) * rescale(__ldcg(parts + s * (p.stride + 2)), most);
    static_cast<T*>(p.out)[row * p.ldo + head * p.width + d] = from_float<T>(out / sum);
  }
}

template <class T, int Lanes>
__global__ void __launch_bounds__(kThreads) attention_kernel(AttentionParams p) {
  follow();
  constexpr int kGroups = Shared<Lanes>::kGroups;
  Shared<Lanes>& shared = *reinterpret_cast<Shared<Lanes>*>(shared_memory());
  const int row = blockIdx.x, head = blockIdx.y, split = blockIdx.z;
  const int slot = p.slot[row], position = p.position[row], count = p.last[row] + 1;
  const int share = (count + p.splits - 1) / p.splits, each = share > kLeast ? share : kLeast;
  const int active = (count + each - 1) / each;
  if (split >= active) return;
  const int begin = split * each, end = begin + each < count ? begin + each : count;
  if (p.append && begin <= position && position < end) {
    store_position<T>(p, row, head, slot, position, threadIdx.x, kThreads);
    __syncthreads();
  }

  const int lane = threadIdx.x % Lanes, group = threadIdx.x / Lanes, first = lane * kVector;
  const float scale = 1.0f / sqrtf(static_cast<float>(p.width));
  const T* query = static_cast<const T*>(p.qkv) + row * p.ldq + head * p.width;
  const std::int64_t start = (static_cast<std::int64_t>(slot) * p.heads + head) * p.capacity * p.stride + first;
  const T* keys = static_cast<const T*>(p.keys) + start;
  const T* values = static_cast<const T*>(p.values) + start;
  float q[kVector], out[kVector] = {}, most = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kVector; ++j) q[j] = first + j < p.width ? to_float(query[first + j]) * scale : 0.0f;

  for (int base = begin; base < end; base += kAtOnce * kGroups) {
    Packed<T> k[kAtOnce], v[kAtOnce];
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      const int at = base + a * kGroups + group;
      const bool there = at < end && first < p.stride;
      k[a] = there ? load(keys + static_cast<std::int64_t>(at) * p.stride) : zeros<T>();
      v[a] = there ? load(values + static_cast<std::int64_t>(at) * p.stride) : zeros<T>();
    }
    float score[kAtOnce], common = most, piece[kVector];
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      score[a] = 0.0f;
      unpack(k[a], piece);
#pragma unroll
      for (int j = 0; j < kVector; ++j) score[a] += q[j] * piece[j];
#pragma unroll
      for (int step = Lanes / 2; step > 0; step /= 2) score[a] += __shfl_xor_sync(kAllLanes, score[a], step);
      if (base + a * kGroups + group < end) common = fmaxf(common, score[a]);
    }
    const float factor = rescale(most, common);
    most = common;
    sum *= factor;
#pragma unroll
    for (int j = 0; j < kVector; ++j) out[j] *= factor;
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      const float weight = base + a * kGroups + group < end ? expf(score[a] - most) : 0.0f;
      sum += weight;
      unpack(v[a], piece);
#pragma unroll
      for (int j = 0; j < kVector; ++j) out[j] += weight * piece[j];
    }
  }

  if (lane == 0) {
    shared.most[group] = most;
    shared.sum[group] = sum;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) shared.out[group][first + j] = out[j];
  __syncthreads();
  most = -INFINITY;
  for (int g = 0; g < kGroups; ++g) most = fmaxf(most, shared.most[g]);
  sum = 0.0f;
  for (int g = 0; g < kGroups; ++g) sum += shared.sum[g] * rescale(shared.most[g], most);
  const std::int64_t pair = static_cast<std::int64_t>(row) * p.heads + head;
  float* part = active > 1 ? p.partial + (pair * p.splits + split) * (p.stride + 2) : nullptr;
  for (int d = threadIdx.x; d < p.width; d += kThreads) {
    float total = 0.0f;
    for (int g = 0; g < kGroups; ++g) total += shared.out[g][d] * rescale(shared.most[g], most);
    if (active > 1)
      part[2 + d] = total;
    else
      static_cast<T*>(p.out)[row * p.ldo + head * p.width + d] = from_float<T>(total / sum);
  }
  if (active == 1) return;
  if (threadIdx.x == 0) {
    part[0] = most;
    part[1] = sum;
  }
  // Each thread's writes reach the device before the block is counted; the block that counts last reads all of them.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomicAdd(p.arrived + pair, 1u) + 1 == static_cast<unsigned>(active);
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  if (threadIdx.x == 0) p.arrived[pair] = 0;  // for the next launch
  join<T>(p, row, head, active);
}

template <class T>
__global__ void __launch_bounds__(kThreads) append_kernel(AttentionParams p) {
  follow();
  const int row = blockIdx.x;
  for (int head = 0; head < p.heads; ++head)
    store_position<T>(p, row, head, p.slot[row], p.position[row], threadIdx.x, kThreads);
}

template <class T, int Lanes>
void launch_lanes(const AttentionParams& p, const Queue& queue) {
  launch("decode attention", &attention_kernel<T, Lanes>, dim3(p.rows, p.heads, p.splits), kThreads,
         sizeof(Shared<Lanes>), queue, p);
}

}  // namespace

void attention(Number number, const AttentionParams& params, const Queue& queue) {
  for_number(number, [&](auto sample) {
    using T = decltype(sample);
    if (params.stride <= 8 * kVector) return launch_lanes<T, 8>(params, queue);
    if (params.stride <= 16 * kVector) return launch_lanes<T, 16>(params, queue);
    launch_lanes<T, 32>(params, queue);
  });
}

void append(Number number, const AttentionParams& params, const Queue& queue) {
  for_number(number, [&](auto sample) {
    using T = decltype(sample);
    launch("cache append", &append_kernel<T>, dim3(params.rows), kThreads, 0, queue, params);
  });
}

}  // namespace tamingfast::cuda
