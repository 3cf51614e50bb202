// Grid tier, forward: see grid.cuh. All gates of a unit belong to one block, and what a (row, unit) carries stays in
// a register of its owner. The state before step k travels with tag k + 1 in buffer k & 1; the initial one too.
#include "grid_product.cuh"
#include "unit_forward.cuh"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, class Product>
__global__ void __launch_bounds__(tiles::kGridThreads, 1)
    grid_forward_kernel(LaunchParams<ForwardParams> p, GridShape s, void* workspace) {
  constexpr int G = Cell::kGates, N = Product::kValues;
  const int group = p.first_group + int(blockIdx.z), first_unit = int(blockIdx.x) * s.units;
  const GridShared shared(dev::dynamic_shared(), s);
  sort_rows(p, s, group, shared);

  Product product(s, shared);
  product.load(grid_packed(workspace, s));
  dev::sync_block();

  const GridOwner o = grid_owner(p, s, shared);
  const Exchange<typename Product::Way> exchange(workspace, s, s.word_of(o.position, 0, o.unit));
  float carried[N], start[N];
  Pack<S, G> gates[N];
  Pack<float, G> of_unit[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    carried[n] = start[n] = 0.f;
    load_bias<Cell, S>(p, group, n < o.units ? o.unit + n : s.hidden, of_unit[n]);
    load_gates<Cell, S>(p, o.row, 0, n < o.units ? o.unit + n : s.hidden, gates[n]);
    if (n >= o.units) continue;
    const bool reset = reset_before(p, o.row, 0);
    start[n] = start_h<S>(p, o.row, o.unit + n, reset);
    carried[n] = start_carried<Cell, S>(p, o.row, o.unit + n, reset, start[n]);
  }
  uint32_t bias[G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float of_gate[N];
#pragma unroll
    for (int n = 0; n < N; ++n) of_gate[n] = of_unit[n][g];
    bias[g] = hold<S>(of_gate);
  }
  if (o.units && o.row.running(0)) exchange.store(0, 1, 0, Product::encode(start));
  exchange.publish(1);

  const int steps = shared.length[0];
  int running = s.rows;
  for (int k = 0; k < steps; ++k) {
    while (shared.length[running - 1] <= k) --running;
    const uint8_t reset_next = reset_before(p, o.row, k + 1);
    float* sums = k & 1 ? shared.sums_odd : shared.sums_even;
    product.multiply(exchange, k, uint32_t(k) + 1, running, sums);
    Pack<S, G> gates_next[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      load_gates<Cell, S>(p, o.row, k + 1, n < o.units ? o.unit + n : s.hidden, gates_next[n]);
    dev::sync_block();
    const bool own = o.units && o.row.running(k);
    ForwardOut<Cell, float> out[N];
    if (own) {
      float z[G][N], next[N];
      grid_sums<Product::kStride>(sums, s, o.position, o.unit - first_unit, Product::gate_columns(s), z);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        next[n] = 0.f;
        if (n >= o.units) continue;
        Pack<float, G> gates_hh;
#pragma unroll
        for (int g = 0; g < G; ++g) gates_hh[g] = z[g][n] + held<S, N>(bias[g], n);
        run_cell<Cell, S>(p, o.row, o.unit + n, gates[n], gates_hh, carried[n], out[n]);
        next[n] = next_h<S>(p, o.row, o.unit + n, out[n].state[0], reset_next);
        if constexpr (Cell::kStates == 1) carried[n] = next[n];
      }
      if (o.row.running(k + 1)) exchange.store(k + 1, uint32_t(k) + 2, 0, Product::encode(next));
    }
    // The others wait for this, and for nothing else that follows.
    exchange.publish(uint32_t(k) + 2);
    if (own) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n >= o.units) continue;
        store_cell<Cell, S>(p, o.row, k, o.unit + n, out[n], reset_next, carried[n]);
        store_h<S>(p, o.row, k, o.unit + n, out[n].state[0], reset_next);
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) gates[n] = gates_next[n];
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (n < o.units) pad_forward<Cell, S>(p, o.row, o.unit + n);
}

}  // namespace

int grid_forward(const ForwardParams& params, const Choice& choice, void* workspace, void* stream) {
  if (!check_sizes(params)) return int(dev::kInvalidValue);
  const GridShape s = grid_shape(params, choice, false);
  if (!grid_takes(params, s)) return int(dev::kInvalidValue);
  return for_each_launch(params, [&](const LaunchParams<ForwardParams>& call) {
    return with_exchange_and_cell(s, call.cell, [&](auto way, auto cell) {
      using Way = typename decltype(way)::type;
      using Cell = typename decltype(cell)::type;
      constexpr int G = Cell::kGates;
      if (s.half)
        return with_half(call.dtype, [&](auto type) {
          using S = typename decltype(type)::type;
          using Product = MmaProduct<S, G, 1, Way>;
          return launch_grid(grid_forward_kernel<Cell, S, Product>, call, s, workspace, stream);
        });
      if (s.mma) {
        using Product = MmaProduct<float, G, 1, Way>;
        return launch_grid(grid_forward_kernel<Cell, float, Product>, call, s, workspace, stream);
      }
      using Product = FfmaProduct<32, 1, Way>;
      return launch_grid(grid_forward_kernel<Cell, float, Product>, call, s, workspace, stream);
    });
  });
}

}  // namespace fastrnn::cuda
