// Binds the CPU's functions and the GPT engine to a module.
#pragma once

#include <pybind11/pybind11.h>

namespace tamingfast {

void bind_cpu(pybind11::module_& module);

}  // namespace tamingfast
