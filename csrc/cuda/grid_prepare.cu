// Grid tier: the choice, the workspace, and the small kernel before each launch. That one clears the words of the
// exchange and lays every block's weights out as it will hold them, so that a block starts with coalesced loads of
// 16 bytes instead of thousands of single elements.
#include "grid.cuh"

namespace fastrnn::cuda {
namespace {

constexpr int kThreads = 256, kMostBlocks = 2048;

// Where element e of quad `index` of a block's packed weights, [tiles of units, ...], comes from: unit and gate of M
// and of K.
struct Element {
  int m_unit, m_gate, k_unit, k_gate;
};
FASTRNN_INLINE Element element(const GridShape& s, int index, int e) {
  Element x;
  int tile, k;
  const int unit_tile = s.cluster ? index / int(s.tile_quads()) : 0;
  index -= unit_tile * int(s.tile_quads());
  if (s.mma) {  // [tile, gate of M, lane]: a's registers, with s.values() elements each
    const int lane = index % 32, reg = e / s.values();
    tile = index / 32 / s.gates_in_m();
    x.m_gate = index / 32 % s.gates_in_m();
    x.m_unit = lane / 4 + reg % 2 * 8;
    k = (reg / 2 * 4 + lane % 4) * s.values() + e % s.values();
  } else {  // [k / 4, column, 4]
    const int column = index % s.columns(), at = index / s.columns() * 4 + e;
    tile = at / s.k_tile();
    k = at % s.k_tile();
    x.m_gate = column / s.tile_units();
    x.m_unit = column % s.tile_units();
  }
  x.m_unit += unit_tile * s.most_units();
  x.k_unit = tile / s.gates_in_k() * s.k_tile() + k;
  x.k_gate = tile % s.gates_in_k();
  return x;
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    prepare_grid_kernel(const S* weight_hh, GridShape s, int groups, void* workspace) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x, first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t words = s.all_words(groups), quads = s.packed_quads();
  uint32_t* results = static_cast<uint32_t*>(workspace);
  uint64_t* tagged_words = static_cast<uint64_t*>(workspace);
  if (s.flags) {
    for (int64_t i = first; i < words + s.all_flags(groups); i += step) results[i] = 0;
  } else {
    for (int64_t i = first; i < words; i += step)
      tagged_words[i] = s.unit_of_word(int(i % s.words())) < s.hidden ? 0 : kNoUnit;
  }
  uint4* packed = reinterpret_cast<uint4*>(static_cast<char*>(workspace) + s.exchange_bytes(groups));
  for (int64_t i = first; i < quads * s.unit_blocks() * groups; i += step) {
    const int index = int(i % quads), block = int(i / quads % s.unit_blocks());
    const S* weight = weight_hh + i / quads / s.unit_blocks() * s.gates * s.hidden * s.hidden;
    constexpr int N = sizeof(S) == 2 ? 8 : 4;
    S value[N];
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const Element x = element(s, index, e);
      const int unit = block * s.units + x.m_unit;
      const bool there =
          x.m_gate < s.gates_in_m() && x.m_unit < s.units && unit < s.hidden && x.k_unit < s.hidden;
      const int row = s.backward ? x.k_gate * s.hidden + x.k_unit : x.m_gate * s.hidden + unit;
      value[e] = there ? weight[int64_t(row) * s.hidden + (s.backward ? unit : x.k_unit)] : zero<S>();
    }
    uint32_t bits[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if constexpr (N == 8) bits[n] = dev::pack2(value[2 * n], value[2 * n + 1]);
      else bits[n] = s.mma ? dev::to_tf32(value[n]) : dev::float_to_bits(value[n]);
    }
    packed[i] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
  }
}

}  // namespace

int prepare_grid(const ForwardParams& p, int first_group, int groups, const GridShape& s, void* workspace,
                 dev::Stream stream) {
  const int64_t most = s.all_words(groups) + s.all_flags(groups) + s.packed_quads() * s.unit_blocks() * groups;
  const int64_t blocks = ceil_div(most, kThreads);
  dev::Launch launch{dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks)), kThreads, 0, 1, false, stream};
  const auto run = [&](auto type) {
    using S = typename decltype(type)::type;
    const S* weight = static_cast<const S*>(p.weight_hh) + first_group * (int64_t(s.gates) * s.hidden * s.hidden);
    return int(dev::launch(prepare_grid_kernel<S>, launch, weight, s, groups, workspace));
  };
  return s.half ? with_half(p.dtype, run) : run(Type<float>{});
}

static const char* description(const GridShape& s) {
  if (s.half)
    return s.flags ? "grid, mma, weights spread over multiprocessors, results beside flags"
                   : "grid, mma, weights spread over multiprocessors, {value, step} words";
  if (s.mma)
    return s.flags ? "grid, TF32 mma, weights spread over multiprocessors, results beside flags"
                   : "grid, TF32 mma, weights spread over multiprocessors, {value, step} words";
  return s.flags ? "grid, FFMA, weights spread over multiprocessors, results beside flags"
                 : "grid, FFMA, weights spread over multiprocessors, {value, step} words";
}

bool grid_choice(const ForwardParams& p, bool backward, const Device& device, bool allow_tf32, bool forced,
                 Choice* choice) {
  if (!check_sizes(p) || p.dtype == DType::kFloat64 || p.weight_hr || has_masks(p) || !is_pointwise(p.cell))
    return false;
  if (p.groups > kGroupsPerLaunch || p.batch > tiles::kGridBatch || device.compute_capability < 80) return false;
  const bool half = tiles::is_half(p.dtype), tf32 = allow_tf32 && p.dtype == DType::kFloat32;
  GridShape s{kCells[p.cell].gates, int32_t(p.hidden), int32_t(p.batch), 0, 0, 0, backward, half || tf32, half, false,
              false};
  if (!tiles::grid_fit(s, p.groups, device.multiprocessors, device.shared_per_block)) return false;
  // One step has nothing to exchange, and a product of cuBLAS is spread as well.
  if (!forced && (p.steps < 2 || s.exchanged_bytes() > tiles::kGridExchangeBytes)) return false;
  *choice = Choice{Tier::kGrid,
                   s.rows,
                   s.units,
                   s.flags ? kGridFlags : kGridWords,
                   tf32,
                   int64_t(s.unit_blocks()) * s.row_tiles() * p.groups,
                   s.threads,
                   s.shared_bytes(),
                   description(s)};
  return true;
}

int64_t grid_workspace_bytes(const ForwardParams& params, const Choice& choice, bool backward) {
  const int64_t groups = params.groups < kGroupsPerLaunch ? params.groups : kGroupsPerLaunch;
  const GridShape s = grid_shape(params, choice, backward);
  return s.exchange_bytes(groups) + 16 * s.packed_quads() * s.unit_blocks() * groups;
}

}  // namespace fastrnn::cuda
