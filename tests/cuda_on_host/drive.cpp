// Runs every kernel of csrc/cuda on small made-up data and prints a digest of all memory after each case:
//   drive ORDER [DTYPE...] [CASE...]
// ORDER is the seed of a random order of threads, or `in-order`; without dtypes or cases, all are taken. The last line
// has the addresses of the kernels that were launched, relative to that of `main`.
//
// Grids are small: a thread costs ThreadSanitizer half a millisecond.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace {

using namespace tamingfast;        // NOLINT
using namespace tamingfast::cuda;  // NOLINT

const Queue kQueue{0, nullptr};

// The arrays of a case.
class Arrays {
 public:
  explicit Arrays(Dtype dtype) : dtype(dtype) {}

  template <class T>
  T* of(const std::vector<T>& values) {
    arrays_.emplace_back((values.size() * sizeof(T) + sizeof(uint4) - 1) / sizeof(uint4));
    memcpy(static_cast<void*>(arrays_.back().data()), values.data(), values.size() * sizeof(T));
    return reinterpret_cast<T*>(arrays_.back().data());
  }
  template <class T>
  T* filled(std::size_t count, T value) {
    return of(std::vector<T>(count, value));
  }
  float* floats(std::size_t count) { return of(random(count)); }
  // Of the case's dtype.
  void* numbers(std::size_t count) {
    void* made = nullptr;
    for_dtype(dtype, [&](auto sample) {
      using T = decltype(sample);
      std::vector<T> converted;
      for (const float value : random(count)) converted.push_back(from_float<T>(value));
      made = of(converted);
    });
    return made;
  }
  // FNV-1a of all arrays, once no kernel uses them any longer.
  std::uint64_t digest() const {
    cuda_on_host::synchronize();
    std::uint64_t digest = 0xcbf29ce484222325u;
    for (const auto& array : arrays_)
      for (const uint4& words : array)
        for (const unsigned word : {words.x, words.y, words.z, words.w}) digest = (digest ^ word) * 0x100000001b3u;
    return digest;
  }

  const Dtype dtype;

 private:
  std::vector<float> random(std::size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = static_cast<float>(bits_() >> 8) * 0x1p-23f - 1.0f;
    return values;
  }

  std::mt19937 bits_;
  std::vector<std::vector<uint4>> arrays_;
};

struct Layer {
  int rows, inner, columns;
  const void* x;
  void* out;
  Epilogue epilogue;
  bool norm;
};

void run(const Layer& layer, Arrays& arrays) {
  LinearParams p{};
  p.rows = layer.rows;
  p.inner = layer.inner;
  p.columns = layer.columns;
  p.x = layer.x;
  p.ldx = layer.inner;
  if (layer.norm) p.gain = arrays.floats(layer.inner), p.shift = arrays.floats(layer.inner);
  p.epsilon = 1e-5f;
  p.weight = arrays.numbers(static_cast<std::size_t>(layer.columns) * layer.inner);
  p.bias = arrays.floats(layer.columns);
  p.epilogue = layer.epilogue;
  p.out = layer.out;
  p.ldo = layer.columns;
  linear(arrays.dtype, p, kQueue);
}

void linear_layers(Arrays& arrays) {
  constexpr int kColumns = 9, kInner = 1160;  // more than a block computes, and covers at once
  int turn = 0;
  for (const int rows : {1, 2, 3, 8})
    for (const bool norm : {false, true}) {
      const Epilogue epilogue = static_cast<Epilogue>(turn++ % 4);
      const bool adds = epilogue == Epilogue::add || epilogue == Epilogue::store_float;
      void* out = adds ? arrays.floats(rows * kColumns) : arrays.numbers(rows * kColumns);
      const void* x = norm ? arrays.floats(rows * kInner) : arrays.numbers(rows * kInner);
      run({rows, kInner, kColumns, x, out, epilogue, norm}, arrays);
    }
}

// The cache of one layer, and what its attention needs besides.
struct Cache {
  static constexpr int kCapacity = 192, kSplits = 3;
  int rows, heads, width;
  AttentionParams p{};

