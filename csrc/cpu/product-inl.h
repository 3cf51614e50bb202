// The product of a few rows with a panel of packed weights.
//
// A panel holds `depth` x N vectors: for each k, the weights that input k has for N vectors of outputs (panels-inl.h
// packs them); where kDepth neighbours along k are multiplied together, they stand side by side in each lane. It is read
// front to back, once per tile of rows, while the tile's M x N sums stay in registers.
#pragma once
#include "isa-inl.h"

#include "dual-inl.h"
#include "matrix-inl.h"
#include "operands-inl.h"
#include "scalar.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// How many rows' sums fit the register file beside `vectors` vectors of weights: it has 32 registers with AVX-512 and on
// AArch64, 16 elsewhere. A vector of dual numbers takes two, so a panel of those is multiplied kTileVectors vectors at a
// time.
#if FASTRNN_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif
constexpr int kMaxVectors = 4;
template <class T>
inline constexpr int kTileVectors = !kIsDual<T> ? kMaxVectors : kManyRegisters ? 2 : 1;
template <class T>
constexpr int max_rows(int vectors) {
  if (kIsDual<T>) return kManyRegisters ? 6 : 5;
  return kManyRegisters ? (vectors == 4 ? 6 : 8) : (vectors == 4 ? 2 : vectors == 3 ? 4 : 6);
}

// out[m][n] = sum_k a[m * stride + k] panel[k * panel_stride + n * L] + bias[n]; bias null means 0. It comes last: sums
// that start from a large one lose their small terms. out does not alias the rest, and has `vectors` vectors a row.
// Turned: a is transposed, a[k * stride + m], with kDepth neighbours along k side by side as in a panel, zeros at the end.
// With few sums in flight the chain of additions would wait for itself: U of them are interleaved over k.
template <class A, bool Turned, int M, int N, int U, Terms terms, class T = typename Compute<A>::type>
FASTRNN_ONE_COPY void product(const A* a, int64_t stride, const A* panel, int64_t panel_stride, int64_t depth,
                              const T* bias, T* out, int vectors) {
  using V = Vec<T>;
  constexpr int L = V::kLanes, D = kDepth<A>;
  const auto x = [&](int64_t k, int m) { return a + (Turned ? (k * stride + m) * D : m * stride + k * D); };
  const int64_t whole = Turned ? ceil_div(depth, D) : depth / D;
  panel_stride *= D;
  V sum[U][M][N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) sum[u][m][n] = V(0);
  int64_t k = 0;
  for (; k + U <= whole; k += U) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      Operands<A> w[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) w[n] = load_operands(panel + n * L * D);
      panel += panel_stride;
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Operands<A> of_row = operands_everywhere(x(k + u, m));
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[u][m][n] = add_products<terms>(sum[u][m][n], of_row, w[n]);
      }
    }
  }
  const auto add = [&](int left) FASTRNN_INLINE_BODY {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sum[0][m][n] =
            add_products<terms>(sum[0][m][n], operands_everywhere(x(k, m), left), load_operands(panel + n * L * D));
  };
  for (; k < whole; ++k, panel += panel_stride) add(D);
  if constexpr (!Turned && D > 1)
    if (depth % D) add(1);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const V last = bias ? load(bias + n * L) : V(0);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) sum[0][m][n] = sum[0][m][n] + sum[u][m][n];
      store(out + (m * vectors + n) * L, sum[0][m][n] + last);
    }
  }
}

template <class A, class T = typename Compute<A>::type>
using Product = void (*)(const A*, int64_t, const A*, int64_t, int64_t, const T*, T*, int);

template <class A, bool Turned, Terms terms, int N, int M = 1>
Product<A> pick_product(int rows, bool uniform) {
  if constexpr (M < max_rows<A>(N)) {
    if (rows > M) return pick_product<A, Turned, terms, N, M + 1>(rows, uniform);
  }
  constexpr int in_flight = M * N * (kIsDual<A> ? 2 : 1);
  constexpr int U = in_flight >= 8 ? 1 : in_flight >= 4 ? 2 : 4;
  if constexpr (!Turned && U > 1)
    if (uniform) return product<A, Turned, M, N, 1, terms>;
  return product<A, Turned, M, N, U, terms>;
}

