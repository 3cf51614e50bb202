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
// log(1 + x), x in [0, 1]
FASTRNN_HD float log1p(float x) { return ::log1pf(x); }
FASTRNN_HD double log1p(double x) { return ::log1p(x); }
// Of single numbers alone, for Row::combine.
FASTRNN_HD float sqrt(float x) { return ::sqrtf(x); }
FASTRNN_HD double sqrt(double x) { return ::sqrt(x); }
// a where y > 0, 0 where y <= 0, a where y is NaN (so that a NaN is not lost).
FASTRNN_HD float where_positive(float y, float a) { return y <= 0.0f ? 0.0f : a; }
FASTRNN_HD double where_positive(double y, double a) { return y <= 0.0 ? 0.0 : a; }
// a where y is 0, b elsewhere.
FASTRNN_HD float where_zero(float y, float a, float b) { return y == 0.0f ? a : b; }
FASTRNN_HD double where_zero(double y, double a, double b) { return y == 0.0 ? a : b; }
// The larger one, NaN where either is.
FASTRNN_HD float maximum(float a, float b) { return a > b ? a : a <= b ? b : a + b; }
FASTRNN_HD double maximum(double a, double b) { return a > b ? a : a <= b ? b : a + b; }

template <class V>
FASTRNN_HD V sigmoid(V x) {
  return V(1) / (V(1) + exp(-x));
}
#if defined(__CUDA_ARCH__)
// As a division makes it, but 0 below 2^-126, and without its branch, for which activations of a unit wait for each other:
// the hardware's reciprocal and a step of Newton's (by fused multiply-adds), but where that would multiply infinity by 0.
FASTRNN_HD float sigmoid(float x) {
  const float s = 1.0f + exp(-x);
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(s));
  return s > 1e38f ? y : y + y * (1.0f - s * y);
}
#endif
template <class V>
FASTRNN_HD V relu(V x) {
  return where_positive(x, x);
}

// a b, on a GPU rounded by itself and no part of a fused multiply-add: so what the same product made elsewhere cancels it.
template <class V>
FASTRNN_HD V rounded_product(V a, V b) {
  return a * b;
}
#if defined(__CUDA_ARCH__)
FASTRNN_HD float rounded_product(float a, float b) { return __fmul_rn(a, b); }
FASTRNN_HD double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

// log sigmoid(x) = min(x, 0) - log(1 + e^-|x|)
template <class V>
FASTRNN_HD V log_sigmoid(V x) {
  const V below = relu(-x);
  return -(below + log1p(exp(-(relu(x) + below))));
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
