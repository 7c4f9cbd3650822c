#include "kernels.h"

namespace tamingfast {

const Kernels& kernels_for(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512bf16) return avx512bf16::kernels;
  if (isa == Isa::avx512) return avx512::kernels;
  if (isa == Isa::avx2) return avx2::kernels;
#endif
  (void)isa;
  return generic::kernels;
}

}  // namespace tamingfast
