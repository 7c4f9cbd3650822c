// Checks that keep wrong arguments from corrupting memory. Python checks what its users pass (tamingfast/engines and
// tamingfast/ops); what reaches these checks is a mistake in a caller of the extension, yet must not crash it.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>

namespace tamingfast {

[[noreturn]] inline void refuse(const std::string& name, const std::string& got, const std::string& expected) {
  throw std::invalid_argument(name + ": got " + got + ", expected " + expected);
}

inline void require(bool good, const std::string& name, std::int64_t got, const std::string& expected) {
  if (!good) refuse(name, std::to_string(got), expected);
}

inline void require_range(const std::string& name, std::int64_t value, std::int64_t least, std::int64_t most) {
  require(value >= least && value <= most, name, value, std::to_string(least) + " to " + std::to_string(most));
}

inline void require_least(const std::string& name, std::int64_t value, std::int64_t least) {
  require(value >= least, name, value, "at least " + std::to_string(least));
}

// The value of the given name. Refuses a name that is not among the values, and lists those that are.
template <class Value>
Value named(const std::string& argument, const std::string& name, const std::map<std::string, Value>& values) {
  const auto found = values.find(name);
  if (found != values.end()) return found->second;
  std::string known;
  for (const auto& entry : values) known += (known.empty() ? "" : ", ") + entry.first;
  refuse(argument, "'" + name + "'", "one of " + known);
}

// The address as a pointer that is aligned and, unless it may be null, not null.
template <class T>
T* pointer_at(const std::string& name, std::uintptr_t address, std::uintptr_t alignment, bool may_be_null) {
  if (address == 0 && !may_be_null) refuse(name, "a null pointer", "an address");
  if (address % alignment != 0)
    refuse(name, std::to_string(address), "an address that is a multiple of " + std::to_string(alignment));
  return reinterpret_cast<T*>(address);
}

// The start of a (rows, columns) array, whose size in bytes fits into an int64. Only an empty array may be null.
template <class T>
T* array_at(const std::string& name, std::uintptr_t address, std::int64_t rows, std::int64_t columns) {
  const std::int64_t most = std::numeric_limits<std::int64_t>::max() / static_cast<std::int64_t>(sizeof(double));
  if (rows > most / columns)
    refuse(name, std::to_string(rows) + " x " + std::to_string(columns) + " elements",
           "at most " + std::to_string(most));
  return pointer_at<T>(name, address, alignof(T), rows == 0);
}

}  // namespace tamingfast
