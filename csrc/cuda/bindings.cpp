#include "bindings.h"

#include <cstring>
#include <map>
#include <string>
#include <type_traits>

#include "../guard.h"
#include "kernels.h"

namespace py = pybind11;

namespace tamingfast::cuda {
namespace {

const std::map<std::string, Dtype> kDtypes{
    {"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16}, {"float16", Dtype::float16}};
const std::map<std::string, Epilogue> kEpilogues{{"store", Epilogue::store},
                                                 {"gelu", Epilogue::gelu},
                                                 {"add", Epilogue::add},
                                                 {"store_float", Epilogue::store_float}};

template <class T>
const char* kind() {
  if (std::is_same_v<T, std::string>) return "a string";
  if (std::is_same_v<T, bool>) return "a bool";
  return std::is_integral_v<T> ? "an integer in range" : "a number";
}

// The keyword arguments of a call.
class Arguments {
 public:
  explicit Arguments(const py::kwargs& values) : values_(values) {}

  template <class T>
  T get(const char* name) const {
    if (!values_.contains(name)) refuse(name, "nothing", kind<T>());
    try {
      return py::cast<T>(values_[name]);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name) + ": got " + std::string(py::repr(values_[name])) + ", expected " +
                           kind<T>());
    }
  }

  int size(const char* name, std::int64_t least = 1, std::int64_t most = 0x7fffffff) const {
    const auto value = get<std::int64_t>(name);
    require_range(name, value, least, most);
    return static_cast<int>(value);
  }

  template <class T = void>
  T* pointer(const char* name, std::uintptr_t alignment = 16) const {
    return pointer_at<T>(name, get<std::uintptr_t>(name), alignment, false);
  }

  template <class T = void>
  T* optional(const char* name, std::uintptr_t alignment = 16) const {
    return pointer_at<T>(name, get<std::uintptr_t>(name), alignment, true);
  }

  Dtype dtype() const { return named("dtype", get<std::string>("dtype"), kDtypes); }
  Epilogue epilogue() const { return named("epilogue", get<std::string>("epilogue"), kEpilogues); }
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
  require(p.inner % 8 == 0, "inner", p.inner, "a multiple of 8");
  p.x = a.pointer("x");
  p.ldx = a.size("ldx");
  require(p.ldx % 8 == 0, "ldx", p.ldx, "a multiple of 8");
  p.gain = a.optional<float>("gain");
  if (p.gain) p.shift = a.pointer<float>("shift");
  p.epsilon = a.get<float>("epsilon");
  p.weight = a.pointer("weight");
  p.bias = a.optional<float>("bias", alignof(float));
  p.epilogue = a.epilogue();
  p.out = a.pointer("out");
  p.ldo = a.size("ldo");
  linear(a.dtype(), p, a.queue());
}

AttentionParams cached_rows(const Arguments& a) {
  AttentionParams p{};
  p.rows = a.size("rows", 0);
  p.heads = a.size("heads", 1, 65535);
  p.width = a.size("width", 1, 256);
  p.stride = a.size("stride", p.width, 256);
  require(p.stride % 8 == 0, "stride", p.stride, "a multiple of 8");
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
  attention(a.dtype(), p, a.queue());
}

void bound_append(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  append(a.dtype(), cached_rows(a), a.queue());
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
  add_norm(a.dtype(), p, a.queue());
}

void bound_bias_gelu(const py::kwargs& kwargs) {
  const Arguments a(kwargs);
  GeluParams p{};
  p.rows = a.size("rows", 0);
  p.width = a.size("width");
  p.x = a.pointer("x");
  p.ldx = a.size("ldx");
  p.bias = a.pointer<float>("bias", alignof(float));
  bias_gelu(a.dtype(), p, a.queue());
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
  choose(a.dtype(), p, a.queue());
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

// The functions take keyword arguments, named as the fields of the structures in kernels.h, with addresses as integers;
// `dtype` names the element type, `device` and `stream` form the Queue.
void bind(py::module_& module) {
  module.def("linear", &bound_linear, "Linear layer of one to eight rows; see LinearParams in kernels.h.");
  module.def("attention", &bound_attention, "Attention of rows to cached positions; see AttentionParams in kernels.h.");
  module.def("append", &bound_append,
             "Writes the keys and values of rows into the cache; see AttentionParams in kernels.h.");
  module.def("add_norm", &bound_add_norm, "Residual sum and layer norm of rows; see AddNormParams in kernels.h.");
  module.def("bias_gelu", &bound_bias_gelu, "Bias and exact GELU of rows, in place; see GeluParams in kernels.h.");
  module.def("choose", &bound_choose,
             "Chooses the next token of each row; `dtype` is that of the logits; see ChooseParams in kernels.h.");
  module.def("options_bytes", &options_bytes, py::arg("greedy"), py::arg("temperature"), py::arg("top_k"),
             py::arg("top_p"), py::arg("seed"), py::arg("choices"),
             "The options of `choose` as bytes to copy to the device. top_k 0 and top_p 1 keep all entries.");
  module.def(
      "devices",
      [] {
        const Devices found = devices();
        return py::make_tuple(found.count, found.reason);
      },
      "(number of CUDA devices, why there are none).");
}

}  // namespace tamingfast::cuda
