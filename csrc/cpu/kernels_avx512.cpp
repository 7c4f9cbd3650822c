#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define TF_ISA avx512
#define TF_LANES 16
#define TF_DOT 0
#include "convolution.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
