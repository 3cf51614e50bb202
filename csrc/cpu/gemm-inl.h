// The matrix products around a recurrence (the gradients of weights and input) by the recurrence's own micro-kernel.
// Included once per instruction set, after product-inl.h.
//
// Each thread owns a range of rows, or of columns where there are more of those, and packs what it needs itself: no
// barrier. k is cut into blocks so that a packed panel and the rows it meets stay in the second-level cache.

constexpr int64_t kBlockK = 128, kBlockM = 96, kBlockN = 512;

template <class T>
struct GemmBuffers {
  static constexpr int L = Vec<T>::kLanes;
  int64_t block_n, a_stride;
  T* panels;  // [block_n / (4 L)][kBlockK][4][L]
  T* rows;    // [kBlockK][a_stride]: a block of a where a is transposed, so that its lines lie together

  GemmBuffers(const GemmParams& p, Arena& arena)
      : block_n(round_up(p.n < kBlockN ? p.n : kBlockN, L)), a_stride(kBlockM + L) {
    panels = arena.take<T>(block_n * kBlockK);
    rows = p.transpose_a ? arena.take<T>(kBlockK * a_stride) : nullptr;
  }
};

template <class T>
void gemm_worker(const GemmParams& p, char* workspace, int thread, int threads) {
  constexpr int L = Vec<T>::kLanes;
  Arena arena(workspace);
  const GemmBuffers<T> buffers(p, arena);
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b), *bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out);
  const bool by_rows = p.m >= p.n;
  const Range m = by_rows ? share(p.m, thread, threads) : Range{0, p.m};
  const Range vectors = by_rows ? Range{0, ceil_div(p.n, L)} : share(ceil_div(p.n, L), thread, threads);

  for (int64_t v0 = vectors.begin; v0 < vectors.end; v0 += buffers.block_n / L) {
    const Range block{v0, v0 + buffers.block_n / L < vectors.end ? v0 + buffers.block_n / L : vectors.end};
    for (int64_t k0 = 0; k0 < (p.k > 0 ? p.k : 1); k0 += kBlockK) {
      const int64_t depth = p.k - k0 < kBlockK ? p.k - k0 : kBlockK;
      for_each_panel(block, kMaxVectors, [&](int64_t v, int n) {
        T* panel = buffers.panels + (v - v0) * L * kBlockK;
        if (p.transpose_b)
          pack_rows(b + v * L * p.b_stride + k0, p.b_stride, 0, 1, n, p.n - v * L, depth, panel);
        else
          pack_columns(b + k0 * p.b_stride + v * L, p.b_stride, n, p.n - v * L, 1, depth, depth, panel);
      });
      for (int64_t m0 = m.begin; m0 < m.end; m0 += kBlockM) {
        const int64_t rows = m.end - m0 < kBlockM ? m.end - m0 : kBlockM;
        if (p.transpose_a)
          for (int64_t k = 0; k < depth; ++k)
            for (int64_t i = 0; i < rows; i += L)
              store(buffers.rows + k * buffers.a_stride + i,
                    load(a + (k0 + k) * p.a_stride + m0 + i, int(rows - i < L ? rows - i : L)));
        for_each_panel(block, kMaxVectors, [&](int64_t v, int n) {
          const T* panel = buffers.panels + (v - v0) * L * kBlockK;
          const auto keep = [&](int64_t first, int count, const T* sums) {
            for (int i = 0; i < count; ++i)
              for (int q = 0; q < n; ++q) {
                const int64_t j = (v + q) * L;
                const int valid = int(p.n - j < L ? p.n - j : L);
                T* to = out + (m0 + first + i) * p.n + j;
                Vec<T> sum = load(sums + (i * n + q) * L);
                if (k0 > 0)
                  sum = sum + load(to, valid);
                else if (bias)
                  sum = sum + load(bias + j, valid);
                store(to, sum, valid);
              }
          };
          const T* none = nullptr;
          if (p.transpose_a)
            for_each_tile<T, true>(rows, buffers.rows, buffers.a_stride, panel, n * L, depth, n, none, keep);
          else
            for_each_tile(rows, a + m0 * p.a_stride + k0, p.a_stride, panel, n * L, depth, n, none, keep);
        });
      }
    }
  }
}
