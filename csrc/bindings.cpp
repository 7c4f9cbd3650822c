// Python bindings of tamingfast._C. Tensors come as addresses and sizes, so that one binary serves every torch version;
// tamingfast/ops is the only caller and owns the checks of dtype, device and contiguity.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/limits.h"
#include "cpu/nearest_code.h"
#include "engine.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef TAMINGFAST_CUDA
#include "cuda/bindings.h"
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

// --- the GPT engine --------------------------------------------------------------------------------------------------

using tamingfast::Engine;
using Addresses = std::map<std::string, std::uintptr_t>;

const float* parameter(const Addresses& weights, const std::string& name) {
  const auto found = weights.find(name);
  if (found == weights.end()) throw std::invalid_argument("weights: '" + name + "' is missing");
  if (found->second == 0 || found->second % alignof(float) != 0)
    throw std::invalid_argument("weights: '" + name + "' is null or no address of float32");
  return reinterpret_cast<const float*>(found->second);
}

tamingfast::GPTWeights read_weights(const Addresses& from, std::int64_t layers) {
  const auto at = [&](const std::string& name) { return parameter(from, name); };
  const auto linear = [&](const std::string& name) {
    return tamingfast::Linear{at(name + ".weight"), at(name + ".bias")};
  };
  tamingfast::GPTWeights weights{at("tok_emb.weight"), at("pos_emb"),   {},
                                 at("ln_f.weight"),    at("ln_f.bias"), {at("head.weight"), nullptr}};
  for (std::int64_t i = 0; i < layers; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    weights.layers.push_back({at(block + "ln1.weight"), at(block + "ln1.bias"), at(block + "ln2.weight"),
                              at(block + "ln2.bias"), linear(block + "attn.query"), linear(block + "attn.key"),
                              linear(block + "attn.value"), linear(block + "attn.proj"), linear(block + "mlp.0"),
                              linear(block + "mlp.2")});
  }
  return weights;
}

tamingfast::Geometry read_geometry(const std::map<std::string, std::int64_t>& from) {
  const auto at = [&](const char* name) {
    const auto found = from.find(name);
    if (found == from.end()) throw std::invalid_argument(std::string("geometry: '") + name + "' is missing");
    return found->second;
  };
  return {at("vocab_size"), at("block_size"), at("n_layer"), at("n_head"), at("n_embd"), at("n_unmasked")};
}

template <class Value>
Value named(const char* argument, const std::string& got, const std::map<std::string, Value>& values) {
  const auto found = values.find(got);
  if (found != values.end()) return found->second;
  std::string known;
  for (const auto& entry : values) known += (known.empty() ? "" : ", ") + entry.first;
  throw std::invalid_argument(std::string(argument) + ": got '" + got + "', expected one of " + known);
}

const std::map<std::string, tamingfast::Logits> kLogits{
    {"none", tamingfast::Logits::none}, {"last", tamingfast::Logits::last}, {"all", tamingfast::Logits::all}};
const std::map<std::string, tamingfast::Dtype> kDtypes{{"float32", tamingfast::Dtype::float32},
                                                       {"bfloat16", tamingfast::Dtype::bfloat16},
                                                       {"int8", tamingfast::Dtype::int8}};

// What Python holds: an engine that one thread at a time may use, and that may be closed.
class GPTEngine {
 public:
  GPTEngine(const Addresses& weights, const std::map<std::string, std::int64_t>& geometry, const std::string& dtype,
            int threads, const std::string& isa) {
    const tamingfast::Geometry g = read_geometry(geometry);
    check_size("n_layer", g.n_layer, 0);
    if (g.n_layer > static_cast<std::int64_t>(weights.size()))
      throw std::invalid_argument("geometry: got n_layer=" + std::to_string(g.n_layer) +
                                  ", expected at most as many layers as there are weights");
    const tamingfast::GPTWeights read = read_weights(weights, g.n_layer);
    const tamingfast::Dtype type = named("dtype", dtype, kDtypes);
    const tamingfast::Isa chosen = tamingfast::parse_isa(isa);
    py::gil_scoped_release unlocked;
    engine_ = std::make_unique<Engine>(read, g, type, threads, chosen);
  }

