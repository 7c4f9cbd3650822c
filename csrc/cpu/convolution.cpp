#include "convolution.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../guard.h"
#include "convolution_kernels.h"
#include "memory.h"
#include "team.h"

namespace tamingfast {

namespace {

// Whether this process may use AMX. Linux has to be asked, as its registers enlarge the frames of signal handlers.
bool amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool allowed = [] {
    constexpr int kRequest = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

}  // namespace

const ConvolutionKernels& convolution_kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512bf16 && amx()) return avx512bf16::convolution_kernels;
  if (isa == Isa::avx512 || isa == Isa::avx512bf16) return avx512::convolution_kernels;
  if (isa == Isa::avx2) return avx2::convolution_kernels;
#endif
  (void)isa;
  return generic::convolution_kernels;
}

namespace {

constexpr std::int64_t kMaxThreads = 256;
constexpr std::int64_t kMostKernel = 3;
constexpr std::int64_t kPadding = 16;      // floats between matrices, so that they do not compete for cache sets
constexpr std::int64_t kPatchPixels = 48;  // rows of a product with patches
constexpr std::int64_t kSharedChannels = 1 << 17;  // weights of in x out: above, all threads work on the same tiles
constexpr std::int64_t kSharedTiles = 64;          // tiles of a group that all threads work on

std::int64_t round_to(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }
std::int64_t pieces(std::int64_t value, std::int64_t step) { return (value + step - 1) / step; }

int outputs(Method method) { return method == Method::winograd4 ? 4 : 2; }

// The matrix G of the filters' transform, (m + 2, 3); see convolution.inl for the points.
void filter_matrix(int m, double matrix[6][3]) {
  const double a = std::sqrt(0.5), b = std::sqrt(2.0);
  const double points4[] = {0.0, a, -a, b, -b}, points2[] = {0.0, 1.0, -1.0};
  const double* points = m == 4 ? points4 : points2;
  for (int i = 0; i <= m; ++i) {
    double norm = 1.0;
    for (int j = 0; j <= m; ++j)
      if (j != i) norm *= points[i] - points[j];
    for (int power = 0; power < 3; ++power) matrix[i][power] = std::pow(points[i], power) / norm;
  }
  matrix[m + 1][0] = matrix[m + 1][1] = 0.0;
  matrix[m + 1][2] = 1.0;
}

constexpr std::int64_t kMostPanel = 32;
constexpr Storage kPlain{1, 1, false};

// G g G' of the 3x3 filters of up to kMostPanel output channels for one input channel. `g` is (9, kMostPanel); position
// k is written to out[k].
void transform_filters(int m, const double matrix[6][3], const double (*g)[kMostPanel], double (*out)[kMostPanel]) {
  const int side = m + 2;
  double half[6][3][kMostPanel];
  for (int i = 0; i < side; ++i)
    for (int x = 0; x < 3; ++x)
      for (std::int64_t o = 0; o < kMostPanel; ++o)
        half[i][x][o] = matrix[i][0] * g[x][o] + matrix[i][1] * g[3 + x][o] + matrix[i][2] * g[6 + x][o];
  for (int i = 0; i < side; ++i)
    for (int j = 0; j < side; ++j)
      for (std::int64_t o = 0; o < kMostPanel; ++o)
        out[i * side + j][o] =
            matrix[j][0] * half[i][0][o] + matrix[j][1] * half[i][1][o] + matrix[j][2] * half[i][2][o];
}

// Row `i` of a panel that is split for AMX; rows i and i + 16 are a pair.
void split(const double* row, std::int64_t i, std::uint16_t* panel) {
  constexpr std::int64_t kTile = 512;
  float rest[kMostPanel];
  for (std::int64_t o = 0; o < kMostPanel; ++o) rest[o] = static_cast<float>(row[o]);
  for (std::int64_t part = 0; part < Storage::kSplit; ++part) {
    std::uint32_t bits[kMostPanel];
    std::memcpy(bits, rest, sizeof bits);
    for (std::int64_t o = 0; o < kMostPanel; ++o) {
      const std::uint32_t half = rest[o] == rest[o] ? 0x7fffu + (bits[o] >> 16 & 1u) : 0u;  // ties to even
      bits[o] = (bits[o] + half) & 0xffff0000u;
    }
    float nearest[kMostPanel];
    std::memcpy(nearest, bits, sizeof nearest);
    for (std::int64_t o = 0; o < kMostPanel; ++o) rest[o] -= nearest[o];
    std::uint16_t* to = panel + (i / 32 * Storage::kSplit + part) * 2 * kTile + i % 16 * 32 + i % 32 / 16;
    for (std::int64_t o = 0; o < kMostPanel; ++o)
      to[o / 16 * kTile + o % 16 * 2] = static_cast<std::uint16_t>(bits[o] >> 16);
  }
}

}  // namespace

