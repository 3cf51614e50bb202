// The cluster tier: the grid tier's pass (grid_forward.cuh, grid_backward.cuh) with other neighbours. The blocks that
// share a tile of rows are a cluster of up to 16, hold all of a group's weights between them, and push a step's results
// into each other's shared memory; other clusters have other rows or groups, and nobody waits for them. A call whose
// weights do not fit one cluster is another tier's. For targets where dev::kClusters is true.
//
// A block has more units than in the grid tier, in tiles of a warp's width (GridShape::unit_tiles): its warps are
// [parts of K, tiles of units].
//
// The exchange. Each block has two buffers of results, for even and odd steps, and an mbarrier for each. Every block
// pushes its results to all blocks of the cluster, itself included. A push is a store that also counts its bytes on the
// mbarrier behind its destination. A phase of an mbarrier ends when its one arrival is there, which says how many bytes
// a step has, and as many have come: then a reader finds all results of all blocks. Phases alternate in parity; `tag`
// counts steps from 1, so what ends with the results of `tag` is phase (tag - 1) / 2 of its mbarrier.
//
// Why a push never meets what it must not. Bytes may be counted before the arrival that expects them, but never those
// of the next phase: who pushes step n + 2 has seen all of step n + 1, among them what this block made of it after its
// barrier of step n, when each of its threads had seen the phase of step n end and had read that step's buffer. So the
// buffer is free, its phase over and no thread still waits for it. The same chain orders those reads before the pushes.
// Before the first one there is a barrier of the cluster; behind the last, which every block waits for, none is needed.
// Rows that do not run are pushed too, as zeros, so that all phases have the same bytes.
#pragma once
#include "grid_product.cuh"

namespace fastrnn::cuda {

template <int kGates, int kTileWords>
class Exchange<ByPushes, kGates, kTileWords> {
  using Word = ByPushes::Word;
  static constexpr int kRanks = tiles::kClusterBlocks / 4;  // that a thread pushes to

 public:
  // Ends with a barrier of the cluster. word: as in the other exchanges.
  FASTRNN_INLINE Exchange(void*, const GridShape& s, const GridShared& shared, int word)
      : even(shared.pushed_even), odd(shared.pushed_odd), barrier_even(shared.barrier_even),
        barrier_odd(shared.barrier_odd), bytes(unsigned(s.pushed_bytes())), first(word / 4 * 4), own(word % 4),
        low(s.mma ? 4 : 1), high(s.mma ? 1 : 2), ranks(0) {
    const int tid = int(threadIdx.x), words = s.words_per_row(), rank = int(dev::cluster_rank());
    const int blocks = int(dev::cluster_size());
    in_four = dev::keep((tid & low ? 1 : 0) + (tid & high ? 2 : 0));
    arrives = dev::keep(tid == 0 ? 1 : 0);
    alone = blocks == 1;
    const bool owns = tid / words < s.rows && rank * s.units + tid % words * s.values() < s.pushed_units();
    pushes = !owns ? 0 : alone ? 1 : in_four < blocks ? ceil_div(blocks - in_four, 4) : 0;
    pushes = dev::keep(pushes);
    for (int n = pushes - 1; n >= 0; --n) ranks = ranks << 8 | uint32_t((rank + in_four + 4 * n) % blocks);
    // FFMA reads rows and units that are not, too.
    for (int i = tid; i < int(s.pushed_words()); i += int(blockDim.x)) even[i] = odd[i] = 0;
    if (tid == 0) {
      dev::mbarrier_init(barrier_even, 1);
      dev::mbarrier_init(barrier_odd, 1);
      dev::mbarrier_init_fence();
    }
    dev::sync_cluster();
#pragma unroll
    for (int g = 0; g < kGates; ++g) result[g] = 0;
  }

  FASTRNN_INLINE Word* words(int k) const { return k & 1 ? odd : even; }

  // Keeps the thread's result of the step until publish().
  FASTRNN_INLINE void store(int, uint32_t, int gate, uint32_t value) { result[gate] = value; }

