// The grid and cluster tiers' numbers: tiles, what fits on a multiprocessor, which call takes which. Host and device,
// no CUDA header. The reasons are counts of registers, bytes and cycles; which tier is faster was measured (tiles.h).
//
// A block's weights are its share of W_hh, G * units * h elements in either pass. They may take 227 KB of shared
// memory less what sums and stages need and, for mma, 112 KB of registers. Blocks, ceil(h / units) * row tiles *
// groups, must find a multiprocessor each. Largest h with 132 of them and one group, forward / backward:
//                          units       B = 1        B = 16       B = 32       B = 64
//   half, mma    LSTM      16          2112 / 2112  2048 / 2048  1536 / 1056  1056 / 1024
//                GRU       16          2112 / 2112  2112 / 2112  2112 / 1360  1056 / 1056
//                RNN       16          2112 / 2112  2112 / 2112  2112 / 2112  1056 / 1056
//   TF32, mma    LSTM      16          1216 / 1312  1056 / 1056  1024 / 1024   528 / 528
//   float32,     LSTM      8           1056 / 1056  1056 / 1024   960 / 528    528 / 512
//   FFMA         GRU       10 / 8      1320 / 1056  1248 / 1056   660 / 672    440 / 528
//                RNN       32 / 8      1408 / 1056  1408 / 1056  1056 / 1056   512 / 528
// At small B the bound is blocks (half) or shared memory (float32, TF32), then kGridExchangeBytes, then row tiles.
#pragma once
#include <cstdint>

#include "../host_device.h"

namespace fastrnn::cuda::tiles {

// Threads of a block: 8 warps may have 255 registers each, and one block fills a multiprocessor.
constexpr int kGridThreads = 256;
// Rows of a tile, at most: a thread owns one word of one row, and a row has 8 words or more.
constexpr int kGridRows = 32;
// Fragments of weights (16 x 16 halves or 16 x 8 floats, 4 registers a thread) that a warp keeps in registers: 112
// of 255 (LSTM 7 k-tiles of 4 gates, GRU 9 of 3). The others are read from shared memory, 512 bytes each, for
// every 8 rows.
constexpr int kGridFragments = 28;
// FFMA: words of a row that a warp takes from the exchange at a time.
constexpr int kGridStage = 128;
// Rows are sorted by length in every block, which costs batch^2 / threads comparisons once.
constexpr int kGridBatch = 1024;
// Offsets into a group's weights fit 31 bits; no device has the multiprocessors for that many units.
constexpr int kGridHidden = 16384;
// The bytes of a step's results up to which blocks exchange words with tags, and above which results beside flags. On
// an H200 blocks have seen 8 KB of results in words, which are twice as many bytes, after 1.1 us and 16 KB after 1.8 to
// 1.9; with a flag it is 1.3 to 1.4 us for 8 KB, 1.3 for 16, 1.8 for 32 and 3 for 128 (docs/gpu.md).
constexpr int64_t kGridWordBytes = 8 << 10;
// Above this many bytes from the exchange a step and block (4 to 5 us, going by those numbers) a GEMM per step is as
// good.
constexpr int64_t kGridExchangeBytes = 256 << 10;

// The cluster tier: blocks of a cluster, at most. More than 8 have to be asked for (device_cuda.cuh).
constexpr int kClusterBlocks = 16;
// Fragments that a warp keeps in registers there: 128 of 255.
constexpr int kClusterFragments = 32;
// FFMA: groups of 4 weights that a lane keeps in registers, 96 of 255.
constexpr int kClusterQuads = 24;
// Bytes that an mbarrier can count.
constexpr int64_t kClusterBytes = (1 << 20) - 1;

constexpr FASTRNN_HD int grid_max(int a, int b) { return a > b ? a : b; }
constexpr FASTRNN_HD int grid_min(int a, int b) { return a < b ? a : b; }

// What a launch is made of: all that kernels, launchers and the choice need to agree on.
struct GridShape {
  int32_t gates, hidden, batch, units, rows, threads;
  bool backward, mma, half;
  bool flags;    // blocks exchange results beside flags, not in words that carry tags; exchange.cuh
  bool cluster;  // the blocks of a tile of rows are a cluster and push results to each other; cluster.cuh