struct Convolution::Packed {
  std::int64_t out, in, kernel, stride;
  Method method;
  const ConvolutionKernels& kernels;
  std::int64_t panel, padded;            // output channels per panel, and all of them in whole panels
  std::int64_t depth;                    // inner dimension of the product, in whole steps of the storage
  std::int64_t positions;                // matrices of weights: (padded / panel, depth, panel) each
  std::int64_t tile_rows, tile_columns;  // of a block, for Winograd
  bool shared;                           // all threads work on the same tiles, on different positions
  Memory panels, bias;

  const Storage& storage() const { return winograd() ? kernels.storage : kPlain; }
  std::int64_t panel_floats() const { return storage().floats(depth * panel); }
  std::int64_t matrix() const { return padded / panel * panel_floats(); }
  bool winograd() const { return method != Method::patches; }
  int m() const { return outputs(method); }
  Blocks blocks() const {
    if (winograd()) return {m() * tile_rows, m() * tile_columns};
    return {1, std::int64_t{1} << 40};
  }

  // Floats of a matrix of transformed inputs, and of one of products.
  std::int64_t value_floats(std::int64_t rows) const {
    return storage().floats(round_to(rows, storage().row_step) * depth) + kPadding;
  }
  std::int64_t sums(std::int64_t rows) const { return round_to(rows, storage().row_step) * padded + kPadding; }

  struct Work;
  struct Scratch;
  static Packed plan(const ConvolutionWeights& weights, Method wanted, Isa isa);
  void tiles(const Work& work, Scratch* scratch, Barrier& barrier, int thread, int of) const;
  void patches(const Work& work, Scratch& scratch, int thread, int of) const;
};

namespace {

// F(4x4) has the fewest products. Its block is a compromise between the second-level cache, which a block's values
// should fit, and the number of times that the weights are read, once per block or group of blocks.
void choose_blocks(std::int64_t channels, bool shared, int m, const ConvolutionKernels& kernels, std::int64_t& rows,
                   std::int64_t& columns) {
  const std::int64_t scale = m == 4 ? 1 : 2;
  if (shared) {
    rows = columns = 2 * scale;
  } else if (kernels.storage.split) {
    rows = 8 * scale;
    columns = channels <= 256 ? 16 * scale : 8 * scale;
  } else if (channels <= 256) {
    rows = (kernels.lanes == 16 ? 4 : 3) * scale;
    columns = (kernels.lanes == 16 ? 12 : 6) * scale;
  } else {
    rows = columns = 4;
    rows *= scale;
  }
}

}  // namespace

