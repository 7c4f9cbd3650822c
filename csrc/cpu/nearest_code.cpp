// A register-tiled matrix product scores all codes in float32 by the expanded square |c|^2/2 - z.c, with an error bound
// for each row. Codes whose score lies within the bound of the best are rivals, which are compared by their distances
// in float64. The result is therefore the argmin in float64, at nearly the cost of the product: near-duplicate codes
// cost time, never exactness, and so do large common offsets, which centring on the codebook's mean removes.
#include "nearest_code.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../guard.h"

namespace tamingfast {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kRowsPerChunk = 48;  // a multiple of every row tile; 48 rows of 256 floats stay in L2
constexpr int kMaxRivals = 8;
constexpr int kMaxThreads = 1024;

struct Codebook {
  const float* rows;  // (k, d), as given
  std::int64_t k;
  std::int64_t d;
  std::vector<float> mean;        // (d,)
  std::vector<float> panels;      // (k / width, d, width): mean - code, a panel of `width` codes side by side
  std::vector<float> half_norms;  // (k,) |code - mean|^2 / 2; infinity in the padding of the last panel
  double max_norm = 0.0;          // the largest |code - mean|
};

struct Row {
  float best;
  float margin;  // a code whose score exceeds best + margin cannot be the nearest
  int rivals;
  std::int64_t rival[kMaxRivals];
  float score[kMaxRivals];
  std::int64_t winner;  // the nearest of the rivals compared in float64 so far, or -1
  double winner_distance;
};

struct Scratch {
  std::vector<float> z;   // (kRowsPerChunk, d), centred
  std::vector<Row> rows;  // (kRowsPerChunk,)
};

// Sets centred[i * stride] = sign * (values[i] - mean[i]) and returns the squared norm.
double center(const float* values, const std::vector<float>& mean, float sign, float* centred, std::int64_t stride) {
  const std::int64_t d = static_cast<std::int64_t>(mean.size());
  double norm = 0.0;
#pragma omp simd reduction(+ : norm)
  for (std::int64_t i = 0; i < d; ++i) {
    const float difference = values[i] - mean[i];
    centred[i * stride] = sign * difference;
    norm += static_cast<double>(difference) * difference;
  }
  return norm;
}

Codebook pack(const NearestCodeParams& p, int width, [[maybe_unused]] int threads) {
  const std::int64_t panels = (p.k + width - 1) / width;
  Codebook book{p.codebook, p.k, p.d, {}, {}, {}};
  std::vector<double> sum(p.d, 0.0);
  for (std::int64_t j = 0; j < p.k; ++j)
    for (std::int64_t i = 0; i < p.d; ++i) sum[i] += p.codebook[j * p.d + i];
  book.mean.resize(p.d);
  for (std::int64_t i = 0; i < p.d; ++i) {
    if (!std::isfinite(sum[i])) refuse("codebook", "NaN or infinity in column " + std::to_string(i), "finite numbers");
    book.mean[i] = static_cast<float>(sum[i] / p.k);
  }
  book.panels.assign(panels * width * p.d, 0.0f);
  book.half_norms.assign(panels * width, kInfinity);
  double largest = 0.0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : largest) if (threads > 1)
  for (std::int64_t j = 0; j < p.k; ++j) {
    float* panel = book.panels.data() + j / width * width * p.d + j % width;
    const double norm = center(p.codebook + j * p.d, book.mean, -1.0f, panel, width);
    book.half_norms[j] = static_cast<float>(0.5 * norm);
    largest = std::max(largest, norm);
  }
  book.max_norm = std::sqrt(largest);
  return book;
}