// rows in 1..max_rows<A>(vectors), vectors in 1..kTileVectors<A>. uniform (not Turned): sums are the same whatever these
// are.
template <class A, bool Turned, Terms terms>
Product<A> pick_product(int rows, int vectors, bool uniform) {
  if constexpr (kTileVectors<A> == kMaxVectors) {
    if (vectors == 3) return pick_product<A, Turned, terms, 3>(rows, uniform);
    if (vectors == 4) return pick_product<A, Turned, terms, 4>(rows, uniform);
  }
  if constexpr (kTileVectors<A> > 1)
    if (vectors == 2) return pick_product<A, Turned, terms, 2>(rows, uniform);
  return pick_product<A, Turned, terms, 1>(rows, uniform);
}
template <class A, bool Turned>
Product<A> pick_product(int rows, int vectors, bool uniform, Terms terms) {
  if constexpr (kIsDual<A>) {
    if (terms == Terms::kConstantWeights) return pick_product<A, Turned, Terms::kConstantWeights>(rows, vectors, uniform);
    if (terms == Terms::kSlope) return pick_product<A, Turned, Terms::kSlope>(rows, vectors, uniform);
    if (terms == Terms::kSlopeOfConstant) return pick_product<A, Turned, Terms::kSlopeOfConstant>(rows, vectors, uniform);
  }
  return pick_product<A, Turned, Terms::kAll>(rows, vectors, uniform);
}

// Does the matrix unit make sums of so many products with a panel? Their number alone decides, and not that of the rows, so
// a sum is the same whatever other rows there are.
template <class A>
bool by_matrix_unit([[maybe_unused]] int64_t depth) {
  if constexpr (kDepth<A> == 2) return depth >= kMatrixDepth && has_matrix_unit();
  else return false;
}

// The product of 1..2 kMatrixRows rows with a panel by that unit. The products beyond the last multiple of kMatrixDepth, which
// would fill no register, are added by product().
template <class A>
void multiply_by_matrix_unit(int rows, const A* a, int64_t stride, const A* panel, int64_t panel_stride, int64_t depth,
                             int vectors, const float* bias, float* sums, bool uniform) {
  constexpr int L = Vec<float>::kLanes;
  const int64_t whole = depth / kMatrixDepth * kMatrixDepth, row = vectors * L;
  matrix_product(a, stride, rows, panel, panel_stride, whole, bias, sums, vectors);
  if (whole == depth) return;
  alignas(64) float rest[8 * kMaxVectors * L];
  const int most = max_rows<A>(vectors);
  for (int first = 0; first < rows; first += most) {
    const int some = rows - first < most ? rows - first : most;
    const float* none = nullptr;
    pick_product<A, false>(some, vectors, uniform, Terms::kAll)(
        a + first * stride + whole, stride, panel + whole * panel_stride, panel_stride, depth - whole, none, rest, vectors);
    for (int64_t j = 0; j < some * row; j += L) store(sums + first * row + j, load(sums + first * row + j) + load(rest + j));
  }
}

// A tile's `rows` rows of sums, [rows][vectors][lanes].
template <class A, bool Turned, class T = typename Compute<A>::type>
FASTRNN_HD void multiply_tile(bool matrix, int rows, const A* a, int64_t stride, const A* panel, int64_t panel_stride,
                              int64_t depth, int vectors, const T* bias, T* sums, bool uniform, Terms terms) {
  if constexpr (!Turned && kDepth<A> == 2)
    if (matrix)
      return multiply_by_matrix_unit(rows, a, stride, panel, panel_stride, depth, vectors, bias, sums, uniform);
  for (int n = 0; n < vectors; n += kTileVectors<A>) {
    const int some = vectors - n < kTileVectors<A> ? vectors - n : kTileVectors<A>;
    const int64_t at = n * Vec<T>::kLanes;
    pick_product<A, Turned>(rows, some, uniform, terms)(a, stride, panel + at * kDepth<A>, panel_stride, depth,
                                                        bias ? bias + at : nullptr, sums + at, vectors);
  }
}

// How `count` rows are cut into tiles, as even as can be, so that none is left with a single row.
struct TileRows {
  const int64_t count, tiles;
  TileRows(int64_t count, int most) : count(count), tiles(ceil_div(count, most)) {}
  int64_t begin(int64_t tile) const { return count * tile / tiles; }
};

// The product of rows a[0 .. count) with a panel, out [count][vectors][lanes].
template <class A, class T = typename Compute<A>::type>
void multiply_rows(int64_t count, const A* a, int64_t stride, const A* panel, int64_t panel_stride, int64_t depth,
                   int vectors, const T* bias, T* out, bool uniform, Terms terms) {
  const bool matrix = by_matrix_unit<A>(depth);
  const TileRows rows(count, matrix ? 2 * kMatrixRows : max_rows<A>(vectors));
  for (int64_t i = 0; i < rows.tiles; ++i) {
    const int64_t begin = rows.begin(i);
    multiply_tile<A, false>(matrix, int(rows.begin(i + 1) - begin), a + begin * stride, stride, panel, panel_stride,
                            depth, vectors, bias, out + begin * vectors * Vec<T>::kLanes, uniform, terms);
  }
}

