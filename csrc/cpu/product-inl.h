// The recurrent product of a few rows with a panel of packed weights. Included once per instruction set.
//
// A panel holds `depth` x N vectors: for each k, the weights that input k has for N vectors of outputs. It is read
// front to back, once per tile of rows, while the tile's M x N sums stay in registers. Calls too short to repay the
// packing read the weights as they lie.

// Rows that fit the register file beside N vectors of weights: 32 registers with AVX-512, 16 elsewhere.
constexpr int kWide = FASTRNN_VECTOR_BYTES == 64;
constexpr int max_rows(int vectors) {
  return kWide ? (vectors == 4 ? 6 : 8) : (vectors == 4 ? 2 : vectors == 3 ? 4 : 6);
}
constexpr int kMaxVectors = 4;

// out[m][n] = sum_k a[m * stride + k] panel[k * panel_stride + n * L] + bias[n]; bias null means 0. It comes last: sums
// that start from a large one lose their small terms. out does not alias the rest. A packed panel has panel_stride
// N * L. Turned: a stands transposed, a[k * stride + m]. With few sums in flight the chain of additions would wait for
// itself: U of them are interleaved over k.
template <class T, bool Turned, int M, int N, int U>
__attribute__((noinline)) void product(const T* a, int64_t stride, const T* panel, int64_t panel_stride, int64_t depth,
                                       const T* bias, T* out) {
  using V = Vec<T>;
  constexpr int L = V::kLanes;
  typename V::Native sum[U][M][N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) sum[u][m][n] = typename V::Native{};
  int64_t k = 0;
  for (; k + U <= depth; k += U) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      typename V::Native w[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) w[n] = load(panel + n * L).v;
      panel += panel_stride;
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const typename V::Native x = V(Turned ? a[(k + u) * stride + m] : a[m * stride + k + u]).v;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sum[u][m][n] += x * w[n];
      }
    }
  }
  for (; k < depth; ++k, panel += panel_stride) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sum[0][m][n] += V(Turned ? a[k * stride + m] : a[m * stride + k]).v * load(panel + n * L).v;
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const typename V::Native last = bias ? load(bias + n * L).v : typename V::Native{};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) sum[0][m][n] += sum[u][m][n];
      store(out + (m * N + n) * L, V(sum[0][m][n] + last));
    }
  }
}

template <class T>
using Product = void (*)(const T*, int64_t, const T*, int64_t, int64_t, const T*, T*);

template <class T, bool Turned, int N, int M = 1>
Product<T> pick_product(int rows, bool uniform) {
  if constexpr (M < max_rows(N)) {
    if (rows > M) return pick_product<T, Turned, N, M + 1>(rows, uniform);
  }
  constexpr int U = M * N >= 8 ? 1 : M * N >= 4 ? 2 : 4;
  if constexpr (!Turned && U > 1)
    if (uniform) return product<T, Turned, M, N, 1>;
  return product<T, Turned, M, N, U>;
}

// rows in 1..max_rows(vectors), vectors in 1..kMaxVectors. uniform (not Turned): sums are the same whatever these are.
template <class T, bool Turned = false>
Product<T> pick_product(int rows, int vectors, bool uniform) {
  switch (vectors) {
    case 1:
      return pick_product<T, Turned, 1>(rows, uniform);
    case 2:
      return pick_product<T, Turned, 2>(rows, uniform);
    case 3:
      return pick_product<T, Turned, 3>(rows, uniform);
    default:
      return pick_product<T, Turned, 4>(rows, uniform);
  }
}

// Calls body(first_row, M, sums) for tiles of rows a[first .. first + count), sums [M][vectors][lanes]. Tiles are as
// even as can be, so that no tile is left with a single row.
template <class T, bool Turned = false, class Body>
FASTRNN_HD void for_each_tile(int64_t count, const T* a, int64_t stride, const T* panel, int64_t panel_stride,
                              int64_t depth, int vectors, const T* bias, Body body, bool uniform = false) {
  alignas(64) T sums[8 * kMaxVectors * Vec<T>::kLanes];
  const int64_t tiles = ceil_div(count, max_rows(vectors));
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = count * i / tiles, end = count * (i + 1) / tiles;
    pick_product<T, Turned>(int(end - begin), vectors, uniform)(a + (Turned ? begin : begin * stride), stride, panel,
                                                                panel_stride, depth, bias, sums);
    body(begin, int(end - begin), static_cast<const T*>(sums));
  }
}

