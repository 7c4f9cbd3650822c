// Binds the CUDA engine's kernels to a module.
#pragma once

#include <pybind11/pybind11.h>

namespace tamingfast::cuda {

void bind(pybind11::module_& module);

}  // namespace tamingfast::cuda
