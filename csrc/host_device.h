// Marks functions that both the host's compiler and nvcc compile.
#pragma once

#if defined(__CUDACC__)
#define TAMINGFAST_HOST_DEVICE __host__ __device__
#else
#define TAMINGFAST_HOST_DEVICE
#endif
