// Queries the CUDA runtime about the machine.
#include "device.h"

namespace tamingfast::cuda {

Devices devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return {0, cudaGetErrorString(status)};
  }
  return {count, count > 0 ? "" : "the driver reports none"};
}

}  // namespace tamingfast::cuda
