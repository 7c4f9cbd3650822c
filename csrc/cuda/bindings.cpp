#include "bindings.h"

#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace py = pybind11;

namespace tamingfast::cuda {
namespace {

const std::map<std::string, Number> kNumbers{
    {"float32", Number::float32}, {"bfloat16", Number::bfloat16}, {"float16", Number::float16}};
const std::map<std::string, Epilogue> kEpilogues{{"store", Epilogue::store},
                                                 {"gelu", Epilogue::gelu},
                                                 {"add", Epilogue::add},
                                                 {"store_float", Epilogue::store_float}};

[[noreturn]] void refuse(const std::string& name, const std::string& got, const std::string& expected) {
  throw std::invalid_argument(name + ": got " + got + ", expected " + expected);
}

// The arguments of a call by name; each is asked for once.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& values) : values_(values) {}

  template <class T>
  T get(const char* name) const {
    if (!values_.contains(name)) throw std::invalid_argument(std::string(name) + ": missing");
    try {
      return py::cast<T>(values_[name]);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name) + ": got " + std::string(py::repr(values_[name])));
    }
  }

  int size(const char* name, std::int64_t least = 1, std::int64_t most = 0x7fffffff) const {
    const auto value = get<std::int64_t>(name);
    if (value < least || value > most)
      refuse(name, std::to_string(value), std::to_string(least) + " to " + std::to_string(most));
    return static_cast<int>(value);
  }

  template <class T = void>
  T* pointer(const char* name, std::uintptr_t alignment = 16) const {
    const auto address = optional<T>(name, alignment);
    if (!address) refuse(name, "a null pointer", "an address");
    return address;
  }

  template <class T = void>
  T* optional(const char* name, std::uintptr_t alignment = 16) const {
    const auto address = get<std::uintptr_t>(name);
    if (address % alignment != 0)
      refuse(name, std::to_string(address), "an address that is a multiple of " + std::to_string(alignment));
    return reinterpret_cast<T*>(address);
  }

  template <class Value>
  Value named(const char* name, const std::map<std::string, Value>& known) const {
    const auto wanted = get<std::string>(name);
    const auto found = known.find(wanted);
    if (found != known.end()) return found->second;
    std::string names;
    for (const auto& entry : known) names += (names.empty() ? "" : ", ") + entry.first;
    refuse(name, "'" + wanted + "'", "one of " + names);
  }

  Number number() const { return named("dtype", kNumbers); }
  Queue queue() const {
    return {static_cast<int>(get<std::int64_t>("device")), reinterpret_cast<void*>(get<std::uintptr_t>("stream"))};
  }

 private:
  const py::kwargs& values_;
};

void bound_linear(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  LinearParams p{};
  p.rows = a.size("rows", 1, kMostLinearRows);
  p.inner = a.size("inner");
  p.columns = a.size("columns");
  if (p.inner % 8 != 0) refuse("inner", std::to_string(p.inner), "a multiple of 8");
  p.x = a.pointer("x");
  p.ldx = a.size("ldx");
  if (p.ldx % 8 != 0) refuse("ldx", std::to_string(p.ldx), "a multiple of 8");
  p.gain = a.optional<float>("gain");
  if (p.gain) p.shift = a.pointer<float>("shift");
  p.epsilon = a.get<float>("epsilon");
  p.weight = a.pointer("weight");
  p.bias = a.optional<float>("bias", alignof(float));
  p.epilogue = a.named("epilogue", kEpilogues);
  p.out = a.pointer("out");
  p.ldo = a.size("ldo");
  linear(a.number(), p, a.queue());
}

AttentionParams cached_rows(const Arguments& a) {
  AttentionParams p{};
  p.rows = a.size("rows", 0);
  p.heads = a.size("heads", 1, 65535);
  p.width = a.size("width", 1, 256);
  p.stride = a.size("stride", p.width, 256);
  if (p.stride % 8 != 0) refuse("stride", std::to_string(p.stride), "a multiple of 8");
  p.capacity = a.size("capacity");
  p.qkv = a.pointer("qkv", 2);
  p.ldq = a.size("ldq");
  p.slot = a.pointer<std::int32_t>("slot", alignof(std::int32_t));
  p.position = a.pointer<std::int32_t>("position", alignof(std::int32_t));
  p.keys = a.pointer("keys");
  p.values = a.pointer("values");
  return p;
}