  // All threads of the block, behind its barrier of the step. Four neighbouring words of a row are in four lanes; each
  // of these pushes all four to every fourth block, counted from its own, so that not all push to one at once.
  FASTRNN_INLINE void publish(int k, uint32_t, bool wanted) {
    if (wanted && alone) {
#pragma unroll
      for (int g = 0; g < kGates; ++g)
        if (pushes) words(k)[first + own + g * kTileWords] = result[g];
      dev::sync_block();
    } else if (wanted) {
      uint64_t* const barrier = barrier_of(k);
      if (arrives) dev::mbarrier_arrive_expect(barrier, bytes);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const uint4 four = gather(result[g]);
        uint4* const to = reinterpret_cast<uint4*>(words(k) + first + g * kTileWords);
        const auto push = [&](int n) { dev::push_async(to, four, barrier, ranks >> 8 * n & 0xffu); };
        if (pushes == kRanks) {  // one branch where there are as many blocks as may be
#pragma unroll
          for (int n = 0; n < kRanks; ++n) push(n);
        } else {
#pragma unroll
          for (int n = 0; n < kRanks - 1; ++n)
            if (n < pushes) push(n);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGates; ++g) result[g] = 0;
  }

  // Every thread that reads the step's results, and by its block's next barrier every thread of the block.
  FASTRNN_INLINE void await(int k, uint32_t tag, int, int) const {
    if (alone) return;  // behind publish()'s barrier
    const unsigned parity = (tag - 1) / 2 % 2;
    if constexpr (kMostTurns > 0) {
      for (int turn = 0; !dev::mbarrier_test(barrier_of(k), parity);) pause(turn);
    } else {
      dev::mbarrier_wait(barrier_of(k), parity);
    }
  }

 private:
  FASTRNN_INLINE uint64_t* barrier_of(int k) const { return k & 1 ? barrier_odd : barrier_even; }

  FASTRNN_INLINE uint4 gather(uint32_t own) const {
    const uint32_t other = dev::shuffle_xor(own, low);
    const bool second = in_four & 1, upper = in_four & 2;
    const uint32_t a = second ? other : own, b = second ? own : other;
    const uint32_t c = dev::shuffle_xor(a, high), d = dev::shuffle_xor(b, high);
    return upper ? make_uint4(c, d, a, b) : make_uint4(a, b, c, d);
  }

  Word *const even, *const odd;
  uint64_t *const barrier_even, *const barrier_odd;
  const unsigned bytes;  // of a step
  const int first, own;   // of the four words, and which of them is the thread's
  const int low, high;    // the bits in which their lanes differ, in the order of the words
  int in_four;            // the thread's place in that order
  int arrives;            // does the thread arrive at the mbarriers?
  bool alone;             // a cluster of one block, for which the hardware has no pushes (H200: an illegal instruction)
  int pushes;             // of the thread, for each gate
  uint32_t ranks;         // and where they go, a byte for each
  uint32_t result[kGates];
};

// Exact float32 there: as FfmaProduct, but a lane keeps its first weights in registers, the others in shared memory,
// and the words are where the lanes read them. The lanes of a warp are [splits of K by fours, columns of M].
template <int kColumns, int kGates>
class PushedFfmaProduct {
  static constexpr int kSplits = 32 / kColumns, kOfTile = 8 / kSplits;  // fours of a lane in a tile of K
  static constexpr int kHeld = tiles::kClusterQuads, kHeldTiles = kHeld / kOfTile;
  static_assert(kHeld % kOfTile == 0, "whole tiles");

 public:
  using Way = ByPushes;
  static constexpr bool kMma = false;
  static constexpr int kTile = 32, kTileWords = 8 * kTile, kValues = 1, kStride = kColumns + 4;
  using Exchange = cuda::Exchange<Way, kGates, kTileWords>;
  static FASTRNN_INLINE int tile_units(const GridShape& s) { return s.tile_units(); }
  static FASTRNN_INLINE int gate_columns(const GridShape& s) { return s.tile_units(); }

  FASTRNN_INLINE PushedFfmaProduct(const GridShape& s, const GridShared& shared)
      : lane(int(threadIdx.x) % 32), warp(warp_of_block()), unit_tiles(s.unit_tiles()),
        range(k_range(s, warp / unit_tiles, s.warp_parts())), tiles(range.end - range.begin),
        group_fours(s.k_tiles() * kTileWords / 4), padded_rows(s.padded_rows()),
        first_quad((warp % unit_tiles * s.k_tiles() + range.begin) * 8 * kColumns + lane),
        rest(reinterpret_cast<float4*>(shared.weights) + threadIdx.x) {}

