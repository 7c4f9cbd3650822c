#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TF_ISA avx2
#define TF_LANES 8
#define TF_DOT 0
#include "convolution.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
