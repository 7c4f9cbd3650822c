// The module tamingfast._C. Tensors are passed as addresses and sizes, so that one binary serves every torch version;
// tamingfast/ops and tamingfast/engines are the only callers and check dtype, device and contiguity.
#include "cpu/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "philox.h"

#ifdef TAMINGFAST_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using tamingfast::gumbel;
using tamingfast::noise_words;
using tamingfast::Words;

std::array<std::uint32_t, 4> philox4x32(const std::array<std::uint32_t, 4>& counter,
                                        const std::array<std::uint32_t, 2>& key) {
  const Words words = tamingfast::philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {words.at[0], words.at[1], words.at[2], words.at[3]};
}

std::vector<float> gumbel_noise(std::uint64_t seed, std::uint32_t image, std::uint32_t row, std::uint32_t column,
                                std::uint32_t vocab) {
  std::vector<float> noise(vocab);
  for (std::uint32_t v = 0; v < vocab; ++v) noise[v] = gumbel(noise_words(seed, {image, row, column}, v / 4).at[v % 4]);
  return noise;
}

py::dict build_info() {
  py::dict info;
  info["version"] = TAMINGFAST_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cxx_standard"] = static_cast<long>(__cplusplus / 100 % 100);
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["isas"] = tamingfast::supported_isas();
#ifdef TAMINGFAST_CUDA
  info["cuda"] = TAMINGFAST_CUDA;
#else
  info["cuda"] = py::none();
  info["no_cuda"] = TAMINGFAST_NO_CUDA;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of tamingfast; call them through tamingfast.ops and tamingfast.engines.";
  module.def("build_info", &build_info,
             "dict: version, compiler, cxx_standard, openmp, isas (supported by this build and processor, slowest "
             "first), cuda (the compiler and targets of the submodule `cuda`, or None), no_cuda (why there is none).");
  module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"), "Philox4x32-10, to test csrc/philox.h.");
  module.def("gumbel_noise", &gumbel_noise, py::arg("seed"), py::arg("image"), py::arg("row"), py::arg("column"),
             py::arg("vocab"), "The noise of tamingfast.ops.choice, to test csrc/philox.h.");
  tamingfast::bind_cpu(module);
  tamingfast::bind_convolutions(module);
#ifdef TAMINGFAST_CUDA
  py::module_ cuda =
      module.def_submodule("cuda", "Kernels of the CUDA engine; use them through tamingfast.engines.cuda.");
  tamingfast::cuda::bind(cuda);
#endif
}