  Cache(int rows_, int heads_, int width_, Arrays& arrays) : rows(rows_), heads(heads_), width(width_) {
    std::vector<std::int32_t> slots(rows);
    for (int row = 0; row < rows; ++row) slots[row] = rows - 1 - row;
    p.rows = rows;
    p.heads = heads;
    p.width = width;
    p.stride = (width + 7) / 8 * 8;
    p.capacity = kCapacity;
    p.splits = kSplits;
    p.ldq = 3 * heads * width;
    p.slot = arrays.of(slots);
    p.keys = arrays.numbers(static_cast<std::size_t>(rows) * heads * kCapacity * p.stride);
    p.values = arrays.numbers(static_cast<std::size_t>(rows) * heads * kCapacity * p.stride);
    p.partial = arrays.filled<float>(static_cast<std::size_t>(rows) * heads * kSplits * (p.stride + 2), NAN);
    p.arrived = arrays.filled<std::uint32_t>(rows * heads, 0);
    p.ldo = heads * width;
  }
  AttentionParams at(const void* qkv, const std::int32_t* position, void* out) const {
    AttentionParams params = p;
    params.append = true;
    params.qkv = qkv;
    params.position = params.last = position;
    params.out = out;
    return params;
  }
};

// The counters of arrivals and the partial results are used again by the second launch.
void attention_of_rows(Arrays& arrays) {
  constexpr int kRows = 1, kHeads = 1;
  for (const int width : {12, 72, 136}) {
    const Cache cache(kRows, kHeads, width, arrays);
    const void* qkv = arrays.numbers(kRows * 3 * kHeads * width);
    for (const int step : {0, 1}) {
      const auto* position = arrays.of(std::vector<std::int32_t>{150 + step});
      attention(arrays.dtype, cache.at(qkv, position, arrays.numbers(kRows * kHeads * width)), kQueue);
    }
  }
}

// All rows are of one sequence, and all are in the cache before any attends.
void attention_of_prefix(Arrays& arrays) {
  constexpr int kRows = 3, kHeads = 1, kWidth = 24;
  Cache cache(kRows, kHeads, kWidth, arrays);
  cache.p.slot = arrays.filled<std::int32_t>(kRows, 1);
  const auto* position = arrays.of(std::vector<std::int32_t>{126, 127, 128});
  const void* qkv = arrays.numbers(kRows * 3 * kHeads * kWidth);
  AttentionParams p = cache.at(qkv, position, arrays.numbers(kRows * kHeads * kWidth));
  p.append = false;
  p.last = arrays.filled<std::int32_t>(kRows, 128);
  append(arrays.dtype, p, kQueue);
  attention(arrays.dtype, p, kQueue);
}

void rows_of_large_batches(Arrays& arrays) {
  constexpr int kRows = 2;
  for (const int width : {5, 304}) {  // not whole vectors, and more than a block has threads
    AddNormParams norm{};
    norm.rows = kRows;
    norm.width = width;
    norm.x = arrays.floats(kRows * width);
    norm.y = width == 5 ? nullptr : arrays.numbers(kRows * width);
    norm.bias = arrays.floats(width);
    norm.gain = arrays.floats(width);
    norm.shift = arrays.floats(width);
    norm.epsilon = 1e-5f;
    norm.out = arrays.numbers(kRows * width);
    norm.ldx = norm.ldy = norm.ldo = width;
    add_norm(arrays.dtype, norm, kQueue);
    GeluParams activation{};
    activation.rows = kRows;
    activation.width = width;
    activation.x = norm.out;
    activation.ldx = width;
    activation.bias = norm.bias;
    bias_gelu(arrays.dtype, activation, kQueue);
  }
}

// Sequences of three tokens, of which the second row wants only the last.
struct Sequences {
  static constexpr int kRows = 2, kLength = 3;
  ChooseParams p{};

  Sequences(int vocab, int width, const Choice& choice, Arrays& arrays) {
    Options options;
    memset(static_cast<void*>(&options), 0, sizeof options);  // the padding too, which is part of the digest
    options.choice.greedy = choice.greedy;
    options.choice.temperature = choice.temperature;
    options.choice.top_k = choice.top_k;
    options.choice.top_p = choice.top_p;
    options.choices = vocab;
    p.rows = kRows;
    p.vocab = vocab;
    p.ldl = vocab;
    p.options = arrays.of(std::vector<Options>{options});
    p.images = arrays.of(std::vector<std::int64_t>{4, 7});
    p.places = arrays.filled<std::int64_t>(2 * kLength, 1);
    p.wanted = arrays.of(std::vector<std::uint8_t>{0, 1, 1, 0, 0, 1});
    p.sequence = arrays.filled<std::int64_t>(kRows * kLength, 2);
    p.length = kLength;
    p.position = arrays.filled<std::int32_t>(kRows, 0);
    p.tok_emb = arrays.floats(vocab * width);
    p.pos_emb = arrays.floats(kLength * width);
    p.positions = kLength;
    p.width = width;
    p.x = arrays.floats(kRows * width);
    p.ldx = width;
    p.errors = arrays.filled<std::int32_t>(kRows, 0);
  }
};