// Everything but the weights.
Convolution::Packed Convolution::Packed::plan(const ConvolutionWeights& w, Method wanted, Isa isa) {
  require_least("out", w.out, 1);
  require_least("in", w.in, 1);
  require_range("kernel", w.kernel, 1, kMostKernel);
  require_range("stride", w.stride, 1, kMostKernel);
  // The smaller tile is for exactness, and over short sums split values round more than whole ones.
  const bool exact = wanted == Method::winograd2 && isa == Isa::avx512bf16;
  const ConvolutionKernels& kernels = convolution_kernels_for(exact ? Isa::avx512 : isa);
  const bool winograd = wanted != Method::patches;
  if (winograd && (w.kernel != 3 || w.stride != 1)) refuse("method", "Winograd", "patches for any but 3x3 of stride 1");
  if (winograd) require(w.in % kernels.lanes == 0, "in", w.in, "a multiple of " + std::to_string(kernels.lanes));
  // Products on AMX are so fast that many weights take longer to read than to multiply.
  const bool fewer = kernels.storage.split && w.in * w.out > kSharedChannels;
  const Method method = wanted != Method::winograd ? wanted : fewer ? Method::winograd2 : Method::winograd4;
  Packed p{w.out, w.in, w.kernel, w.stride, method, kernels, kernels.panel, 0, 0, 0, 0, 0, false, {}, {}};
  p.padded = round_to(w.out, p.panel);
  p.depth = winograd ? round_to(w.in, kernels.storage.depth_step) : w.in * w.kernel * w.kernel;
  const int side = p.m() + 2;
  p.positions = winograd ? side * side : 1;
  p.shared = winograd && w.in * w.out > kSharedChannels;
  choose_blocks(w.in + w.out, p.shared, p.m(), kernels, p.tile_rows, p.tile_columns);
  return p;
}

Convolution::Convolution(const ConvolutionWeights& w, Method method, int threads, Isa isa)
    : packed_(new Packed(Packed::plan(w, method, isa))) {
  require_least("threads", threads, 1);
  Packed& p = *packed_;
  const bool winograd = p.winograd();
  p.panels = Memory(static_cast<std::size_t>(p.positions * p.matrix()) * sizeof(float));
  p.bias = Memory(static_cast<std::size_t>(p.padded) * sizeof(float));
  if (w.bias) std::memcpy(p.bias.as<float>(), w.bias, w.out * sizeof(float));
  double matrix[6][3];
  if (winograd) filter_matrix(p.m(), matrix);
  parallel(std::min<int>(threads, kMaxThreads), [&](int thread, int of) {
    const Range panels = share(p.padded / p.panel, thread, of);
    const std::int64_t area = w.kernel * w.kernel;
    for (std::int64_t number = panels.first; number < panels.last; ++number) {
      const std::int64_t first = number * p.panel, here = std::min(p.panel, w.out - first);
      float* to = p.panels.as<float>() + number * p.panel_floats();
      for (std::int64_t i = 0; i < w.in; ++i) {
        double g[kMostKernel * kMostKernel][kMostPanel] = {};
        for (std::int64_t o = 0; o < here; ++o)
          for (std::int64_t k = 0; k < area; ++k) g[k][o] = w.weight[((first + o) * w.in + i) * area + k];
        if (winograd) {
          double transformed[36][kMostPanel];
          transform_filters(p.m(), matrix, g, transformed);
          for (std::int64_t k = 0; k < p.positions; ++k) {
            float* at = to + k * p.matrix();
            if (p.storage().split)
              split(transformed[k], i, reinterpret_cast<std::uint16_t*>(at));
            else
              std::copy_n(transformed[k], p.panel, at + i * p.panel);
          }
        } else
          for (std::int64_t k = 0; k < area; ++k)
            for (std::int64_t o = 0; o < p.panel; ++o) to[(k * w.in + i) * p.panel + o] = static_cast<float>(g[k][o]);
      }
    }
  });
}

Convolution::~Convolution() = default;
std::size_t Convolution::bytes() const { return packed_->panels.size() + packed_->bias.size(); }
Blocks Convolution::blocks() const { return packed_->blocks(); }
Blocks Convolution::planned_blocks(const ConvolutionWeights& weights, Method method, Isa isa) {
  return Packed::plan(weights, method, isa).blocks();
}
std::int64_t Convolution::out() const { return packed_->out; }
std::int64_t Convolution::in() const { return packed_->in; }

