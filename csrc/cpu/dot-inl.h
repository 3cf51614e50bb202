// The product of a few rows with weights that are not packed, for calls too short to repay the packing. Outputs are
// rows of the weights. Of few rows vectors run along k, and at the end the lanes of each are summed. As many rows as a
// vector has lanes are packed themselves, which takes little beside the weights: then they are the panel, weights its rows.
#pragma once
#include "isa-inl.h"

#include "panels-inl.h"
#include "product-inl.h"
#include "scalar.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Rows of a tile, outputs of a tile, and rows of the tiles that share one reading of the weights.
constexpr int kDotRows = 4, kDotOutputs = 4, kDotBlock = 16;

// out[m * out_stride + n] = sum_k a[m * stride + k] w[n * ld + k]
// next: the weights whose turn comes after these, which are fetched meanwhile if `fetches`.
template <class A, class S, int M, int N, bool fetches, class T = typename Compute<A>::type>
FASTRNN_HD void dot(const A* a, int64_t stride, const S* w, [[maybe_unused]] const S* next, int64_t ld, int64_t depth,
                    T* out, int64_t out_stride) {
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
        if constexpr (fetches) __builtin_prefetch(next + n * ld + k, 0, 2);
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
      if constexpr (fetches) __builtin_prefetch(next + n * ld + k, 0, 2);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][n] = add_products<Terms::kAll>(sum[m][n], x[m], weight);
    }
  };
  for (; k + L * D <= depth; k += L * D) add(k, L * D);
  if (k < depth) add(k, int(depth - k));
  if constexpr (M * 4 == L) {
    T sums[M][4];
    sum_lanes(*reinterpret_cast<const V(*)[L]>(sum), &sums[0][0]);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) __builtin_memcpy(out + m * out_stride, sums[m], N * sizeof(T));
  } else {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      T sums[4];
      sum_lanes(sum[m], sums);
      for (int n = 0; n < N; ++n) out[m * out_stride + n] = sums[n];
    }
  }
}

// The same for any number of outputs, a few at a time.
template <class A, class S, int M, bool fetches, class T = typename Compute<A>::type>
FASTRNN_ONE_COPY void dots(int outputs, const A* a, int64_t stride, const S* w, const S* next, int64_t ld,
                           int64_t depth, T* out, int64_t out_stride) {
  for (; outputs >= kDotOutputs; outputs -= kDotOutputs, w += kDotOutputs * ld, out += kDotOutputs)
    dot<A, S, M, kDotOutputs, fetches>(a, stride, w, next, ld, depth, out, out_stride);
  for (; outputs > 0; --outputs, w += ld, ++out) dot<A, S, M, 1, false>(a, stride, w, w, ld, depth, out, out_stride);
}

template <class A, class S, class T>
void dots(int rows, bool fetches, int outputs, const A* a, int64_t stride, const S* w, const S* next, int64_t ld,
          int64_t depth, T* out, int64_t out_stride) {
  const auto run = [&](auto M) {
    const auto of_rows = fetches ? dots<A, S, M, true, T> : dots<A, S, M, false, T>;
    of_rows(outputs, a, stride, w, next, ld, depth, out, out_stride);
  };
  switch (rows) {
    case 1:
      return run(std::integral_constant<int, 1>());
    case 2:
      return run(std::integral_constant<int, 2>());
    case 3:
      return run(std::integral_constant<int, 3>());
    default:
      return run(std::integral_constant<int, 4>());
  }
}

// A panel of outputs, those that pack_rows (panels-inl.h) would order as [n][lane], of `rows` rows. bias points at the
// first output's and has the same gate_stride.
//
// The first tile of rows to read some weights waits for memory, the others for the arithmetic alone. So that neither is
// idle, the second one fetches what the first will read next; into the second level, for fetches into the first one would
// keep its few misses in flight from those that a sum waits for.
template <class A, class W, class S, class T>
FASTRNN_ONE_COPY void dot_panel(int rows, const A* a, int64_t stride, const W* w, int64_t ld,
                                int64_t gate_stride, int gates, int unit_vectors, int64_t valid, int64_t depth,
                                const S* bias, T* out) {
  constexpr int L = Vec<T>::kLanes;
  const int out_stride = gates * unit_vectors * L, tiles = int(ceil_div(rows, kDotRows));
  const int tile_rows = int(ceil_div(rows, tiles));
  for (int v = 0; v < unit_vectors; ++v)
    for (int g = 0; g < gates; ++g, out += L) {
      const int lanes = valid_lanes<T>(valid, v * L);
      const int64_t at = g * gate_stride + v * L;
      if (tiles == 1) {
        dots(rows, false, lanes, a, stride, w + at * ld, w, ld, depth, out, out_stride);
      } else {
        for (int i = 0; i < lanes; i += kDotOutputs) {
          const int outputs = lanes - i < kDotOutputs ? lanes - i : kDotOutputs;
          int64_t next = at + i + kDotOutputs;  // after the last gate's last ones nothing is fetched that is not there
          if (i + 2 * kDotOutputs > lanes) next = g + 1 < gates ? at + gate_stride : at;
          for (int m = 0; m < rows; m += tile_rows) {
            const int some = rows - m < tile_rows ? rows - m : tile_rows;
            dots(some, m == tile_rows, outputs, a + m * stride, stride, w + (at + i) * ld, w + next * ld, ld, depth,
                 out + m * out_stride + i, out_stride);
          }
        }
      }
      for (int m = 0; m < rows; ++m) {
        for (int j = lanes; j < L; ++j) out[m * out_stride + j] = 0;
        if (bias) store(out + m * out_stride, load(out + m * out_stride) + load(bias + at, lanes));
      }
    }
}

