// The online softmax: partial sums of weighted exponentials that merge without overflow.
// Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.
#pragma once

#include <cmath>

#include "host_device.h"

namespace tamingfast {

// The factor that rescales a sum of exponentials from its own maximum to a common one, which is at least as large. An
// empty sum has the maximum -infinity.
TAMINGFAST_HOST_DEVICE inline float rescale(float own, float common) {
  return own == common ? 1.0f : expf(own - common);
}

}  // namespace tamingfast