// Memory of one thread, or of a group of threads that share their tiles.
struct Convolution::Packed::Scratch {
  Memory staged;  // of one block; every thread has its own
  Memory values;  // transformed inputs
  Memory products;

  static void reserve(Memory& memory, std::int64_t floats) {
    const std::size_t bytes = static_cast<std::size_t>(floats) * sizeof(float);
    if (memory.size() >= bytes) return;
    memory = Memory();  // before its successor needs the space
    memory = Memory(bytes, false);
  }
};

// A band in units that threads share out: blocks of tiles, or rows of pixels.
struct Convolution::Packed::Work {
  const ConvolutionParams& p;
  std::int64_t block_rows, block_columns;  // number of blocks of the band in each direction; Winograd
  std::int64_t units, group;               // units in all, and units that are worked on together
  std::int64_t all_blocks;                 // of a whole image

  const float* image(std::int64_t i, std::int64_t channels) const {
    return p.x.data + i * p.x.rows * p.x.width * channels;
  }
  std::int64_t band() const { return p.bottom - p.top; }
  // The input map of an image, for a block that is still to be placed.
  StageParams source(std::int64_t i, std::int64_t channels) const {
    StageParams stage{};
    stage.x = image(i, channels);
    stage.first = p.x.first;
    stage.width = p.x.width;
    stage.channels = channels;
    stage.doubling = p.upsample;
    stage.height = p.x.height << stage.doubling;
    stage.shown_width = p.x.width << stage.doubling;
    stage.scale = p.scale ? p.scale + i * channels : nullptr;
    stage.shift = p.scale ? p.shift + i * channels : nullptr;
    stage.silu = p.silu;
    return stage;
  }
};

namespace {

struct Group {
  int thread, of;
  Barrier* barrier;
  void wait() const {
    if (barrier) barrier->wait(of, [] {});
  }
};

}  // namespace

void Convolution::Packed::tiles(const Work& work, Scratch* scratch, Barrier& barrier, int thread, int of) const {
  const ConvolutionParams& p = work.p;
  const Group team = shared ? Group{thread, of, &barrier} : Group{0, 1, nullptr};
  Scratch& own = scratch[thread];
  Scratch& common = shared ? scratch[0] : own;
  const std::int64_t per_block = tile_rows * tile_columns;
  const std::int64_t in_stride = value_floats(work.group * per_block), out_stride = sums(work.group * per_block);
  const int size = m();
  struct Place {
    std::int64_t image, top, left, rows, columns, number;
  };
  const auto place = [&](std::int64_t unit) {
    const std::int64_t of_image = work.block_rows * work.block_columns, image = unit / of_image;
    const std::int64_t row = unit % of_image / work.block_columns, column = unit % work.block_columns;
    const std::int64_t high = size * tile_rows, wide = size * tile_columns;
    const std::int64_t top = p.top + row * high, left = column * wide;
    return Place{image,
                 top,
                 left,
                 std::min(high, p.bottom - top),
                 std::min(wide, p.width - left),
                 top / high * work.block_columns + column};
  };
  for (std::int64_t first = shared ? 0 : thread * work.group; first < work.units;
       first += work.group * (shared ? 1 : of)) {
    const std::int64_t here = std::min(work.group, work.units - first);
    // Tiles beyond the last pixel are computed with the others of their block, and not stored.
    std::int64_t begins[kSharedTiles + 1] = {};
    for (std::int64_t u = 0; u < here; ++u) {
      const Place at = place(first + u);
      begins[u + 1] = begins[u] + pieces(at.rows, size) * pieces(at.columns, size);
    }
    const Range mine = share(here, team.thread, team.of);
    for (std::int64_t u = mine.first; u < mine.last; ++u) {
      const Place at = place(first + u);
      const std::int64_t rows = pieces(at.rows, size), columns = pieces(at.columns, size);
      StageParams stage = work.source(at.image, in);
      stage.top = at.top - p.padding;
      stage.left = at.left - p.padding;
      stage.rows = size * rows + 2;
      stage.columns = size * columns + 2;
      stage.out = own.staged.as<float>();
      stage.ldo = in + kPadding;
      kernels.stage(stage);
      TileParams tiles{rows, columns, in, common.values.as<float>(), in_stride, begins[u], stage.out, stage.ldo};
      kernels.input_transform(size, tiles);
    }
    team.wait();
    // One unit is a position and a share of its panels.
    const std::int64_t all = padded / panel, split = std::min<std::int64_t>(all, shared ? team.of : 1);
    const Range products = share(positions * split, team.thread, team.of);
    for (std::int64_t unit = products.first; unit < products.last; ++unit) {
      const std::int64_t position = unit / split;
      const Range some = share(all, static_cast<int>(unit % split), static_cast<int>(split));
      kernels.tile_product({common.values.as<float>() + position * in_stride, depth, begins[here], depth,
                            panels.as<float>() + position * matrix() + some.first * panel_floats(), panel_floats(),
                            some.last - some.first,
                            common.products.as<float>() + position * out_stride + some.first * panel, padded});
    }
    team.wait();
    for (std::int64_t u = mine.first; u < mine.last; ++u) {
      const Place at = place(first + u);
      const std::int64_t row_stride = p.width * out;
      const std::int64_t corner = ((at.image * work.band() + at.top - p.top) * p.width + at.left) * out;
      TileParams tiles{pieces(at.rows, size),
                       pieces(at.columns, size),
                       padded,
                       common.products.as<float>(),
                       out_stride,
                       begins[u],
                       nullptr,
                       0};
      kernels.output_transform(
          size, tiles,
          {at.rows, at.columns, out, bias.as<float>(), p.residual ? p.residual + corner : nullptr, p.out + corner,
           row_stride, p.moments ? p.moments + (at.image * work.all_blocks + at.number) * 3 * out : nullptr});
    }
    // The next group overwrites the values only after every thread has read them, behind the second wait, and the
    // products only behind its own first wait.
  }
}

