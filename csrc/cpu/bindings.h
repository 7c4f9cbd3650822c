// Binds the functions, the GPT engine and the convolutions of the CPU to a module.
#pragma once

#include <pybind11/pybind11.h>

namespace tamingfast {

void bind_cpu(pybind11::module_& module);
void bind_convolutions(pybind11::module_& module);

}  // namespace tamingfast
