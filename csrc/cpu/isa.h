// Instruction sets that kernels are compiled for, and the choice among them when the program runs.
#pragma once

#include <string>
#include <vector>

namespace tamingfast {

// avx512 stands for F, BW, DQ and VL; avx512bf16 adds VBMI and BF16.
enum class Isa { generic, avx2, avx512, avx512bf16 };

// What this processor and this build can run, the slowest first.
std::vector<std::string> supported_isas();

// The instruction set of that name, the fastest for "auto".
// Throws std::invalid_argument when the name is unknown or the processor cannot run it.
Isa parse_isa(const std::string& name);

}  // namespace tamingfast
