// The grid tier's products: a block's share of weights, kept on chip, times what the exchange holds, a warp for
// each part of K. FfmaProduct: exact float32. MmaProduct: bfloat16, float16 and TF32.
//
// Both take K in tiles of kTile: tile number (unit / kTile) * kGates + gate, so that a unit's neighbours and gates
// stay together. Only units below h exist; the last tile of each gate is padded with zeros.
//   load(packed)   once: the block's weights as grid_prepare.cu laid them out; the caller meets a barrier after
//   multiply(exchange, k, tag, rows, sums)   waits for the results of step k, of rows 0 .. rows - 1, and writes this
//                  warp's parts of sums [parts, padded rows, stride]; those of other rows may hold anything. Every warp
//                  calls it. No block barrier inside.
//   encode(values)   what the owner of a word publishes
//
// A row that is not running is looked at as the last one that is: no load, branch or mask for it alone, and what comes
// out as its sums is not used.
#pragma once
#include "grid.cuh"

namespace fastrnn::cuda {

struct Range {
  int begin, end;
};
// Through a shuffle, by which the compiler sees that it is the same in all lanes.
FASTRNN_INLINE int warp_of_block() { return dev::shuffle(int(threadIdx.x) / 32, 0); }
// Of one of so many parts, in tiles of K.
FASTRNN_INLINE Range k_range(const GridShape& s, int part, int parts) {
  const int n = s.k_tiles();
  return {n * part / parts, n * (part + 1) / parts};
}

// The flags of the blocks that own the units of these tiles.
FASTRNN_INLINE Range flag_range(const GridShape& s, const Range& tiles, int tile, int gates) {
  if (tiles.begin == tiles.end) return {0, 0};
  const int first = tiles.begin / gates * tile, end = ((tiles.end - 1) / gates + 1) * tile;
  const int last = (end < s.hidden ? end : s.hidden) - 1;
  return {first / s.units * s.owner_warps(), (last / s.units + 1) * s.owner_warps()};
}

// Of a lane's column and R rows. Of few rows each sum is in parts, so that not every multiply-add waits for the one
// before.
template <int R>
struct FfmaSums {
  static constexpr int kParts = R < 4 ? 4 / R : 1;
  float part[R][kParts] = {};

  FASTRNN_INLINE void add(int r, const float4& w, const float4& u) {
    part[r][0] += w.x * u.x;
    part[r][1 % kParts] += w.y * u.y;
    part[r][2 % kParts] += w.z * u.z;
    part[r][3 % kParts] += w.w * u.w;
  }
  FASTRNN_INLINE float sum(int r) const {
    if constexpr (kParts == 4) return (part[r][0] + part[r][1]) + (part[r][2] + part[r][3]);
    else if constexpr (kParts == 2) return part[r][0] + part[r][1];
    else return part[r][0];
  }
};

// kColumns lanes side by side hold the columns of M; the 32 / kColumns sets of lanes split K by fours. Weights, as
// [k / 4, column, 4], and a stage of 8 rows' words are in shared memory: 4 R multiply-adds for R + 1 loads of 16
// bytes, R of which are the same for all lanes of a set.
template <int kColumns, int kGates, class W>
class FfmaProduct {
  using Word = typename W::Word;
  static constexpr int kSplits = 32 / kColumns, kStage = tiles::kGridStage;

 public:
  using Way = W;
  static constexpr bool kMma = false;
  using Exchange = cuda::Exchange<Way, kGates, 8 * 32>;
  static constexpr int kTile = 32, kTileWords = 8 * kTile, kValues = 1, kStride = kColumns + 4;
  static FASTRNN_INLINE int gate_columns(const GridShape& s) { return s.units; }

  FASTRNN_INLINE FfmaProduct(const GridShape& s, const GridShared& shared)
      : lane(int(threadIdx.x) % 32), warp(warp_of_block()), range(k_range(s, warp, s.warps())),
        flags(flag_range(s, range, kTile, kGates)), group_words(ceil_div(s.hidden, kTile) * kGates * kTileWords),
        padded_rows(s.padded_rows()), weights(shared.weights), staged(shared.staged + warp * 8 * kStage) {}

  static FASTRNN_INLINE uint32_t encode(const float (&value)[1]) { return dev::float_to_bits(value[0]); }

  FASTRNN_INLINE void load(const uint4* packed) {
    const int end = range.end * 8 * kColumns;
#pragma unroll 4
    for (int i = range.begin * 8 * kColumns + lane; i < end; i += 32) weights[i] = packed[i];
  }

  FASTRNN_INLINE void multiply(const Exchange& exchange, int k, uint32_t tag, int rows, float* sums) {
    exchange.await(k, tag, flags.begin, flags.end - flags.begin);
    const Word* words = exchange.words(k) + range.begin * kTileWords;
    for (int row = 0; row < rows; row += 8, words += group_words) {  // rows is the same in all threads
      const int left = rows - row;
      if (left > 4) multiply_rows<8>(words, tag, row, left, sums);
      else if (left > 1) multiply_rows<4>(words, tag, row, left, sums);
      else multiply_rows<1>(words, tag, row, left, sums);
    }
  }

