// The cluster tier: the grid tier's pass (grid_forward.cuh, grid_backward.cuh) with other neighbours. The blocks that
// share a tile of rows are a cluster of up to 16, hold all of a group's weights between them, and push a step's results
// into each other's shared memory; other clusters have other rows or groups, and nobody waits for them. Where one
// cluster does not hold the weights, several share a tile of rows. For targets where dev::kClusters is true. It has not
// run on a GPU, so it runs only where it is asked for by name.
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
//
// Several clusters. Each pushes within itself, as above, and hands its results to the others through L2 beside flags
// (exchange.cuh). The reasons of either hold for them as they are: a block's warps between them have seen all of step
// n, its own cluster's and the others', before its barrier of step n, and what it makes of it goes out behind that. So
// all blocks of a tile of rows wait for each other and have to be resident at once (launch_clusters). As clusters are
// of one size, the last blocks may have no unit. Such a block pushes the zeros that its cluster waits for; nobody waits
// for its flags, and so it reads nothing through L2.
#pragma once
#include "grid_product.cuh"

namespace fastrnn::cuda {

template <int kGates, int kTileWords>
class Exchange<ByPushes, kGates, kTileWords> {
  using Word = ByPushes::Word;
  static constexpr int kRanks = tiles::kClusterBlocks / 4;  // that a thread pushes to

 public:
  // Ends with a barrier of the cluster. s, word: as in the other exchanges, of one cluster (GridShape::pushed).
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

// Both ways at once, of several clusters.
template <int kGates, int kTileWords>
class Exchange<ByPushesAndFlags, kGates, kTileWords> {
 public:
  FASTRNN_INLINE Exchange(void* workspace, const GridShape& s, const GridShared& shared, int word)
      : within(workspace, s.pushed(), shared, word_within(s)), between(workspace, s, shared, word) {}

  FASTRNN_INLINE void store(int k, uint32_t tag, int gate, uint32_t value) {
    between.store(k, tag, gate, value);
    within.store(k, tag, gate, value);
  }
  // The flags last: a release waits until results are in L2, and pushes behind it would wait with it.
  FASTRNN_INLINE void publish(int k, uint32_t tag, bool wanted) {
    within.publish(k, tag, wanted);
    between.publish(k, tag, wanted);
  }

  // Where the thread's own result goes in what is pushed.
  static FASTRNN_INLINE int word_within(const GridShape& s) {
    const int tid = int(threadIdx.x), words = s.words_per_row();
    return s.pushed().word_of(tid / words, 0, int(dev::cluster_rank()) * s.units + tid % words * s.values());
  }

  cuda::Exchange<ByPushes, kGates, kTileWords> within;  // the own cluster
  cuda::Exchange<ByFlags, kGates, kTileWords> between;  // all clusters; of its results those of others are read
};

// Exact float32 there: as FfmaProduct, but a lane keeps its first weights in registers, the others in shared memory,
// and the words are where the lanes read them, those of other clusters by way of a stage. The lanes of a warp are
// [splits of K by fours, columns of M].
template <int kColumns, int kGates, class W>
class PushedFfmaProduct {
  using Word = typename W::Word;
  static constexpr bool kSeveral = kSeveralClusters<W>;
  static constexpr int kSplits = 32 / kColumns, kOfTile = 8 / kSplits;  // fours of a lane in a tile of K
  static constexpr int kHeld = tiles::kClusterQuads, kHeldTiles = kHeld / kOfTile;
  static constexpr int kAhead = kHeldTiles < 4 ? kHeldTiles : 4;  // tiles of a stage: 4 rows of each
  static_assert(kHeld % kOfTile == 0 && kHeldTiles % kAhead == 0, "whole tiles and stages");

 public:
  using Way = W;
  static constexpr bool kMma = false;
  static constexpr int kTile = 32, kTileWords = 8 * kTile, kValues = 1, kStride = kColumns + 4;
  using Exchange = cuda::Exchange<Way, kGates, kTileWords>;
  static FASTRNN_INLINE int tile_units(const GridShape& s) { return s.tile_units(); }
  static FASTRNN_INLINE int gate_columns(const GridShape& s) { return s.tile_units(); }

  FASTRNN_INLINE PushedFfmaProduct(const GridShape& s, const GridShared& shared)
      : lane(int(threadIdx.x) % 32), warp(warp_of_block()), unit_tiles(s.unit_tiles()),
        tiles(warp_tiles<Way>(s, warp / unit_tiles, s.warp_parts())),
        flags(flag_range(s, tiles.before_range(), kTile, kGates)),
        flags_behind(flag_range(s, tiles.behind_range(), kTile, kGates)),
        group_fours((kSeveral ? s.pushed().k_tiles() : s.k_tiles()) * kTileWords / 4),
        other_group_words(s.k_tiles() * kTileWords), padded_rows(s.padded_rows()),
        first_quad((warp % unit_tiles * s.k_tiles() + tiles.own) * 8 * kColumns + lane),
        rest(reinterpret_cast<float4*>(shared.weights) + threadIdx.x),
        staged(shared.staged + warp * 4 * tiles::kGridStage) {}

