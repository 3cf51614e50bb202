// The product of a few rows with weights that are not packed, for calls too short to repay the packing. Outputs are
// rows of the weights, so vectors run along k, and at the end the lanes of each are summed.
#pragma once
#include "isa-inl.h"

#include "product-inl.h"
#include "scalar.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int kDotRows = 4, kDotOutputs = 4;

// out[m * out_stride + n] = sum_k a[m * stride + k] w[n * ld + k]
template <class A, class S, int M, int N, class T = typename Compute<A>::type>
__attribute__((noinline)) void dot(const A* a, int64_t stride, const S* w, int64_t ld, int64_t depth, T* out,
                                   int64_t out_stride) {
  using V = Vec<T>;
  constexpr int L = V::kLanes, D = kDepth<A>;
  V sum[M][4];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sum[m][n] = V(0);
  int64_t k = 0;
  if constexpr (std::is_same_v<S, BFloat16> && !std::is_same_v<A, S>) {
    // Two neighbours in 32 bits: the upper one is a float32 already but for bits below its own, the lower one after a
    // shift. So no lane has to move but the few of a.
    using Bits = typename V::Bits;
    for (; k + 2 * L <= depth; k += 2 * L) {
      V even[M], odd[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const V x = load(a + m * stride + k), y = load(a + m * stride + k + L);
        even[m] = gather_lanes(x, y, [](int l) { return 2 * l; });
        odd[m] = gather_lanes(x, y, [](int l) { return 2 * l + 1; });
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        Bits pairs;
        __builtin_memcpy(&pairs, w + n * ld + k, sizeof pairs);
        const V low = (typename V::Native)(pairs << 16), high = (typename V::Native)(pairs & int32_t(0xffff0000));
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[m][n] = sum[m][n] + even[m] * low + odd[m] * high;
      }
    }
  }
  const auto add = [&](int64_t k, int lanes) {
    Operands<A> x[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) x[m] = load_along<A>(a + m * stride + k, lanes);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const Operands<A> weight = load_along<A>(w + n * ld + k, lanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][n] = add_products<Terms::kAll>(sum[m][n], x[m], weight);
    }
  };
  for (; k + L * D <= depth; k += L * D) add(k, L * D);
  if (k < depth) add(k, int(depth - k));
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    T sums[4];
    sum_lanes(sum[m], sums);
    for (int n = 0; n < N; ++n) out[m * out_stride + n] = sums[n];
  }
}

template <int N, class A, class S, class T>
void dot(int rows, const A* a, int64_t stride, const S* w, int64_t ld, int64_t depth, T* out, int64_t out_stride) {
  switch (rows) {
    case 1:
      return dot<A, S, 1, N>(a, stride, w, ld, depth, out, out_stride);
    case 2:
      return dot<A, S, 2, N>(a, stride, w, ld, depth, out, out_stride);
    case 3:
      return dot<A, S, 3, N>(a, stride, w, ld, depth, out, out_stride);
    default:
      return dot<A, S, 4, N>(a, stride, w, ld, depth, out, out_stride);
  }
}

// for_each_tile without packing. The outputs are those that pack_rows (panels-inl.h) would order as [n][lane]; bias
// points at the first of them and has the same gate_stride.
template <class A, class W, class S, class Body>
void for_each_dot_tile(int64_t count, const A* a, int64_t stride, const W* w, int64_t ld, int64_t gate_stride,
                       int gates, int unit_vectors, int64_t valid, int64_t depth, const S* bias, Body body) {
  using T = typename Compute<A>::type;
  constexpr int L = Vec<T>::kLanes;
  alignas(64) T sums[kDotRows * kMaxVectors * L];
  const int outputs = gates * unit_vectors * L;
  for (int64_t first = 0; first < count; first += kDotRows) {
    const int rows = int(count - first < kDotRows ? count - first : kDotRows);
    for (int v = 0; v < unit_vectors; ++v)
      for (int g = 0; g < gates; ++g) {
        const int lanes = int(valid - v * L < L ? valid - v * L : L);
        const int64_t at = g * gate_stride + v * L;
        T* to = sums + (v * gates + g) * L;
        int i = 0;
        for (; i + kDotOutputs <= lanes; i += kDotOutputs)
          dot<kDotOutputs>(rows, a + first * stride, stride, w + (at + i) * ld, ld, depth, to + i, outputs);
        for (; i < lanes; ++i)
          dot<1>(rows, a + first * stride, stride, w + (at + i) * ld, ld, depth, to + i, outputs);
        for (int m = 0; m < rows; ++m) {
          for (int j = lanes; j < L; ++j) to[m * outputs + j] = 0;
          if (bias) store(to + m * outputs, load(to + m * outputs) + load(bias + at, lanes));
        }
      }
    body(first, rows, static_cast<const T*>(sums));
  }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
