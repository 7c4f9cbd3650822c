// Drives the CPU's convolutions with random sizes, bands and threads, without Python, and compares them with plain
// loops in float64. Built with sanitizers by test_sanitizers.py; every array is as long as it must be and no longer.
// Usage: convolution_driver SEED ROUNDS
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/convolution.h"
#include "driver.h"

using namespace tamingfast;

namespace {

using Floats = std::vector<float>;

// A convolution with everything that may be fused into it.
struct Case {
  Method method;
  std::int64_t images, in, out, kernel, stride, padding, x_height, x_width, height, width;
  bool upsample, silu;
  Floats x, weight, bias, scale, shift, residual;

  Case() {
    method = one_of<Method>({Method::patches, Method::winograd2, Method::winograd4});
    const bool winograd = method != Method::patches;
    images = any(1, 3);
    in = winograd ? 16 * any(1, 4) : any(1, 20);
    out = one_of<std::int64_t>({1, 3, 16, 32, 48, any(1, 70)});
    if (winograd && any(0, 7) == 0) in = out = 384;  // threads share the tiles
    kernel = winograd ? 3 : one_of<std::int64_t>({1, 3});
    stride = !winograd && kernel == 3 ? any(1, 2) : 1;
    padding = stride == 1 ? kernel / 2 : 0;
    upsample = stride == 1 && any(0, 1);
    const std::int64_t most = in == 384 ? 9 : 40;
    x_height = any(stride, most);
    x_width = any(stride, most);
    height = (upsample ? 2 : 1) * x_height / stride;
    width = (upsample ? 2 : 1) * x_width / stride;
    x = random_values(images * x_height * x_width * in, 1.0f);
    weight = random_values(out * in * kernel * kernel, 1.0f / std::sqrt(static_cast<float>(in * kernel * kernel)));
    if (any(0, 1)) bias = random_values(out, 1.0f);
    if (any(0, 1)) scale = random_values(images * in, 1.0f), shift = random_values(images * in, 1.0f);
    silu = !scale.empty() && any(0, 1);
    if (any(0, 1)) residual = random_values(images * height * width * out, 1.0f);
    situation = "method " + std::to_string(static_cast<int>(method)) + ", " + std::to_string(images) + " images of " +
                std::to_string(x_height) + "x" + std::to_string(x_width) + "x" + std::to_string(in) + " to " +
                std::to_string(height) + "x" + std::to_string(width) + "x" + std::to_string(out) + ", kernel " +
                std::to_string(kernel) + ", stride " + std::to_string(stride) + (upsample ? ", upsampled" : "");
  }

  double input(std::int64_t image, std::int64_t y, std::int64_t x_at, std::int64_t c) const {
    const std::int64_t doubling = upsample ? 2 : 1;
    if (y < 0 || x_at < 0 || y >= x_height * doubling || x_at >= x_width * doubling) return 0.0;
    double value = x[((image * x_height + y / doubling) * x_width + x_at / doubling) * in + c];
    if (!scale.empty()) value = value * scale[image * in + c] + shift[image * in + c];
    return silu ? value / (1.0 + std::exp(-value)) : value;
  }

