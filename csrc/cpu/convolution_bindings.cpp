#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "../guard.h"
#include "bindings.h"
#include "convolution.h"
#include "isa.h"

namespace py = pybind11;

namespace tamingfast {
namespace {

constexpr std::int64_t kMostSide = std::int64_t{1} << 24;  // so that products of sizes stay far from overflow
const std::map<std::string, Method> kMethods{{"patches", Method::patches},
                                             {"winograd2", Method::winograd2},
                                             {"winograd4", Method::winograd4},
                                             {"winograd", Method::winograd}};

using MaybeArray = std::optional<Array>;

template <class T>
T* optional_at(const char* name, const MaybeArray& array, std::int64_t rows, std::int64_t columns) {
  return array ? array_at<T>(name, *array, rows, columns) : nullptr;
}

std::unique_ptr<Convolution> make(const Array& weight, const MaybeArray& bias, std::int64_t out, std::int64_t in,
                                  std::int64_t kernel, std::int64_t stride, const std::string& method, int threads,
                                  const std::string& isa) {
  require_range("out", out, 1, kMostSide);
  require_range("in", in, 1, kMostSide);
  require_range("kernel", kernel, 1, 3);
  const ConvolutionWeights weights{array_at<const float>("weight", weight, out * in, kernel * kernel),
                                   optional_at<const float>("bias", bias, out, 1),
                                   out,
                                   in,
                                   kernel,
                                   stride};
  const Method chosen = named("method", method, kMethods);
  const Isa set = parse_isa(isa);
  py::gil_scoped_release unlocked;
  return std::make_unique<Convolution>(weights, chosen, threads, set);
}

std::tuple<std::int64_t, std::int64_t> pair_of(const Blocks& blocks) { return {blocks.rows, blocks.columns}; }

std::tuple<std::int64_t, std::int64_t> planned(std::int64_t out, std::int64_t in, std::int64_t kernel,
                                               std::int64_t stride, const std::string& method, const std::string& isa) {
  require_range("out", out, 1, kMostSide);
  require_range("in", in, 1, kMostSide);
  return pair_of(Convolution::planned_blocks({nullptr, nullptr, out, in, kernel, stride},
                                             named("method", method, kMethods), parse_isa(isa)));
}

void run(const Convolution& convolution, std::int64_t images, const Array& x, std::int64_t x_first, std::int64_t x_rows,
         std::int64_t x_height, std::int64_t x_width, const Array& out, std::int64_t height, std::int64_t width,
         std::int64_t top, std::int64_t bottom, std::int64_t padding, bool upsample, const MaybeArray& scale,
         const MaybeArray& shift, bool silu, const MaybeArray& residual, const MaybeArray& moments, int threads) {
  const std::int64_t in = convolution.in(), to = convolution.out();
  require_range("images", images, 0, kMostSide);
  for (const auto& [name, side] : {std::pair{"x_rows", x_rows},
                                   {"x_height", x_height},
                                   {"x_width", x_width},
                                   {"height", height},
                                   {"width", width}})
    require_range(name, side, 0, kMostSide);
  require_range("top", top, 0, height);
  require_range("bottom", bottom, top, height);
  ConvolutionParams p{};
  p.images = images;
  p.x = {array_at<const float>("x", x, images * x_rows * x_width, in), x_first, x_rows, x_height, x_width};
  p.upsample = upsample;
  p.padding = padding;
  p.scale = optional_at<const float>("scale", scale, images, in);
  p.shift = optional_at<const float>("shift", shift, images, in);
  if (p.scale && !p.shift) refuse("shift", "a null pointer", "an address, as there is a scale");
  p.silu = silu;
  const std::int64_t pixels = images * (bottom - top) * width;
  p.residual = optional_at<const float>("residual", residual, pixels, to);
  p.out = array_at<float>("out", out, pixels, to);
  p.height = height;
  p.width = width;
  p.top = top;
  p.bottom = bottom;
  if (moments && width > 0)
    p.moments = array_at<float>("moments", *moments, images * convolution.blocks().count(height, width) * 3, to);
  py::gil_scoped_release unlocked;
  convolution.run(p, threads);
}

Blocks read_blocks(const std::tuple<std::int64_t, std::int64_t>& blocks) {
  require_range("blocks", std::get<0>(blocks), 1, kMostSide);
  require_least("blocks", std::get<1>(blocks), 1);
  return {std::get<0>(blocks), std::get<1>(blocks)};
}

void moments_of(const Array& x, std::int64_t images, std::int64_t height, std::int64_t width, std::int64_t channels,
                std::int64_t top, std::int64_t bottom, const std::tuple<std::int64_t, std::int64_t>& blocks,
                const Array& moments) {
  for (const auto& [name, side] : {std::pair{"images", images}, {"height", height}, {"width", width}})
    require_range(name, side, 1, kMostSide);
  require_range("channels", channels, 1, kMostSide);
  require_range("top", top, 0, height);
  require_range("bottom", bottom, top, height);
  const Blocks sizes = read_blocks(blocks);
  const MomentsParams p{array_at<const float>("x", x, images * (bottom - top) * width, channels),
                        images,
                        height,
                        width,
                        channels,
                        top,
                        bottom,
                        sizes,
                        array_at<float>("moments", moments, images * sizes.count(height, width) * 3, channels)};
  py::gil_scoped_release unlocked;
  measure_moments(p);
}

void norm(const Array& moments, std::int64_t images, std::int64_t height, std::int64_t width, std::int64_t channels,
          const std::tuple<std::int64_t, std::int64_t>& blocks, std::int64_t groups, double eps, const Array& gain,
          const Array& bias, const Array& scale, const Array& shift) {
  for (const auto& [name, side] : {std::pair{"images", images}, {"height", height}, {"width", width}})
    require_range(name, side, 1, kMostSide);
  require_range("channels", channels, 1, kMostSide);
  const Blocks sizes = read_blocks(blocks);
  const NormParams p{array_at<const float>("moments", moments, images * sizes.count(height, width) * 3, channels),
                     images,
                     height,
                     width,
                     channels,
                     groups,
                     sizes,
                     eps,
                     array_at<const float>("gain", gain, channels, 1),
                     array_at<const float>("bias", bias, channels, 1),
                     array_at<float>("scale", scale, images, channels),
                     array_at<float>("shift", shift, images, channels)};
  py::gil_scoped_release unlocked;
  normalisation(p);
}

}  // namespace

void bind_convolutions(py::module_& module) {
  py::class_<Convolution>(module, "Convolution",
                          "A convolution with packed weights, for maps (images, rows, width, channels) of float32; use "
                          "it through tamingfast.engines.first_stage. Its calls may run side by side.")
      .def(py::init(&make), py::arg("weight"), py::arg("bias"), py::arg("out"), py::arg("in_"), py::arg("kernel"),
           py::arg("stride"), py::arg("method"), py::arg("threads"), py::arg("isa") = "auto",
           "weight, bias: (address, bytes) of float32 (out, in, kernel, kernel) and (out,) or None, read and not kept; "
           "method: 'winograd', 'winograd4', 'winograd2' or 'patches'.")
      .def("run", &run, py::arg("images"), py::arg("x"), py::arg("x_first"), py::arg("x_rows"), py::arg("x_height"),
           py::arg("x_width"), py::arg("out"), py::arg("height"), py::arg("width"), py::arg("top"), py::arg("bottom"),
           py::arg("padding"), py::arg("upsample"), py::arg("scale"), py::arg("shift"), py::arg("silu"),
           py::arg("residual"), py::arg("moments"), py::arg("threads"),
           "Writes rows `top` to `bottom` - 1; see ConvolutionParams in csrc/cpu/convolution.h. Arrays are (address, "
           "bytes), or None."
           "")
      .def_property_readonly(
          "blocks", [](const Convolution& c) { return pair_of(c.blocks()); },
          "(rows, columns) of the blocks of which moments are summed; bands are whole rows of blocks.")
      .def_static("planned_blocks", &planned, py::arg("out"), py::arg("in_"), py::arg("kernel"), py::arg("stride"),
                  py::arg("method"), py::arg("isa") = "auto", "The `blocks` of a convolution that is still to be made.")
      .def_property_readonly("bytes", &Convolution::bytes, "Bytes of the packed weights.");
  module.def("moments", &moments_of, py::arg("x"), py::arg("images"), py::arg("height"), py::arg("width"),
             py::arg("channels"), py::arg("top"), py::arg("bottom"), py::arg("blocks"), py::arg("moments"),
             "Writes the moments of a band of a map; see MomentsParams in csrc/cpu/convolution.h.");
  module.def("normalisation", &norm, py::arg("moments"), py::arg("images"), py::arg("height"), py::arg("width"),
             py::arg("channels"), py::arg("blocks"), py::arg("groups"), py::arg("eps"), py::arg("gain"),
             py::arg("bias"), py::arg("scale"), py::arg("shift"),
             "Turns moments into scale and shift, (images, channels), of a group normalisation.");
}

}  // namespace tamingfast
