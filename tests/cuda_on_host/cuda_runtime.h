// The part of CUDA that is needed to compile csrc/cuda/*.cu with an ordinary C++ compiler and test it on the CPU.
//
// This folder replaces CUDA's include directory. The threads of a kernel are fibers of one system thread: each runs
// until it waits at a barrier or shuffle, then another one continues. They run in order, one block after another, or at
// random, with several blocks together. Shared memory is filled with NaN before each block. Detected errors: barriers
// that only part of a block reaches, shuffles that only part of a warp reaches, and writes beyond the shared memory of
// the launch.
//
// Compiled with -fsanitize=thread (fibers.cpp with -DCUDA_ON_HOST_TSAN instead) it detects races: of two accesses to
// one address, at least one of them a write, that nothing orders. What orders is what CUDA's memory model says:
// barriers, atomic additions with an order, and `follow`, which alone comes after the previous launches; shuffles order
// nothing. Only a GPU shows coalescing and speed.
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr std::size_t kSharedLimit = 227 * 1024;  // of compute capability 9.0

// How the threads of the following launches take turns.
void run_in_order();
void run_at_random(unsigned seed);

// Calls `thread` for every thread of every block. Returns CUDA's message for an invalid launch, or null.
const char* run(dim3 grid, dim3 block, std::size_t shared, std::size_t allowed, std::function<void()> thread);
// What the caller does from here on comes after the launches so far.
void synchronize();
// What the calling thread does from here on comes after the launches before its own.
void follow();
unsigned char* shared_memory();
void barrier();
// Returns the value that lane `source` of the same warp passes.
std::uint64_t exchange(std::uint64_t value, unsigned source, unsigned mask);
// Lets other threads continue first, or not, if threads run at random.
void let_others_run();

template <class Value>
Value exchanged(Value value, unsigned source, unsigned mask) {
  static_assert(sizeof value <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, source, mask);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Adds and returns the old value, with the given order, such as __ATOMIC_ACQ_REL.
template <int Order, class Value>
Value add(Value* at, Value value) {
  let_others_run();
  return __atomic_fetch_add(at, value, Order);
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::barrier(); }

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  return cuda_on_host::exchanged(value, (threadIdx.x % 32) ^ lanes, mask);
}
template <class Value>
Value __shfl_sync(unsigned mask, Value value, int lane) {
  return cuda_on_host::exchanged(value, lane, mask);
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned lanes) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_host::exchanged(value, lane >= lanes ? lane - lanes : lane, mask);
}

template <class Value>
Value atomicAdd(Value* at, Value value) {
  return cuda_on_host::add<__ATOMIC_RELAXED>(at, value);
}
inline int atomicOr(int* at, int value) {
  cuda_on_host::let_others_run();
  return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);
}

template <class Value>
Value __ldcs(const Value* from) {
  return *from;
}
template <class Value>
Value __ldcg(const Value* from) {
  return *from;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// --- the runtime's functions -----------------------------------------------------------------------------------------

using cudaStream_t = void*;
using cudaError_t = const char*;
constexpr cudaError_t cudaSuccess = nullptr;
inline const char* cudaGetErrorString(cudaError_t error) { return error; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : "invalid device ordinal"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

namespace cuda_on_host {
template <class Kernel>
std::size_t& allowed_shared(Kernel*) {
  static std::size_t bytes = 48 * 1024;
  return bytes;
}

// The kernels that were launched.
inline std::set<const void*>& launched() {
  static std::set<const void*> kernels;
  return kernels;
}
}  // namespace cuda_on_host

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = cuda_on_host::kSharedLimit;
  return cudaSetDevice(device);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100 };
template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (static_cast<std::size_t>(bytes) > cuda_on_host::kSharedLimit) return "invalid argument";
  cuda_on_host::allowed_shared(kernel) = bytes;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};
template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& params) {
  cuda_on_host::launched().insert(reinterpret_cast<const void*>(kernel));
  return cuda_on_host::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                           cuda_on_host::allowed_shared(kernel), [kernel, params] { kernel(params); });
}