 private:
  template <int R>
  FASTRNN_INLINE void multiply_rows(const Word* words, uint32_t tag, int row, int left, float* sums) {
    constexpr int kAhead = R == 8 ? 2 : 4;     // tiles whose words are in flight at once
    constexpr int kPairs = R > 1 ? R / 2 : 1;  // of a lane in a tile: half a warp takes a row
    constexpr int kStageTiles = kStage / kTile;
    const int c = lane % kColumns, split = lane / kColumns, pair = lane % 16 * 2, half = lane / 16;
    const Word* from[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      from[i] = words + (2 * i + half < left ? 2 * i + half : left - 1) * kTile + pair;
    FfmaSums<R> acc;
    bool early = row == 0;
    for (int stage = range.begin; stage < range.end; stage += kStageTiles) {
      const int count = range.end - stage < kStageTiles ? range.end - stage : kStageTiles;
      for (int first = 0; first < count; first += kAhead) {
        Word word[kAhead * kPairs][2];
        take(
            [&](int n) { return from[n % kPairs] + n / kPairs * kTileWords; }, (count - first) * kPairs, tag, early,
            word);
        early = false;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) from[i] += kAhead * kTileWords;
#pragma unroll
        for (int n = 0; n < kAhead * kPairs; ++n) {
          const int tile = first + n / kPairs;
          if (tile < count)
            *reinterpret_cast<float2*>(staged + (n % kPairs * 2 + half) * kStage + tile * kTile + pair) =
                make_float2(dev::bits_to_float(uint32_t(word[n][0])), dev::bits_to_float(uint32_t(word[n][1])));
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
          acc.add(r, v, x[r * (kStage / 4) + i * kSplits]);
        }
      }
      dev::sync_warp();  // before the stage is written again
    }
    float* to = sums + ((warp * kSplits + split) * padded_rows + row) * kStride + c;
#pragma unroll
    for (int r = 0; r < R; ++r) to[r * kStride] = acc.sum(r);
  }

  const int lane, warp;
  const Range range, flags;
  const int group_words, padded_rows;
  uint4* weights;   // of the block
  float* staged;    // [8, kStage] of the warp
};

// kM tiles of 16 columns of M (one for each gate, of 16 units) are the rows of mma's a; 8 rows of the batch are
// its columns. A pair of words is b of one tile in one lane; words never touch shared memory.
template <class S, int kM, int kGates, class W>
class MmaProduct {
  using Word = typename W::Word;
  static constexpr bool kHalf = sizeof(S) == 2;
  // k tiles of a warp in registers
  static constexpr int kHeld = (W::kPushes ? tiles::kClusterFragments : tiles::kGridFragments) / kM;
  // k tiles whose words are in flight at once: as many as there are registers for, of which tags take half
  static constexpr int kAhead =
      W::kPushes ? (kM == 3 ? 10 : 8) : kM == 3 ? 9 : kM == 1 && sizeof(Word) == 4 ? 14 : 7;
  static_assert(kHeld % kAhead == 0, "whole batches");
  static constexpr int kAheadSpilled = 4;
  // Sums of a tile of M: two of them where one would have every mma wait for the last.
  static constexpr int kSums = kM == 1 ? 2 : 1;

 public:
  using Way = W;
  static constexpr bool kMma = true;
  using Exchange = cuda::Exchange<Way, kGates, 64>;
  static constexpr int kValues = kHalf ? 2 : 1, kTile = 8 * kValues, kTileWords = 64, kStride = 16 * kM + 4;
  static FASTRNN_INLINE int tile_units(const GridShape&) { return 16; }
  static FASTRNN_INLINE int gate_columns(const GridShape&) { return 16; }

  // Warps are [parts of K, tiles of units].
  FASTRNN_INLINE MmaProduct(const GridShape& s, const GridShared& shared)
      : lane(int(threadIdx.x) % 32), warp(warp_of_block()), unit_tiles(Way::kPushes ? s.unit_tiles() : 1),
        range(k_range(s, warp / unit_tiles, s.warps() / unit_tiles)), flags(flag_range(s, range, kTile, kGates)),
        tiles(range.end - range.begin), group_words(ceil_div(s.hidden, kTile) * kGates * kTileWords),
        padded_rows(s.padded_rows()) {
    const int more = s.k_tiles_of_warp() - kHeld;
    spilled = shared.weights + (more > 0 ? more : 0) * warp * kM * 32 + lane;
    first_quad = (warp % unit_tiles * s.k_tiles() + range.begin) * kM * 32 + lane;
  }

  static FASTRNN_INLINE uint32_t encode(const float (&value)[kValues]) {
    if constexpr (kHalf) return hold<S>(value);
    else return dev::to_tf32(value[0]);
  }

