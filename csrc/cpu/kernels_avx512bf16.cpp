#if defined(__x86_64__)
// A compiler that does not know AMX builds the kernels for float32, which any processor with this instruction set runs.
#if !defined(TAMINGFAST_NO_AMX) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define TF_AMX 1
#endif
#if !defined(__clang__)
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")
#if TF_AMX
#pragma GCC target("amx-tile,amx-bf16")  // in addition
#endif
#elif TF_AMX
#pragma clang attribute push(                                                                                       \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16"))), apply_to = function)
#endif
#define TF_ISA avx512bf16
#define TF_LANES 16
#define TF_DOT 1
#include "convolution.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
