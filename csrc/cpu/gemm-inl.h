// The matrix products around a recurrence (the gradients of weights and input) by the recurrence's own micro-kernel.
//
// Each thread owns a range of rows, or of columns where there are more of those, and packs what it needs itself: no
// barrier. k is cut into blocks whose packed panels stay in the second-level cache beside the rows they meet, and those
// into parts: sums of more products lose more to rounding, and a part's panel stays in the first level.
#pragma once
#include "isa-inl.h"

#include "panels-inl.h"
#include "product-inl.h"
#include "scalar.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

constexpr int64_t kBlockK = 512, kPartK = 128, kBlockM = 96, kBlockN = 256;

// What a thread has for products over k with n columns; `member` of `members` that share an arena.
template <class A>
struct GemmBuffers {
  static constexpr int L = Vec<typename Compute<A>::type>::kLanes;
  int64_t block_n, block_k, a_stride;
  A* panels;  // [block_n / (4 L)][block_k][4][L]
  // [block_k][a_stride]: a block of a where a is transposed, copied so that its rows are adjacent in memory, or, where
  // kDepth rows are multiplied together, side by side as in a panel. For the matrix unit its columns are rows here,
  // [kBlockM][turned_stride].
  int64_t turned_stride;
  A* rows;

  GemmBuffers() = default;
  GemmBuffers(int64_t n, int64_t k, bool transpose_a, Arena& arena, int members = 1, int member = 0)
      : block_k(padded_depth<A>(k < kBlockK ? k : kBlockK)), a_stride(kBlockM + L) {
    const int64_t most = k <= kPartK ? kBlockN * kBlockK / kPartK : kBlockN;
    block_n = round_up(n < most ? n : most, L);
    panels = arena.take<A>(block_n * block_k * members) + block_n * block_k * member;
    turned_stride = round_up(block_k, kMatrixDepth) + kMatrixDepth;  // no power of two
    int64_t size = block_k * a_stride;
    if (kDepth<A> == 2 && size < kBlockM * turned_stride) size = kBlockM * turned_stride;
    rows = transpose_a ? arena.take<A>(size * members) + size * member : nullptr;
  }
};

// rows[m * stride + k] = a[k * a_stride + m], of pairs, a square of the lanes at a time: so zeros are written beyond the last
// k and the last m.
template <class A>
FASTRNN_ONE_COPY void turn(const A* a, int64_t a_stride, int64_t depth, int64_t count, A* rows, int64_t stride) {
  using T = typename Compute<A>::type;
  constexpr int L = Vec<T>::kLanes, D = kDepth<A>;
  for (int64_t m = 0; m < count; m += L)
    for (int64_t k = 0; k < depth; k += L * D) {
      Vec<T> square[L];
      FASTRNN_UNROLL for (int i = 0; i < L; ++i) {
        const int64_t left = depth - k - i * D;
        square[i] = lanes_of(load_across<A>(a + (left > 0 ? k + i * D : 0) * a_stride + m, a_stride,
                                            int(left < 0 ? 0 : left < D ? left : D), int(count - m < L ? count - m : L)));
      }
      transpose(square);
      FASTRNN_UNROLL for (int i = 0; i < L; ++i) store_operands(rows + (m + i) * stride + k, operands_in<A>(square[i]));
    }
}

