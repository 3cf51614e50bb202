// Products with int8 weights for inference: rows of float32 are quantised as they come, each by its own largest
// magnitude, and multiplied as integers, exactly.
//
// x = scale (q - 128) with q in 1..255, w = scale' q'; sum x w = scale scale' (sum q q' - 128 sum q').
// LayerParams says how the blocks of weights are ordered.
#pragma once
#include "isa-inl.h"

#include "product-inl.h"
#include "scalar.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int kInt8Units = 16, kInt8Depth = 4, kInt8Rows = 4;

// to[k] for k < n, then 128 (a zero) up to a multiple of kInt8Depth. Returns the scale, in which a NaN or infinity of x
// lives on.
inline float quantize_row(const float* x, int64_t n, uint8_t* to) {
  int32_t largest = 0;  // magnitudes compare like their bits
  for (int64_t k = 0; k < n; ++k) {
    int32_t bits;
    __builtin_memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &largest, sizeof magnitude);
  const bool usable = magnitude > 0 && magnitude < 3e38f;
  const float inverse = usable ? 127 / magnitude : 0;
  int64_t k = 0;
  if (usable)
    for (; k < n; ++k) to[k] = static_cast<uint8_t>(static_cast<int32_t>(x[k] * inverse + 128.5f));
  for (; k < round_up(n, kInt8Depth); ++k) to[k] = 128;
  return magnitude / 127;
}

// out[m][g][lane] = sum_k a[m * stride + k] w[..]; w points at the first unit's bytes in its block.
template <int M, int G>
FASTRNN_ONE_COPY void int8_product(const uint8_t* a, int64_t stride, const int8_t* w, int64_t quads,
                                   int32_t* out) {
  constexpr int L = Vec<float>::kLanes;
  for (int i = 0; i < M * G * L; ++i) out[i] = 0;
  for (int64_t quad = 0; quad < quads; ++quad)
    for (int m = 0; m < M; ++m)
      for (int g = 0; g < G; ++g) {
        const int8_t* p = w + (quad * G + g) * kInt8Units * kInt8Depth;
        for (int lane = 0; lane < L; ++lane) {
          int32_t sum = 0;
          for (int q = 0; q < kInt8Depth; ++q)
            sum += int32_t(a[m * stride + quad * kInt8Depth + q]) * p[lane * kInt8Depth + q];
          out[(m * G + g) * L + lane] += sum;
        }
      }
}

#if FASTRNN_VECTOR_BYTES == 64
inline bool has_vnni() {
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has;
}

template <int M, int G>
__attribute__((noinline, target("avx512f,avx512bw,avx512vnni"))) void int8_product_vnni(
    const uint8_t* a, int64_t stride, const int8_t* w, int64_t quads, int32_t* out) {
  constexpr int U = M * G >= 8 ? 1 : 2;  // chains enough to hide an addition's latency
  __m512i sum[U][M][G];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sum[u][m][g] = _mm512_setzero_si512();
  const auto add = [&](int64_t quad, int u) __attribute__((always_inline, target("avx512f,avx512bw,avx512vnni"))) {
    __m512i x[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int32_t four;
      __builtin_memcpy(&four, a + m * stride + quad * kInt8Depth, sizeof four);
      x[m] = _mm512_set1_epi32(four);
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const __m512i weights = _mm512_loadu_si512(w + (quad * G + g) * kInt8Units * kInt8Depth);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[u][m][g] = _mm512_dpbusd_epi32(sum[u][m][g], x[m], weights);
    }
  };
  int64_t quad = 0;
  for (; quad + U <= quads; quad += U)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) add(quad + u, u);
  for (; quad < quads; ++quad) add(quad, 0);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) sum[0][m][g] = _mm512_add_epi32(sum[0][m][g], sum[u][m][g]);
      _mm512_storeu_si512(out + (m * G + g) * kInt8Units, sum[0][m][g]);
    }
}
#endif

template <int G = 1, int M = 1>
void int8_product(int gates, int rows, const uint8_t* a, int64_t stride, const int8_t* w, int64_t quads, int32_t* out) {
  if constexpr (G < kMaxVectors && M == 1) {
    if (gates > G) return int8_product<G + 1>(gates, rows, a, stride, w, quads, out);
  }
  if constexpr (M < kInt8Rows) {
    if (rows > M) return int8_product<G, M + 1>(gates, rows, a, stride, w, quads, out);
  }
#if FASTRNN_VECTOR_BYTES == 64
  if (has_vnni()) return int8_product_vnni<M, G>(a, stride, w, quads, out);
#endif
  int8_product<M, G>(a, stride, w, quads, out);
}

// One group's weights.
struct Int8Weights {
  const int8_t* blocks;
  const float* scale;
  const int32_t* sum;
  int64_t quads;
};
inline Int8Weights int8_weights(const void* all, const float* scale, const int32_t* sum, int gates, int64_t units,
                                int64_t quads, int64_t group) {
  const int64_t rows = ceil_div(units, kInt8Units) * gates * kInt8Units;
  return {static_cast<const int8_t*>(all) + group * rows * quads * kInt8Depth, scale + group * rows, sum + group * rows,
          quads};
}

// As for_each_tile, for units v * L .. of all gates: sums [rows][vectors][G][L]. bias [G * units] or null.
template <class Body>
void for_each_int8_tile(int64_t count, const uint8_t* a, int64_t stride, const float* a_scale,
                        const Int8Weights& weights, int G, int64_t v, int vectors, const float* bias, int64_t units,
                        Body body) {
  using V = Vec<float>;
  constexpr int L = V::kLanes;
  alignas(64) float sums[kInt8Rows * kMaxVectors * L];
  alignas(64) int32_t products[kInt8Rows * kMaxVectors * L];
  for (int64_t first = 0; first < count; first += kInt8Rows) {
    const int rows = int(count - first < kInt8Rows ? count - first : kInt8Rows);
    for (int n = 0; n < vectors; ++n) {
      const int64_t unit = (v + n) * L, block = unit / kInt8Units, within = unit % kInt8Units;
      const int8_t* w = weights.blocks + block * weights.quads * G * kInt8Units * kInt8Depth + within * kInt8Depth;
      int8_product(G, rows, a + first * stride, stride, w, weights.quads, products);
      for (int g = 0; g < G; ++g) {
        const int64_t at = (block * G + g) * kInt8Units + within;
        typename V::Bits zero;
        __builtin_memcpy(&zero, weights.sum + at, sizeof zero);
        const V scale = load(weights.scale + at);
        const V last = bias ? load(bias + g * units + unit, int(units - unit < L ? units - unit : L)) : V(0);
        for (int m = 0; m < rows; ++m) {
          typename V::Bits product;
          __builtin_memcpy(&product, products + (m * G + g) * L, sizeof product);
          const V exact = __builtin_convertvector(product - zero, typename V::Native);
          store(sums + ((m * vectors + n) * G + g) * L, exact * (scale * V(a_scale[first + m])) + last);
        }
      }
    }
    body(first, rows, static_cast<const float*>(sums));
  }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