  // The work runs without the GIL and under the engine's lock, which is taken without the GIL too: its holder may need
  // the GIL to go on.
  template <class Work>
  auto use(Work&& work) {
    if (owner_.load() == std::this_thread::get_id())
      throw std::runtime_error("the engine is working: a callback cannot use it");
    py::gil_scoped_release unlocked;
    const Turn turn(*this);
    if (!engine_) throw std::invalid_argument("the engine is closed");
    return work(*engine_);
  }

  void close() {
    if (owner_.load() == std::this_thread::get_id())
      throw std::runtime_error("the engine is working: a callback cannot close it");
    py::gil_scoped_release unlocked;
    const Turn turn(*this);
    engine_.reset();
  }

 private:
  struct Turn {
    explicit Turn(GPTEngine& engine) : engine_(engine), lock_(engine.mutex_) {
      engine_.owner_ = std::this_thread::get_id();
    }
    ~Turn() { engine_.owner_ = std::thread::id(); }
    GPTEngine& engine_;
    std::lock_guard<std::mutex> lock_;
  };

  std::unique_ptr<Engine> engine_;
  std::mutex mutex_;
  std::atomic<std::thread::id> owner_{};
};

// Whether a signal's handler raised, as Ctrl-C's does; the exception stays set for the caller.
bool interrupted() {
  py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

// Runs the work and, when it was interrupted, raises what the signal's handler raised.
template <class Work>
void interruptible(GPTEngine& engine, Work&& work) {
  bool stopped = false;
  engine.use([&](Engine& native) {
    try {
      work(native);
    } catch (const tamingfast::Interrupted&) {
      stopped = true;
    }
  });
  if (stopped) throw py::error_already_set();
}

using PyFeed = std::tuple<std::int64_t, std::int64_t, std::vector<std::int64_t>>;

void step(GPTEngine& engine, const std::vector<PyFeed>& items, const std::string& logits, std::uintptr_t out,
          std::int64_t rows) {
  const tamingfast::Logits wanted = named("logits", logits, kLogits);
  std::vector<tamingfast::Feed> feeds;
  for (const auto& [slot, start, tokens] : items)
    feeds.push_back({slot, start, tokens.data(), static_cast<std::int64_t>(tokens.size())});
  interruptible(engine, [&](Engine& native) {
    const std::int64_t needed = native.logits_rows(feeds, wanted);
    if (rows != needed)
      throw std::invalid_argument("rows: got " + std::to_string(rows) + ", expected " + std::to_string(needed) +
                                  " rows of logits");
    native.step(feeds, wanted, check_array<float>("out", out, needed, native.geometry().vocab_size), interrupted);
  });
}

void check_length(const char* name, std::size_t got, std::int64_t expected) {
  if (static_cast<std::int64_t>(got) != expected)
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(got) + " values, expected " +
                                std::to_string(expected));
}

