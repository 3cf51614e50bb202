// Panels of weights: which vectors of outputs each one holds, and how it is packed, once a call.
#pragma once
#include "isa-inl.h"

#include "product-inl.h"
#include "scalar.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// begin .. end - 1: of vectors, rows or gates.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int member, int size) { return {n * member / size, n * (member + 1) / size}; }
// A member's own of n: all of them where the team has split its rows, for it sees no others'; else its share.
inline Range own_part(const Plan& plan, int64_t n, int member) {
  return plan.split_rows ? Range{0, n} : share(n, member, plan.team_size);
}

// Panels of at most `step` vectors that cover `range`: body(first vector, vectors). At odd times they come in reverse,
// so that a pass over them begins with those that the last pass left in the cache.
template <class Body>
FASTRNN_HD void for_each_panel_zigzag(Range range, int step, int64_t time, Body body) {
  const int64_t panels = ceil_div(range.end - range.begin, step);
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t v = range.begin + (time & 1 ? panels - 1 - i : i) * step;
    body(v, int(range.end - v < step ? range.end - v : step));
  }
}
// The same, always forward.
template <class Body>
FASTRNN_HD void for_each_panel(Range range, int step, Body body) {
  for_each_panel_zigzag(range, step, 0, body);
}

// The panels of `range` that a member packs: all where each member has a range of its own, else its share of them.
template <class Body>
FASTRNN_HD void for_each_packed_panel(Range range, int step, bool shared, int member, int members, Body body) {
  int64_t index = 0;
  for_each_panel(range, step, [&](int64_t v, int vectors) {
    if (!shared || index++ % members == member) body(v, vectors);
  });
}

// Where the weights of some vectors of outputs are, and how many elements lie between those of k and of k + 1.
template <class A>
struct Panel {
  const A* weights;
  int64_t stride;
};
// Of vectors v .. of the columns of a [P, rows, columns] weight: packed `depth` rows deep by pack_columns (packs), or
// those of the weight itself.
template <class A>
Panel<A> panel_of_columns(const void* weight, int64_t group, int64_t rows, int64_t columns, int64_t gap, const A* packs,
                          int64_t depth, int64_t v, int vectors, bool packed) {
  constexpr int L = Vec<typename Compute<A>::type>::kLanes;
  if (packed) return {packs + v * L * padded_depth<A>(depth), vectors * L};
  return {static_cast<const A*>(weight) + group * (rows * columns + gap) + v * L, columns};
}

// Outputs are rows of the matrix: panel[k][n][lane] = w[(n * gate_stride + lane) * ld + k] for lane < valid, else 0.
// Several vectors of units: unit vector v (of `unit_vectors`) of gate g is n = v * gates + g, and starts L rows on.
template <class S, class A>
FASTRNN_ONE_COPY void pack_rows(const S* w, int64_t ld, int64_t gate_stride, int gates, int unit_vectors,
                                int64_t valid, int64_t depth, A* panel) {
  using T = typename Compute<A>::type;
  constexpr int L = Vec<T>::kLanes, D = kDepth<A>;
  const int N = gates * unit_vectors;
  for (int v = 0; v < unit_vectors; ++v)
    for (int g = 0; g < gates; ++g) {
      A* out = panel + (v * gates + g) * L * D;
      const int lanes = int(valid - v * L < 0 ? 0 : valid - v * L < L ? valid - v * L : L);
      const S* in = w + (g * gate_stride + v * L) * ld;
      for (int64_t k0 = 0; k0 < depth; k0 += L * D) {  // a square at a time
        const int columns = int(depth - k0 < L * D ? depth - k0 : L * D);
        Vec<T> square[L];  // of kDepth values a lane
        if (lanes == L && columns == L * D)
          FASTRNN_UNROLL for (int lane = 0; lane < L; ++lane) square[lane] = lanes_of(load_along<A>(in + lane * ld + k0, L * D));
        else
          FASTRNN_UNROLL for (int lane = 0; lane < L; ++lane)
            square[lane] = lane < lanes ? lanes_of(load_along<A>(in + lane * ld + k0, columns)) : Vec<T>(0);
        transpose(square);
        FASTRNN_UNROLL for (int k = 0; k < L; ++k)
          if (k * D < columns) store_operands(out + (k0 + k * D) * N * L, operands_in<A>(square[k]));
      }
    }
}

// The biases of a panel's outputs, in the same order.
template <class S, class T>
FASTRNN_ONE_COPY void pack_bias(const S* bias, int64_t gate_stride, int gates, int unit_vectors, int64_t valid,
                                T* out) {
  constexpr int L = Vec<T>::kLanes;
  for (int v = 0; v < unit_vectors; ++v)
    for (int g = 0; g < gates; ++g, out += L)
      store(out, load(bias + g * gate_stride + v * L, valid_lanes<T>(valid, v * L)));
}

// Outputs are columns: panel[k][n][lane] = w[k * ld + n * L + lane], 0 from column `valid` on. Rows come in `blocks`
// of `rows`, each block followed by zero rows up to `padded`.
template <class S, class A>
FASTRNN_ONE_COPY void pack_columns(const S* w, int64_t ld, int vectors, int64_t valid, int blocks, int64_t rows,
                                   int64_t padded, A* panel) {
  constexpr int L = Vec<typename Compute<A>::type>::kLanes, D = kDepth<A>;
  const int whole = int(valid / L < vectors ? valid / L : vectors);  // vectors
  for (int block = 0; block < blocks; ++block)
    for (int64_t k = 0; k < padded; k += D) {
      int n = 0;
      if (k + D <= rows)
        for (const S* from = w + (block * rows + k) * ld; n < whole; ++n, panel += L * D)
          store_operands(panel, load_across<A>(from + n * L, ld, D, L));
      for (; n < vectors; ++n, panel += L * D) {
        const int64_t left = valid - n * L;
        const int there = int(left <= 0 || k >= rows ? 0 : rows - k < D ? rows - k : D);
        const S* from = there > 0 ? w + (block * rows + k) * ld + n * L : w;
        store_operands(panel, load_across<A>(from, ld, there, int(left < L ? left : L)));
      }
    }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