void Convolution::Packed::patches(const Work& work, Scratch& scratch, int thread, int of) const {
  const ConvolutionParams& p = work.p;
  const Range mine = share(work.units, thread, of);
  const bool plain = kernel == 1 && stride == 1 && !p.scale && !p.upsample;
  for (std::int64_t unit = mine.first; unit < mine.last; ++unit) {
    const std::int64_t image = unit / work.band(), y = p.top + unit % work.band();
    float* row_products = scratch.products.as<float>();
    for (std::int64_t left = 0; left < p.width; left += kPatchPixels) {
      const std::int64_t columns = std::min(kPatchPixels, p.width - left);
      const float* a = work.image(image, in) + ((y - p.x.first) * p.x.width + left) * in;
      if (!plain) {
        StageParams stage = work.source(image, in);
        stage.top = y * stride - p.padding;
        stage.left = left * stride - p.padding;
        stage.rows = kernel;
        stage.columns = (columns - 1) * stride + kernel;
        stage.out = scratch.staged.as<float>();
        stage.ldo = in;
        kernels.stage(stage);
        float* to = scratch.values.as<float>();
        for (std::int64_t x = 0; x < columns; ++x)
          for (std::int64_t r = 0; r < kernel; ++r, to += kernel * in)
            std::memcpy(to, stage.out + (r * stage.columns + x * stride) * in, kernel * in * sizeof(float));
        a = scratch.values.as<float>();
      }
      kernels.product({a, depth, columns, depth, panels.as<float>(), depth * panel, padded / panel,
                       row_products + left * padded, padded});
    }
    const std::int64_t corner = (image * work.band() + y - p.top) * p.width * out;
    kernels.store(row_products, padded,
                  {1, p.width, out, bias.as<float>(), p.residual ? p.residual + corner : nullptr, p.out + corner,
                   p.width * out, p.moments ? p.moments + (image * work.all_blocks + y) * 3 * out : nullptr});
  }
}

