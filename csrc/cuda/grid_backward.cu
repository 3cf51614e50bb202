// Grid tier, backward: see grid.cuh. A block owns columns of weight_hh, its units' gradient of state 0, and
// multiplies the gate gradients of all units by them. The gate gradients of step k travel with tag `steps` - k, which
// counts up, in buffer k & 1.
#include "grid_product.cuh"
#include "unit_backward.cuh"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, class Product>
__global__ void __launch_bounds__(tiles::kGridThreads, 1)
    grid_backward_kernel(LaunchParams<BackwardParams> p, GridShape s, void* workspace) {
  constexpr int G = Cell::kGates, N = Product::kValues;
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

  const Exchange<typename Product::Way> exchange(workspace, s, s.word_of(o.position, 0, o.unit));

  // Step -1 finishes: its product, over the gate gradients of step 0, goes to grad_h_0.
  const int steps = shared.length[0], end = finish_wanted(p) ? -1 : 0;
  int running = 0;  // rows with a step k + 1, then with a step k
  uint8_t crossed = 0, reset = reset_before(p, o.row, steps - 1);  // on entering steps k + 1 and k
  for (int k = steps - 1; k >= end; --k) {
    const int before = running;
    while (running < s.rows && shared.length[running] > k) ++running;
    BackwardLoads<Cell, S> loads[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      load_backward<Cell, S>(p, o.row, k, n < o.units ? o.unit + n : s.hidden, reset, loads[n]);
    float* sums = k & 1 ? shared.sums_odd : shared.sums_even;
    const uint8_t reset_ahead = reset_before(p, o.row, k - 1);
    if (before > 0) product.multiply(exchange, k + 1, uint32_t(steps - k) - 1, before, sums);
    dev::sync_block();
    if (o.units && (k < 0 || o.row.running(k))) {
      float recurrent[1][N], grad_gates[G][N];
#pragma unroll
      for (int n = 0; n < N; ++n) recurrent[0][n] = 0.f;
      if (o.position < before) grid_sums<Product::kStride>(sums, s, o.position, o.unit - first_unit, 0, recurrent);
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
          exchange.store(k, uint32_t(steps - k), g * Product::kTileWords, Product::encode(grad_gates[g]));
      }
    }
    exchange.publish(uint32_t(steps - k));
    crossed = reset;
    reset = reset_ahead;
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (n < o.units) pad_backward<Cell, S>(p, o.row, o.unit + n);
}

}  // namespace

int grid_backward(const BackwardParams& params, const Choice& choice, void* workspace, void* stream) {
  if (!check_sizes(params)) return int(dev::kInvalidValue);
  const GridShape s = grid_shape(params, choice, true);
  if (!grid_takes(params, s)) return int(dev::kInvalidValue);
  return for_each_launch(params, [&](const LaunchParams<BackwardParams>& call) {
    return with_exchange_and_cell(s, call.cell, [&](auto way, auto cell) {
      using Way = typename decltype(way)::type;
      using Cell = typename decltype(cell)::type;
      constexpr int G = Cell::kGates;
      if (s.half)
        return with_half(call.dtype, [&](auto type) {
          using S = typename decltype(type)::type;
          using Product = MmaProduct<S, 1, G, Way>;
          return launch_grid(grid_backward_kernel<Cell, S, Product>, call, s, workspace, stream);
        });
      if (s.mma) {
        using Product = MmaProduct<float, 1, G, Way>;
        return launch_grid(grid_backward_kernel<Cell, float, Product>, call, s, workspace, stream);
      }
      using Product = FfmaProduct<8, G, Way>;
      return launch_grid(grid_backward_kernel<Cell, float, Product>, call, s, workspace, stream);
    });
  });
}

}  // namespace fastrnn::cuda
