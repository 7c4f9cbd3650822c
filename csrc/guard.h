// Checks that keep wrong arguments from corrupting memory. Python checks what its users pass (tamingfast/engines and
// tamingfast/ops); what reaches these checks is a mistake in a caller of the extension, yet must not crash it.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

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

// A caller's contiguous array: its address and its size in bytes.
using Array = std::pair<std::uintptr_t, std::int64_t>;

// The start of an array that must be (rows, columns) elements long, neither shorter nor longer: a caller whose elements
// have another type is refused. Only an empty array may be null.
template <class T>
T* array_at(const std::string& name, const Array& array, std::int64_t rows, std::int64_t columns) {
  const std::int64_t size = sizeof(T), most = std::numeric_limits<std::int64_t>::max() / size;
  const std::string shape = std::to_string(rows) + " x " + std::to_string(columns);
  if (rows < 0 || columns < 1 || rows > most / columns)
    refuse(name, shape + " elements", "at most " + std::to_string(most));
  require(array.second == rows * columns * size, name, array.second,
          std::to_string(rows * columns * size) + " bytes, " + shape + " elements of " + std::to_string(size));
  return pointer_at<T>(name, array.first, alignof(T), rows == 0);
}

}  // namespace tamingfast
