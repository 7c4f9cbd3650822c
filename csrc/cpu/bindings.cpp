#include "bindings.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "../guard.h"
#include "choose.h"
#include "engine.h"
#include "isa.h"
#include "limits.h"
#include "lookahead.h"
#include "memory.h"
#include "nearest_code.h"

namespace py = pybind11;

namespace tamingfast {
namespace {

const std::map<std::string, Dtype> kDtypes{
    {"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16}, {"int8", Dtype::int8}};

// --- the nearest code ------------------------------------------------------------------------------------------------

void bound_nearest_code(const Array& z, std::int64_t n, const Array& codebook, std::int64_t k, std::int64_t d,
                        const Array& out, int threads, const std::string& isa) {
  require_least("n", n, 0);
  require_least("k", k, 1);
  require_least("d", d, 1);
  require_least("threads", threads, 1);
  NearestCodeParams params;
  params.z = array_at<const float>("z", z, n, d);
  params.codebook = array_at<const float>("codebook", codebook, k, d);
  params.out = array_at<std::int64_t>("out", out, n, 1);
  params.n = n;
  params.k = k;
  params.d = d;
  params.threads = threads;
  const Isa chosen = parse_isa(isa);
  py::gil_scoped_release unlocked;
  nearest_code(params, chosen);
}

// --- the GPT engine --------------------------------------------------------------------------------------------------

using Arrays = std::map<std::string, Array>;
using Sizes = std::map<std::string, std::int64_t>;

GPTWeights read_weights(const Arrays& from, const Geometry& g) {
  const auto at = [&](const std::string& name, std::int64_t rows, std::int64_t columns) {
    const auto found = from.find(name);
    if (found == from.end()) refuse("weights", "no '" + name + "'", "every parameter of the GPT");
    return array_at<const float>("weights['" + name + "']", found->second, rows, columns);
  };
  const std::int64_t c = g.n_embd, inside = g.mlp_width();
  const auto linear = [&](const std::string& name, std::int64_t out, std::int64_t in) {
    return Linear{at(name + ".weight", out, in), g.biases ? at(name + ".bias", out, 1) : nullptr};
  };
  const auto shift = [&](const std::string& norm) { return g.rms_norm ? nullptr : at(norm + ".bias", c, 1); };
  GPTWeights weights{at("tok_emb.weight", g.tokens(), c),
                     at("pos_emb", g.block_size, g.rotary ? c / g.n_head : c),
                     {},
                     at("ln_f.weight", c, 1),
                     shift("ln_f"),
                     {at("head.weight", g.vocab_size, c), nullptr}};
  for (std::int64_t i = 0; i < g.n_layer; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    weights.layers.push_back(
        {at(block + "ln1.weight", c, 1), shift(block + "ln1"), at(block + "ln2.weight", c, 1), shift(block + "ln2"),
         linear(block + "attn.query", c, c), linear(block + "attn.key", c, c), linear(block + "attn.value", c, c),
         linear(block + "attn.proj", c, c), linear(block + "mlp.0", inside, c), linear(block + "mlp.2", c, inside)});
    if (g.qk_norm) {
      weights.layers.back().query_norm = at(block + "attn.query_norm.weight", c / g.n_head, 1);
      weights.layers.back().key_norm = at(block + "attn.key_norm.weight", c / g.n_head, 1);
    }
    if (g.gated) weights.layers.back().gate = linear(block + "mlp.gate", inside, c);
  }
  return weights;
}

Geometry read_geometry(const Sizes& from) {
  const auto at = [&](const char* name) {
    const auto found = from.find(name);
    if (found == from.end()) refuse("geometry", std::string("no '") + name + "'", "every size of the GPT");
    return found->second;
  };
  Geometry g{at("vocab_size"), at("block_size"), at("n_layer"), at("n_head"), at("n_embd"), at("n_unmasked")};
  const auto given = [&](const char* name) { return from.find(name) != from.end(); };
  if (given("extra_tokens")) g.extra_tokens = at("extra_tokens");
  if (given("hidden")) g.hidden = at("hidden");
  for (const auto& [name, flag] :
       {std::pair{"rms_norm", &g.rms_norm}, std::pair{"gated", &g.gated}, std::pair{"rotary", &g.rotary},
        std::pair{"biases", &g.biases}, std::pair{"qk_norm", &g.qk_norm}})
    if (given(name)) *flag = at(name) != 0;
  return g;
}

// The Python object: an engine that one thread uses at a time and that can be closed.
class GPTEngine {
 public:
  GPTEngine(const Arrays& weights, const Sizes& geometry, const std::string& dtype, int threads, const std::string& isa,
            const std::string& draft) {
    const Geometry g = read_geometry(geometry);
    check_geometry(g);
    require_range("n_layer", g.n_layer, 0, static_cast<std::int64_t>(weights.size()));
    const GPTWeights read = read_weights(weights, g);
    const Dtype type = named("dtype", dtype, kDtypes);
    const Dtype draft_type = draft.empty() ? type : named("draft", draft, kDtypes);
    const Isa chosen = parse_isa(isa);
    py::gil_scoped_release unlocked;
    engine_ = std::make_unique<Engine>(read, g, type, threads, chosen);
    if (!draft.empty()) engine_->set_draft(std::make_unique<Engine>(read, g, draft_type, threads, chosen));
  }

  // Calls work(engine) without the GIL and with the engine's lock. The GIL is released before the lock is taken,
  // because the thread that holds the lock may need the GIL to go on.
  template <class Work>
  auto use(Work&& work) {
    const Turn turn(*this);
    if (!engine_) throw std::invalid_argument("the engine is closed");
    return work(*engine_);
  }

  void close() {
    const Turn turn(*this);
    engine_.reset();
  }

 private:
  class Turn {
   public:
    explicit Turn(GPTEngine& engine) : engine_(engine) {
      if (engine.owner_.load() == std::this_thread::get_id())
        throw std::runtime_error("the engine is working: a callback cannot use or close it");
      unlocked_.emplace();
      lock_ = std::unique_lock<std::mutex>(engine.mutex_);
      engine.owner_ = std::this_thread::get_id();
    }
    ~Turn() { engine_.owner_ = std::thread::id(); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    GPTEngine& engine_;
    std::optional<py::gil_scoped_release> unlocked_;
    std::unique_lock<std::mutex> lock_;  // destroyed first, so that no thread waits for the GIL with the lock held
  };

  std::unique_ptr<Engine> engine_;
  std::mutex mutex_;
  std::atomic<std::thread::id> owner_{};
};

// Whether a signal's handler raised, as that of Ctrl-C does. The exception stays set for the caller.
bool interrupted() {
  py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

// Calls work(engine) and, if a signal interrupts it, raises what the signal's handler raised.
template <class Work>
void interruptible(GPTEngine& engine, Work&& work) {
  bool stopped = false;
  engine.use([&](Engine& native) {
    try {
      work(native);
    } catch (const Interrupted&) {
      stopped = true;
    }
  });
  if (stopped) throw py::error_already_set();
}

using Item = std::tuple<std::int64_t, std::int64_t, std::vector<std::int64_t>, std::int64_t>;

void bound_step(GPTEngine& engine, const std::vector<Item>& items, const Array& out) {
  std::vector<Span> spans;
  std::vector<std::int64_t> tokens;
  std::int64_t needed = 0;
  for (const auto& [slot, start, own, asked] : items) {
    const std::int64_t count = static_cast<std::int64_t>(own.size());
    require_range("asked", asked, 0, count);
    spans.push_back({slot, start, count, asked});
    tokens.insert(tokens.end(), own.begin(), own.end());
    needed += asked;
  }
  interruptible(engine, [&](Engine& native) {
    float* to = array_at<float>("out", out, needed, native.geometry().vocab_size);
    native.step(spans, tokens.data(), to, interrupted);
  });
}

void require_count(const char* name, std::size_t got, std::int64_t expected) {
  if (static_cast<std::int64_t>(got) != expected)
    refuse(name, std::to_string(got) + " values", std::to_string(expected));
}

// A temperature that is 0 or infinite as float32 would make scores NaN, which std::nth_element must not see.
float read_temperature(double temperature) {
  using Float = std::numeric_limits<float>;
  if (!(temperature >= Float::min() && temperature <= Float::max()))
    refuse("temperature", std::to_string(temperature), "a positive number that a float32 holds");
  return static_cast<float>(temperature);
}

std::int32_t bound_decode(GPTEngine& engine, const std::vector<std::int64_t>& slots, const Array& sequences,
                          std::int64_t length, std::int64_t fed, const std::vector<std::int64_t>& steps,
                          const std::vector<std::uint8_t>& wanted, const std::vector<std::uint32_t>& rows,
                          const std::vector<std::uint32_t>& columns, const std::vector<std::uint32_t>& images,
                          std::int64_t choices, bool greedy, double temperature, std::int64_t top_k, double top_p,
                          std::uint64_t seed, std::int64_t lookahead, const Engine::Progress& progress,
                          std::int64_t every, const std::vector<std::int64_t>& null_slots, std::int64_t null_token,
                          std::int64_t prefix, const std::vector<float>& scales) {
  DecodeParams p;
  p.batch = static_cast<std::int64_t>(slots.size());
  p.count = static_cast<std::int64_t>(steps.size());
  require_least("length", length, 1);
  require_count("wanted", wanted.size(), p.batch * p.count);
  require_count("rows", rows.size(), p.count);
  require_count("columns", columns.size(), p.count);
  require_count("images", images.size(), p.batch);
  require_least("every", every, 1);
  p.slots = slots.data();
  p.sequences = array_at<std::int64_t>("sequences", sequences, p.batch, length);
  p.length = length;
  p.fed = fed;
  p.steps = steps.data();
  p.wanted = wanted.data();
  p.rows = rows.data();
  p.columns = columns.data();
  p.images = images.data();
  p.choices = choices;
  p.choice = {greedy, read_temperature(temperature), top_k, top_p, seed};
  p.lookahead = lookahead;
  if (!null_slots.empty()) {
    require_count("null_slots", null_slots.size(), p.batch);
    require_count("scales", scales.size(), length);
    p.null_slots = null_slots.data();
    p.null_token = null_token;
    p.prefix = prefix;
    p.scales = scales.data();
  }
  // Captured by reference: copying a Python function would need the GIL.
  const auto report = [&](std::int64_t done) {
    if (progress && done % every == 0) progress(done);
  };
  std::int32_t found = 0;
  interruptible(engine, [&](Engine& native) { found = native.decode(p, interrupted, report); });
  return found;
}

py::dict bound_info(GPTEngine& engine) {
  struct Facts {
    std::size_t weight_bytes, cache_bytes;
    std::int64_t slots, capacity;
    int threads;
    Counts decoded;
    std::size_t draft_bytes;
  };
  const Facts facts = engine.use([](Engine& native) {
    return Facts{native.weight_bytes(), native.cache_bytes(), native.slots(),      native.capacity(),
                 native.threads(),      native.counts(),      native.draft_bytes()};
  });
  py::dict info;
  info["weight_bytes"] = facts.weight_bytes;
  info["cache_bytes"] = facts.cache_bytes;
  info["slots"] = facts.slots;
  info["capacity"] = facts.capacity;
  info["threads"] = facts.threads;
  info["passes"] = facts.decoded.passes;
  info["rows"] = facts.decoded.rows;
  info["tokens"] = facts.decoded.tokens;
  info["draft_bytes"] = facts.draft_bytes;
  return info;
}

std::map<std::int64_t, double> bound_pass_seconds(GPTEngine& engine, const std::vector<std::int64_t>& rows) {
  for (const std::int64_t count : rows) require_range("rows", count, 1, 1 << 20);
  std::map<std::int64_t, double> seconds;
  interruptible(engine, [&](Engine& native) {
    for (const std::int64_t count : rows) seconds[count] = native.pass_cost(interrupted).at(count);
  });
  return seconds;
}

using Seen = std::vector<std::pair<std::int64_t, std::int64_t>>;

// The rows that lookahead gives to sequences, and what each learned from (right, guesses) of its passes.
std::pair<std::vector<std::int64_t>, std::vector<std::vector<double>>> bound_share_rows(
    const std::array<double, PassCost::kSizes.size()>& seconds, double extra, std::int64_t known,
    const std::vector<Seen>& seen, const std::vector<std::int64_t>& most) {
  require_count("most", most.size(), static_cast<std::int64_t>(seen.size()));
  std::vector<Survival> learned(seen.size());
  std::vector<Contender> contenders;
  std::vector<std::vector<double>> shares;
  for (std::size_t i = 0; i < seen.size(); ++i) {
    for (const auto& [right, guesses] : seen[i]) learned[i].observe(right, guesses);
    contenders.push_back({&learned[i], most[i]});
    shares.emplace_back();
    for (std::int64_t depth = 0; depth < kWidest; ++depth) shares.back().push_back(learned[i].at(depth));
  }
  std::size_t next = 0;
  const PassCost cost = PassCost::measure([&](std::int64_t) { return seconds[next++ % seconds.size()]; });
  return {share_rows(cost, extra, known, contenders).rows, shares};
}

// The token of one row of logits, or what stands in its place.
std::int64_t bound_choose(const Array& logits, std::int64_t vocab, bool greedy, double temperature, std::int64_t top_k,
                          double top_p, std::uint64_t seed, std::uint32_t image, std::uint32_t row,
                          std::uint32_t column) {
  require_least("vocab", vocab, 1);
  const auto* row_of_logits = array_at<const float>("logits", logits, 1, vocab);
  ChoiceScratch scratch(vocab);
  return choose(row_of_logits, vocab, {greedy, read_temperature(temperature), top_k, top_p, seed}, {image, row, column},
                scratch);
}

void bind_engine(py::module_& module) {
  py::class_<GPTEngine>(module, "GPTEngine",
                        "Decodes a GPT on the CPU with a key/value cache; use it through tamingfast.engines.cpu.")
      .def(
          py::init<const Arrays&, const Sizes&, const std::string&, int, const std::string&, const std::string&>(),
          py::arg("weights"), py::arg("geometry"), py::arg("dtype"), py::arg("threads"), py::arg("isa") = "auto",
          py::arg("draft") = "",
          "weights: (address, bytes) of each contiguous float32 parameter by its name in the state dict, read here and "
          "not kept; geometry: the fields of Geometry in csrc/cpu/engine.h, flags as 0 and 1, those with defaults may "
          "be left out; draft: the dtype of a "
          "second copy that guesses, or none.")
      .def(
          "reserve",
          [](GPTEngine& e, std::int64_t slots, std::int64_t length) {
            e.use([&](Engine& native) { native.reserve(slots, length); });
          },
          py::arg("slots"), py::arg("length"),
          "Replaces the cache with an empty one for `slots` sequences of `length` positions. Raises MemoryError, which "
          "states the bytes, if there is not enough memory.")
      .def(
          "length",
          [](GPTEngine& e, std::int64_t slot) { return e.use([&](Engine& native) { return native.length(slot); }); },
          py::arg("slot"), "Number of valid positions of the slot.")
      .def(
          "truncate",
          [](GPTEngine& e, std::int64_t slot, std::int64_t length) {
            e.use([&](Engine& native) { native.truncate(slot, length); });
          },
          py::arg("slot"), py::arg("length"), "Discards the slot's positions from `length` on.")
      .def(
          "copy",
          [](GPTEngine& e, std::int64_t source, std::int64_t target, std::int64_t length) {
            e.use([&](Engine& native) { native.copy(source, target, length); });
          },
          py::arg("source"), py::arg("target"), py::arg("length"),
          "Copies the first `length` positions of slot `source` to slot `target`.")
      .def("step", &bound_step, py::arg("items"), py::arg("out"),
           "Feeds a list of (slot, start, tokens, asked). The logits of the last `asked` tokens of each are written to "
           "`out`, (address, bytes) of a float32 (rows, vocab_size) array.")
      .def(
          "decode", &bound_decode, py::arg("slots"), py::arg("sequences"), py::arg("length"), py::arg("fed"),
          py::arg("steps"), py::arg("wanted"), py::arg("rows"), py::arg("columns"), py::arg("images"),
          py::arg("choices"), py::arg("greedy"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
          py::arg("seed"), py::arg("lookahead") = 1, py::arg("progress") = py::none(), py::arg("every") = 1,
          py::arg("null_slots") = std::vector<std::int64_t>(), py::arg("null_token") = 0, py::arg("prefix") = 0,
          py::arg("scales") = std::vector<float>(),
          "Decodes positions `steps` of the sequences, (address, bytes) of an int64 (batch, length) array, in place; "
          "see DecodeParams in csrc/cpu/engine.h. top_k 0 and top_p 1 keep all entries. Returns 0, or if a token could "
          "not be chosen, 1 for logits with NaN and 2 for nothing above -infinity, or-ed.")
      .def(
          "set_threads", [](GPTEngine& e, int threads) { e.use([&](Engine& native) { native.set_threads(threads); }); },
          py::arg("threads"), "Sets the number of threads for later calls.")
      .def("info", &bound_info,
           "dict: weight_bytes (read for every token), cache_bytes, slots, capacity (positions per slot), threads; and "
           "what `decode` did so far: passes, rows (of logits), tokens (chosen); draft_bytes (of the copy that "
           "guesses).")
      .def("pass_seconds", &bound_pass_seconds, py::arg("rows"),
           "Seconds of a pass, by which `decode` chooses how far to look ahead, for each number of rows.")
      .def("close", &GPTEngine::close, "Frees the memory; every later call raises ValueError.");
}

}  // namespace

void bind_cpu(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const OutOfMemory& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    }
  });
  module.def(
      "nearest_code", &bound_nearest_code, py::arg("z"), py::arg("n"), py::arg("codebook"), py::arg("k"), py::arg("d"),
      py::arg("out"), py::arg("threads"), py::arg("isa") = "auto",
      "Writes the index of the nearest row of the codebook (k, d) for each row of z (n, d) to out (n,). z, codebook "
      "and out are (address, bytes) of contiguous float32, float32 and int64 arrays. ValueError names the argument.");
  bind_engine(module);
  module.def("choose", &bound_choose, py::arg("logits"), py::arg("vocab"), py::arg("greedy"), py::arg("temperature"),
             py::arg("top_k"), py::arg("top_p"), py::arg("seed"), py::arg("image"), py::arg("row"), py::arg("column"),
             "To test csrc/cpu/choose.h.");
  module.def("share_rows", &bound_share_rows, py::arg("seconds"), py::arg("extra"), py::arg("known"), py::arg("seen"),
             py::arg("most"), "To test csrc/cpu/lookahead.h.");
  module.def(
      "read_bandwidth",
      [](std::int64_t bytes, int threads, int repeats) {
        require_least("bytes", bytes, 1 << 20);
        require_least("threads", threads, 1);
        require_least("repeats", repeats, 1);
        py::gil_scoped_release unlocked;
        return read_bandwidth(bytes, std::min(threads, 256), repeats);
      },
      py::arg("bytes"), py::arg("threads"), py::arg("repeats") = 5,
      "Bytes per second that the threads together read from an array of that size: the best of the repeats.");
  module.def(
      "arithmetic_rate",
      [](const std::string& dtype, int threads, int repeats, const std::string& isa) {
        require_least("threads", threads, 1);
        require_least("repeats", repeats, 1);
        const Dtype type = named("dtype", dtype, kDtypes);
        const Isa chosen = parse_isa(isa);
        py::gil_scoped_release unlocked;
        return arithmetic_rate(type, std::min(threads, 256), repeats, chosen);
      },
      py::arg("dtype"), py::arg("threads"), py::arg("repeats") = 5, py::arg("isa") = "auto",
      "Floating-point operations per second of all threads, with operands in registers: the best of the repeats.");
}

}  // namespace tamingfast