// Calls body(first_row, M, sums) for parts of tiles of rows a[first .. first + count), at most max_rows of them, sums
// [M][vectors][lanes].
template <class A, bool Turned = false, class Body>
FASTRNN_HD void for_each_tile(int64_t count, const A* a, int64_t stride, const A* panel, int64_t panel_stride,
                              int64_t depth, int vectors, const typename Compute<A>::type* bias, Body body,
                              bool uniform = false, Terms terms = Terms::kAll) {
  using T = typename Compute<A>::type;
  constexpr bool kMatrix = !Turned && kDepth<A> == 2;
  alignas(64) T sums[(kMatrix ? 2 * kMatrixRows : 8) * kMaxVectors * Vec<T>::kLanes];
  const bool matrix = kMatrix && by_matrix_unit<A>(depth);
  const int most = max_rows<A>(vectors);
  const TileRows rows(count, matrix ? 2 * kMatrixRows : most);
  for (int64_t i = 0; i < rows.tiles; ++i) {
    const int64_t begin = rows.begin(i), end = rows.begin(i + 1);
    multiply_tile<A, Turned>(matrix, int(end - begin), a + begin * (Turned ? kDepth<A> : stride), stride, panel,
                             panel_stride, depth, vectors, bias, sums, uniform, terms);
    for (int64_t first = begin; first < end; first += most)
      body(first, int(end - first < most ? end - first : most),
           static_cast<const T*>(sums + (first - begin) * vectors * Vec<T>::kLanes));
  }
}

// for_each_tile where a panel may be deeper than the second-level cache holds: all tiles take one part of it after the
// other, and `sums` [count][vectors][lanes] is where they add up. So they do where the panel is columns of weights as they
// are stored, of which that cache does not hold all: lines so far apart do not come ahead of their use, and drive each other
// out. A part of those is copied side by side first, if there are tiles enough to repay it, and while tiles multiply with
// it the next one is fetched; into the second level, for fetches into the first one would keep its few misses in flight
// from those that a sum waits for.
template <class A, class Body>
FASTRNN_HD void for_each_deep_tile(int64_t count, const A* a, int64_t stride, const A* panel, int64_t panel_stride,
                                   int64_t depth, int vectors, typename Compute<A>::type* sums, Body body,
                                   Terms terms = Terms::kAll) {
  using T = typename Compute<A>::type;
  constexpr int L = Vec<T>::kLanes;
  constexpr int64_t kPart = (256 << 10) / (kMaxVectors * FASTRNN_VECTOR_BYTES), kCopiedPart = 128, kCached = 1 << 20;
  constexpr int kStep = kDepth<A> == 1 ? 1 : kMatrixDepth;
  const T* none = nullptr;
  const int64_t row = vectors * L;
  const bool copies = kDepth<A> == 1 && panel_stride != row && depth * panel_stride * int64_t(sizeof(A)) > kCached &&
                      count > 2 * max_rows<A>(vectors);
  if (!copies && depth < 2 * kPart)
    return for_each_tile(count, a, stride, panel, panel_stride, depth, vectors, none, body, false, terms);
  alignas(64) A copied[kCopiedPart * kMaxVectors * L];
  const int64_t parts = copies ? ceil_div(depth, kCopiedPart) : depth / kPart;
  const auto first_of_part = [&](int64_t i) { return i >= parts ? depth : depth * i / parts / kStep * kStep; };
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t k = first_of_part(i), end = first_of_part(i + 1), next = first_of_part(i + 2) - end;
    const A* part = panel + k * panel_stride;
    if (copies)
      for (int64_t j = 0; j < end - k; ++j)
        for (int64_t n = 0; n < row; n += L) store_operands(copied + j * row + n, load_operands(part + j * panel_stride + n));
    const auto each = [&](int64_t first, int rows, const T* sums_of_part) {
      if (copies)  // the tile's share of the next part
        for (int64_t j = end + next * first / count; j < end + next * (first + rows) / count; ++j)
          for (int64_t n = 0; n < row; n += int64_t(64 / sizeof(A))) __builtin_prefetch(panel + j * panel_stride + n, 0, 2);
      T* to = sums + first * row;
      for (int64_t j = 0; j < rows * row; j += L) {
        Vec<T> sum = load(sums_of_part + j);
        if (i > 0) sum = sum + load(to + j);
        store(to + j, sum);
      }
      if (i + 1 == parts) body(first, rows, static_cast<const T*>(to));
    };
    for_each_tile(count, a + k, stride, copies ? copied : part, copies ? row : panel_stride, end - k, vectors, none, each,
                  false, terms);
  }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
