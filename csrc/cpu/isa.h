// The instruction sets that kernels are compiled for, selected at run time.
#pragma once

#include <string>
#include <vector>

namespace tamingfast {

// avx512 stands for F, BW, DQ and VL; avx512bf16 adds VBMI and BF16.
enum class Isa { generic, avx2, avx512, avx512bf16 };

// The instruction sets that both this build and this processor support, slowest first.
std::vector<std::string> supported_isas();

// The instruction set of that name; "auto" is the fastest one.
// Throws std::invalid_argument if the name is unknown or the processor does not support it.
Isa parse_isa(const std::string& name);

}  // namespace tamingfast
