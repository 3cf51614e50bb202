// Resident tier, backward: a block runs all steps of one tile of rows of one group, from the last to the first,
// with a block barrier a step. Step k multiplies the gate gradients of step k + 1 and then makes its own.
#include "resident.cuh"
#include "unit_backward.cuh"

namespace fastrnn::cuda {

// What a thread knows of the resets around the step k it is at. Each flag is loaded a step before it is looked at.
struct Boundaries {
  unsigned flags;   // bit 0: on entering k + 1; bit 1: on entering k
  uint8_t earlier;  // on entering k - 1
  FASTRNN_INLINE Boundaries(const ForwardParams& p, const RowWalk& r, int k)
      : flags(bit(p, r, k + 1) | bit(p, r, k) << 1), earlier(reset_before(p, r, k - 1)) {}
  FASTRNN_INLINE bool after() const { return flags & 1u; }
  FASTRNN_INLINE bool before() const { return flags & 2u; }
  FASTRNN_INLINE void step_to(const ForwardParams& p, const RowWalk& r, int k) {
    flags = flags >> 1 | unsigned(earlier != 0) << 1;
    earlier = reset_before(p, r, k - 1);
  }

 private:
  static FASTRNN_INLINE unsigned bit(const ForwardParams& p, const RowWalk& r, int k) {
    return reset_before(p, r, k) != 0;
  }
};

// float32. 16 lanes share 4 columns of h and split the product; then lane l has row l / 4 (kRows = 4) and column
// l % 4, or lane 4 l the only row's column l.
template <class Cell, int kRows>
__global__ void __launch_bounds__(kFfmaThreads, 1) resident_ffma_backward_kernel(LaunchParams<BackwardParams> p) {
  constexpr int G = Cell::kGates, kLanes = 16, kColumns = 4;
  const int h = int(p.hidden), first_row = int(blockIdx.x) * kRows, group_here = int(blockIdx.y);
  const int lane = int(threadIdx.x) % kLanes, first = int(threadIdx.x) / kLanes * kColumns;
  const int row = kRows == 1 ? 0 : lane / kColumns, j = first + (kRows == 1 ? lane / kColumns : lane % kColumns);
  const int segment = ffma_segment(h);
  using Shared = FfmaBackward<Cell, kRows>;
  const Shared s(dev::dynamic_shared(), G * segment, int(blockDim.x));
  RowWalk r = row_of(p, group_here, first_row + row);
  const int steps = longest(p, r.group, first_row, kRows);
  if (j >= h || (kRows == 1 && lane % kColumns > 0)) r.length = -1;  // idle throughout

  ResidentFfma<Shared> product;
  const float* weight = static_cast<const float*>(p.weight_hh) + int64_t(r.group) * G * h * h;
  product.load(s, [&](int column, int term) {
    const int gate = term / segment, unit = term % segment;
    const bool there = gate < G && unit < h && first + column < h;
    return there ? weight[(int64_t(gate) * h + unit) * h + first + column] : 0.f;
  });
  clear_shared(s.even, kRows * s.stride);
  clear_shared(s.odd, kRows * s.stride);

  if (r.present()) clear_sums<Cell, float>(p, r, j);
  float carried = 0.f;
  Boundaries resets(p, r, steps - 1);
  BackwardLoads<Cell, float> loads;
  load_backward<Cell, float>(p, r, steps - 1, j, resets.before(), loads);
  dev::sync_block();

  const int end = finish_wanted(p) ? -1 : 0;  // k = -1: the initial state
  for (int k = steps - 1; k >= end; --k) {
    const float* from = k % 2 == 0 ? s.odd : s.even;
    float* to = k % 2 == 0 ? s.even : s.odd;
    float sum[kRows][kColumns];
    product.multiply(from, s.stride, sum);
    float all[kRows * kColumns];
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) all[i] = sum[i / kColumns][i % kColumns];
    const float recurrent = group_sum<kLanes, kRows * kColumns>(all);
    if (k < 0) {
      if (r.present()) finish_backward_unit<Cell, float>(p, r, j, recurrent, carried, resets.after());
    } else {
      if (r.running(k)) {
        Pack<float, G> grad_gates;
        backward_step<Cell, float>(p, r, k, j, loads, recurrent, resets.after(), carried, grad_gates);
#pragma unroll
        for (int g = 0; g < G; ++g) to[row * s.stride + g * segment + j] = grad_gates[g];
      }
      resets.step_to(p, r, k - 1);
      load_backward<Cell, float>(p, r, k - 1, j, resets.before(), loads);  // in flight during the next product
    }
    dev::sync_block();
  }
  if (r.present()) pad_backward<Cell, float>(p, r, j);
}