// op(a) b for the rows `m` of the result and `columns`, in vectors. pack(k0, depth, v, n, panel) packs n vectors of b's
// columns from v on; keep(row, v, n, k0, sums) is called for every part of k in turn, with a row's n vectors from v on.
template <class A, bool TransposeA, class Pack, class Keep>
void multiply(const GemmBuffers<A>& buffers, Range m, Range columns, int64_t k, const A* a, int64_t a_stride, Pack pack,
              Keep keep, Terms terms = Terms::kAll) {
  using T = typename Compute<A>::type;
  constexpr int L = Vec<T>::kLanes, D = kDepth<A>;
  const auto block = [&](Range block, int64_t k0, int64_t depth) {
    const auto panel_at = [&](int64_t v) { return buffers.panels + (v - block.begin) * L * buffers.block_k; };
    for_each_panel(block, kMaxVectors, [&](int64_t v, int n) { pack(k0, depth, v, n, panel_at(v)); });
    // Long rows of a result that no cache has are written the faster the more of each is written at once.
    const bool by_rows = k <= kPartK && (columns.end - columns.begin) * L > kBlockN;
    const int64_t block_m = by_rows ? round_up(2 * max_rows<A>(kMaxVectors), L) : kBlockM;
    for (int64_t m0 = m.begin; m0 < m.end; m0 += block_m) {
      const int64_t rows = m.end - m0 < block_m ? m.end - m0 : block_m;
      const bool matrix = by_matrix_unit<A>(depth);
      if constexpr (TransposeA && D > 1)
        if (matrix) turn(a + k0 * a_stride + m0, a_stride, depth, rows, buffers.rows, buffers.turned_stride);
      if (TransposeA && !matrix)
        for (int64_t i = 0; i < depth; i += D)
          for (int64_t j = 0; j < rows; j += L)
            store_operands(buffers.rows + i * buffers.a_stride + j * D,
                           load_across<A>(a + (k0 + i) * a_stride + m0 + j, a_stride, int(depth - i < D ? depth - i : D),
                                          int(rows - j < L ? rows - j : L)));
      for_each_panel(block, kMaxVectors, [&](int64_t v, int n) {
        // The matrix unit is so much faster than its sums are added up that it makes whole blocks.
        const int64_t most = matrix ? kBlockK : kPartK;
        for (int64_t i = 0; i < (depth > 0 ? depth : 1); i += most) {
          const int64_t part = depth - i < most ? depth - i : most;
          const A* panel = panel_at(v) + i * n * L;
          const auto each = [&](int64_t first, int count, const T* sums) {
            for (int j = 0; j < count; ++j) keep(m0 + first + j, v, n, k0 + i, sums + j * n * L);
          };
          const T* none = nullptr;
          if (TransposeA && matrix)
            for_each_tile(rows, static_cast<const A*>(buffers.rows), buffers.turned_stride, panel, n * L, part, n, none,
                          each, false, terms);
          else if (TransposeA)
            for_each_tile<A, true>(rows, buffers.rows + i * buffers.a_stride, buffers.a_stride, panel, n * L, part, n,
                                   none, each, false, terms);
          else
            for_each_tile(rows, a + m0 * a_stride + k0 + i, a_stride, panel, n * L, part, n, none, each, false, terms);
        }
      });
    }
  };
  const int64_t block_vectors = buffers.block_n / L;
  for (int64_t v = columns.begin; v < columns.end; v += block_vectors)
    for (int64_t k0 = 0; k0 < (k > 0 ? k : 1); k0 += kBlockK)
      block({v, v + block_vectors < columns.end ? v + block_vectors : columns.end}, k0,
            k - k0 < kBlockK ? k - k0 : kBlockK);
}

template <class T>
void gemm_worker(const GemmParams& p, char* workspace, int thread, int threads) {
  constexpr int L = Vec<T>::kLanes;
  Arena arena(workspace);
  const GemmBuffers<T> buffers(p.n, p.k, p.transpose_a, arena);
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b), *bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out);
  const bool by_rows = p.m >= p.n;
  const Range m = by_rows ? share(p.m, thread, threads) : Range{0, p.m};
  const Range columns = by_rows ? Range{0, ceil_div(p.n, L)} : share(ceil_div(p.n, L), thread, threads);
  const auto pack = [&](int64_t k0, int64_t depth, int64_t v, int n, T* panel) {
    if (p.transpose_b)
      pack_rows(b + v * L * p.b_stride + k0, p.b_stride, 0, 1, n, p.n - v * L, depth, panel);
    else
      pack_columns(b + k0 * p.b_stride + v * L, p.b_stride, n, p.n - v * L, 1, depth, depth, panel);
  };
  const auto keep = [&](int64_t row, int64_t v, int count, int64_t k0, const T* sums) {
    T* to = out + row * p.n + v * L;
    for_each_vector<T>(columns_of<T>(v, count, p.n), [&](int64_t j, int n) FASTRNN_INLINE_BODY {
      Vec<T> sum = load(sums + j);
      if (k0 > 0)
        sum = sum + load(to + j, n);
      else if (bias)
        sum = sum + load(bias + v * L + j, n);
      store(to + j, sum, n);
    });
  };
  if (p.transpose_a)
    multiply<T, true>(buffers, m, columns, p.k, a, p.a_stride, pack, keep);
  else
    multiply<T, false>(buffers, m, columns, p.k, a, p.a_stride, pack, keep);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
