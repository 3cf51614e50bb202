// Cluster tier, backward: see cluster.cuh.
#include "cluster.cuh"
#include "grid_backward.cuh"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, class Product, bool kRagged>
__global__ void __launch_bounds__(tiles::kGridThreads, 1)
    cluster_backward_kernel(LaunchParams<BackwardParams> p, GridShape s, void* workspace) {
  if constexpr (dev::kClusters) run_backward<Cell, S, Product, kRagged>(p, s, workspace);
}

}  // namespace

int cluster_backward(const BackwardParams& params, const Choice& choice, void* workspace, void* stream) {
  if (!check_sizes(params)) return int(dev::kInvalidValue);
  const GridShape s = grid_shape(params, choice, true);
  if (!grid_takes(params, s)) return int(dev::kInvalidValue);
  return for_each_launch(params, [&](const LaunchParams<BackwardParams>& call) {
    return with_pushed_product<true>(call, s, [&](auto cell, auto storage, auto product, auto masks) {
      using Cell = typename decltype(cell)::type;
      using S = typename decltype(storage)::type;
      using Product = typename decltype(product)::type;
      constexpr bool kRagged = decltype(masks)::value;
      return launch_grid(cluster_backward_kernel<Cell, S, Product, kRagged>, call, s, workspace, stream);
    });
  });
}

}  // namespace fastrnn::cuda