void choices(Arrays& arrays) {
  Choice plain, greedy, filtered;
  greedy.greedy = true;
  filtered.top_k = 100;
  filtered.top_p = 0.9;
  constexpr int kVocab = 300, kLogits = Sequences::kRows * kVocab;
  for (const Choice& choice : {plain, greedy, filtered}) {
    Sequences sequences(kVocab, 8, choice, arrays);
    sequences.p.logits = arrays.filled(kLogits, 0.0f);  // zero in every dtype; the nucleus is a part of equals
    choose(arrays.dtype, sequences.p, kQueue);
    sequences.p.logits = arrays.numbers(kLogits);
    choose(arrays.dtype, sequences.p, kQueue);
  }
}

// Larger vocabularies have no scores in shared memory.
void choices_of_many(Arrays& arrays) {
  constexpr int kVocab = 16500;
  Choice filtered;
  filtered.top_k = 100;
  filtered.top_p = 0.9;
  Sequences sequences(kVocab, 8, filtered, arrays);
  sequences.p.logits = arrays.numbers(Sequences::kRows * kVocab);
  choose(arrays.dtype, sequences.p, kQueue);
}

// Two tokens of a transformer of one layer, whose kernels follow one another as in the engine.
void decoding(Arrays& arrays) {
  constexpr int kRows = Sequences::kRows, kHeads = 1, kWidth = 8, kEmbd = kHeads * kWidth, kVocab = 8;
  Choice choice;
  choice.top_k = 5;
  Sequences sequences(kVocab, kEmbd, choice, arrays);
  Cache cache(kRows, kHeads, kWidth, arrays);
  cache.p.splits = 1;
  float *x = sequences.p.x, *logits = arrays.floats(kRows * kVocab);
  void *qkv = arrays.numbers(kRows * 3 * kEmbd), *attended = arrays.numbers(kRows * kEmbd);
  void* inner = arrays.numbers(kRows * 4 * kEmbd);
  sequences.p.logits = logits;
  for (int token = 0; token < 2; ++token) {
    run({kRows, kEmbd, 3 * kEmbd, x, qkv, Epilogue::store, true}, arrays);
    attention(arrays.dtype, cache.at(qkv, sequences.p.position, attended), kQueue);
    run({kRows, kEmbd, kEmbd, attended, x, Epilogue::add, false}, arrays);
    run({kRows, kEmbd, 4 * kEmbd, x, inner, Epilogue::gelu, true}, arrays);
    run({kRows, 4 * kEmbd, kEmbd, inner, x, Epilogue::add, false}, arrays);
    run({kRows, kEmbd, kVocab, x, logits, Epilogue::store_float, true}, arrays);
    choose(Dtype::float32, sequences.p, kQueue);
  }
}

using Case = void(Arrays&);
const std::map<std::string, Case*> kCases{
    {"linear", linear_layers},
    {"attention", attention_of_rows},
    {"prefix", attention_of_prefix},
    {"rows", rows_of_large_batches},
    {"choose", choices},
    {"choose-of-many", choices_of_many},
    {"decoding", decoding},
};
const std::map<std::string, Dtype> kDtypes{
    {"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16}, {"float16", Dtype::float16}};

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (words.empty()) return 2;
  if (words[0] != "in-order") cuda_on_host::run_at_random(std::stoul(words[0]));
  std::map<std::string, Case*> cases;
  std::map<std::string, Dtype> dtypes;
  for (auto word = words.begin() + 1; word != words.end(); ++word)
    if (const auto dtype = kDtypes.find(*word); dtype != kDtypes.end())
      dtypes.insert(*dtype);
    else
      cases[*word] = kCases.at(*word);
  for (const auto& [name, function] : cases.empty() ? kCases : cases)
    for (const auto& [dtype_name, dtype] : dtypes.empty() ? kDtypes : dtypes) {
      Arrays arrays(dtype);
      function(arrays);
      std::printf("%s %s %016llx\n", name.c_str(), dtype_name.c_str(),
                  static_cast<unsigned long long>(arrays.digest()));
    }
  std::printf("launched");
  for (const void* kernel : cuda_on_host::launched())
    std::printf(" %td", static_cast<const char*>(kernel) - reinterpret_cast<const char*>(&main));
  std::printf("\n");
  return 0;
}
