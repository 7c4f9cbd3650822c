// The online softmax: parts of a sum of weighted exponentials, joined without overflow.
// Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.
#pragma once

#include <cmath>

#include "philox.h"

namespace tamingfast {

// What a sum of exponentials relative to `own` is multiplied by to be relative to `common`, which is at least as large;
// -infinity is the maximum of nothing.
TAMINGFAST_BOTH inline float rescale(float own, float common) { return own == common ? 1.0f : expf(own - common); }

}  // namespace tamingfast