// The same for rows that are a panel, [depth][panel_stride].
template <class T>
FASTRNN_ONE_COPY void turned_panel(int rows, const T* panel, int64_t panel_stride, const T* w, int64_t ld,
                                   int64_t gate_stride, int gates, int unit_vectors, int64_t valid, int64_t depth,
                                   const T* bias, T* out) {
  constexpr int L = Vec<T>::kLanes;
  const int out_stride = gates * unit_vectors * L, vectors = int(ceil_div(rows, L));
  alignas(64) T sums[L * kMaxVectors * L];  // [outputs][vectors][rows in a vector]
  const T* none = nullptr;
  for (int v = 0; v < unit_vectors; ++v)
    for (int g = 0; g < gates; ++g, out += L) {
      const int lanes = valid_lanes<T>(valid, v * L);
      const int64_t at = g * gate_stride + v * L;
      multiply_rows(lanes, w + at * ld, ld, panel, panel_stride, depth, vectors, none, sums, false, Terms::kAll);
      const Vec<T> last = bias ? load(bias + at, lanes) : Vec<T>(0);
      for (int q = 0; q < vectors; ++q) {
        Vec<T> square[L];
        FASTRNN_UNROLL for (int i = 0; i < L; ++i)
          square[i] = i < lanes ? load(sums + (i * vectors + q) * L) : Vec<T>(0);
        transpose(square);
        FASTRNN_UNROLL for (int i = 0; i < L; ++i)
          if (q * L + i < rows) store(out + (q * L + i) * out_stride, square[i] + last);
      }
    }
}

// Rows packed as a panel, [depth][stride]; null where they are multiplied as they lie.
template <class A>
struct Turned {
  const A* panel = nullptr;
  int64_t stride = 0;
};
// Are rows of such operands packed for such weights? The micro-kernel multiplies one type with itself, and products of dual
// numbers are not the same with their factors exchanged.
template <class A, class W>
inline constexpr bool kTurns = std::is_floating_point_v<A> && std::is_same_v<A, W>;
// Packs them into `memory`, [depth][round_up(count, lanes)], if there is some and they fill a vector.
template <class A>
Turned<A> turned_rows(int64_t count, const A* a, int64_t stride, int64_t depth, A* memory) {
  constexpr int L = Vec<typename Compute<A>::type>::kLanes;
  if (!memory || count < L) return {};
  pack_rows(a, stride, 0, 1, int(ceil_div(count, L)), count, depth, memory);
  return {memory, round_up(count, L)};
}

// for_each_tile without packing the weights; the tiles are of kDotBlock rows, or of kMaxVectors vectors of them.
template <class A, class W, class S, class Body>
void for_each_dot_tile(int64_t count, const A* a, int64_t stride, Turned<A> turned, const W* w, int64_t ld,
                       int64_t gate_stride, int gates, int unit_vectors, int64_t valid, int64_t depth, const S* bias,
                       Body body) {
  using T = typename Compute<A>::type;
  constexpr int L = Vec<T>::kLanes, kTurnedBlock = kMaxVectors * L;
  constexpr int kBlock = kTurns<A, W> && kTurnedBlock > kDotBlock ? kTurnedBlock : kDotBlock;  // vectors may be short
  alignas(64) T sums[kBlock * kMaxVectors * L];
  if constexpr (kTurns<A, W>)
    if (turned.panel) {
      for (int64_t first = 0; first < count; first += kTurnedBlock) {
        const int rows = int(count - first < kTurnedBlock ? count - first : kTurnedBlock);
        turned_panel(rows, turned.panel + first, turned.stride, w, ld, gate_stride, gates, unit_vectors, valid, depth, bias,
                     sums);
        body(first, rows, static_cast<const T*>(sums));
      }
      return;
    }
  for (int64_t first = 0; first < count; first += kDotBlock) {
    const int rows = int(count - first < kDotBlock ? count - first : kDotBlock);
    dot_panel(rows, a + first * stride, stride, w, ld, gate_stride, gates, unit_vectors, valid, depth, bias, sums);
    body(first, rows, static_cast<const T*>(sums));
  }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