  // K: what the product sums over. Forward the units of state 0, backward the gate gradients of all units.
  // M: what a block computes of it. Forward all gates of its units, backward its units' gradient of state 0.
  constexpr FASTRNN_HD int gates_in_k() const { return backward ? gates : 1; }
  constexpr FASTRNN_HD int gates_in_m() const { return backward ? 1 : gates; }
  constexpr FASTRNN_HD int warps() const { return threads / 32; }
  constexpr FASTRNN_HD int values() const { return half ? 2 : 1; }  // elements in a word of the exchange
  // Units whose columns of M fill a warp: the most of a block in the grid tier. A cluster's blocks have several such
  // tiles of units, the last of which may be narrower, and whole groups of the words that are pushed at a time.
  constexpr FASTRNN_HD int most_units() const {
    return mma ? 16 : backward ? 8 : cluster ? 32 / gates / 4 * 4 : 32 / gates;
  }
  constexpr FASTRNN_HD int tile_units() const { return cluster ? grid_min(units, most_units()) : units; }
  constexpr FASTRNN_HD int unit_tiles() const { return cluster ? ceil_div(units, most_units()) : 1; }
  constexpr FASTRNN_HD int unit_step() const { return cluster ? (mma ? 16 : 4) : values(); }
  constexpr FASTRNN_HD int unit_blocks() const { return ceil_div(hidden, units); }
  constexpr FASTRNN_HD int row_tiles() const { return ceil_div(batch, rows); }
  constexpr FASTRNN_HD int words_per_row() const { return ceil_div(units, values()); }

  // FFMA: `columns` of M stand side by side in a warp's lanes, as often as they fit; mma: 16 for every gate.
  constexpr FASTRNN_HD int columns() const { return mma ? 16 * gates_in_m() : backward ? 8 : 32; }
  constexpr FASTRNN_HD int gate_columns() const { return mma ? 16 : tile_units(); }
  // Sums over parts of K, added up through shared memory. 4 mod 16: mma's stores of them meet no bank twice.
  constexpr FASTRNN_HD int warp_parts() const { return warps() / unit_tiles(); }
  constexpr FASTRNN_HD int parts() const { return warp_parts() * (mma ? 1 : 32 / columns()); }
  constexpr FASTRNN_HD int sums_stride() const { return columns() + 4; }
  // K in tiles, each gate padded to whole ones; a warp has at most k_tiles_of_warp, mma's first few in registers.
  constexpr FASTRNN_HD int k_tile() const { return mma ? 8 * values() : 32; }
  constexpr FASTRNN_HD int k_tiles() const { return ceil_div(hidden, k_tile()) * gates_in_k(); }
  constexpr FASTRNN_HD int k_tiles_of_warp() const { return ceil_div(k_tiles(), warp_parts()); }
  constexpr FASTRNN_HD int held_tiles() const { return (cluster ? kClusterFragments : kGridFragments) / gates_in_m(); }
  constexpr FASTRNN_HD int padded_rows() const { return round_up(rows, 8); }

