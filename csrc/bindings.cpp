// Python bindings of tamingfast._C. Tensors come as addresses and sizes, so that one binary serves every torch version;
// tamingfast/ops.py is the only caller and owns the checks of dtype, device and contiguity.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/nearest_code.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

void check_size(const char* name, std::int64_t value, std::int64_t least) {
  if (value < least)
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) + ", expected at least " +
                                std::to_string(least));
}

// That rows x columns elements are addressable, and that the address can be that of such an array.
template <typename T>
T* check_array(const char* name, std::uintptr_t address, std::int64_t rows, std::int64_t columns) {
  const std::int64_t most = std::numeric_limits<std::int64_t>::max() / static_cast<std::int64_t>(sizeof(double));
  if (rows > most / columns)
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(rows) + " x " + std::to_string(columns) +
                                " elements do not fit into memory");
  if (rows > 0 && address == 0) throw std::invalid_argument(std::string(name) + ": got a null pointer");
  if (address % alignof(T) != 0)
    throw std::invalid_argument(std::string(name) + ": got an address that is not a multiple of " +
                                std::to_string(alignof(T)));
  return reinterpret_cast<T*>(address);
}

void nearest_code(std::uintptr_t z, std::int64_t n, std::uintptr_t codebook, std::int64_t k, std::int64_t d,
                  std::uintptr_t out, int threads, const std::string& isa) {
  check_size("n", n, 0);
  check_size("k", k, 1);
  check_size("d", d, 1);
  check_size("threads", threads, 1);
  tamingfast::NearestCodeParams params;
  params.z = check_array<const float>("z", z, n, d);
  params.codebook = check_array<const float>("codebook", codebook, k, d);
  params.out = check_array<std::int64_t>("out", out, n, 1);
  params.n = n;
  params.k = k;
  params.d = d;
  params.threads = threads;
  const tamingfast::Isa chosen = tamingfast::parse_isa(isa);
  py::gil_scoped_release unlocked;
  tamingfast::nearest_code(params, chosen);
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
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of tamingfast; call them through tamingfast.ops.";
  module.def(
      "nearest_code", &nearest_code, py::arg("z"), py::arg("n"), py::arg("codebook"), py::arg("k"), py::arg("d"),
      py::arg("out"), py::arg("threads"), py::arg("isa") = "auto",
      "Index of the nearest row of codebook (k, d) for each row of z (n, d), both contiguous float32 at the given "
      "addresses, written to out (n,) int64. ValueError names the argument that is wrong.");
  module.def("build_info", &build_info,
             "dict: version, compiler, cxx_standard, openmp, isas (what this build and processor can run).");
}
