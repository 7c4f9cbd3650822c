// What the kernels share: element types, vectors, reductions, shared memory, checked launches.
//
// The kernels use only the subset of CUDA that tests/cuda_on_host can run on the CPU: shuffles of full warps, dynamic
// shared memory only, launches through `launch` only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace tamingfast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVector = 8;  // elements that a thread loads at once

struct Bf16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
__device__ inline float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline Bf16 from_float<Bf16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline Half from_float<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// kVector elements in their memory representation; addresses are multiples of 16 bytes.
template <class T>
struct Packed {
  static constexpr int kWords = kVector * sizeof(T) / sizeof(uint4);
  uint4 words[kWords];
};

template <class T>
__device__ inline Packed<T> load(const T* from) {
  Packed<T> packed;
#pragma unroll
  for (int i = 0; i < Packed<T>::kWords; ++i) packed.words[i] = reinterpret_cast<const uint4*>(from)[i];
  return packed;
}

// Loads data that is read once and never written by a kernel, to be evicted from the caches first.
template <class T>
__device__ inline Packed<T> load_streaming(const T* from) {
  Packed<T> packed;
#pragma unroll
  for (int i = 0; i < Packed<T>::kWords; ++i) packed.words[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
  return packed;
}

template <class T>
__device__ inline void store(T* to, const Packed<T>& packed) {
#pragma unroll
  for (int i = 0; i < Packed<T>::kWords; ++i) reinterpret_cast<uint4*>(to)[i] = packed.words[i];
}

// Loads `count` elements from any address and pads with zeros.
template <class T>
__device__ inline Packed<T> gather(const T* from, int count) {
  T values[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = i < count ? from[i] : T{};
  Packed<T> packed;
  memcpy(packed.words, values, sizeof values);
  return packed;
}

template <class T>
__device__ inline Packed<T> zeros() {
  Packed<T> packed;
#pragma unroll
  for (int i = 0; i < Packed<T>::kWords; ++i) packed.words[i] = make_uint4(0, 0, 0, 0);
  return packed;
}

__device__ inline void unpack_word(unsigned word, float* to, float) { to[0] = __uint_as_float(word); }
__device__ inline void unpack_word(unsigned word, float* to, Bf16) {
  to[0] = __uint_as_float(word << 16);
  to[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ inline void unpack_word(unsigned word, float* to, Half) {
  to[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
  to[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

template <class T>
__device__ inline void unpack(const Packed<T>& packed, float (&to)[kVector]) {
  constexpr int each = sizeof(unsigned) / sizeof(T);
#pragma unroll
  for (int i = 0; i < Packed<T>::kWords; ++i) {
    unpack_word(packed.words[i].x, to + (4 * i + 0) * each, T{});
    unpack_word(packed.words[i].y, to + (4 * i + 1) * each, T{});
    unpack_word(packed.words[i].z, to + (4 * i + 2) * each, T{});
    unpack_word(packed.words[i].w, to + (4 * i + 3) * each, T{});
  }
}

// Exact GELU.
__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

// Every lane gets the same bits.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// Returns the total to every thread. `scratch` has one element per warp and may be reused after the call.
template <class Value>
__device__ Value block_sum(Value value, Value* scratch) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  Value total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

// atomicAdd with acquire-release order at device scope; returns the old value. Source: PTX ISA, "Memory Consistency
// Model".
__device__ inline std::uint32_t add_acq_rel(std::uint32_t* at, std::uint32_t value) {
#ifdef __CUDA_ARCH__
  std::uint32_t before;
  asm volatile("atom.acq_rel.gpu.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(value) : "memory");
  return before;
#elif defined(__CUDACC__)  // its pass for the host, which never calls this
  return atomicAdd(at, value);
#else
  return cuda_on_host::add<__ATOMIC_ACQ_REL>(at, value);
#endif
}

// The block's dynamic shared memory, as untyped bytes.
__device__ inline unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return shared_bytes;
#else
  return cuda_on_host::shared_memory();
#endif
}

// Programmatic dependent launch, from compute capability 9.0 on; elsewhere a kernel starts when the one before has
// ended.
//
// `follow` alone makes results right. Every thread of every kernel calls it before it reads anything but weights, which
// no kernel writes, and before it writes anything. It returns when the previous kernel has ended and its writes are
// visible; the previous one cannot have ended before its own threads returned from `follow`, so all earlier kernels of
// the stream have ended too. No kernel reads what a later one overwrites, nor the other way round, however early it
// starts.
//
// `lead` is for speed alone: the next kernel may start once all blocks have called it or ended, so it never takes the
// room of blocks that have yet to start. A block that starts early gains what it can load before it waits, which is
// weights. Therefore kernels call it before they wait whose successors read weights: linear layers, once they have
// asked for their own, and attention, which leaves most of the bandwidth idle. After the others, the next kernel starts
// when they end. Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
__device__ inline void lead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void follow() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
  cuda_on_host::follow();
#endif
}

inline void check(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it for the next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

constexpr std::size_t kSharedWithoutAsking = 48 * 1024;

// Whether a kernel may start while the previous one still runs: only if the device and captured graphs support it.
#define TAMINGFAST_EARLY_VERSION 12030
#if CUDART_VERSION >= TAMINGFAST_EARLY_VERSION
inline bool starts_early(int device) {
  static const int driver = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  }();
  int major = 0;
  check("reading the compute capability", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return driver >= TAMINGFAST_EARLY_VERSION && major >= 9;
}
#endif

template <class Params>
void launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, std::size_t shared, const Queue& queue,
            const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto checked = [&](cudaError_t status) {
    if (status == cudaSuccess) return;
    const auto failed = "kernel '" + std::string(name) + "' could not be launched in " + std::to_string(grid.x) +
                        " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) + " blocks of " +
                        std::to_string(threads) + " threads with " + std::to_string(shared) + " bytes of shared memory";
    check(failed.c_str(), status);
  };
  int device = -1;
  checked(cudaGetDevice(&device));
  if (device != queue.device) checked(cudaSetDevice(queue.device));
  // Kernels that divide the memory on the chip differently cannot run side by side, so all divide it alike.
  checked(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  if (shared > kSharedWithoutAsking)
    checked(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(queue.stream);
#if CUDART_VERSION >= TAMINGFAST_EARLY_VERSION
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (starts_early(queue.device)) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
#endif
  checked(cudaLaunchKernelEx(&config, kernel, params));
}

// Calls work(value) with a value of the C++ type that represents `dtype`.
template <class Work>
void for_dtype(Dtype dtype, const Work& work) {
  if (dtype == Dtype::float32) return work(0.0f);
  if (dtype == Dtype::bfloat16) return work(Bf16{});
  work(Half{});
}

inline unsigned pieces(std::int64_t total, std::int64_t each) {
  return static_cast<unsigned>((total + each - 1) / each);
}

}  // namespace tamingfast::cuda
