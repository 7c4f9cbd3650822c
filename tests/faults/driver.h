// What the drivers of this directory share: random values, and checks that name the case that failed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

inline std::mt19937_64 generator;
inline std::string situation;

inline std::int64_t any(std::int64_t least, std::int64_t most) {
  return std::uniform_int_distribution<std::int64_t>(least, most)(generator);
}

template <class Value>
Value one_of(const std::vector<Value>& values) {
  return values[any(0, static_cast<std::int64_t>(values.size()) - 1)];
}

inline std::vector<float> random_values(std::int64_t n, float spread) {
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> values(n);
  for (float& value : values) value = normal(generator);
  return values;
}

inline void expect(bool good, const std::string& what) {
  if (good) return;
  std::fprintf(stderr, "failed: %s in %s\n", what.c_str(), situation.c_str());
  std::exit(1);
}

template <class Call>
void expect_refused(const char* what, Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return;
  }
  expect(false, std::string(what) + " was not refused");
}