  // One of the two buffers of one (group, row tile), in words: 64 bits with their tags, 32 beside flags.
  constexpr FASTRNN_HD int tile_words() const { return 8 * k_tile() / values(); }  // of 8 rows
  constexpr FASTRNN_HD int64_t words() const { return int64_t(k_tiles()) * tile_words() * (padded_rows() / 8); }
  constexpr FASTRNN_HD int word_bytes() const { return flags ? 4 : 8; }
  // Where in it the word of a row's gate and unit of K stands: [8 rows, tile, ...] and there in the order in which
  // lanes load them, two neighbours at a time. mma: [row, q, register of b]; FFMA: [row, unit].
  constexpr FASTRNN_HD int word_of(int row, int gate, int unit) const {
    const int tile = row / 8 * k_tiles() + unit / k_tile() * gates_in_k() + gate, k = unit % k_tile() / values();
    return tile * tile_words() + (mma ? (row % 8 * 4 + k % 4) * 2 + k / 4 : row % 8 * 32 + k);
  }
  // The first unit of K in a word: of all that word_of gives this one for.
  constexpr FASTRNN_HD int unit_of_word(int word) const {
    const int tile = word / tile_words() % k_tiles(), k = mma ? word % 2 * 4 + word / 2 % 4 : word % 32;
    return tile / gates_in_k() * k_tile() + k * values();
  }
  constexpr FASTRNN_HD int64_t all_words(int64_t groups) const {
    return cluster ? 0 : groups * row_tiles() * 2 * words();
  }
  // A flag for each warp of a block that owns results.
  constexpr FASTRNN_HD int owner_warps() const { return ceil_div(rows * words_per_row(), 32); }
  constexpr FASTRNN_HD int flags_of_tile() const { return unit_blocks() * owner_warps(); }
  constexpr FASTRNN_HD int64_t all_flags(int64_t groups) const {
    return flags ? groups * row_tiles() * flags_of_tile() : 0;
  }
  constexpr FASTRNN_HD int64_t exchange_bytes(int64_t groups) const {
    return round_up(all_words(groups) * word_bytes() + all_flags(groups) * 4, int64_t(16));
  }
  // Units whose results a cluster's blocks push, of the padded K; and the bytes of a step's that arrive in each.
  constexpr FASTRNN_HD int pushed_units() const {
    return grid_min(unit_blocks() * units, ceil_div(hidden, k_tile()) * k_tile());
  }
  constexpr FASTRNN_HD int64_t pushed_bytes() const {
    return int64_t(pushed_units() / values()) * gates_in_k() * rows * 4;
  }
  // Read by a block in a step whose rows are all running: results, and what they take.
  constexpr FASTRNN_HD int64_t result_bytes() const {
    return int64_t(k_tiles()) * (k_tile() / values()) * (rows < batch ? rows : batch) * 4;
  }
  constexpr FASTRNN_HD int64_t exchanged_bytes() const { return result_bytes() / 4 * word_bytes(); }

  // A block's weights in quads of 16 bytes: all of them, as they are packed, and those in shared memory.
  constexpr FASTRNN_HD int64_t tile_quads() const {  // of a tile of units
    return int64_t(k_tiles()) * (mma ? 32 * gates_in_m() : 8 * columns());
  }
  constexpr FASTRNN_HD int64_t packed_quads() const { return unit_tiles() * tile_quads(); }
  constexpr FASTRNN_HD int64_t weight_quads() const {
    if (!mma && cluster) return int64_t(threads) * grid_max(0, k_tiles_of_warp() * columns() / 4 - kClusterQuads);
    if (!mma) return packed_quads();
    return int64_t(warps()) * grid_max(0, k_tiles_of_warp() - held_tiles()) * gates_in_m() * 32;
  }
  // Other pieces of shared memory, in elements.
  constexpr FASTRNN_HD int64_t staged_floats() const { return mma || cluster ? 0 : int64_t(warps()) * 8 * kGridStage; }
  constexpr FASTRNN_HD int64_t sums_floats() const {
    return int64_t(parts()) * unit_tiles() * padded_rows() * sums_stride();
  }
  constexpr FASTRNN_HD int64_t pushed_words() const { return cluster ? words() : 0; }  // one of the two buffers
  constexpr FASTRNN_HD int barriers() const { return cluster ? 2 : 0; }
  constexpr FASTRNN_HD int64_t shared_bytes() const {
    return 16 * weight_quads() + 4 * staged_floats() + 8 * sums_floats() + 8 * pushed_words() + 8 * barriers() +
           4 * (2 * rows + round_up(batch, 4)) + (cluster ? 8 : 5) * 16;
  }

