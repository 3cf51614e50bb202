// Resident tier, forward: a block runs all steps of one tile of rows of one group, with a block barrier a step.
#include "resident.cuh"

namespace fastrnn::cuda {

// float32. The 4 lanes of a unit split its products; then lane l has row l (kRows = 4), or lane 0 the only one.
template <class Cell, int kRows>
__global__ void __launch_bounds__(kFfmaThreads, 1) resident_ffma_forward_kernel(LaunchParams<ForwardParams> p) {
  constexpr int G = Cell::kGates, kLanes = 4;
  const int h = int(p.hidden), first_row = int(blockIdx.x) * kRows, group_here = int(blockIdx.y);
  const int lane = int(threadIdx.x) % kLanes, j = int(threadIdx.x) / kLanes, row = kRows == 1 ? 0 : lane;
  using Shared = FfmaForward<Cell, kRows>;
  const Shared s(dev::dynamic_shared(), h, int(blockDim.x));
  RowWalk r = row_of(p, group_here, first_row + row);
  const int steps = longest(p, r.group, first_row, kRows);
  if (j >= h || (kRows == 1 && lane > 0)) r.length = -1;  // idle throughout

  ResidentFfma<Shared> product;
  const float* weight = static_cast<const float*>(p.weight_hh) + int64_t(r.group) * G * h * h;
  product.load(s, [&](int gate, int term) {
    return j < h && term < h ? weight[(int64_t(gate) * h + j) * h + term] : 0.f;
  });
  keep_bias<Cell, float>(p, r.group, s);
  clear_shared(s.even, kRows * s.stride);
  clear_shared(s.odd, kRows * s.stride);
  dev::sync_block();

  float carried = 0.f;
  if (r.present()) {
    const bool reset = reset_before(p, r, 0);
    const float start = start_h<float>(p, r, j, reset);
    carried = start_carried<Cell, float>(p, r, j, reset, start);
    s.even[row * s.stride + j] = start;
  }
  Pack<float, G> gates_ih;
  load_gates<Cell, float>(p, r, 0, j, gates_ih);
  uint8_t reset_next = reset_before(p, r, 1);
  dev::sync_block();

  for (int k = 0; k < steps; ++k) {
    const float* h_prev = k % 2 ? s.odd : s.even;
    float* h_next = k % 2 ? s.even : s.odd;
    float sum[kRows][G];
    product.multiply(h_prev, s.stride, sum);
    Pack<float, G> gates_hh;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float of_rows[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) of_rows[i] = sum[i][g];
      gates_hh[g] = group_sum<kLanes, kRows>(of_rows) + s.bias[g * s.units + j];
    }
    if (r.running(k))
      h_next[row * s.stride + j] =
          forward_step<Cell, float>(p, r, k, j, gates_ih, gates_hh, reset_next != 0, carried);
    load_gates<Cell, float>(p, r, k + 1, j, gates_ih);  // in flight until the next step's product is done
    reset_next = reset_before(p, r, k + 2);
    dev::sync_block();
  }
  if (r.present()) pad_forward<Cell, float>(p, r, j);
}

// bfloat16, float16. A lane has units g, g + 8 of its warp's 16 and rows 2q, 2q + 1 of the tile's 8: resident.cuh.
template <class Cell, class S, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 1) resident_mma_forward_kernel(LaunchParams<ForwardParams> p) {
  constexpr int G = Cell::kGates;
  const int h = int(p.hidden), first_row = int(blockIdx.x) * kMmaRows, group_here = int(blockIdx.y);
  const int lane = int(threadIdx.x) % 32, g = lane / 4, q = lane % 4, warp = int(threadIdx.x) / 32;
  const int j = warp * 16 + g;
  using Shared = MmaForward<Cell, S, kWarps>;
  const Shared s(dev::dynamic_shared(), h, int(blockDim.x));
  const RowWalk r[2] = {row_of(p, group_here, first_row + 2 * q), row_of(p, group_here, first_row + 2 * q + 1)};
  const int steps = longest(p, r[0].group, first_row, kMmaRows);

  ResidentMma<Shared> product;
  const S* weight = static_cast<const S*>(p.weight_hh) + int64_t(r[0].group) * G * h * h;
  product.load(s, [&](int gate, int unit, int term) {
    return unit < h && term < h ? weight[(int64_t(gate) * h + unit) * h + term] : zero<S>();
  });
  keep_bias<Cell, S>(p, r[0].group, s);
  clear_shared(s.even, kMmaRows * s.stride);
  clear_shared(s.odd, kMmaRows * s.stride);
  dev::sync_block();

  const int word = warp * 8 + g;  // of both units in a row of s.even, s.odd
  float carried[2][2];            // [row][unit]
  Pack<S, G> gates_ih[2][2];
  uint8_t reset_next[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const bool reset = reset_before(p, r[c], 0);
    float start[2] = {0.f, 0.f};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      carried[c][u] = 0.f;
      if (r[c].present() && j + 8 * u < h) {
        start[u] = start_h<S>(p, r[c], j + 8 * u, reset);
        carried[c][u] = start_carried<Cell, S>(p, r[c], j + 8 * u, reset, start[u]);
      }
      load_gates<Cell, S>(p, r[c], 0, j + 8 * u, gates_ih[c][u]);
    }
    s.even[(2 * q + c) * s.stride + word] = dev::pack2(narrow<S>(start[0]), narrow<S>(start[1]));
    reset_next[c] = reset_before(p, r[c], 1);
  }
  dev::sync_block();

  for (int k = 0; k < steps; ++k) {
    const uint32_t* h_prev = k % 2 ? s.odd : s.even;
    uint32_t* h_next = k % 2 ? s.even : s.odd;
    float sum[G][4];
    product.multiply(h_prev, s.stride, 0, sum);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float next[2] = {0.f, 0.f};
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        Pack<float, G> gates_hh;
#pragma unroll
        for (int gate = 0; gate < G; ++gate)
          gates_hh[gate] = sum[gate][2 * u + c] + s.bias[gate * s.units + j + 8 * u];
        if (r[c].running(k) && j + 8 * u < h)
          next[u] = forward_step<Cell, S>(p, r[c], k, j + 8 * u, gates_ih[c][u], gates_hh, reset_next[c] != 0,
                                          carried[c][u]);
        load_gates<Cell, S>(p, r[c], k + 1, j + 8 * u, gates_ih[c][u]);
      }
      h_next[(2 * q + c) * s.stride + word] = dev::pack2(narrow<S>(next[0]), narrow<S>(next[1]));
      reset_next[c] = reset_before(p, r[c], k + 2);
    }
    dev::sync_block();
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (r[c].present() && j + 8 * u < h) pad_forward<Cell, S>(p, r[c], j + 8 * u);
  }
}

