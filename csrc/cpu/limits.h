// Measures the peak rates of this machine; benchmarks report their figures as a share of these.
#pragma once

#include <cstddef>

#include "isa.h"
#include "kernels.h"

namespace tamingfast {

// Bytes per second that `threads` threads together read from an array of `bytes` in huge pages; the best of the
// repeats.
double read_bandwidth(std::size_t bytes, int threads, int repeats);

// Floating-point operations per second of `threads` threads, with operands in registers: multiply-adds, or for bfloat16
// and int8 bfloat16 dot products if the instruction set has them. The best of the repeats.
double arithmetic_rate(Dtype dtype, int threads, int repeats, Isa isa);

}  // namespace tamingfast
