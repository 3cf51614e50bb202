// A whole forward pass of the grid and cluster tiers: see grid.cuh. All gates of a unit belong to one block, and what a
// (row, unit) carries stays in a register of its owner. The state before step k travels with tag k + 1 in buffer k & 1;
// the initial one too.
#pragma once
#include "grid_product.cuh"
#include "unit_forward.cuh"

namespace fastrnn::cuda {

// kRagged: may rows differ, by lengths or resets?
template <class Cell, class S, class Product, bool kRagged = true>
FASTRNN_INLINE void run_forward(const LaunchParams<ForwardParams>& p, const GridShape& shape, void* workspace) {
  constexpr int G = Cell::kGates, N = Product::kValues;
  const GridShape s = shape_for<Product>(shape, G, false);
  const int group = p.first_group + int(blockIdx.z), first_unit = int(blockIdx.x) * s.units;
  const GridShared shared(dev::dynamic_shared(), s);
  sort_rows(p, s, group, shared);

  Product product(s, shared);
  product.load(grid_packed(workspace, s));
  dev::sync_block();

  const GridOwner o = grid_owner(p, s, shared);
  typename Product::Exchange exchange(workspace, s, shared, s.word_of(o.position, 0, o.unit));
  const PushedSums pushed = pushed_sums<Product>(s, o.position, o.unit - first_unit);
  const auto reset_at = [&](int k) -> uint8_t { return kRagged ? reset_before(p, o.row, k) : 0; };
  float carried[N], start[N];
  Pack<S, G> gates[N];
  Pack<float, G> of_unit[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    carried[n] = start[n] = 0.f;
    load_bias<Cell, S>(p, group, n < o.units ? o.unit + n : s.hidden, of_unit[n]);
    load_gates<Cell, S>(p, o.row, 0, n < o.units ? o.unit + n : s.hidden, gates[n]);
    if (n >= o.units) continue;
    const bool reset = reset_at(0);
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
  const int gate_columns = Product::gate_columns(s), steps = shared.length[0];
  exchange.publish(0, 1, steps > 0);

  int running = s.rows;
  for (int k = 0; k < steps; ++k) {
    if (kRagged || k == 0)
      while (shared.length[running - 1] <= k) --running;
    const uint8_t reset_next = reset_at(k + 1);
    float* sums = k & 1 ? shared.sums_odd : shared.sums_even;
    product.multiply(exchange, k, uint32_t(k) + 1, running, sums);
    Pack<S, G> gates_next[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      load_gates<Cell, S>(p, o.row, k + 1, n < o.units ? o.unit + n : s.hidden, gates_next[n]);
    dev::sync_block();
    const bool own = o.units && (!kRagged || o.row.running(k));
    ForwardOut<Cell, float> out[N];
    if (own) {
      float z[G][N], next[N];
      grid_sums<Product>(sums, s, pushed, o.position, o.unit - first_unit, gate_columns, z);
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
    exchange.publish(k + 1, uint32_t(k) + 2, k + 1 < steps);
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

}  // namespace fastrnn::cuda
