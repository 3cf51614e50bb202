// A whole backward pass of the grid and cluster tiers: see grid.cuh. A block owns columns of weight_hh, its units'
// gradient of state 0, and multiplies the gate gradients of all units by them. The gate gradients of step k travel with
// tag `steps` - k, which counts up, in buffer k & 1.
#pragma once
#include "grid_product.cuh"
#include "unit_backward.cuh"

namespace fastrnn::cuda {

// kRagged: may rows differ, by lengths or resets?
template <class Cell, class S, class Product, bool kRagged = true>
FASTRNN_INLINE void run_backward(const LaunchParams<BackwardParams>& p, const GridShape& shape, void* workspace) {
  constexpr int G = Cell::kGates, N = Product::kValues;
  const GridShape s = shape_for<Product>(shape, G, true);
  const int group = p.first_group + int(blockIdx.z), first_unit = int(blockIdx.x) * s.units;
  const GridShared shared(dev::dynamic_shared(), s);
  sort_rows(p, s, group, shared);

  Product product(s, shared);
  product.load(grid_packed(workspace, s));
  dev::sync_block();

  const GridOwner o = grid_owner(p, s, shared);
  float carried[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    carried[n] = 0.f;
    if (n < o.units) clear_sums<Cell, S>(p, o.row, o.unit + n);
  }

  typename Product::Exchange exchange(workspace, s, shared, s.word_of(o.position, 0, o.unit));
  const PushedSums pushed = pushed_sums<Product>(s, o.position, o.unit - first_unit);

  const auto reset_at = [&](int k) -> uint8_t { return kRagged ? reset_before(p, o.row, k) : 0; };
  // Step -1 finishes: its product, over the gate gradients of step 0, goes to grad_h_0.
  const int steps = shared.length[0], end = finish_wanted(p) ? -1 : 0;
  int running = 0;  // rows with a step k + 1, then with a step k
  uint8_t crossed = 0, reset = reset_at(steps - 1);  // on entering steps k + 1 and k
  for (int k = steps - 1; k >= end; --k) {
    const int before = running;
    if (kRagged || k == steps - 1)
      while (running < s.rows && shared.length[running] > k) ++running;
    BackwardLoads<Cell, S> loads[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      load_backward<Cell, S>(p, o.row, k, n < o.units ? o.unit + n : s.hidden, reset, loads[n]);
    float* sums = k & 1 ? shared.sums_odd : shared.sums_even;
    const uint8_t reset_ahead = reset_at(k - 1);
    if (before > 0) product.multiply(exchange, k + 1, uint32_t(steps - k) - 1, before, sums);
    dev::sync_block();
    if (o.units && (!kRagged || k < 0 || o.row.running(k))) {
      float recurrent[1][N], grad_gates[G][N];
#pragma unroll
      for (int n = 0; n < N; ++n) recurrent[0][n] = 0.f;
      if (o.position < before)
        grid_sums<Product>(sums, s, pushed, o.position, o.unit - first_unit, 0, recurrent);
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int g = 0; g < G; ++g) grad_gates[g][n] = 0.f;
        if (n >= o.units) continue;
        if (k < 0) {
          finish_backward_unit<Cell, S>(p, o.row, o.unit + n, recurrent[0][n], carried[n], crossed);
          continue;
        }
        Pack<float, G> grad;
        backward_step<Cell, S>(p, o.row, k, o.unit + n, loads[n], recurrent[0][n], crossed, carried[n], grad);
#pragma unroll
        for (int g = 0; g < G; ++g) grad_gates[g][n] = grad[g];
      }
      if (k >= 0) {
#pragma unroll
        for (int g = 0; g < G; ++g)
          exchange.store(k, uint32_t(steps - k), g, Product::encode(grad_gates[g]));
      }
    }
    exchange.publish(k, uint32_t(steps - k), k > end);
    crossed = reset;
    reset = reset_ahead;
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (n < o.units) pad_backward<Cell, S>(p, o.row, o.unit + n);
}

}  // namespace fastrnn::cuda
