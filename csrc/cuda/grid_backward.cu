// Grid tier, backward: grid_backward.cuh over multiprocessors that exchange results through L2.
#include "grid_backward.cuh"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, class Product>
__global__ void __launch_bounds__(tiles::kGridThreads, 1)
    grid_backward_kernel(LaunchParams<BackwardParams> p, GridShape s, void* workspace) {
  run_backward<Cell, S, Product>(p, s, workspace);
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