void decode(GPTEngine& engine, const std::vector<std::int64_t>& slots, std::uintptr_t sequences, std::int64_t length,
            std::int64_t fed, const std::vector<std::int64_t>& steps, const std::vector<std::uint8_t>& wanted,
            const std::vector<std::uint32_t>& rows, const std::vector<std::uint32_t>& columns,
            const std::vector<std::uint32_t>& images, std::int64_t choices, bool greedy, double temperature,
            std::int64_t top_k, double top_p, std::uint64_t seed, const Engine::Progress& progress, std::int64_t every,
            std::int64_t before) {
  const std::int64_t batch = static_cast<std::int64_t>(slots.size()), count = static_cast<std::int64_t>(steps.size());
  check_size("length", length, 1);
  check_length("wanted", wanted.size(), batch * count);
  check_length("rows", rows.size(), count);
  check_length("columns", columns.size(), count);
  check_length("images", images.size(), batch);
  check_size("top_k", top_k, 0);
  check_size("every", every, 1);
  check_size("before", before, 0);
  if (!(temperature > 0.0 && temperature <= std::numeric_limits<float>::max()))
    throw std::invalid_argument("temperature: got " + std::to_string(temperature) + ", expected a positive number");
  if (!(top_p > 0.0 && top_p <= 1.0))
    throw std::invalid_argument("top_p: got " + std::to_string(top_p) + ", expected above 0 and at most 1");
  const tamingfast::Decoding decoding{batch,
                                      slots.data(),
                                      check_array<std::int64_t>("sequences", sequences, batch, length),
                                      length,
                                      fed,
                                      count,
                                      steps.data(),
                                      wanted.data(),
                                      rows.data(),
                                      columns.data(),
                                      images.data(),
                                      choices,
                                      {greedy, static_cast<float>(temperature), top_k, top_p, seed}};
  // The Python function stays referenced, never copied, while the GIL is away.
  const auto report = [&](std::int64_t done) {
    if (progress && (before + done) % every == 0) progress(before + done);
  };
  interruptible(engine, [&](Engine& native) { native.decode(decoding, interrupted, report); });
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
  module.doc() = "Native kernels of tamingfast; call them through tamingfast.ops.";
  module.def(
      "nearest_code", &nearest_code, py::arg("z"), py::arg("n"), py::arg("codebook"), py::arg("k"), py::arg("d"),
      py::arg("out"), py::arg("threads"), py::arg("isa") = "auto",
      "Index of the nearest row of codebook (k, d) for each row of z (n, d), both contiguous float32 at the given "
      "addresses, written to out (n,) int64. ValueError names the argument that is wrong.");
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const tamingfast::OutOfMemory& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    }
  });
  py::class_<GPTEngine>(module, "GPTEngine",
                        "A GPT with a key/value cache, decoding on the CPU; use it through tamingfast.engines.cpu.")
      .def(py::init<const Addresses&, const std::map<std::string, std::int64_t>&, const std::string&, int,
                    const std::string&>(),
           py::arg("weights"), py::arg("geometry"), py::arg("dtype"), py::arg("threads"), py::arg("isa") = "auto",
           "weights: addresses of contiguous float32 parameters by their names in the state dict, read here and not "
           "kept; geometry: vocab_size, block_size, n_layer, n_head, n_embd, n_unmasked.")
      .def(
          "reserve",
          [](GPTEngine& e, std::int64_t slots, std::int64_t length) {
            e.use([&](Engine& native) { native.reserve(slots, length); });
          },
          py::arg("slots"), py::arg("length"),
          "Makes the cache anew for that many sequences of `length` positions, all empty. MemoryError with the bytes.")
      .def(
          "length",
          [](GPTEngine& e, std::int64_t slot) { return e.use([&](Engine& native) { return native.length(slot); }); },
          py::arg("slot"), "How many positions of the slot are valid.")
      .def(
          "truncate",
          [](GPTEngine& e, std::int64_t slot, std::int64_t length) {
            e.use([&](Engine& native) { native.truncate(slot, length); });
          },
          py::arg("slot"), py::arg("length"), "Forgets the positions from `length` on.")
      .def(
          "copy",
          [](GPTEngine& e, std::int64_t source, std::int64_t target, std::int64_t length) {
            e.use([&](Engine& native) { native.copy(source, target, length); });
          },
          py::arg("source"), py::arg("target"), py::arg("length"),
          "Makes the slot `target` hold the first `length` positions of `source`.")
      .def("step", &step, py::arg("items"), py::arg("logits"), py::arg("out"), py::arg("rows"),
           "Feeds a list of (slot, start, tokens); logits 'none', 'last' or 'all' go to float32 (rows, vocab_size).")
      .def(
          "decode", &decode, py::arg("slots"), py::arg("sequences"), py::arg("length"), py::arg("fed"),
          py::arg("steps"), py::arg("wanted"), py::arg("rows"), py::arg("columns"), py::arg("images"),
          py::arg("choices"), py::arg("greedy"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
          py::arg("seed"), py::arg("progress") = py::none(), py::arg("every") = 1, py::arg("before") = 0,
          "Decodes positions `steps` of the sequences int64 (batch, length) in place; see engine.h. top_k 0 keeps all.")
      .def(
          "set_threads", [](GPTEngine& e, int threads) { e.use([&](Engine& native) { native.set_threads(threads); }); },
          py::arg("threads"))
      .def(
          "info",
          [](GPTEngine& e) {
            struct {
              std::size_t weights, cache;
              std::int64_t slots, capacity;
              int threads;
            } facts;
            e.use(
                [&](Engine& n) { facts = {n.weight_bytes(), n.cache_bytes(), n.slots(), n.capacity(), n.threads()}; });
            py::dict info;
            info["weight_bytes"] = facts.weights;
            info["cache_bytes"] = facts.cache;
            info["slots"] = facts.slots;
            info["capacity"] = facts.capacity;
            info["threads"] = facts.threads;
            return info;
          },
          "dict: weight_bytes (read for every token), cache_bytes, slots, capacity (positions of a slot), threads.")
      .def("close", &GPTEngine::close, "Frees the memory; every later call raises ValueError.");
  module.def(
      "philox4x32",
      [](const std::array<std::uint32_t, 4>& c, const std::array<std::uint32_t, 2>& key) {
        const tamingfast::Words words = tamingfast::philox4x32({{c[0], c[1], c[2], c[3]}}, key[0], key[1]);
        return std::array<std::uint32_t, 4>{words.at[0], words.at[1], words.at[2], words.at[3]};
      },
      py::arg("counter"), py::arg("key"), "Philox4x32-10, for tests of csrc/philox.h.");
  module.def(
      "gumbel_noise",
      [](std::uint64_t seed, std::uint32_t image, std::uint32_t row, std::uint32_t column, std::uint32_t vocab) {
        std::vector<float> noise(vocab);
        for (std::uint32_t v = 0; v < vocab; ++v)
          noise[v] = tamingfast::gumbel(tamingfast::noise_words(seed, {image, row, column}, v / 4).at[v % 4]);
        return noise;
      },
      py::arg("seed"), py::arg("image"), py::arg("row"), py::arg("column"), py::arg("vocab"),
      "The noise of tamingfast.ops.choice, for tests of csrc/philox.h.");
  module.def(
      "read_bandwidth",
      [](std::int64_t bytes, int threads, int repeats) {
        check_size("bytes", bytes, 1 << 20);
        check_size("threads", threads, 1);
        check_size("repeats", repeats, 1);
        py::gil_scoped_release unlocked;
        return tamingfast::read_bandwidth(bytes, std::min(threads, 256), repeats);
      },
      py::arg("bytes"), py::arg("threads"), py::arg("repeats") = 5,
      "Bytes per second that the threads read together from an array of that size: the best of the repeats.");
  module.def(
      "arithmetic_rate",
      [](const std::string& dtype, int threads, int repeats, const std::string& isa) {
        check_size("threads", threads, 1);
        check_size("repeats", repeats, 1);
        const tamingfast::Dtype type = named("dtype", dtype, kDtypes);
        const tamingfast::Isa chosen = tamingfast::parse_isa(isa);
        py::gil_scoped_release unlocked;
        return tamingfast::arithmetic_rate(type, std::min(threads, 256), repeats, chosen);
      },
      py::arg("dtype"), py::arg("threads"), py::arg("repeats") = 5, py::arg("isa") = "auto",
      "Floating-point operations per second of the threads together, operands in registers: the best of the repeats.");
  module.def(
      "build_info", &build_info,
      "dict: version, compiler, cxx_standard, openmp, isas (what this build and processor can run), cuda (by what "
      "and for what the submodule of that name was built, or None, then no_cuda tells why).");
#ifdef TAMINGFAST_CUDA
  py::module_ cuda =
      module.def_submodule("cuda", "Kernels of the CUDA engine; use them through tamingfast.engines.cuda.");
  tamingfast::cuda::bind(cuda);
#endif
}
