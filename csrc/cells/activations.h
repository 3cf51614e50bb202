// Activations and their derivatives, written once for every value type.
#pragma once
#include <cmath>

#include "cell.h"

namespace fastrnn {

// The primitives that a value type supplies. Those of SIMD vectors are in cpu/simd-inl.h and are found by
// argument-dependent lookup; on a GPU these are the CUDA library's (expf: 1 ulp, tanhf: 1 ulp).
FASTRNN_HD float exp(float x) { return ::expf(x); }
FASTRNN_HD float tanh(float x) { return ::tanhf(x); }
FASTRNN_HD double exp(double x) { return ::exp(x); }
FASTRNN_HD double tanh(double x) { return ::tanh(x); }
// Of single numbers alone, for Row::combine.
FASTRNN_HD float sqrt(float x) { return ::sqrtf(x); }
FASTRNN_HD double sqrt(double x) { return ::sqrt(x); }
// a where y > 0, 0 where y <= 0, a where y is NaN (so that a NaN is not lost).
FASTRNN_HD float where_positive(float y, float a) { return y <= 0.0f ? 0.0f : a; }
FASTRNN_HD double where_positive(double y, double a) { return y <= 0.0 ? 0.0 : a; }

template <class V>
FASTRNN_HD V sigmoid(V x) {
  return V(1) / (V(1) + exp(-x));
}
template <class V>
FASTRNN_HD V relu(V x) {
  return where_positive(x, x);
}

// Derivatives in terms of the activation's output y, which is what is kept.
template <class V>
FASTRNN_HD V sigmoid_grad(V y) {
  return y * (V(1) - y);
}
template <class V>
FASTRNN_HD V tanh_grad(V y) {
  return V(1) - y * y;
}

}  // namespace fastrnn
