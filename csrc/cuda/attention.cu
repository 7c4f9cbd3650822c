// Attention of single query rows to cached keys and values, split along the sequence.
// Source of the split: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023.
#include "../softmax.h"
#include "device.h"

namespace tamingfast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;    // positions whose keys and values a group of lanes loads together
constexpr int kLeast = 64;    // fewest positions per block
constexpr int kWidest = 256;  // of a head
constexpr int kResident = 5;  // blocks per multiprocessor: few enough that all outstanding loads have registers

// Shared memory of a split: the partial softmax of each group of Lanes lanes. A group handles one position at a time.
template <int Lanes>
struct Shared {
  static constexpr int kGroups = kThreads / Lanes;
  float most[kGroups];
  float sum[kGroups];
  float out[kGroups][Lanes * kVector];
  int last;  // whether this block was the last to arrive
};

// Counts the calling block as done with its part and returns whether it is the last of `active` blocks; if so, all its
// threads may read all parts. The barriers order the other threads of the block before and after the first one, whose
// addition releases their writes and acquires those of the blocks that arrived earlier. Causality order in PTX's memory
// model is transitive over barriers and atomics, so that no other thread needs a fence.
__device__ inline bool last_of(unsigned active, std::uint32_t* arrived, int* answer) {
  __syncthreads();
  if (threadIdx.x == 0) *answer = add_acq_rel(arrived, 1u) + 1 == active;
  __syncthreads();
  return *answer;
}

// How to merge partial softmaxes, one per lane of a warp. A lane without one has the maximum -infinity and the sum 0.
struct Joint {
  float most;    // the maximum of all parts and of `before`
  float weight;  // the factor of this lane's part
  float sum;     // of all parts, relative to `most`
};

__device__ inline Joint join_parts(float most, float sum, float before) {
  Joint joint;
  joint.most = fmaxf(warp_max(most), before);
  joint.weight = rescale(most, joint.most);
  joint.sum = warp_sum(sum * joint.weight);
  return joint;
}

// Merges the splits of a row and head, always in the same order, whichever block arrives last.
template <class T>
__device__ void join_splits(const AttentionParams& p, int row, int head, int active) {
  constexpr int kTogether = 16;              // splits that are loaded together
  constexpr int kEach = kWidest / kThreads;  // elements per thread
  const std::int64_t pair = static_cast<std::int64_t>(row) * p.heads + head;
  const int size = p.stride + 2, lane = threadIdx.x % kWarp;
  float most = -INFINITY, sum = 0.0f, out[kEach] = {};
  for (int first = 0; first < active; first += kTogether) {
    const float* parts = p.partial + (pair * p.splits + first) * size;
    const int count = active - first < kTogether ? active - first : kTogether;
    const float own_most = lane < count ? __ldcg(parts + lane * size) : -INFINITY;
    const float own_sum = lane < count ? __ldcg(parts + lane * size + 1) : 0.0f;
    float piece[kEach][kTogether];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
        const int d = i * kThreads + threadIdx.x;
        piece[i][s] = s < count && d < p.width ? __ldcg(parts + s * size + 2 + d) : 0.0f;
      }
    const Joint joint = join_parts(own_most, own_sum, most);
    const float factor = rescale(most, joint.most);
    most = joint.most;
    sum = sum * factor + joint.sum;
#pragma unroll
    for (int i = 0; i < kEach; ++i) out[i] *= factor;
#pragma unroll
    for (int s = 0; s < kTogether; ++s) {
      const float weight = __shfl_sync(kAllLanes, joint.weight, s);
#pragma unroll
      for (int i = 0; i < kEach; ++i) out[i] += piece[i][s] * weight;
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int d = i * kThreads + threadIdx.x;
    if (d < p.width) static_cast<T*>(p.out)[row * p.ldo + head * p.width + d] = from_float<T>(out[i] / sum);
  }
}