  static FASTRNN_INLINE uint32_t encode(const float (&value)[1]) { return dev::float_to_bits(value[0]); }

  FASTRNN_INLINE void load(const uint4* packed) {
    const float4* from = reinterpret_cast<const float4*>(packed) + first_quad;
    const int fours = tiles * kOfTile;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = i < fours ? from[i * 32] : make_float4(0, 0, 0, 0);
    for (int i = kHeld; i < fours; ++i) rest[(i - kHeld) * int(blockDim.x)] = from[i * 32];
  }

  FASTRNN_INLINE void multiply(const Exchange& exchange, int k, uint32_t tag, int rows, float* sums) const {
    exchange.await(k, tag, 0, 0);
    const float4* words = reinterpret_cast<const float4*>(exchange.words(k)) + range.begin * (kTileWords / 4);
    for (int row = 0; row < rows; row += 4) {  // rows is the same in all threads
      const float4* x = words + row / 8 * group_fours + row % 8 * 8 + lane / kColumns;
      const int left = rows - row;
      if (left > 2) multiply_rows<4>(x, row, sums);
      else if (left > 1) multiply_rows<2>(x, row, sums);
      else multiply_rows<1>(x, row, sums);
    }
  }

 private:
  template <int R>
  FASTRNN_INLINE void multiply_rows(const float4* x, int row, float* sums) const {
    FfmaSums<R> acc;
#pragma unroll
    for (int t = 0; t < kHeldTiles; ++t)
      if (t < tiles) add_tile(held + t * kOfTile, x + t * (kTileWords / 4), acc);
#pragma unroll 1
    for (int t = kHeldTiles; t < tiles; ++t) add_rest(t, x + t * (kTileWords / 4), acc);
    const int part = warp / unit_tiles * kSplits + lane / kColumns;
    float* to = sums + ((part * unit_tiles + warp % unit_tiles) * padded_rows + row) * kStride + lane % kColumns;
#pragma unroll
    for (int r = 0; r < R; ++r) to[r * kStride] = acc.sum(r);
  }

  // The product of tile t, whose weights are in shared memory.
  template <int R>
  FASTRNN_INLINE void add_rest(int t, const float4* x, FfmaSums<R>& acc) const {
    float4 w[kOfTile];
#pragma unroll
    for (int i = 0; i < kOfTile; ++i) w[i] = rest[((t - kHeldTiles) * kOfTile + i) * int(blockDim.x)];
    add_tile(w, x, acc);
  }

  template <int R>
  static FASTRNN_INLINE void add_tile(const float4* w, const float4* x, FfmaSums<R>& acc) {
#pragma unroll
    for (int i = 0; i < kOfTile; ++i)
#pragma unroll
      for (int r = 0; r < R; ++r) {
        acc.add(r, w[i], x[r * 8 + i * kSplits]);
      }
  }

  const int lane, warp, unit_tiles;
  const Range range;
  const int tiles, group_fours, padded_rows;  // k tiles of the warp; fours of 8 rows
  const int first_quad;  // the lane's, of the packed weights
  float4* const rest;    // [fours beyond kHeld, threads]
  float4 held[kHeld];
};

// f(Type<Cell>{}, Type<S>{}, Type<Product>{}, masks) -> int for what the shape asks. masks: std::true_type where the
// call has lengths or resets, std::false_type where the kernel may leave out what they cost.
template <bool kBackward, class F>
int with_pushed_product(const ForwardParams& p, const GridShape& s, F f) {
  return with_pointwise_cell(p.cell, [&](auto cell) {
    constexpr int G = decltype(cell)::type::kGates, kM = kBackward ? 1 : G, kK = kBackward ? G : 1;
    const auto with_masks = [&](auto storage, auto product) {
      return p.lengths || p.resets ? f(cell, storage, product, std::true_type{})
                                   : f(cell, storage, product, std::false_type{});
    };
    if (s.half)
      return with_half(p.dtype, [&](auto storage) {
        using S = typename decltype(storage)::type;
        return with_masks(storage, Type<MmaProduct<S, kM, kK, ByPushes>>{});
      });
    if (s.mma) return with_masks(Type<float>{}, Type<MmaProduct<float, kM, kK, ByPushes>>{});
    return with_masks(Type<float>{}, Type<PushedFfmaProduct<kBackward ? 8 : 32, kK>>{});
  });
}

}  // namespace fastrnn::cuda