  double output(std::int64_t image, std::int64_t y, std::int64_t x_at, std::int64_t o) const {
    double sum = bias.empty() ? 0.0 : bias[o];
    for (std::int64_t r = 0; r < kernel; ++r)
      for (std::int64_t s = 0; s < kernel; ++s)
        for (std::int64_t c = 0; c < in; ++c)
          sum += input(image, y * stride + r - padding, x_at * stride + s - padding, c) *
                 weight[((o * in + c) * kernel + r) * kernel + s];
    if (!residual.empty()) sum += residual[((image * height + y) * width + x_at) * out + o];
    return sum;
  }
};

struct Result {
  Floats out, moments;
  bool operator==(const Result& other) const { return same(out, other.out) && same(moments, other.moments); }
  static bool same(const Floats& a, const Floats& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
  }
};

const float* maybe(const Floats& values) { return values.empty() ? nullptr : values.data(); }

// Rows [top, bottom) of all images, with exactly the input rows that they need, into `result`.
void run_band(const Convolution& conv, const Case& c, std::int64_t top, std::int64_t bottom, int threads,
              Result& result) {
  const std::int64_t doubling = c.upsample ? 2 : 1, row = c.width * c.out;
  std::int64_t first = std::max<std::int64_t>(0, top * c.stride - c.padding) / doubling;
  std::int64_t last = ((bottom - 1) * c.stride - c.padding + c.kernel + doubling - 1) / doubling;
  last = std::min(last, c.x_height);
  const std::int64_t rows = last - first;
  Floats source, residual, band(c.images * (bottom - top) * row, NAN);
  for (std::int64_t i = 0; i < c.images; ++i) {
    const float* image = c.x.data() + i * c.x_height * c.x_width * c.in;
    source.insert(source.end(), image + first * c.x_width * c.in, image + last * c.x_width * c.in);
    if (c.residual.empty()) continue;
    const float* kept = c.residual.data() + i * c.height * row;
    residual.insert(residual.end(), kept + top * row, kept + bottom * row);
  }
  source.shrink_to_fit();
  const bool in_place = !residual.empty() && any(0, 1);
  if (in_place) band = residual;
  ConvolutionParams p{};
  p.images = c.images;
  p.x = {source.data(), first, rows, c.x_height, c.x_width};
  p.upsample = c.upsample;
  p.padding = c.padding;
  p.scale = maybe(c.scale);
  p.shift = maybe(c.shift);
  p.silu = c.silu;
  p.residual = in_place ? band.data() : maybe(residual);
  p.out = band.data();
  p.height = c.height;
  p.width = c.width;
  p.top = top;
  p.bottom = bottom;
  p.moments = result.moments.empty() ? nullptr : result.moments.data();
  conv.run(p, threads);
  for (std::int64_t i = 0; i < c.images; ++i)
    std::copy_n(band.data() + i * (bottom - top) * row, (bottom - top) * row,
                result.out.data() + (i * c.height + top) * row);
}

Result run(const Convolution& conv, const Case& c, bool bands, int threads) {
  Result result;
  result.out.assign(c.images * c.height * c.width * c.out, NAN);
  if (c.out % 16 == 0) result.moments.assign(c.images * conv.blocks().count(c.height, c.width) * 3 * c.out, NAN);
  for (std::int64_t top = 0; top < c.height;) {
    const std::int64_t unit = conv.blocks().rows;
    const std::int64_t bottom = bands ? std::min(c.height, top + unit * any(1, 3)) : c.height;
    run_band(conv, c, top, bottom, threads, result);
    top = bottom;
  }
  return result;
}

void compare(const Case& c, const Result& result) {
  for (int sample = 0; sample < 60; ++sample) {
    const std::int64_t i = any(0, c.images - 1), y = any(0, c.height - 1), x = any(0, c.width - 1),
                       o = any(0, c.out - 1);
    const double expected = c.output(i, y, x, o), got = result.out[((i * c.height + y) * c.width + x) * c.out + o];
    expect(std::abs(got - expected) <= 2e-4 * (1.0 + std::abs(expected)), "outputs are those of the plain loops");
  }
  for (float value : result.out) expect(std::isfinite(value), "every output is written");
  for (float value : result.moments) expect(std::isfinite(value), "every moment is written");
}

// The normalisation that the moments give: every group of channels has mean 0 and variance 1.
void normalise(const Convolution& conv, const Case& c, const Result& result) {
  const std::int64_t groups = one_of<std::int64_t>({1, 4, 16}), each = c.out / groups;
  const Floats gain(c.out, 1.0f), bias(c.out, 0.0f);
  Floats scale(c.images * c.out), shift(c.images * c.out);
  normalisation({result.moments.data(), c.images, c.height, c.width, c.out, groups, conv.blocks(), 1e-6, gain.data(),
                 bias.data(), scale.data(), shift.data()});
  const std::int64_t i = any(0, c.images - 1), g = any(0, groups - 1);
  double mean = 0, square = 0;
  for (std::int64_t pixel = 0; pixel < c.height * c.width; ++pixel)
    for (std::int64_t o = g * each; o < (g + 1) * each; ++o) {
      const double value = result.out[(i * c.height * c.width + pixel) * c.out + o];
      const double normed = value * scale[i * c.out + o] + shift[i * c.out + o];
      mean += normed;
      square += normed * normed;
    }
  const double n = static_cast<double>(c.height * c.width * each);
  expect(std::abs(mean / n) < 1e-3, "a group's mean is 0");
  if (n >= 16) expect(std::abs(square / n - 1) < 1e-2, "a group's variance is 1");
}

void refusals(const Convolution& conv, const Case& c) {
  Result result = run(conv, c, false, 1);
  Floats out = result.out;
  ConvolutionParams p{};
  p.images = c.images;
  p.x = {c.x.data(), 0, c.x_height, c.x_height, c.x_width};
  p.upsample = c.upsample;
  p.padding = c.padding;
  p.out = out.data();
  p.height = c.height;
  p.width = c.width;
  p.bottom = c.height;
  const auto wrong = [&](const char* what, auto change) {
    ConvolutionParams changed = p;
    change(changed);
    expect_refused(what, [&] { conv.run(changed, 1); });
  };
  wrong("more rows than there are", [&](ConvolutionParams& q) { q.bottom = q.height + 1; });
  wrong("a negative row", [&](ConvolutionParams& q) { q.top = -1; });
  wrong("a wider output", [&](ConvolutionParams& q) { q.width = 4 * q.width + 8; });
  wrong("missing input rows", [&](ConvolutionParams& q) { q.x.rows = 0; });
  wrong("rows of another place", [&](ConvolutionParams& q) { q.x.first = 1; });
  expect_refused("no threads", [&] { conv.run(p, 0); });
}

void drive_convolution() {
  const Case c;
  const std::string isa = one_of(supported_isas());
  situation += ", " + isa;
  const Convolution conv({c.weight.data(), maybe(c.bias), c.out, c.in, c.kernel, c.stride}, c.method,
                         static_cast<int>(any(1, 3)), parse_isa(isa));
  const Result whole = run(conv, c, false, 1);
  compare(c, whole);
  const int threads = static_cast<int>(any(2, 4));
  expect(run(conv, c, false, threads) == whole, "threads change no bit");
  expect(run(conv, c, true, threads) == whole, "bands change no bit");
  if (!whole.moments.empty() && c.height * c.width > 1) normalise(conv, c, whole);
  refusals(conv, c);
  if (any(0, 3) == 0) {  // calls side by side
    std::vector<Result> results(2);
    std::vector<std::thread> callers;
    for (Result& result : results) {
      result.out.assign(whole.out.size(), NAN);
      result.moments.assign(whole.moments.size(), NAN);
      callers.emplace_back([&conv, &c, &result] {
        ConvolutionParams p{};
        p.images = c.images;
        p.x = {c.x.data(), 0, c.x_height, c.x_height, c.x_width};
        p.upsample = c.upsample;
        p.padding = c.padding;
        p.scale = maybe(c.scale);
        p.shift = maybe(c.shift);
        p.silu = c.silu;
        p.residual = maybe(c.residual);
        p.out = result.out.data();
        p.height = c.height;
        p.width = c.width;
        p.bottom = c.height;
        p.moments = result.moments.empty() ? nullptr : result.moments.data();
        conv.run(p, 2);
      });
    }
    for (std::thread& caller : callers) caller.join();
    for (const Result& result : results) expect(result == whole, "calls side by side change no bit");
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return 2;
  const std::int64_t seed = std::atoll(words[1]), rounds = std::atoll(words[2]);
  for (std::int64_t round = 0; round < rounds; ++round) {
    generator.seed(seed + round);
    drive_convolution();
  }
  std::printf("%lld rounds\n", static_cast<long long>(rounds));
}
