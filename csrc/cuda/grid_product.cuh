// The grid tier's products: a block's share of weights, kept on chip, times what the exchange holds, a warp for
// each part of K. FfmaProduct: exact float32. MmaProduct: bfloat16, float16 and TF32.
//
// Both take K in tiles of kTile: tile number (unit / kTile) * kGates + gate, so that a unit's neighbours and gates
// stay together. Only units below h exist; the last tile of each gate is padded with zeros.
//   load(packed)   once: the block's weights as grid_prepare.cu laid them out; the caller meets a barrier after
//   multiply(words, tag, rows, sums)   waits for the words of rows 0 .. rows - 1 and writes this warp's parts of
//                  sums [parts, padded rows, stride]; those of other rows may hold anything. Every warp calls it.
//                  No block barrier inside.
//   word_of(shape, row, gate, unit), encode(values)   where and what the owner of a word publishes
#pragma once
#include "grid.cuh"

namespace fastrnn::cuda {

struct KRange {  // of a warp, in tiles
  int begin, end;
};
FASTRNN_INLINE KRange k_range(const GridShape& s) {
  const int warp = int(threadIdx.x) / 32, warps = s.warps(), n = s.k_tiles();
  return {n * warp / warps, n * (warp + 1) / warps};
}

// kColumns lanes side by side hold the columns of M; the 32 / kColumns sets of lanes split K by fours. Weights, as
// [k / 4, column, 4], and a stage of 8 rows' words are in shared memory: 4 R multiply-adds for R + 1 loads of 16
// bytes, R of which are the same for all lanes of a set. Words: [8 rows, tile, row, 32].
template <int kColumns, int kGates>
class FfmaProduct {
  static constexpr int kSplits = 32 / kColumns, kStage = tiles::kGridStage;

 public:
  static constexpr int kTile = 32, kValues = 1;

  FASTRNN_INLINE FfmaProduct(const GridShape& shape, const GridShared& shared)
      : s(shape), lane(int(threadIdx.x) % 32), warp(int(threadIdx.x) / 32), range(k_range(shape)),
        weights(shared.weights), staged(shared.staged + warp * 8 * kStage) {}

  static FASTRNN_INLINE int word_of(const GridShape& s, int row, int gate, int unit) {
    return ((row / 8 * s.k_tiles() + unit / kTile * kGates + gate) * 8 + row % 8) * 32 + unit % kTile;
  }
  static FASTRNN_INLINE uint32_t encode(const float (&value)[1]) { return dev::float_to_bits(value[0]); }

  FASTRNN_INLINE void load(const uint4* packed) {
    const int end = range.end * 8 * kColumns;
#pragma unroll 4
    for (int i = range.begin * 8 * kColumns + lane; i < end; i += 32) weights[i] = packed[i];
  }

  FASTRNN_INLINE void multiply(const uint64_t* words, uint32_t tag, int rows, float* sums) {
    for (int row = 0; row < rows; row += 8) {  // rows is the same in all threads
      const int left = rows - row;
      if (left > 4) multiply_rows<8>(words, tag, row, left, sums);
      else if (left > 1) multiply_rows<4>(words, tag, row, left, sums);
      else multiply_rows<1>(words, tag, row, left, sums);
    }
  }