// for_each_tile where a panel may be deeper than the second-level cache holds: all tiles take one part of it after the
// other, and `sums` [count][vectors][lanes] is where they add up.
template <class T, class Body>
FASTRNN_HD void for_each_deep_tile(int64_t count, const T* a, int64_t stride, const T* panel, int64_t panel_stride,
                                   int64_t depth, int vectors, T* sums, Body body) {
  constexpr int64_t kPart = (256 << 10) / (kMaxVectors * FASTRNN_VECTOR_BYTES);
  const T* none = nullptr;
  if (depth < 2 * kPart) return for_each_tile(count, a, stride, panel, panel_stride, depth, vectors, none, body);
  const int64_t parts = depth / kPart;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t k = depth * i / parts, end = depth * (i + 1) / parts;
    for_each_tile(count, a + k, stride, panel + k * panel_stride, panel_stride, end - k, vectors, none,
                  [&](int64_t first, int rows, const T* part) {
                    T* to = sums + first * vectors * Vec<T>::kLanes;
                    for (int64_t j = 0; j < rows * vectors; ++j, to += Vec<T>::kLanes) {
                      Vec<T> sum = load(part + j * Vec<T>::kLanes);
                      if (i > 0) sum = sum + load(to);
                      store(to, sum);
                    }
                    if (i + 1 == parts) body(first, rows, static_cast<const T*>(to - rows * vectors * Vec<T>::kLanes));
                  });
  }
}

// ---- the same from weights that are not packed: outputs are rows, so vectors run along k and lanes are summed ----

constexpr int kDotRows = 4, kDotOutputs = 4;

// Lane l of the result: lane index(l) of a, or, from kLanes on, of b.
template <class T, class Index>
FASTRNN_HD Vec<T> gather_lanes(Vec<T> a, Vec<T> b, Index index) {
  typename Vec<T>::Bits mask;
  for (int l = 0; l < Vec<T>::kLanes; ++l) mask[l] = index(l);
  return __builtin_shuffle(a.v, b.v, mask);
}

// Half as many lanes of each of what a and b hold in `parts` equal parts: those of a, then those of b.
template <int Parts, class T>
FASTRNN_HD Vec<T> merge_sums(Vec<T> a, Vec<T> b) {
  constexpr int L = Vec<T>::kLanes, kPart = L / Parts, kHalf = kPart / 2;
  const auto low = [](int l) { return l / kHalf * kPart + l % kHalf; };
  return gather_lanes(a, b, low) + gather_lanes(a, b, [&](int l) { return low(l) + kHalf; });
}

// The sums over all lanes of four vectors.
template <class T>
FASTRNN_HD void sum_lanes(const Vec<T> (&x)[4], T* out) {
  constexpr int L = Vec<T>::kLanes;
  static_assert(L >= 2);
  alignas(64) T lanes[L];
  if constexpr (L >= 4) {
    Vec<T> sums = merge_sums<2>(merge_sums<1>(x[0], x[1]), merge_sums<1>(x[2], x[3]));
#pragma GCC unroll 4
    for (int half = L / 8; half > 0; half /= 2)
      sums = sums + gather_lanes(sums, sums, [half](int l) { return l ^ half; });
    store(lanes, sums);
    for (int i = 0; i < 4; ++i) out[i] = lanes[i * (L / 4)];
  } else
    for (int i = 0; i < 4; ++i) {
      store(lanes, x[i]);
      out[i] = lanes[0] + lanes[1];
    }
}

// out[m * out_stride + n] = sum_k a[m * stride + k] w[n * ld + k]
template <class T, class S, int M, int N>
__attribute__((noinline)) void dot(const T* a, int64_t stride, const S* w, int64_t ld, int64_t depth, T* out,
                                   int64_t out_stride) {
  using V = Vec<T>;
  constexpr int L = V::kLanes;
  V sum[M][4];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sum[m][n] = V(0);
  int64_t k = 0;
  if constexpr (std::is_same_v<S, BFloat16>) {
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
    V x[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) x[m] = load(a + m * stride + k, lanes);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const V weight = load(w + n * ld + k, lanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][n] = sum[m][n] + x[m] * weight;
    }
  };
  for (; k + L <= depth; k += L) add(k, L);
  if (k < depth) add(k, int(depth - k));
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    T sums[4];
    sum_lanes(sum[m], sums);
    for (int n = 0; n < N; ++n) out[m * out_stride + n] = sums[n];
  }
}