namespace {

void check(const ConvolutionParams& p, const Blocks& blocks, std::int64_t out, std::int64_t lanes, std::int64_t kernel,
           std::int64_t stride) {
  require_least("images", p.images, 0);
  require_least("width", p.width, 1);
  require_range("padding", p.padding, 0, kernel);
  require_range("top", p.top, 0, p.height);
  require_range("bottom", p.bottom, p.top, p.height);
  const std::string whole = "a multiple of " + std::to_string(blocks.rows);
  require(p.top % blocks.rows == 0, "top", p.top, whole);
  require(p.bottom == p.height || p.bottom % blocks.rows == 0, "bottom", p.bottom, whole + ", or the height");
  require(!p.moments || out % lanes == 0, "moments", out,
          "output channels in whole vectors of " + std::to_string(lanes));
  const std::int64_t doubling = p.upsample ? 2 : 1;
  const std::int64_t reach = (p.width - 1) * stride + kernel - p.padding;  // columns that the convolution sees
  require(reach <= p.x.width * doubling + kernel, "width", p.width, "an output of the input's width");
  const std::int64_t first = std::max<std::int64_t>(0, p.top * stride - p.padding) / doubling;
  const std::int64_t last =
      std::min(p.x.height * doubling, (p.bottom - 1) * stride - p.padding + kernel + doubling - 1) / doubling;
  require(p.x.first >= 0 && p.x.first <= first, "first", p.x.first, "at most " + std::to_string(first));
  require(p.x.first + p.x.rows <= p.x.height && (p.top == p.bottom || p.x.first + p.x.rows >= last), "rows", p.x.rows,
          "input rows up to " + std::to_string(last));
}

}  // namespace

void Convolution::run(const ConvolutionParams& p, int threads) const {
  const Packed& own = *packed_;
  require_least("threads", threads, 1);
  check(p, own.blocks(), own.out, own.kernels.lanes, own.kernel, own.stride);
  if (p.images == 0 || p.top == p.bottom) return;
  Packed::Work work{p, 0, 0, 0, 1, own.blocks().count(p.height, p.width)};
  const std::int64_t band = p.bottom - p.top;
  std::int64_t staged = 0, values = 0, products = 0;
  if (own.winograd()) {
    const int m = own.m();
    work.block_rows = pieces(band, m * own.tile_rows);
    work.block_columns = pieces(p.width, m * own.tile_columns);
    work.units = p.images * work.block_rows * work.block_columns;
    const std::int64_t per_block = own.tile_rows * own.tile_columns;
    work.group = own.shared ? std::min(work.units, std::max<std::int64_t>(1, kSharedTiles / per_block)) : 1;
    staged = (m * own.tile_rows + 2) * (m * own.tile_columns + 2) * (own.in + kPadding);
    values = own.positions * own.value_floats(work.group * per_block);
    products = own.positions * own.sums(work.group * per_block);
  } else {
    work.units = p.images * band;
    const std::int64_t columns = std::min(kPatchPixels, p.width);
    staged = own.kernel * ((columns - 1) * own.stride + own.kernel) * own.in;
    values = columns * own.depth;
    products = round_to(p.width, kPatchPixels) * own.padded;
  }
  const std::int64_t useful = own.shared ? own.positions : pieces(work.units, work.group);
  const int team = forked() ? 1 : static_cast<int>(std::min({std::int64_t{threads}, useful, kMaxThreads}));
  // All memory is allocated before the parallel region, which no exception may leave. The calls of a thread follow one
  // another, and new pages cost as much as a small layer: the memory is kept for the next call.
  static thread_local std::vector<Packed::Scratch> kept;
  if (kept.size() < static_cast<std::size_t>(team)) kept.resize(team);
  Packed::Scratch* scratch = kept.data();
  for (int t = 0; t < team; ++t) {
    Packed::Scratch::reserve(scratch[t].staged, staged);
    if (t > 0 && own.shared) continue;
    Packed::Scratch::reserve(scratch[t].values, values);
    Packed::Scratch::reserve(scratch[t].products, products);
  }
  Barrier barrier;
  parallel(team, [&](int thread, int of) {
    if (own.winograd())
      own.tiles(work, scratch, barrier, thread, of);
    else
      own.patches(work, scratch[thread], thread, of);
  });
}