 private:
  template <int R>
  FASTRNN_INLINE void multiply_rows(const uint64_t* words, uint32_t tag, int row, int left, float* sums) {
    constexpr int kAhead = R == 8 ? 2 : 4;  // tiles whose words are in flight at once
    constexpr int kStageTiles = kStage / kTile;
    const int c = lane % kColumns, split = lane / kColumns;
    float acc[R];
#pragma unroll
    for (int r = 0; r < R; ++r) acc[r] = 0.f;
    for (int stage = range.begin; stage < range.end; stage += kStageTiles) {
      const int count = range.end - stage < kStageTiles ? range.end - stage : kStageTiles;
      for (int first = 0; first < count; first += kAhead) {
        uint32_t value[kAhead * R], wanted = 0;
#pragma unroll
        for (int n = 0; n < kAhead * R; ++n) {
          const int tile = first + n / R;
          const bool there = tile < count && (stage + tile) / kGates * kTile + lane < s.hidden;
          wanted |= uint32_t(there && n % R < left) << n;
        }
        const uint64_t* from = words + (row / 8 * s.k_tiles() + stage + first) * 256 + lane;
        const bool early = row == 0 && stage == range.begin && first == 0;
        await(from, [](int n) { return n / R * 256 + n % R * 32; }, wanted, tag, early, value);
#pragma unroll
        for (int n = 0; n < kAhead * R; ++n) {
          const int tile = first + n / R;
          if (tile < count) staged[n % R * kStage + tile * kTile + lane] = dev::bits_to_float(value[n]);
        }
      }
      dev::sync_warp();
      const float4* w = reinterpret_cast<const float4*>(weights) + (stage * 8 + split) * kColumns + c;
      const float4* x = reinterpret_cast<const float4*>(staged) + split;
#pragma unroll 2
      for (int i = 0; i < count * 8 / kSplits; ++i) {
        const float4 v = w[i * 32];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float4 u = x[r * (kStage / 4) + i * kSplits];
          acc[r] += v.x * u.x;
          acc[r] += v.y * u.y;
          acc[r] += v.z * u.z;
          acc[r] += v.w * u.w;
        }
      }
      dev::sync_warp();  // before the stage is written again
    }
    float* to = sums + ((warp * kSplits + split) * s.padded_rows() + row) * s.sums_stride() + c;
#pragma unroll
    for (int r = 0; r < R; ++r) to[r * s.sums_stride()] = acc[r];
  }

  const GridShape& s;
  const int lane, warp;
  const KRange range;
  uint4* weights;   // of the block
  float* staged;    // [8, kStage] of the warp
};

// kM tiles of 16 columns of M (one for each gate, of 16 units) are the rows of mma's a; 8 rows of the batch are
// its columns. Words: [8 rows, tile, register of b, lane]; they never touch shared memory.
template <class S, int kM, int kGates>
class MmaProduct {
  static constexpr bool kHalf = sizeof(S) == 2;
  static constexpr int kHeld = tiles::kGridFragments / kM;  // k tiles of a warp in registers
  static constexpr int kAhead = kM == 3 ? 9 : 7;            // k tiles whose words are in flight at once
  static constexpr int kAheadSpilled = 4;
  static_assert(kHeld % kAhead == 0 && kHeld <= 32, "whole batches; a bit for each tile");

 public:
  static constexpr int kValues = kHalf ? 2 : 1, kTile = 8 * kValues;

  FASTRNN_INLINE MmaProduct(const GridShape& shape, const GridShared& shared)
      : s(shape), lane(int(threadIdx.x) % 32), warp(int(threadIdx.x) / 32), range(k_range(shape)), there{0, 0} {
    const int more = s.k_tiles_of_warp() - kHeld;
    spilled = shared.weights + (more > 0 ? more : 0) * warp * kM * 32 + lane;
    for (int t = 0; t < kHeld; ++t)
      for (int i = 0; i < 2; ++i)
        there[i] |= uint32_t(range.begin + t < range.end && unit_of(range.begin + t, i) < s.hidden) << t;
  }

  static FASTRNN_INLINE int word_of(const GridShape& s, int row, int gate, int unit) {
    const int tile = unit / kTile * kGates + gate, k = unit % kTile, i = k / (4 * kValues), q = k / kValues % 4;
    return ((row / 8 * s.k_tiles() + tile) * 2 + i) * 32 + row % 8 * 4 + q;
  }
  static FASTRNN_INLINE uint32_t encode(const float (&value)[kValues]) {
    if constexpr (kHalf) return dev::pack2(dev::from_float<S>(value[0]), dev::from_float<S>(value[1]));
    else return dev::to_tf32(value[0]);
  }