// Four partial sums in plain float64, so that the value does not depend on the instruction set of the scan.
double exact_distance(const float* z, const float* code, std::int64_t d) {
  double sum[4] = {0.0, 0.0, 0.0, 0.0};
  std::int64_t i = 0;
  for (; i + 4 <= d; i += 4)
    for (int lane = 0; lane < 4; ++lane) {
      const double difference = static_cast<double>(z[i + lane]) - code[i + lane];
      sum[lane] += difference * difference;
    }
  for (; i < d; ++i) {
    const double difference = static_cast<double>(z[i]) - code[i];
    sum[0] += difference * difference;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Twice the largest error of any code's score. With u = 2^-24, the error of centring, the product of length d in any
// order, the half norm and their sum is at most (d + 8) u (|z| max|c| + max|c|^2) (Higham, Accuracy and Stability of
// Numerical Algorithms, section 3.1); the last term covers underflow. Infinity if a score might overflow.
float score_margin(double z_norm, const Codebook& book) {
  const double size = z_norm * book.max_norm + book.max_norm * book.max_norm;
  if (!(size < 1e37)) return kInfinity;
  const double terms = static_cast<double>(book.d + 8);
  return static_cast<float>(2.0 * terms * (0x1p-24 * size + std::numeric_limits<float>::min()));
}

// Returns false if the row holds NaN or an infinity.
bool begin_row(const float* z, const Codebook& book, float* centred, Row& row) {
  const double norm = center(z, book.mean, 1.0f, centred, 1);
  row.best = kInfinity;
  row.margin = score_margin(std::sqrt(norm), book);
  row.rivals = 0;
  row.winner = -1;
  row.winner_distance = std::numeric_limits<double>::infinity();
  // Subtracting the mean can overflow finite values, so a norm that is not finite does not prove that z is not.
  return std::isfinite(norm) || std::all_of(z, z + book.d, [](float value) { return std::isfinite(value); });
}

// Compares the rivals in float64 and keeps the nearest.
void settle(const float* z, const Codebook& book, Row& row) {
  for (int r = 0; r < row.rivals; ++r) {
    const double distance = exact_distance(z, book.rows + row.rival[r] * book.d, book.d);
    // Rivals are in order of their indices, so a strict comparison gives ties to the lowest.
    if (row.winner < 0 || distance < row.winner_distance) {
      row.winner = row.rival[r];
      row.winner_distance = distance;
    }
  }
  row.rivals = 0;
}

// Adds the rivals among codes first to first + count - 1. Called only if one of them may be the nearest.
void admit(const float* z, const Codebook& book, std::int64_t first, int count, const float* scores, Row& row) {
  float best = row.best;
  for (int j = 0; j < count; ++j) best = std::min(best, scores[j]);
  row.best = best;
  const float limit = best + row.margin;
  int kept = 0;
  for (int r = 0; r < row.rivals; ++r) {
    if (row.score[r] > limit) continue;
    row.rival[kept] = row.rival[r];
    row.score[kept++] = row.score[r];
  }
  row.rivals = kept;
  for (int j = 0; j < count; ++j) {
    if (scores[j] > limit) continue;  // written so that NaN, from an overflow, stays a rival
    if (row.rivals == kMaxRivals) settle(z, book, row);
    row.rival[row.rivals] = first + j;
    row.score[row.rivals++] = scores[j];
  }
}

// Scores Rows vectors against one panel of Width codes, with sums kept in registers over the whole of d. Uses the
// compiler's vector extension, because automatic vectorisation spills such tiles.
template <int Rows, int Width, int Lanes>
[[gnu::always_inline]] inline void score_tile(const float* z, std::int64_t d, const float* panel,
                                              const float* half_norms, float* scores) {
  typedef float Vector __attribute__((vector_size(Lanes * sizeof(float)), aligned(alignof(float)), may_alias));
  constexpr int kVectors = Width / Lanes;
  Vector sum[Rows][kVectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = *reinterpret_cast<const Vector*>(half_norms + v * Lanes);
  for (std::int64_t i = 0; i < d; ++i) {
    Vector code[kVectors];
    for (int v = 0; v < kVectors; ++v) code[v] = *reinterpret_cast<const Vector*>(panel + i * Width + v * Lanes);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] += z[r * d + i] * code[v];
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(scores + r * Width + v * Lanes) = sum[r][v];
}

// Scans every panel for one chunk of at most kRowsPerChunk rows; a panel stays in L1 while all rows read it. The
// scratch always holds a full chunk, so the last tile may score rows beyond `count`, which are ignored.
template <int Rows, int Width, int Lanes>
[[gnu::always_inline]] inline void scan_chunk(const float* z, int count, const Codebook& book, Scratch& scratch) {
  float scores[Rows * Width];
  for (std::int64_t first = 0; first < book.k; first += Width) {
    const int codes = static_cast<int>(std::min<std::int64_t>(Width, book.k - first));
    for (int begin = 0; begin < count; begin += Rows) {
      score_tile<Rows, Width, Lanes>(scratch.z.data() + begin * book.d, book.d, book.panels.data() + first * book.d,
                                     book.half_norms.data() + first, scores);
      for (int r = 0; r < std::min(Rows, count - begin); ++r) {
        Row& row = scratch.rows[begin + r];
        const float limit = row.best + row.margin;
        int near = 0;
        for (int j = 0; j < Width; ++j) near |= !(scores[r * Width + j] > limit);
        if (near) admit(z + (begin + r) * book.d, book, first, codes, scores + r * Width, row);
      }
    }
  }
}

using ScanChunk = void (*)(const float* z, int count, const Codebook& book, Scratch& scratch);

struct Path {
  int width;
  ScanChunk scan;
};

void scan_generic(const float* z, int count, const Codebook& book, Scratch& scratch) {
  scan_chunk<4, 8, 4>(z, count, book, scratch);
}

#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] void scan_avx2(const float* z, int count, const Codebook& book, Scratch& scratch) {
  scan_chunk<6, 16, 8>(z, count, book, scratch);
}

[[gnu::target("avx2,fma,avx512f")]] void scan_avx512(const float* z, int count, const Codebook& book,
                                                     Scratch& scratch) {
  scan_chunk<8, 48, 16>(z, count, book, scratch);
}
#endif

Path path_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512 || isa == Isa::avx512bf16) return {48, scan_avx512};
  if (isa == Isa::avx2) return {16, scan_avx2};
#endif
  (void)isa;
  return {8, scan_generic};
}

}  // namespace

