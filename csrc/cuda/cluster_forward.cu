// Cluster tier, forward, and the choice for both passes: see cluster.cuh.
#include "cluster.cuh"
#include "grid_forward.cuh"

namespace fastrnn::cuda {
namespace {

template <class Cell, class S, class Product, bool kRagged>
__global__ void __launch_bounds__(tiles::kGridThreads, 1)
    cluster_forward_kernel(LaunchParams<ForwardParams> p, GridShape s, void* workspace) {
  if constexpr (dev::kClusters) run_forward<Cell, S, Product, kRagged>(p, s, workspace);
}

}  // namespace

// Whatever the kernel, one block fills a multiprocessor. 8 is what every device of this kind has.
int largest_cluster() {
  int blocks = 0;
  const auto kernel = cluster_forward_kernel<LSTMCell, dev::bf16, MmaProduct<dev::bf16, 4, 1, ByPushes>, false>;
  return dev::max_cluster_blocks(kernel, tiles::kGridThreads, &blocks) == dev::kSuccess ? blocks : 8;
}

static const char* cluster_description(const GridShape& s) {
  return s.half  ? "cluster, mma, results pushed between shared memories"
         : s.mma ? "cluster, TF32 mma, results pushed between shared memories"
                 : "cluster, FFMA, results pushed between shared memories";
}

bool cluster_choice(const ForwardParams& p, bool backward, const Device& device, bool allow_tf32, Choice* choice) {
  if (!check_sizes(p) || p.dtype == DType::kFloat64 || p.weight_hr || has_masks(p) || !is_pointwise(p.cell))
    return false;
  if (device.compute_capability < 90 || device.compute_capability >= 110) return false;
  const bool half = tiles::is_half(p.dtype), tf32 = allow_tf32 && p.dtype == DType::kFloat32;
  GridShape s{kCells[p.cell].gates, int32_t(p.hidden), int32_t(p.batch), 0, 0, 0, backward, half || tf32, half, false,
              true};
  if (!tiles::cluster_fit(s, p.groups, device.multiprocessors, device.shared_per_block, device.cluster_blocks))
    return false;
  *choice = Choice{Tier::kCluster,
                   s.rows,
                   s.units,
                   0,
                   tf32,
                   int64_t(s.unit_blocks()) * s.row_tiles() * p.groups,
                   s.threads,
                   s.shared_bytes(),
                   cluster_description(s)};
  return true;
}

int cluster_forward(const ForwardParams& params, const Choice& choice, void* workspace, void* stream) {
  if (!check_sizes(params)) return int(dev::kInvalidValue);
  const GridShape s = grid_shape(params, choice, false);
  if (!grid_takes(params, s)) return int(dev::kInvalidValue);
  return for_each_launch(params, [&](const LaunchParams<ForwardParams>& call) {
    return with_pushed_product<false>(call, s, [&](auto cell, auto storage, auto product, auto masks) {
      using Cell = typename decltype(cell)::type;
      using S = typename decltype(storage)::type;
      using Product = typename decltype(product)::type;
      constexpr bool kRagged = decltype(masks)::value;
      return launch_grid(cluster_forward_kernel<Cell, S, Product, kRagged>, call, s, workspace, stream);
    });
  });
}

}  // namespace fastrnn::cuda
