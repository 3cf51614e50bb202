// Dual numbers (Clifford 1873): a value and its slope, the derivative in one direction. Given as the numbers that a kernel
// computes with, they turn forward into the derivative of its results in a direction (a Jacobian-vector product), and
// backward into that of the gradients: all that second derivatives need (csrc/torch/second_derivative.cpp). Cells, steps
// and loops stand once, for any type of number.
//
// In memory a dual number is a pair, as a complex number is.
#pragma once
#include "isa-inl.h"

#include "../cells/activations.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

template <class T>
struct Dual {
  T value, slope;
  Dual() = default;
  FASTRNN_HD Dual(T value, T slope = 0) : value(value), slope(slope) {}
};

template <class T>
inline constexpr bool kIsDual<Dual<T>> = true;

template <class T>
struct Vec<Dual<T>> {
  static constexpr int kLanes = Vec<T>::kLanes;
  Vec<T> value, slope;
  Vec() = default;
  FASTRNN_HD Vec(Vec<T> value, Vec<T> slope) : value(value), slope(slope) {}
  FASTRNN_HD explicit Vec(Dual<T> x) : value(x.value), slope(x.slope) {}
  FASTRNN_HD explicit Vec(int x) : value(x), slope(0) {}
};

// ---- arithmetic, of single numbers D = Dual<T> and of vectors D = Vec<Dual<T>> ----

#define FASTRNN_OF_DUALS(D)                                                                \
  template <class T>                                                                       \
  FASTRNN_HD D operator+(D a, D b) {                                                       \
    return {a.value + b.value, a.slope + b.slope};                                         \
  }                                                                                        \
  template <class T>                                                                       \
  FASTRNN_HD D operator-(D a, D b) {                                                       \
    return {a.value - b.value, a.slope - b.slope};                                         \
  }                                                                                        \
  template <class T>                                                                       \
  FASTRNN_HD D operator-(D a) {                                                            \
    return {-a.value, -a.slope};                                                           \
  }                                                                                        \
  template <class T>                                                                       \
  FASTRNN_HD D operator*(D a, D b) {                                                       \
    return {a.value * b.value, a.value * b.slope + a.slope * b.value};                     \
  }                                                                                        \
  template <class T>                                                                       \
  FASTRNN_HD D operator/(D a, D b) {                                                       \
    const auto value = a.value / b.value;                                                  \
    return {value, (a.slope - value * b.slope) / b.value};                                 \
  }
FASTRNN_OF_DUALS(Dual<T>)
FASTRNN_OF_DUALS(Vec<Dual<T>>)
#undef FASTRNN_OF_DUALS

template <class T>
FASTRNN_HD Dual<T> sqrt(Dual<T> x) {
  const T root = fastrnn::sqrt(x.value);
  return {root, x.slope / (root + root)};
}

// sum + x w
template <Terms terms, class T>
FASTRNN_HD Vec<Dual<T>> add_product(Vec<Dual<T>> sum, Vec<Dual<T>> x, Vec<Dual<T>> w) {
  if constexpr (terms == Terms::kAll || terms == Terms::kConstantWeights) sum.value = sum.value + x.value * w.value;
  if constexpr (terms == Terms::kAll || terms == Terms::kSlope) sum.slope = sum.slope + x.value * w.slope;
  sum.slope = sum.slope + x.slope * w.value;
  return sum;
}

// ---- functions ----

template <class T, class Index>
FASTRNN_HD Vec<Dual<T>> gather_lanes(Vec<Dual<T>> a, Vec<Dual<T>> b, Index index) {
  return {gather_lanes(a.value, b.value, index), gather_lanes(a.slope, b.slope, index)};
}
template <class T>
FASTRNN_HD void transpose(Vec<Dual<T>> (&x)[Vec<T>::kLanes]) {
  Vec<T> values[Vec<T>::kLanes], slopes[Vec<T>::kLanes];
  FASTRNN_UNROLL for (int i = 0; i < Vec<T>::kLanes; ++i) values[i] = x[i].value, slopes[i] = x[i].slope;
  transpose(values);
  transpose(slopes);
  FASTRNN_UNROLL for (int i = 0; i < Vec<T>::kLanes; ++i) x[i] = {values[i], slopes[i]};
}

