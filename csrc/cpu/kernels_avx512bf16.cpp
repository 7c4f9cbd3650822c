#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                                                       \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,amx-tile,amx-bf16")
#endif
#define TF_ISA avx512bf16
#define TF_LANES 16
#define TF_DOT 1
#define TF_AMX 1
#include "convolution.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
