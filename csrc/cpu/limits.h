// What this machine can do at most, measured: benchmarks report their figures as shares of it.
#pragma once

#include <cstddef>

#include "isa.h"
#include "kernels.h"

namespace tamingfast {

// Bytes per second that `threads` threads read together from memory, from an array of that size in huge pages.
double read_bandwidth(std::size_t bytes, int threads, int repeats);

// Floating-point operations per second of `threads` threads in registers: multiply-adds, or with bfloat16 and int8
// where the instruction set has them dot products of bfloat16.
double arithmetic_rate(Dtype dtype, int threads, int repeats, Isa isa);

}  // namespace tamingfast