template <class T>
FASTRNN_HD Vec<Dual<T>> exp(Vec<Dual<T>> x) {
  const Vec<T> y = exp(x.value);
  return {y, y * x.slope};
}
template <class T>
FASTRNN_HD Vec<Dual<T>> tanh(Vec<Dual<T>> x) {
  const Vec<T> y = tanh(x.value);
  return {y, tanh_grad(y) * x.slope};
}
// Of exp alone the slope would overflow where sigmoid's is nearly 0.
template <class T>
FASTRNN_HD Vec<Dual<T>> sigmoid(Vec<Dual<T>> x) {
  const Vec<T> y = fastrnn::sigmoid(x.value);
  return {y, sigmoid_grad(y) * x.slope};
}
// The branches of its equation meet at 0, where neither has its slope.
template <class T>
FASTRNN_HD Vec<Dual<T>> log_sigmoid(Vec<Dual<T>> x) {
  return {fastrnn::log_sigmoid(x.value), fastrnn::sigmoid(-x.value) * x.slope};
}
template <class T>
FASTRNN_HD Vec<Dual<T>> where_positive(Vec<Dual<T>> y, Vec<Dual<T>> a) {
  return {where_positive(y.value, a.value), where_positive(y.value, a.slope)};
}
template <class T>
FASTRNN_HD Vec<Dual<T>> where_zero(Vec<Dual<T>> y, Vec<Dual<T>> a, Vec<Dual<T>> b) {
  return {where_zero(y.value, a.value, b.value), where_zero(y.value, a.slope, b.slope)};
}
// Where both are equal, they share it.
template <class T>
FASTRNN_HD Vec<Dual<T>> maximum(Vec<Dual<T>> a, Vec<Dual<T>> b) {
  const Vec<T> half = Vec<T>(1) / Vec<T>(2), apart = a.value - b.value;
  const Vec<T> of_larger = where_positive(apart, a.slope) + where_positive(-apart, b.slope);
  return {maximum(a.value, b.value), where_zero(apart, half * (a.slope + b.slope), of_larger)};
}
// Beyond the limit it is constant.
template <class T>
FASTRNN_HD Vec<Dual<T>> clamp(Vec<Dual<T>> a, Dual<T> limit) {
  const Vec<T> inside = clamp(a.value, limit.value);
  return {inside, where_zero(a.value - inside, a.slope, Vec<T>(0))};
}

// ---- memory: n of the lanes at p; the rest read as 0 and are not written ----

template <class T>
FASTRNN_HD Vec<Dual<T>> load(const Dual<T>* p, int n) {
  constexpr int L = Vec<T>::kLanes;
  typename Vec<T>::Native pair[2] = {};
  if (n >= L)
    __builtin_memcpy(pair, p, sizeof pair);
  else
    __builtin_memcpy(pair, p, n > 0 ? n * sizeof(Dual<T>) : 0);
  const Vec<T> low = pair[0], high = pair[1];
  return {gather_lanes(low, high, [](int l) { return 2 * l; }), gather_lanes(low, high, [](int l) { return 2 * l + 1; })};
}
template <class T>
FASTRNN_HD Vec<Dual<T>> load(const Dual<T>* p) {
  return load(p, Vec<T>::kLanes);
}
template <class T>
FASTRNN_HD void store(Dual<T>* p, Vec<Dual<T>> x, int n) {
  constexpr int L = Vec<T>::kLanes;
  const Vec<T> low = gather_lanes(x.value, x.slope, [](int l) { return l / 2 + l % 2 * L; });
  const Vec<T> high = gather_lanes(x.value, x.slope, [](int l) { return L / 2 + l / 2 + l % 2 * L; });
  const typename Vec<T>::Native pair[2] = {low.v, high.v};
  if (n >= L)
    __builtin_memcpy(p, pair, sizeof pair);
  else
    __builtin_memcpy(p, pair, n > 0 ? n * sizeof(Dual<T>) : 0);
}
template <class T>
FASTRNN_HD void store(Dual<T>* p, Vec<Dual<T>> x) {
  store(p, x, Vec<T>::kLanes);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