  FASTRNN_INLINE void load(const uint4* packed) {
    const uint4* from = packed + first_quad;
#pragma unroll
    for (int t = 0; t < kHeld; ++t)
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint4 w = t < tiles ? from[(t * kM + m) * 32] : make_uint4(0, 0, 0, 0);
        held[t][m][0] = w.x, held[t][m][1] = w.y, held[t][m][2] = w.z, held[t][m][3] = w.w;
      }
    const int more = (tiles - kHeld) * kM;
#pragma unroll 4
    for (int i = 0; i < more; ++i) spilled[i * 32] = from[(kHeld * kM + i) * 32];
  }

  FASTRNN_INLINE void multiply(const Exchange& exchange, int k, uint32_t tag, int rows, float* sums) const {
    exchange.await(k, tag, flags.begin, flags.end - flags.begin);
    const Word* words = exchange.words(k) + range.begin * kTileWords + lane % 4 * 2;
    for (int row = 0; row < rows; row += 8, words += group_words) {
      const Word* from = words + (row + lane / 4 < rows ? lane / 4 : rows - 1 - row) * 8;
      float d[kSums * kM][4];
#pragma unroll
      for (int m = 0; m < kSums * kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][i] = 0.f;
      add_tiles(from, tag, row == 0, d);
      float* to = sums + (warp * padded_rows + row + lane % 4 * 2) * kStride + lane / 4;
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          to[i % 2 * kStride + m * 16 + i / 2 * 8] = kSums == 1 ? d[m][i] : d[m][i] + d[kSums - 1][i];
    }
  }

 private:
  // b of the first `count` of N tiles.
  template <int N>
  static FASTRNN_INLINE void take_tiles(const Word* from, int count, uint32_t tag, bool early, Word (&b)[N][2]) {
    take([&](int n) { return from + n * kTileWords; }, count, tag, early, b);
    if constexpr (sizeof(Word) == 8) dev::sync_warp();  // lanes come back from spinning one by one
  }

  // Adds the products of the warp's tiles, whose words begin at `from`.
  FASTRNN_INLINE void add_tiles(const Word* from, uint32_t tag, bool early, float (&d)[kSums * kM][4]) const {
    if (W::kPushes && tiles >= kHeld) {  // all of them, as where the weights fill the registers
#pragma unroll
      for (int t = 0; t < kHeld; t += kAhead) {
        Word b[kAhead][2];
        take_tiles(from + t * kTileWords, kAhead, tag, early && t == 0, b);
#pragma unroll
        for (int n = 0; n < kAhead; ++n)
#pragma unroll
          for (int m = 0; m < kM; ++m) mma(d[n % kSums + m], held[t + n][m], b[n]);
      }
    } else {
#pragma unroll
      for (int t = 0; t < kHeld; t += kAhead)
        if (t < tiles) {
          Word b[kAhead][2];
          take_tiles(from + t * kTileWords, tiles - t, tag, early && t == 0, b);
#pragma unroll
          for (int n = 0; n < kAhead; ++n)
            if (t + n < tiles) {
#pragma unroll
              for (int m = 0; m < kM; ++m) mma(d[n % kSums + m], held[t + n][m], b[n]);
            }
        }
    }
    const uint4* weight = spilled;
    from += kHeld * kTileWords;
    int t = kHeld;
#pragma unroll 1
    for (; t + kAheadSpilled <= tiles; t += kAheadSpilled) {
      add_spilled<kAheadSpilled>(from, weight, tag, d);
      from += kAheadSpilled * kTileWords, weight += kAheadSpilled * kM * 32;
    }
#pragma unroll 1
    for (; t < tiles; ++t, from += kTileWords, weight += kM * 32) add_spilled<1>(from, weight, tag, d);
  }

  // The next N tiles of those beyond kHeld.
  template <int N>
  static FASTRNN_INLINE void add_spilled(const Word* from, const uint4* weight, uint32_t tag,
                                         float (&d)[kSums * kM][4]) {
    Word b[N][2];
    take_tiles(from, N, tag, false, b);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint4 w = weight[(n * kM + m) * 32];
        const uint32_t a[4] = {w.x, w.y, w.z, w.w};
        mma(d[n % kSums + m], a, b[n]);
      }
  }

  static FASTRNN_INLINE void mma(float (&d)[4], const uint32_t (&a)[4], const Word (&words)[2]) {
    const uint32_t b[2] = {uint32_t(words[0]), uint32_t(words[1])};
    if constexpr (kHalf) dev::mma_16816<S>(d, a, b);
    else dev::mma_1688_tf32(d, a, b);
  }

  const int lane, warp, unit_tiles;
  const Range range, flags;
  const int tiles, group_words, padded_rows;  // k tiles of the warp; words of 8 rows
  int first_quad;  // the lane's, of the packed weights
  uint4* spilled;  // [k tiles beyond kHeld, kM, 32] of the warp
  uint32_t held[kHeld][kM][4];
};

}  // namespace fastrnn::cuda