  FASTRNN_INLINE void load(const uint4* packed) {
    const uint4* from = packed + range.begin * kM * 32 + lane;
#pragma unroll
    for (int t = 0; t < kHeld; ++t)
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint4 w = range.begin + t < range.end ? from[(t * kM + m) * 32] : make_uint4(0, 0, 0, 0);
        held[t][m][0] = w.x, held[t][m][1] = w.y, held[t][m][2] = w.z, held[t][m][3] = w.w;
      }
    const int more = (range.end - range.begin - kHeld) * kM;
#pragma unroll 4
    for (int i = 0; i < more; ++i) spilled[i * 32] = from[(kHeld * kM + i) * 32];
  }

  FASTRNN_INLINE void multiply(const uint64_t* words, uint32_t tag, int rows, float* sums) {
    for (int row = 0; row < rows; row += 8) {
      const bool running = row + lane / 4 < rows;
      const uint64_t* from = words + (row / 8 * s.k_tiles() + range.begin) * 64 + lane;
      float d[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][i] = 0.f;
#pragma unroll
      for (int t = 0; t < kHeld; t += kAhead)
        if (range.begin + t < range.end) {
          uint32_t b[2][kAhead];
          take<kAhead>(from + t * 64, running ? there[0] >> t : 0u, running ? there[1] >> t : 0u, tag,
                       row == 0 && t == 0, b);
#pragma unroll
          for (int n = 0; n < kAhead; ++n)
#pragma unroll
            for (int m = 0; m < kM; ++m) mma(d[m], held[t + n][m], b[0][n], b[1][n]);
        }
      multiply_spilled(from + kHeld * 64, running, tag, d);
      float* to = sums + (warp * s.padded_rows() + row + lane % 4 * 2) * s.sums_stride() + lane / 4;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i % 2 * s.sums_stride() + m * 16 + i / 2 * 8] = d[m][i];
    }
  }

 private:
  // The first unit that b's register i holds of a k tile, in this lane.
  FASTRNN_INLINE int unit_of(int tile, int i) const {
    return tile / kGates * kTile + (i * 4 + lane % 4) * kValues;
  }

  // b's registers of kN tiles, those that bit n of there_0 and there_1 is set for; zeros in the others.
  template <int kN>
  static FASTRNN_INLINE void take(const uint64_t* from, uint32_t there_0, uint32_t there_1, uint32_t tag,
                                  bool early, uint32_t (&b)[2][kN]) {
    constexpr uint32_t kMask = (1u << kN) - 1;
    uint32_t value[2 * kN];
    await(from, [](int n) { return n % kN * 64 + n / kN * 32; }, (there_0 & kMask) | (there_1 & kMask) << kN, tag,
          early, value);
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) b[n / kN][n % kN] = value[n];
    dev::sync_warp();  // lanes come back from spinning one by one
  }

  FASTRNN_INLINE void multiply_spilled(const uint64_t* from, bool running, uint32_t tag, float (&d)[kM][4]) const {
    for (int t = range.begin + kHeld, at = 0; t < range.end; t += kAheadSpilled, at += kAheadSpilled) {
      uint32_t here[2] = {0, 0}, b[2][kAheadSpilled];
#pragma unroll
      for (int n = 0; n < kAheadSpilled; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          here[i] |= uint32_t(running && t + n < range.end && unit_of(t + n, i) < s.hidden) << n;
      take<kAheadSpilled>(from + at * 64, here[0], here[1], tag, false, b);
#pragma unroll
      for (int n = 0; n < kAheadSpilled; ++n)
        if (t + n < range.end) {
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            const uint4 w = spilled[((at + n) * kM + m) * 32];
            const uint32_t a[4] = {w.x, w.y, w.z, w.w};
            mma(d[m], a, b[0][n], b[1][n]);
          }
        }
    }
  }

  static FASTRNN_INLINE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b_0, uint32_t b_1) {
    const uint32_t b[2] = {b_0, b_1};
    if constexpr (kHalf) dev::mma_16816<S>(d, a, b);
    else dev::mma_1688_tf32(d, a, b);
  }

  const GridShape& s;
  const int lane, warp;
  const KRange range;
  uint32_t there[2];  // bit t: this lane's register i of k tile t in registers is of units that there are
  uint4* spilled;     // [k tiles beyond kHeld, kM, 32] of the warp
  uint32_t held[kHeld][kM][4];
};

}  // namespace fastrnn::cuda
