// Grid tier, forward: grid_forward.cuh over multiprocessors that exchange results through L2.
#include "grid_forward.cuh"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, class Product>
__global__ void __launch_bounds__(tiles::kGridThreads, 1)
    grid_forward_kernel(LaunchParams<ForwardParams> p, GridShape s, void* workspace) {
  run_forward<Cell, S, Product>(p, s, workspace);
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