template <class T, class S, int N>
void dot(int rows, const T* a, int64_t stride, const S* w, int64_t ld, int64_t depth, T* out, int64_t out_stride) {
  switch (rows) {
    case 1:
      return dot<T, S, 1, N>(a, stride, w, ld, depth, out, out_stride);
    case 2:
      return dot<T, S, 2, N>(a, stride, w, ld, depth, out, out_stride);
    case 3:
      return dot<T, S, 3, N>(a, stride, w, ld, depth, out, out_stride);
    default:
      return dot<T, S, 4, N>(a, stride, w, ld, depth, out, out_stride);
  }
}

// for_each_tile without packing. The outputs are those that pack_rows (below) would lay out as [n][lane]; bias points
// at the first of them and has the same gate_stride.
template <class T, class W, class S, class Body>
void for_each_dot_tile(int64_t count, const T* a, int64_t stride, const W* w, int64_t ld, int64_t gate_stride,
                       int gates, int unit_vectors, int64_t valid, int64_t depth, const S* bias, Body body) {
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
          dot<T, W, kDotOutputs>(rows, a + first * stride, stride, w + (at + i) * ld, ld, depth, to + i, outputs);
        for (; i < lanes; ++i)
          dot<T, W, 1>(rows, a + first * stride, stride, w + (at + i) * ld, ld, depth, to + i, outputs);
        for (int m = 0; m < rows; ++m) {
          for (int j = lanes; j < L; ++j) to[m * outputs + j] = 0;
          if (bias) store(to + m * outputs, load(to + m * outputs) + load(bias + at, lanes));
        }
      }
    body(first, rows, static_cast<const T*>(sums));
  }
}

// ---- packing: once per call ----

// Outputs are rows of the matrix: panel[k][n][lane] = w[(n * gate_stride + lane) * ld + k] for lane < valid, else 0.
// Several vectors of units: unit vector v (of `unit_vectors`) of gate g is n = v * gates + g, and starts L rows on.
template <class S, class T>
void pack_rows(const S* w, int64_t ld, int64_t gate_stride, int gates, int unit_vectors, int64_t valid, int64_t depth,
               T* panel) {
  constexpr int L = Vec<T>::kLanes;
  const int N = gates * unit_vectors;
  constexpr int64_t kBlock = 16;  // columns turned at a time: a cache line or less of each row
  for (int v = 0; v < unit_vectors; ++v)
    for (int g = 0; g < gates; ++g) {
      T* out = panel + (v * gates + g) * L;
      const int lanes = int(valid - v * L < 0 ? 0 : valid - v * L < L ? valid - v * L : L);
      const S* in = w + (g * gate_stride + v * L) * ld;
      for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
        const int64_t k1 = k0 + kBlock < depth ? k0 + kBlock : depth;
        alignas(64) T turned[kBlock][L] = {};
        for (int lane = 0; lane < lanes; ++lane) {
          alignas(64) T line[kBlock];
          for (int64_t k = k0; k < k1; k += L)
            store(line + (k - k0), load(in + lane * ld + k, int(k1 - k < L ? k1 - k : L)));
          for (int64_t k = k0; k < k1; ++k) turned[k - k0][lane] = line[k - k0];
        }
        for (int64_t k = k0; k < k1; ++k) store(out + k * N * L, load(turned[k - k0]));
      }
    }
}

// Outputs are columns: panel[k][n][lane] = w[k * ld + n * L + lane], 0 from column `valid` on. Rows come in `blocks`
// of `rows`, each block followed by zero rows up to `padded`.
template <class S, class T>
void pack_columns(const S* w, int64_t ld, int vectors, int64_t valid, int blocks, int64_t rows, int64_t padded,
                  T* panel) {
  constexpr int L = Vec<T>::kLanes;
  for (int block = 0; block < blocks; ++block)
    for (int64_t k = 0; k < padded; ++k)
      for (int n = 0; n < vectors; ++n, panel += L) {
        const int64_t left = k < rows ? valid - n * L : 0;
        store(panel, Vec<T>(load(w + (block * rows + (k < rows ? k : 0)) * ld + (left > 0 ? n * L : 0),
                                 int(left < 0 ? 0 : left < L ? left : L))));
      }
}
