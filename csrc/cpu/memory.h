// Large allocations: aligned, and in huge pages if the system has them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tamingfast {

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr std::size_t kHugePage = std::size_t{1} << 21;

inline std::string bytes_text(double bytes) { return std::to_string(static_cast<long long>(bytes)) + " bytes"; }

// Memory, zeroed unless told otherwise, which Linux is advised to back with huge pages: weights are streamed, and page
// walks cost bandwidth.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t size, bool zeroed = true) : size_(size) {
    if (size == 0) return;
    const std::size_t alignment = size >= kHugePage ? kHugePage : 64;
    const std::size_t whole = (size + alignment - 1) / alignment * alignment;
    data_.reset(static_cast<char*>(std::aligned_alloc(alignment, whole)));
    if (!data_)
      throw OutOfMemory("memory: " + bytes_text(static_cast<double>(size)) +
                        " are needed, but the system refused them");
#if defined(__linux__)
    if (alignment == kHugePage) madvise(data_.get(), whole, MADV_HUGEPAGE);
#endif
    if (zeroed) std::memset(data_.get(), 0, whole);
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace tamingfast