void bound_attention(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  AttentionParams p = cached_rows(a);
  p.splits = a.size("splits", 1, 65535);
  p.append = a.get<bool>("append");
  p.last = a.pointer<std::int32_t>("last", alignof(std::int32_t));
  if (p.splits > 1) {
    p.partial = a.pointer<float>("partial");
    p.arrived = a.pointer<std::uint32_t>("arrived", alignof(std::uint32_t));
  }
  p.out = a.pointer("out", 2);
  p.ldo = a.size("ldo");
  attention(a.number(), p, a.queue());
}

void bound_append(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  append(a.number(), cached_rows(a), a.queue());
}

void bound_add_norm(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  AddNormParams p{};
  p.rows = a.size("rows", 0);
  p.width = a.size("width");
  p.x = a.pointer<float>("x");
  p.ldx = a.size("ldx");
  p.y = a.optional("y");
  p.ldy = a.size("ldy");
  p.bias = a.optional<float>("bias", alignof(float));
  p.gain = a.pointer<float>("gain", alignof(float));
  p.shift = a.pointer<float>("shift", alignof(float));
  p.epsilon = a.get<float>("epsilon");
  p.out = a.pointer("out");
  p.ldo = a.size("ldo");
  add_norm(a.number(), p, a.queue());
}

void bound_bias_gelu(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  GeluParams p{};
  p.rows = a.size("rows", 0);
  p.width = a.size("width");
  p.x = a.pointer("x");
  p.ldx = a.size("ldx");
  p.bias = a.pointer<float>("bias", alignof(float));
  bias_gelu(a.number(), p, a.queue());
}

void bound_choose(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  ChooseParams p{};
  p.rows = a.size("rows", 0);
  p.vocab = a.size("vocab");
  p.logits = a.pointer("logits");
  p.ldl = a.size("ldl");
  p.options = a.pointer<Options>("options", alignof(Options));
  p.images = a.pointer<std::int64_t>("images", alignof(std::int64_t));
  p.places = a.pointer<std::int64_t>("places", alignof(std::int64_t));
  p.wanted = a.pointer<std::uint8_t>("wanted", 1);
  p.sequence = a.pointer<std::int64_t>("sequence", alignof(std::int64_t));
  p.length = a.size("length");
  p.position = a.pointer<std::int32_t>("position", alignof(std::int32_t));
  p.tok_emb = a.pointer<float>("tok_emb", alignof(float));
  p.pos_emb = a.pointer<float>("pos_emb", alignof(float));
  p.positions = a.size("positions");
  p.width = a.size("width");
  p.x = a.pointer<float>("x", alignof(float));
  p.ldx = a.size("ldx");
  p.errors = a.pointer<std::int32_t>("errors", alignof(std::int32_t));
  choose(a.number(), p, a.queue());
}

py::bytes options_bytes(bool greedy, double temperature, std::int64_t top_k, double top_p, std::uint64_t seed,
                        std::int64_t choices) {
  Options options;
  std::memset(static_cast<void*>(&options), 0, sizeof options);
  options.choice.greedy = greedy;
  options.choice.temperature = static_cast<float>(temperature);
  options.choice.top_k = top_k;
  options.choice.top_p = top_p;
  options.choice.seed = seed;
  options.choices = choices;
  return py::bytes(reinterpret_cast<const char*>(&options), sizeof options);
}

}  // namespace

// Arguments are given by name: those of the structures in kernels.h, addresses as integers; `dtype` names their type,
// `device` and `stream` say where they run.
void bind(py::module_& module) {
  module.def("linear", &bound_linear, "One to eight rows through a linear layer; see LinearParams in kernels.h.");
  module.def("attention", &bound_attention, "Attention of rows over cached positions; see AttentionParams.");
  module.def("append", &bound_append, "Writes keys and values of rows into the cache; see AttentionParams.");
  module.def("add_norm", &bound_add_norm, "Residual sum and layer norm of rows; see AddNormParams.");
  module.def("bias_gelu", &bound_bias_gelu, "Bias and exact GELU of rows in place; see GeluParams.");
  module.def("choose", &bound_choose, "Chooses the rows' next tokens; `dtype` is the logits'; see ChooseParams.");
  module.def("options_bytes", &options_bytes, py::arg("greedy"), py::arg("temperature"), py::arg("top_k"),
             py::arg("top_p"), py::arg("seed"), py::arg("choices"),
             "The options of `choose` as they lie on the device. top_k 0 and top_p 1 keep all.");
  module.def(
      "devices",
      [] {
        const Devices found = devices();
        return py::make_tuple(found.count, found.reason);
      },
      "(number of CUDA devices, why there are none).");
}

}  // namespace tamingfast::cuda
