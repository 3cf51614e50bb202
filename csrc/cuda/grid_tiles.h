// The grid tier's numbers: tiles, what fits on a multiprocessor, which call takes which. Host and device, no CUDA
// header. Not measured on a GPU yet: the reasons are counts of registers, bytes and cycles.
//
// A block's weights are its share of W_hh, G * units * h elements in either pass. They may take 227 KB of shared
// memory less what sums and stages need and, for mma, 112 KB of registers. Blocks, ceil(h / units) * row tiles *
// groups, must find a multiprocessor each. Largest h with 132 of them and one group, forward / backward:
//                          units       B = 1        B = 16       B = 32       B = 64
//   half, mma    LSTM      16          2112 / 2112  2048 / 1056  1536 / 1024  1056 / 672
//                GRU       16          2112 / 2112  2112 / 1344  2048 / 1056  1056 / 704
//                RNN       16          2112 / 2112  2112 / 2112  2048 / 2048  1056 / 1056
//   TF32, mma    LSTM      16          1216 / 1312  1056 / 1024  1024 / 512    512 / 512
//   float32,     LSTM      8           1056 / 1056  1056 / 512    960 / 512    512 / 320
//   FFMA         GRU       10 / 8      1320 / 1056  1248 / 672    640 / 512    416 / 352
//                RNN       32 / 8      1408 / 1056  1408 / 1056  1056 / 1024   512 / 512
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
// Above this many bytes from the exchange a step and block (6 us at 42 bytes/ns) a GEMM per step is as good.
constexpr int64_t kGridExchangeBytes = 256 << 10;

constexpr FASTRNN_HD int grid_max(int a, int b) { return a > b ? a : b; }

// What a launch is made of: all that kernels, launchers and the choice need to agree on.
struct GridShape {
  int32_t gates, hidden, batch, units, rows, threads;
  bool backward, mma, half;

  // K: what the product sums over. Forward the units of state 0, backward the gate gradients of all units.
  // M: what a block computes of it. Forward all gates of its units, backward its units' gradient of state 0.
  constexpr FASTRNN_HD int gates_in_k() const { return backward ? gates : 1; }
  constexpr FASTRNN_HD int gates_in_m() const { return backward ? 1 : gates; }
  constexpr FASTRNN_HD int warps() const { return threads / 32; }
  constexpr FASTRNN_HD int values() const { return half ? 2 : 1; }  // elements in a word of the exchange
  constexpr FASTRNN_HD int most_units() const { return mma ? 16 : backward ? 8 : 32 / gates; }
  constexpr FASTRNN_HD int unit_blocks() const { return ceil_div(hidden, units); }
  constexpr FASTRNN_HD int row_tiles() const { return ceil_div(batch, rows); }
  constexpr FASTRNN_HD int words_per_row() const { return ceil_div(units, values()); }

  // FFMA: `columns` of M stand side by side in a warp's lanes, as often as they fit; mma: 16 for every gate.
  constexpr FASTRNN_HD int columns() const { return mma ? 16 * gates_in_m() : backward ? 8 : 32; }
  constexpr FASTRNN_HD int gate_columns() const { return mma ? 16 : units; }
  // Sums over parts of K, added up through shared memory. 4 mod 16: mma's stores of them meet no bank twice.
  constexpr FASTRNN_HD int parts() const { return warps() * (mma ? 1 : 32 / columns()); }
  constexpr FASTRNN_HD int sums_stride() const { return columns() + 4; }
  // K in tiles, each gate padded to whole ones; a warp has at most k_tiles_of_warp, mma's first few in registers.
  constexpr FASTRNN_HD int k_tile() const { return mma ? 8 * values() : 32; }
  constexpr FASTRNN_HD int k_tiles() const { return ceil_div(hidden, k_tile()) * gates_in_k(); }
  constexpr FASTRNN_HD int k_tiles_of_warp() const { return ceil_div(k_tiles(), warps()); }
  constexpr FASTRNN_HD int held_tiles() const { return kGridFragments / gates_in_m(); }
  constexpr FASTRNN_HD int padded_rows() const { return round_up(rows, 8); }

  // One parity buffer of one (group, row tile), in 64-bit words.
  constexpr FASTRNN_HD int64_t words() const {
    return int64_t(k_tiles()) * (k_tile() / values()) * padded_rows();
  }
  constexpr FASTRNN_HD int64_t all_words(int64_t groups) const { return groups * row_tiles() * 2 * words(); }
  constexpr FASTRNN_HD int64_t exchanged_bytes() const {  // read by a block in a step whose rows are all running
    return int64_t(k_tiles()) * (k_tile() / values()) * (rows < batch ? rows : batch) * 8;
  }

  // A block's weights in quads of 16 bytes: all of them, as they are packed, and those in shared memory.
  constexpr FASTRNN_HD int64_t packed_quads() const {
    return int64_t(k_tiles()) * (mma ? 32 * gates_in_m() : 8 * columns());
  }
  constexpr FASTRNN_HD int64_t weight_quads() const {
    if (!mma) return packed_quads();
    return int64_t(warps()) * grid_max(0, k_tiles_of_warp() - held_tiles()) * gates_in_m() * 32;
  }
  // Other pieces of shared memory, in elements.
  constexpr FASTRNN_HD int64_t staged_floats() const { return mma ? 0 : int64_t(warps()) * 8 * kGridStage; }
  constexpr FASTRNN_HD int64_t sums_floats() const { return int64_t(parts()) * padded_rows() * sums_stride(); }
  constexpr FASTRNN_HD int64_t shared_bytes() const {
    return 16 * weight_quads() + 4 * staged_floats() + 8 * sums_floats() + 4 * (2 * rows + batch) + 5 * 16;
  }

  // Can a kernel run it at all, whatever the device?
  constexpr FASTRNN_HD bool valid() const {
    return hidden > 0 && hidden <= kGridHidden && batch > 0 && batch <= kGridBatch && units > 0 &&
           units <= most_units() && units % values() == 0 && rows > 0 && threads > 0 && threads % 32 == 0 &&
           threads <= kGridThreads && rows * words_per_row() <= threads;
  }
};

// Fills in units and rows: as many tiles of rows as find multiprocessors, since every block reads all of its rows'
// states from the exchange each step. False where the tier cannot run the call there.
constexpr bool grid_fit(GridShape& s, int64_t groups, int multiprocessors, int64_t shared_per_block) {
  s.threads = kGridThreads;
  s.units = s.most_units();
  if (s.hidden < s.units) s.units = round_up(s.hidden, s.values());
  const int64_t free_tiles = multiprocessors / (int64_t(s.unit_blocks()) * groups);
  if (free_tiles < 1 || s.batch < 1) return false;
  const int step = s.mma ? 8 : 4;  // what rows cost is counted in these
  const int tiles = free_tiles < s.batch ? int(free_tiles) : s.batch;
  s.rows = round_up(ceil_div(s.batch, tiles), step);
  return s.rows <= kGridRows && s.valid() && s.shared_bytes() <= shared_per_block;
}

}  // namespace fastrnn::cuda::tiles
