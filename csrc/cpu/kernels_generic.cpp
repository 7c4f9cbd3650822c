#define TF_ISA generic
#define TF_LANES 4
#define TF_DOT 0
#include "convolution.inl"