// ---- the choice, for both directions, and the launcher ----

static int64_t shared_bytes(const ForwardParams& p, int rows, bool backward) {
  const int h = int(p.hidden), threads = resident_threads(p);
  if (p.dtype == DType::kFloat32)
    return with_ffma_tile(p, rows, [&](auto cell, auto tile_rows) {
      using Cell = typename decltype(cell)::type;
      constexpr int kRows = decltype(tile_rows)::value, G = Cell::kGates;
      return int(backward ? FfmaBackward<Cell, kRows>(nullptr, G * ffma_segment(h), threads).bytes
                          : FfmaForward<Cell, kRows>(nullptr, h, threads).bytes);
    });
  return with_mma_tile(p, rows, [&](auto cell, auto storage, auto warps) {
    using Cell = typename decltype(cell)::type;
    using S = typename decltype(storage)::type;
    constexpr int kWarps = decltype(warps)::value;
    return int(backward ? MmaBackward<Cell, S, kWarps>(nullptr, h, threads).bytes
                        : MmaForward<Cell, S, kWarps>(nullptr, h, threads).bytes);
  });
}

bool resident_choice(const ForwardParams& p, bool backward, const Device& device, Choice* choice) {
  if (p.dtype == DType::kFloat64 || p.weight_hr || has_masks(p) || !is_pointwise(p.cell)) return false;
  if (device.compute_capability < 80) return false;
  for (const tiles::ResidentTile& tile : tiles::kResidentTiles) {
    if (tile.half != tiles::is_half(p.dtype) || p.hidden > tile.max_hidden) continue;
    const int64_t blocks = ceil_div(p.batch, tile.rows) * p.groups;
    if (tile.fill && blocks > device.multiprocessors) continue;
    const int64_t shared = shared_bytes(p, tile.rows, backward);
    if (shared > device.shared_per_block) continue;
    *choice = Choice{};
    choice->tier = Tier::kResident;
    choice->rows = tile.rows;
    choice->blocks = blocks;
    choice->threads = resident_threads(p);
    choice->shared = shared;
    choice->description = tile.reason;
    return true;
  }
  return false;
}

int resident_forward(const ForwardParams& p, const Choice& choice, void* stream) {
  const int h = int(p.hidden), threads = resident_threads(p);
  if (p.dtype == DType::kFloat32)
    return with_ffma_tile(p, choice.rows, [&](auto cell, auto tile_rows) {
      using Cell = typename decltype(cell)::type;
      constexpr int kRows = decltype(tile_rows)::value;
      return launch_resident(resident_ffma_forward_kernel<Cell, kRows>, p, kRows,
                             FfmaForward<Cell, kRows>(nullptr, h, threads).bytes, stream);
    });
  return with_mma_tile(p, choice.rows, [&](auto cell, auto storage, auto warps) {
    using Cell = typename decltype(cell)::type;
    using S = typename decltype(storage)::type;
    constexpr int kWarps = decltype(warps)::value;
    return launch_resident(resident_mma_forward_kernel<Cell, S, kWarps>, p, kMmaRows,
                           MmaForward<Cell, S, kWarps>(nullptr, h, threads).bytes, stream);
  });
}

}  // namespace fastrnn::cuda
