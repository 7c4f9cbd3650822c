// What the CUDA runtime tells about the machine.
#include "device.h"

namespace tamingfast::cuda {

Devices devices() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return {0, cudaGetErrorString(status)};
  }
  return {count, count > 0 ? "" : "the driver knows none"};
}

}  // namespace tamingfast::cuda