template <class T, int Lanes>
__global__ void __launch_bounds__(kThreads, kResident) attention_kernel(AttentionParams p) {
  lead();
  follow();
  constexpr int kGroups = Shared<Lanes>::kGroups;
  Shared<Lanes>& shared = *reinterpret_cast<Shared<Lanes>*>(shared_memory());
  const int row = blockIdx.x, head = blockIdx.y, split = blockIdx.z;
  const int slot = p.slot[row], position = p.position[row], count = p.last[row] + 1;
  const int share = (count + p.splits - 1) / p.splits, each = share > kLeast ? share : kLeast;
  const int active = (count + each - 1) / each;
  // Neither is ever negative. Testing them makes the compiler load all three values before the branch, not after it.
  if (split >= active || (slot | position) < 0) return;
  const int begin = split * each, end = begin + each < count ? begin + each : count;

  const int lane = threadIdx.x % Lanes, group = threadIdx.x / Lanes, first = lane * kVector, whole = p.heads * p.width;
  const float scale = 1.0f / sqrtf(static_cast<float>(p.width));
  const T* own = static_cast<const T*>(p.qkv) + row * p.ldq + head * p.width + first;
  const std::int64_t start = (static_cast<std::int64_t>(slot) * p.heads + head) * p.capacity * p.stride + first;
  T* keys = static_cast<T*>(p.keys) + start;
  T* values = static_cast<T*>(p.values) + start;
  float q[kVector], out[kVector] = {}, most = -INFINITY, sum = 0.0f;
  const int behind = first < p.width ? p.width - first : 0;  // elements of the head from `first` on
  const auto of_row = [&](const T* from) {
    return !p.whole_vectors ? gather(from, behind) : behind > 0 ? load(from) : zeros<T>();
  };
  unpack(of_row(own), q);
#pragma unroll
  for (int j = 0; j < kVector; ++j) q[j] *= scale;
  // The group that handles the new position takes it from the row, so that no thread waits for the cache to be written.
  const bool appends = p.append && begin <= position && position < end && (position - begin) % kGroups == group;
  Packed<T> new_key = zeros<T>(), new_value = zeros<T>();
  if (appends) new_key = of_row(own + whole), new_value = of_row(own + 2 * whole);

  for (int base = begin; base < end; base += kAtOnce * kGroups) {
    Packed<T> k[kAtOnce], v[kAtOnce];
#pragma unroll
    for (int a = 0; a < kAtOnce; ++a) {
      const int at = base + a * kGroups + group;
      const bool is_new = appends && at == position, there = at < end && first < p.stride && !is_new;
      k[a] = there ? load(keys + static_cast<std::int64_t>(at) * p.stride) : is_new ? new_key : zeros<T>();
      v[a] = there ? load(values + static_cast<std::int64_t>(at) * p.stride) : is_new ? new_value : zeros<T>();
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

  if (appends && first < p.stride) {
    store(keys + static_cast<std::int64_t>(position) * p.stride, new_key);
    store(values + static_cast<std::int64_t>(position) * p.stride, new_value);
  }
  if (lane == 0) {
    shared.most[group] = most;
    shared.sum[group] = sum;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) shared.out[group][first + j] = out[j];
  __syncthreads();
  const int part_of_lane = threadIdx.x % kWarp;
  const bool there = part_of_lane < kGroups;
  const Joint joint =
      join_parts(there ? shared.most[part_of_lane] : -INFINITY, there ? shared.sum[part_of_lane] : 0.0f, -INFINITY);
  float weight[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) weight[g] = __shfl_sync(kAllLanes, joint.weight, g);
  const std::int64_t pair = static_cast<std::int64_t>(row) * p.heads + head;
  float* part = active > 1 ? p.partial + (pair * p.splits + split) * (p.stride + 2) : nullptr;
  for (int d = threadIdx.x; d < p.width; d += kThreads) {
    float total = 0.0f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) total += shared.out[g][d] * weight[g];
    if (active > 1)
      part[2 + d] = total;
    else
      static_cast<T*>(p.out)[row * p.ldo + head * p.width + d] = from_float<T>(total / joint.sum);
  }
  if (active == 1) return;
  if (threadIdx.x == 0) {
    part[0] = joint.most;
    part[1] = joint.sum;
  }
  if (!last_of(active, p.arrived + pair, &shared.last)) return;
  if (threadIdx.x == 0) p.arrived[pair] = 0;  // for the next launch
  join_splits<T>(p, row, head, active);
}

template <class T>
__global__ void __launch_bounds__(kThreads) append_kernel(AttentionParams p) {
  follow();
  const int row = blockIdx.x, whole = p.heads * p.width;
  const T* from = static_cast<const T*>(p.qkv) + row * p.ldq + whole;
  const std::int64_t start = static_cast<std::int64_t>(p.slot[row]) * p.heads * p.capacity + p.position[row];
  for (int i = threadIdx.x; i < whole; i += kThreads) {
    const int head = i / p.width, d = i % p.width;
    const std::int64_t to = (start + static_cast<std::int64_t>(head) * p.capacity) * p.stride + d;
    const T key = from[i], value = from[whole + i];
    static_cast<T*>(p.keys)[to] = key;
    static_cast<T*>(p.values)[to] = value;
  }
}

template <class T, int Lanes>
void launch_lanes(const AttentionParams& p, const Queue& queue) {
  AttentionParams params = p;
  params.whole_vectors =
      p.width % kVector == 0 && p.ldq % kVector == 0 && reinterpret_cast<std::uintptr_t>(p.qkv) % sizeof(uint4) == 0;
  launch("decode attention", &attention_kernel<T, Lanes>, dim3(p.rows, p.heads, p.splits), kThreads,
         sizeof(Shared<Lanes>), queue, params);
}

}  // namespace

void attention(Dtype dtype, const AttentionParams& params, const Queue& queue) {
  for_dtype(dtype, [&](auto sample) {
    using T = decltype(sample);
    if (params.stride <= 8 * kVector) return launch_lanes<T, 8>(params, queue);
    if (params.stride <= 16 * kVector) return launch_lanes<T, 16>(params, queue);
    launch_lanes<T, 32>(params, queue);
  });
}

void append(Dtype dtype, const AttentionParams& params, const Queue& queue) {
  for_dtype(dtype, [&](auto sample) {
    using T = decltype(sample);
    launch("cache append", &append_kernel<T>, dim3(params.rows), kThreads, 0, queue, params);
  });
}

}  // namespace tamingfast::cuda