// bfloat16, float16. A lane has columns g, g + 8 of its warp's 16 and rows 2q, 2q + 1 of the tile's 8:
// resident.cuh.
template <class Cell, class S, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 1) resident_mma_backward_kernel(LaunchParams<BackwardParams> p) {
  constexpr int G = Cell::kGates;
  const int h = int(p.hidden), first_row = int(blockIdx.x) * kMmaRows, group_here = int(blockIdx.y);
  const int lane = int(threadIdx.x) % 32, g = lane / 4, q = lane % 4, warp = int(threadIdx.x) / 32;
  const int j = warp * 16 + g;
  using Shared = MmaBackward<Cell, S, kWarps>;
  const Shared s(dev::dynamic_shared(), h, int(blockDim.x));
  const RowWalk r[2] = {row_of(p, group_here, first_row + 2 * q), row_of(p, group_here, first_row + 2 * q + 1)};
  const int steps = longest(p, r[0].group, first_row, kMmaRows);

  ResidentMma<Shared> product;
  const S* weight = static_cast<const S*>(p.weight_hh) + int64_t(r[0].group) * G * h * h;
  product.load(s, [&](int gate, int column, int unit) {
    return column < h && unit < h ? weight[(int64_t(gate) * h + unit) * h + column] : zero<S>();
  });
  clear_shared(s.even, kMmaRows * s.stride);
  clear_shared(s.odd, kMmaRows * s.stride);

  const int word = warp * 8 + g;  // of both units in a gate's part of a row
  float carried[2][2] = {{0.f, 0.f}, {0.f, 0.f}};  // [row][unit]
  Boundaries resets[2] = {Boundaries(p, r[0], steps - 1), Boundaries(p, r[1], steps - 1)};
  BackwardLoads<Cell, S> loads[2][2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      if (r[c].present() && j + 8 * u < h) clear_sums<Cell, S>(p, r[c], j + 8 * u);
      load_backward<Cell, S>(p, r[c], steps - 1, j + 8 * u, resets[c].before(), loads[c][u]);
    }
  }
  dev::sync_block();

  const int end = finish_wanted(p) ? -1 : 0;  // k = -1: the initial state
  for (int k = steps - 1; k >= end; --k) {
    const uint32_t* from = k % 2 == 0 ? s.odd : s.even;
    uint32_t* to = k % 2 == 0 ? s.even : s.odd;
    float sum[G][4];
    product.multiply(from, s.stride, s.gate_stride, sum);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      Pack<float, G> grad_gates[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int column = j + 8 * u;
        float recurrent = sum[0][2 * u + c];
#pragma unroll
        for (int gate = 1; gate < G; ++gate) recurrent += sum[gate][2 * u + c];
#pragma unroll
        for (int gate = 0; gate < G; ++gate) grad_gates[u][gate] = 0.f;
        if (k < 0) {
          if (r[c].present() && column < h)
            finish_backward_unit<Cell, S>(p, r[c], column, recurrent, carried[c][u], resets[c].after());
        } else if (r[c].running(k) && column < h) {
          backward_step<Cell, S>(p, r[c], k, column, loads[c][u], recurrent, resets[c].after(), carried[c][u],
                                 grad_gates[u]);
        }
      }
      if (k >= 0) {
        uint32_t* x = to + (2 * q + c) * s.stride + word;
#pragma unroll
        for (int gate = 0; gate < G; ++gate)
          x[gate * s.gate_stride] = dev::pack2(narrow<S>(grad_gates[0][gate]), narrow<S>(grad_gates[1][gate]));
        resets[c].step_to(p, r[c], k - 1);
#pragma unroll
        for (int u = 0; u < 2; ++u)
          load_backward<Cell, S>(p, r[c], k - 1, j + 8 * u, resets[c].before(), loads[c][u]);
      }
    }
    dev::sync_block();
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (r[c].present() && j + 8 * u < h) pad_backward<Cell, S>(p, r[c], j + 8 * u);
  }
}

int resident_backward(const BackwardParams& p, const Choice& choice, void* stream) {
  const int h = int(p.hidden), threads = resident_threads(p);
  if (p.dtype == DType::kFloat32)
    return with_ffma_tile(p, choice.rows, [&](auto cell, auto tile_rows) {
      using Cell = typename decltype(cell)::type;
      constexpr int kRows = decltype(tile_rows)::value;
      return launch_resident(resident_ffma_backward_kernel<Cell, kRows>, p, kRows,
                             FfmaBackward<Cell, kRows>(nullptr, Cell::kGates * ffma_segment(h), threads).bytes,
                             stream);
    });
  return with_mma_tile(p, choice.rows, [&](auto cell, auto storage, auto warps) {
    using Cell = typename decltype(cell)::type;
    using S = typename decltype(storage)::type;
    constexpr int kWarps = decltype(warps)::value;
    return launch_resident(resident_mma_backward_kernel<Cell, S, kWarps>, p, kMmaRows,
                           MmaBackward<Cell, S, kWarps>(nullptr, h, threads).bytes, stream);
  });
}

}  // namespace fastrnn::cuda
