#include "isa.h"

#include "../guard.h"

namespace tamingfast {
namespace {

struct Entry {
  const char* name;
  Isa isa;
};

std::vector<Entry> supported() {
  std::vector<Entry> entries{{"generic", Isa::generic}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    entries.push_back({"avx2", Isa::avx2});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      entries.push_back({"avx512", Isa::avx512});
      if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16"))
        entries.push_back({"avx512bf16", Isa::avx512bf16});
    }
  }
#endif
  return entries;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : supported()) names.emplace_back(entry.name);
  return names;
}

Isa parse_isa(const std::string& name) {
  const std::vector<Entry> entries = supported();
  if (name == "auto") return entries.back().isa;
  std::string known;
  for (const Entry& entry : entries) {
    if (name == entry.name) return entry.isa;
    known += std::string(known.empty() ? "" : ", ") + entry.name;
  }
  refuse("isa", "'" + name + "'", "auto or one that this processor supports: " + known);
}

}  // namespace tamingfast