  // Can a kernel run it at all, whatever the device?
  constexpr FASTRNN_HD bool valid() const {
    return hidden > 0 && hidden <= kGridHidden && batch > 0 && batch <= kGridBatch && units > 0 &&
           units % unit_step() == 0 && rows > 0 && threads > 0 && threads % 32 == 0 &&
           threads <= kGridThreads && rows * words_per_row() <= threads &&
           (cluster ? unit_blocks() <= kClusterBlocks && warps() % unit_tiles() == 0 && pushed_bytes() <= kClusterBytes
                    : units <= most_units());
  }
};

// Fills in units, rows and the kind of exchange: as many tiles of rows as find multiprocessors, since every block reads
// all of its rows' states from the exchange each step. False where the tier cannot run the call there.
constexpr bool grid_fit(GridShape& s, int64_t groups, int multiprocessors, int64_t shared_per_block) {
  s.threads = kGridThreads;
  s.units = s.most_units();
  if (s.hidden < s.units) s.units = round_up(s.hidden, s.values());
  const int64_t free_tiles = multiprocessors / (int64_t(s.unit_blocks()) * groups);
  if (free_tiles < 1 || s.batch < 1) return false;
  const int step = s.mma ? 8 : 4;  // what rows cost is counted in these
  const int tiles = free_tiles < s.batch ? int(free_tiles) : s.batch;
  s.rows = round_up(ceil_div(s.batch, tiles), step);
  s.flags = s.result_bytes() > kGridWordBytes;
  return s.rows <= kGridRows && s.valid() && s.shared_bytes() <= shared_per_block;
}

// The same for a cluster: the fewest blocks whose registers hold all weights, or else as many as there may be, with the
// rest of them in shared memory. Clusters do not wait for each other, so there may be more than fit at once; rows are
// as few as let all run at once, if any do, on seven of eight multiprocessors: a cluster has to find its own within one
// part of the device, and those that are left over there have no use.
// most_blocks: of a cluster on the device.
constexpr bool cluster_fit(GridShape& s, int64_t groups, int multiprocessors, int64_t shared_per_block,
                           int most_blocks) {
  if (s.batch < 1 || s.hidden < 1) return false;
  const int step = s.mma ? 8 : 4;
  GridShape best = s;
  bool found = false;
  for (int blocks = 1; blocks <= grid_min(kClusterBlocks, most_blocks); ++blocks) {
    GridShape x = s;
    x.units = round_up(ceil_div(s.hidden, blocks), x.unit_step());
    if (x.unit_blocks() != blocks || x.unit_tiles() > kGridThreads / 32) continue;
    x.threads = kGridThreads / 32 / x.unit_tiles() * x.unit_tiles() * 32;
    int most = grid_min(kGridRows, x.threads / x.words_per_row());
    if (most >= step) most = most / step * step;
    if (most < grid_min(x.batch, step)) continue;
    const int64_t free = int64_t(multiprocessors) * 7 / 8 / (blocks * groups);
    const int tiles = free < 1 ? 1 : free < x.batch ? int(free) : x.batch;
    const int rows = ceil_div(x.batch, tiles);
    x.rows = grid_min(most, rows <= 2 && !x.mma ? rows : round_up(rows, step));  // FFMA has products of 1 and 2 rows
    while (x.rows > step && x.shared_bytes() > shared_per_block) x.rows -= step;
    if (!x.valid() || x.shared_bytes() > shared_per_block) continue;
    best = x;
    found = true;
    if (x.weight_quads() == 0) break;
  }
  s = best;
  return found;
}

}  // namespace fastrnn::cuda::tiles