void nearest_code(const NearestCodeParams& p, Isa isa) {
  const Path path = path_for(isa);
  const std::int64_t chunks = (p.n + kRowsPerChunk - 1) / kRowsPerChunk;
  const std::int64_t useful = std::min<std::int64_t>(std::max<std::int64_t>(chunks, 1), kMaxThreads);
  const int threads = static_cast<int>(std::min<std::int64_t>(p.threads, useful));
  const Codebook book = pack(p, path.width, threads);
  // All memory is allocated before the parallel region, which no exception may leave.
  std::vector<Scratch> scratch(threads);
  for (Scratch& own : scratch) {
    own.z.assign(kRowsPerChunk * p.d, 0.0f);
    own.rows.resize(kRowsPerChunk);
  }
  std::atomic<bool> finite{true};

#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int thread = 0; thread < threads; ++thread) {
    Scratch& own = scratch[thread];
    for (std::int64_t chunk = thread; chunk < chunks; chunk += threads) {
      const std::int64_t first = chunk * kRowsPerChunk;
      const int count = static_cast<int>(std::min<std::int64_t>(kRowsPerChunk, p.n - first));
      const float* z = p.z + first * p.d;
      for (int r = 0; r < count; ++r)
        if (!begin_row(z + r * p.d, book, own.z.data() + r * p.d, own.rows[r])) finite = false;
      if (!finite) break;
      path.scan(z, count, book, own);
      for (int r = 0; r < count; ++r) {
        Row& row = own.rows[r];
        if (row.winner < 0 && row.rivals == 1) {
          p.out[first + r] = row.rival[0];
          continue;
        }
        settle(z + r * p.d, book, row);
        p.out[first + r] = row.winner;
      }
    }
  }
  if (!finite) refuse("z", "NaN or infinity", "finite numbers");
}

}  // namespace tamingfast