void measure_moments(const MomentsParams& p) {
  require_least("images", p.images, 0);
  require_least("channels", p.channels, 1);
  require(p.blocks.columns >= p.width, "columns", p.blocks.columns, "blocks of whole rows");
  require(p.top % p.blocks.rows == 0, "top", p.top, "a multiple of " + std::to_string(p.blocks.rows));
  const std::int64_t all = p.blocks.count(p.height, p.width), band = p.bottom - p.top;
  for (std::int64_t image = 0; image < p.images; ++image)
    for (std::int64_t top = p.top; top < p.bottom; top += p.blocks.rows) {
      const std::int64_t rows = std::min(p.blocks.rows, p.bottom - top);
      const float* x = p.x + (image * band + top - p.top) * p.width * p.channels;
      float* pivot = p.moments + (image * all + top / p.blocks.rows) * 3 * p.channels;
      float *sum = pivot + p.channels, *square = sum + p.channels;
      std::copy_n(x, p.channels, pivot);
      std::fill_n(sum, 2 * p.channels, 0.0f);
      for (std::int64_t i = 0; i < rows * p.width; ++i, x += p.channels)
        for (std::int64_t c = 0; c < p.channels; ++c) {
          const float centred = x[c] - pivot[c];
          sum[c] += centred;
          square[c] += centred * centred;
        }
    }
}

void normalisation(const NormParams& p) {
  require_least("images", p.images, 0);
  require_least("groups", p.groups, 1);
  require(p.channels % p.groups == 0, "channels", p.channels, "a multiple of the groups");
  const std::int64_t block_columns = pieces(p.width, p.blocks.columns), blocks = p.blocks.count(p.height, p.width);
  const std::int64_t each = p.channels / p.groups;
  std::vector<double> mean(p.channels), spread(p.channels);
  for (std::int64_t image = 0; image < p.images; ++image) {
    std::fill(mean.begin(), mean.end(), 0.0);
    std::fill(spread.begin(), spread.end(), 0.0);
    double seen = 0.0;
    // Joins the blocks' moments by the formula of Chan, Golub and LeVeque (1979).
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t rows = std::min(p.blocks.rows, p.height - b / block_columns * p.blocks.rows);
      const std::int64_t columns = std::min(p.blocks.columns, p.width - b % block_columns * p.blocks.columns);
      const double n = static_cast<double>(rows * columns), all = seen + n;
      const float* at = p.moments + (image * blocks + b) * 3 * p.channels;
      for (std::int64_t c = 0; c < p.channels; ++c) {
        const double drift = at[p.channels + c] / n, own = at[c] + drift;
        const double difference = own - mean[c];
        spread[c] += at[2 * p.channels + c] - n * drift * drift + difference * difference * seen * n / all;
        mean[c] += difference * n / all;
      }
      seen = all;
    }
    for (std::int64_t g = 0; g < p.groups; ++g) {
      double centre = 0.0, variance = 0.0;
      for (std::int64_t c = g * each; c < (g + 1) * each; ++c) centre += mean[c] / each;
      for (std::int64_t c = g * each; c < (g + 1) * each; ++c)
        variance += (spread[c] / seen + (mean[c] - centre) * (mean[c] - centre)) / each;
      const double inverse = 1.0 / std::sqrt(std::max(variance, 0.0) + p.eps);
      for (std::int64_t c = g * each; c < (g + 1) * each; ++c) {
        const double scale = p.gain[c] * inverse;
        p.scale[image * p.channels + c] = static_cast<float>(scale);
        p.shift[image * p.channels + c] = static_cast<float>(p.bias[c] - centre * scale);
      }
    }
  }
}

}  // namespace tamingfast
