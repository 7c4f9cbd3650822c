// What GCC's code for OpenMP calls, on threads of the standard library. GCC's own runtime is not compiled with the
// thread sanitizer, which therefore does not see its barriers and reports races where there are none.
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

thread_local int number = 0, team = 1;
std::mutex atomic_mutex;

}  // namespace

extern "C" {

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return team; }
int omp_get_max_threads() { return 4; }
void GOMP_atomic_start() { atomic_mutex.lock(); }
void GOMP_atomic_end() { atomic_mutex.unlock(); }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i)
    others.emplace_back([=] {
      number = static_cast<int>(i);
      team = static_cast<int>(threads);
      body(data);
    });
  team = static_cast<int>(threads);
  body(data);
  team = 1;
  for (std::thread& other : others) other.join();
}
}
