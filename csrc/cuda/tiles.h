// Which tier a call takes, as measured, and the numbers of the per-step and resident tiers, each with its reason;
// choose() and *_choice (launch.h) read them. The reasons are counts of registers, bytes and cycles.
#pragma once
#include <cstdint>

#include "../host_device.h"
#include "../params.h"
#include "launch.h"

namespace fastrnn::cuda::tiles {

constexpr bool is_half(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// ---- the fastest tier, as a GPU has measured it ----

enum class Arithmetic { kHalf, kTF32, kFloat32 };
// For calls of cells with so many gates, one group for another row, with at most `rows` and `hidden`. First match wins.
struct MeasuredTier {
  int32_t gates;
  Arithmetic arithmetic;
  bool backward;
  int32_t rows, hidden;
  Tier tier;
};
inline constexpr MeasuredTier kMeasuredTiers[] = {
#include "measured_tiers.inc"
};
// Where they hold; elsewhere, and for calls beyond the largest ones, the first tier that thinks itself worth it.
constexpr int kMeasuredCapability = 90;

// ---- per-step: pointwise kernels ----

// Threads of a block, at most: a row's units go over x, so that no index is divided.
constexpr int kStepThreads = 256;
// Blocks in y, at most (65,535 by the hardware). Where there are more rows, a block takes several, one after the other.
constexpr int64_t kStepRowBlocks = 32768;

// ---- resident: one block per (tile of rows, group), weights in registers and shared memory ----

struct ResidentTile {
  bool half;            // bfloat16 and float16 by mma, or float32 by FFMA
  int32_t rows;         // batch rows of a tile
  int64_t max_hidden;   // h up to which the tile's threads have the registers they were given
  bool fill;            // take it only while every tile finds a multiprocessor of its own
  const char* reason;
};

// First match wins.
inline constexpr ResidentTile kResidentTiles[] = {
    {false, 1, 128, true,
     "resident, FFMA, 1 row: a multiprocessor for every row; weights in shared memory bound it, at 128 bytes a "
     "cycle"},
    {false, 4, 128, false,
     "resident, FFMA, 4 rows: 16 multiply-adds for each 16 bytes of weights from shared memory; one (row, unit) a "
     "thread"},
    {true, 8, 192, false,
     "resident, mma, 8 rows: the width of one m16n8k16 tile, so fewer rows save nothing; 16 units a warp"},
    {false, 1, 128, false, "resident, FFMA, 1 row: shared memory has no room beside 4 rows' weights"},
};

// Weights that a thread keeps in registers; the rest goes to shared memory. As many as ptxas takes without a
// spill in the kernels of sm_80 and sm_90a (forward and backward; LSTM is what decides).
//
// FFMA, of the 128 registers that 512 threads may have: chunks of 4 for each output.
constexpr int resident_register_chunks(int gates, int rows, bool backward) {
  if (backward) return rows == 1 ? 4 : gates > 1 ? 2 : 3;  // 4 outputs: columns of h
  const int chunks = (rows == 1 ? 16 : 12) / gates;
  return chunks < 8 ? chunks : 8;  // all, at h = 128 and one gate
}
// mma: k-tiles of 16 for each gate, 4 registers each. 8 warps may have 255 registers a thread: all of h <= 128,
// but for LSTM's backward. 12 may have 168. In backward a unit's parameters and the sums of their gradients take the
// place of one.
constexpr int resident_warps(int64_t hidden) { return hidden <= 128 ? 8 : 12; }
constexpr int resident_register_tiles(int gates, int params, int warps, bool backward) {
  const int without = backward && params > 0 ? 1 : 0;
  if (warps == 8) return (backward && gates == 4 ? 5 : 8) - without;
  if (gates == 4) return 3 - without;
  if (gates == 3) return (backward ? 4 : 6) - without;
  if (gates == 2 && backward) return 10 - without;
  return 12 - without;  // all, at h = 192
}

}  // namespace fastrnn::cuda::tiles