  static FASTRNN_INLINE uint32_t encode(const float (&value)[1]) { return dev::float_to_bits(value[0]); }

  FASTRNN_INLINE void load(const uint4* packed) {
    const float4* from = reinterpret_cast<const float4*>(packed) + first_quad;
    const int fours = tiles.end * kOfTile;
    // From one four of the lane to another.
    const auto quads_to = [&](int i) {
      return (kSeveral ? (tiles.in_k(i / kOfTile) - tiles.own) * kOfTile + i % kOfTile : i) * 32;
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = i < fours ? from[quads_to(i)] : make_float4(0, 0, 0, 0);
    for (int i = kHeld; i < fours; ++i) rest[(i - kHeld) * int(blockDim.x)] = from[quads_to(i)];
  }

  FASTRNN_INLINE void multiply(const Exchange& exchange, int k, uint32_t tag, int rows, float* sums) const {
    const auto& pushed = own_exchange(exchange);
    pushed.await(k, tag, 0, 0);
    const float4* words =
        reinterpret_cast<const float4*>(pushed.words(k)) + (tiles.own - tiles.first) * (kTileWords / 4);
    for (int row = 0; row < rows; row += 4) {  // rows is the same in all threads
      const float4* x = words + row / 8 * group_fours + row % 8 * 8 + lane / kColumns;
      const int left = rows - row;
      if (left > 2) multiply_rows<4>(exchange, k, tag, x, row, left, sums);
      else if (left > 1) multiply_rows<2>(exchange, k, tag, x, row, left, sums);
      else multiply_rows<1>(exchange, k, tag, x, row, left, sums);
    }
  }

 private:
  static FASTRNN_INLINE const cuda::Exchange<ByPushes, kGates, kTileWords>& own_exchange(const Exchange& exchange) {
    if constexpr (kSeveral) return exchange.within;
    else return exchange;
  }

  template <int R>
  FASTRNN_INLINE void multiply_rows(const Exchange& exchange, int k, uint32_t tag, const float4* x, int row, int left,
                                    float* sums) const {
    FfmaSums<R> acc;
    if constexpr (kSeveral) {
#pragma unroll 1
      for (int side = 0; side < 3; ++side) {  // own, before, behind: in a loop, so that the product is there once
        const int begin = side == 0 ? 0 : side == 1 ? tiles.own_end : tiles.before_end;
        const int end = side == 0 ? tiles.own_end : side == 1 ? tiles.before_end : tiles.end;
        const Range flag = side == 1 ? flags : flags_behind;
        if (side > 0 && row == 0 && begin < end) exchange.between.await(k, tag, flag.begin, flag.end - flag.begin);
        const int from = ((side == 1 ? tiles.before : tiles.behind) - begin) * kTileWords + row % 8 * kTile;
        const Word* others = exchange.between.words(k) + row / 8 * other_group_words + from;
        add_stages<R>(side == 0, x, others, begin, end, left, acc);
      }
    } else {
#pragma unroll
      for (int t = 0; t < kHeldTiles; ++t)
        if (t < tiles.end) add_tile(held + t * kOfTile, x + t * (kTileWords / 4), acc);
#pragma unroll 1
      for (int t = kHeldTiles; t < tiles.end; ++t) add_rest(t, x + t * (kTileWords / 4), acc);
    }
    const int part = warp / unit_tiles * kSplits + lane / kColumns;
    float* to = sums + ((part * unit_tiles + warp % unit_tiles) * padded_rows + row) * kStride + lane % kColumns;
#pragma unroll
    for (int r = 0; r < R; ++r) to[r * kStride] = acc.sum(r);
  }

  // The warp's tiles begin, .. end - 1: from where they have been pushed to, x, or through L2, `from`, by way of the
  // stage. Either is where its tile 0 would be.
  template <int R>
  FASTRNN_INLINE void add_stages(bool pushed, const float4* x, const Word* from, int begin, int end, int left,
                                 FfmaSums<R>& acc) const {
    const int stride = pushed ? kTileWords / 4 : kTile;
    if (!pushed) x = reinterpret_cast<const float4*>(staged) + lane / kColumns;
#pragma unroll
    for (int t = 0; t < kHeldTiles; t += kAhead)
      if (begin < t + kAhead && t < end) {
        if (!pushed) stage<R>(from + t * kTileWords, begin - t, end - t, left);
        const float4* first = pushed ? x + t * stride : x;
#pragma unroll
        for (int n = 0; n < kAhead; ++n)
          if (begin <= t + n && t + n < end) add_tile(held + (t + n) * kOfTile, first + n * stride, acc);
        dev::sync_warp();  // before the stage is written again
      }
#pragma unroll 1
    for (int t = begin < kHeldTiles ? kHeldTiles : begin; t < end; t += kAhead) {
      if (!pushed) stage<R>(from + t * kTileWords, 0, end - t, left);
      const float4* first = pushed ? x + t * stride : x;
#pragma unroll 1
      for (int n = 0; n < kAhead && t + n < end; ++n) add_rest(t + n, first + n * stride, acc);
      dev::sync_warp();
    }
  }

  // Tiles first, .. end - 1, of kAhead at most, as [tile, 4 rows, kTile]. Rows that do not run are the last that does.
  template <int R>
  FASTRNN_INLINE void stage(const Word* from, int first, int end, int left) const {
    constexpr int kParts = kTile / 4;  // of a row, 16 bytes each
    const int last = (end < kAhead ? end : kAhead) * R * kParts;
#pragma unroll 1
    for (int i = (first > 0 ? first : 0) * R * kParts + lane; i < last; i += 32) {
      const int tile = i / (R * kParts), row = i / kParts % R, part = i % kParts * 4;
      dev::copy_async16(staged + (tile * 4 + row) * kTile + part,
                        from + tile * kTileWords + (row < left ? row : left - 1) * kTile + part);
    }
    dev::copy_async_commit();
    dev::copy_async_wait<0>();
    dev::sync_warp();
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
  const WarpTiles tiles;
  const Range flags, flags_behind;  // of what comes through L2, before the own tiles and behind them
  const int group_fours, other_group_words, padded_rows;  // of 8 rows
  const int first_quad;  // the lane's, of the packed weights
  float4* const rest;    // [fours beyond kHeld, threads]
  float* const staged;   // [kAhead, 4, kTile] of the warp
  float4 held[kHeld];
};

// f(Type<Cell>{}, Type<S>{}, Type<Product>{}, masks) -> int for what the shape asks. masks: std::true_type where the
// call has lengths or resets, std::false_type where the kernel may leave out what they cost, which only that of one
// cluster does.
template <bool kBackward, class F>
int with_pushed_product(const ForwardParams& p, const GridShape& s, F f) {
  return with_pointwise_cell(p.cell, [&](auto cell) {
    constexpr int G = decltype(cell)::type::kGates, kM = kBackward ? 1 : G, kK = kBackward ? G : 1;
    const auto with_masks = [&](auto storage, auto product, auto several) {
      if (s.clusters > 1) return f(cell, storage, several, std::true_type{});
      return p.lengths || p.resets ? f(cell, storage, product, std::true_type{})
                                   : f(cell, storage, product, std::false_type{});
    };
    if (s.half)
      return with_half(p.dtype, [&](auto storage) {
        using S = typename decltype(storage)::type;
        return with_masks(storage, Type<MmaProduct<S, kM, kK, ByPushes>>{},
                          Type<MmaProduct<S, kM, kK, ByPushesAndFlags>>{});
      });
    if (s.mma)
      return with_masks(Type<float>{}, Type<MmaProduct<float, kM, kK, ByPushes>>{},
                        Type<MmaProduct<float, kM, kK, ByPushesAndFlags>>{});
    constexpr int kColumns = kBackward ? 8 : 32;
    return with_masks(Type<float>{}, Type<PushedFfmaProduct<kColumns, kK, ByPushes>>{},
                      Type<PushedFfmaProduct<kColumns, kK, ByPushesAndFlags>>{});
  });
}

// ---- launches ----

// Groups first, .. first + count - 1 of those of a launch, as one of their own.
template <class Params>
LaunchParams<Params> some_groups(const LaunchParams<Params>& call, int first, int count) {
  LaunchParams<Params> part = call;
  part.first_group = call.first_group + first;
  part.groups_here = count;
  for (uint32_t& bits : part.reverse_bits) bits = 0;
  for (int i = 0; i < count; ++i)
    part.reverse_bits[i / 32] |= (call.reverse_bits[(first + i) / 32] >> ((first + i) % 32) & 1u) << (i % 32);
  return part;
}

// One cluster waits for no other, so all may be launched at once. Of several that wait for each other all have to be
// resident: as many tiles of rows are launched at a time as the device has room for.
template <class Kernel, class Params>
int launch_clusters(Kernel kernel, const LaunchParams<Params>& call, const GridShape& s, void* workspace,
                    void* stream) {
  if (s.clusters == 1) return launch_grid(kernel, call, s, workspace, stream);
  dev::Launch one = grid_launch(s, 1, 1, stream);
  one.coresident = false;
  int clusters = 0;
  const dev::Error error = dev::max_active_clusters(kernel, one, &clusters);
  if (error != dev::kSuccess) return int(error);
  const int tiles = s.row_tiles(), room = clusters / s.clusters;
  if (room < 1) return int(dev::kCooperativeLaunchTooLarge);
  const int most_tiles = room < tiles ? room : tiles, most_groups = room / most_tiles;
  GridShape part = s;
  for (int first = 0; first < call.groups_here; first += most_groups) {
    const int left = call.groups_here - first, groups = left < most_groups ? left : most_groups;
    const LaunchParams<Params> of_groups = some_groups(call, first, groups);
    for (part.first_tile = 0; part.first_tile < tiles; part.first_tile += most_tiles) {
      const int rest = tiles - part.first_tile;
      const int failed =
          launch_tiles(kernel, of_groups, part, rest < most_tiles ? rest : most_tiles, workspace, stream);
      if (failed != int(dev::kSuccess)) return failed;
    }
  }
  return int(dev::kSuccess);
}

}  // namespace fastrnn::cuda
