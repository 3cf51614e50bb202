// What both passes of the grid tier share. One launch runs the whole sequence: the weights of a group are spread
// over blocks that keep them on chip (registers and shared memory, grid_tiles.h), and in each step every block
// multiplies all of the last step's results by its weights, applies the cell to its units and hands its own
// results to the others through L2. Block (x, y, z) computes `units` units of tile y of the rows of group z.
//
// How they are handed over, and why nobody is overtaken: exchange.cuh. A block's partial sums have two buffers, so one
// barrier a step is enough: who writes a buffer again has passed the barrier that its readers reached after reading.
//
// Floor of a step (b rows of a tile, s bytes of an element, all of one block, 1.7 cycles a ns):
//   exchange of b K s bytes + max(product, shared weights / 128 B a cycle) + about 0.1 us for the cell
//   exchange: words 0.6 us up to 2 KB, 1.1 for 8 KB; flags 1.3 us up to 16 KB and 16 ns for each KB more
//   product: mma 1.5 cycles for each 16 x 8 x 16, FFMA b K columns / 128 cycles
// with K = h forward and G h backward. LSTM in bfloat16, h 1024, 16 rows in 2 tiles of 8: forward 1.3 + 0.3 us,
// backward 2.1 + 0.3.
//
// What backward exchanges. Either each block owns columns of W_hh and reads all gate gradients (b G h s bytes a
// block and step), or it owns rows, multiplies its own gate gradients, and partial sums of grad_h in float32 are
// written and read (4 b h each way). The ratio is G s / 8: 1/4 to 1 in half types and for RNN, 3/2 and 2 for GRU
// and LSTM in float32. The first also writes a G h-th part as much, keeps one protocol and one product for both
// passes, and sums in an order that no other block influences; so it is taken for all. Float32 LSTM pays up to
// twice the bytes for that.
//
// Results are bitwise the same from run to run: warps split K, and their sums are added in the order of warps. Not so
// from batch to batch: exact float32 sums fewer than four rows in more parts.
#pragma once
#include "exchange.cuh"
#include "tiles.h"

namespace fastrnn::cuda {

// The shape, with what a kernel is made for as constants: what follows from these takes no code.
template <class Product>
FASTRNN_INLINE GridShape shape_for(GridShape s, int gates, bool backward) {
  using Way = typename Product::Way;
  s.gates = gates;
  s.backward = backward;
  s.mma = Product::kMma;
  s.half = Product::kValues == 2;
  s.flags = std::is_same<Way, ByFlags>::value;
  s.cluster = Way::kPushes;
  return s;
}

// ---- shared memory ----

struct GridShared {
  uint4* weights;
  float *staged, *sums_even, *sums_odd;  // sums [parts, padded rows, stride]
  uint32_t *pushed_even = nullptr, *pushed_odd = nullptr;    // a cluster's exchange: one buffer of words each
  uint64_t *barrier_even = nullptr, *barrier_odd = nullptr;  // and the mbarriers that count what arrives there
  int *row, *length, *all_lengths;       // [rows] of the tile, longest first; [batch]
  size_t bytes;

  __host__ __device__ GridShared(char* base, const GridShape& s) {
    dev::Carver carver(base);
    weights = carver.take<uint4>(size_t(s.weight_quads()));
    staged = carver.take<float>(size_t(s.staged_floats()));
    sums_even = carver.take<float>(size_t(s.sums_floats()));
    sums_odd = carver.take<float>(size_t(s.sums_floats()));
    if (s.cluster) {
      pushed_even = carver.take<uint32_t>(size_t(s.pushed_words()));
      pushed_odd = carver.take<uint32_t>(size_t(s.pushed_words()));
      barrier_even = carver.take<uint64_t>(1);
      barrier_odd = carver.take<uint64_t>(1);
    }
    row = carver.take<int>(size_t(s.rows));
    length = carver.take<int>(size_t(s.rows));
    all_lengths = carver.take<int>(round_up(size_t(s.batch), size_t(4)));  // ptxas reads 16 bytes at a time
    bytes = carver.used;
  }
};

// ---- rows ----

// The tile's rows: rank tile * rows and on of the batch by length, longest first, so that the running ones are a
// prefix. Past the batch the length is -1. Ends with a barrier.
FASTRNN_INLINE void sort_rows(const ForwardParams& p, const GridShape& s, int group, const GridShared& shared) {
  const int tid = int(threadIdx.x), step = int(blockDim.x), first = int(blockIdx.y) * s.rows;
  for (int i = tid; i < s.rows; i += step)
    if (first + i >= s.batch) shared.row[i] = s.batch, shared.length[i] = -1;
  for (int b = tid; b < s.batch; b += step) shared.all_lengths[b] = length_of(p, group, b);
  dev::sync_block();
  for (int b = tid; b < s.batch; b += step) {
    const int length = shared.all_lengths[b];
    int rank = b;
    if (p.lengths) {
      rank = 0;
      for (int other = 0; other < s.batch; ++other) {
        const int n = shared.all_lengths[other];
        rank += n > length || (n == length && other < b);
      }
    }
    if (rank >= first && rank < first + s.rows) shared.row[rank - first] = b, shared.length[rank - first] = length;
  }
  dev::sync_block();
}

// ---- this block and thread ----

// One thread computes one word of one row: `kValues` neighbouring units, from `unit` on.
struct GridOwner {
  int position;  // of the row in the tile
  int unit;      // of the group
  int units;     // how many of the word's units there are; 0: this thread owns nothing
  RowWalk row;
};

template <class Params>
FASTRNN_INLINE GridOwner grid_owner(const LaunchParams<Params>& call, const GridShape& s, const GridShared& shared) {
  const int tid = int(threadIdx.x), words = s.words_per_row();
  const int first = int(blockIdx.x) * s.units, end = first + s.units < s.hidden ? first + s.units : s.hidden;
  GridOwner o;
  o.position = tid / words;
  o.unit = first + tid % words * s.values();
  o.row = row_of(call, int(blockIdx.z), o.position < s.rows ? shared.row[o.position] : s.batch);
  o.units = o.unit < end && o.row.present() ? (end - o.unit < s.values() ? end - o.unit : s.values()) : 0;
  return o;
}

// This block's weights, in the workspace behind the exchange.
FASTRNN_INLINE const uint4* grid_packed(const void* workspace, const GridShape& s) {
  const char* packed = static_cast<const char*>(workspace) + s.exchange_bytes(int(gridDim.z));
  return reinterpret_cast<const uint4*>(packed) +
         (int64_t(blockIdx.z) * s.unit_blocks() + blockIdx.x) * s.packed_quads();
}

// A cluster's sums for a thread's word. They stand in parts of K, [unit tiles, padded rows, kStride]: where in one, how
// long one is, how many there are. The grid tier has one tile of units, and then these are cheap.
struct PushedSums {
  int place = 0, part = 0, parts = 0;
};
// unit: counted in the block.
template <class Product>
FASTRNN_INLINE PushedSums pushed_sums(const GridShape& s, int position, int unit) {
  PushedSums sums;
  if constexpr (Product::Way::kPushes) {
    const int tile = unit / Product::tile_units(s), column = unit % Product::tile_units(s);
    sums.place = (tile * s.padded_rows() + position) * Product::kStride + column;
    sums.part = s.unit_tiles() * s.padded_rows() * Product::kStride;
    sums.parts = s.parts();
  }
  return sums;
}

// One part's. A word's two columns are aligned to 8 bytes.
template <int kM, int N>
FASTRNN_INLINE void load_sums(const float* from, int gate_columns, float (&z)[kM][N]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    if constexpr (N == 2) {
      const float2 pair = *reinterpret_cast<const float2*>(from + m * gate_columns);
      z[m][0] = pair.x, z[m][1] = pair.y;
    } else {
      z[m][0] = from[m * gate_columns];
    }
  }
}

// What a row's columns column + n of each of kM gates of M end with: the sums over all parts of K, in their order. A
// gate has `gate_columns` of a row's floats. Parts are loaded a few at a time, so that they arrive together.
template <class Product, int kM, int N>
FASTRNN_INLINE void grid_sums(const float* sums, const GridShape& s, const PushedSums& pushed, int position, int column,
                              int gate_columns, float (&z)[kM][N]) {
  constexpr int kAtOnce = 4;
  constexpr bool kPushes = Product::Way::kPushes;
  const float* from = sums + (kPushes ? pushed.place : position * Product::kStride + column);
  const int part = kPushes ? pushed.part : s.padded_rows() * Product::kStride;
  const int parts = kPushes ? pushed.parts : s.warps() * (s.mma ? 1 : 32 / s.columns());
#pragma unroll
  for (int i = 0; i < kM * N; ++i) z[i / N][i % N] = 0.f;
  int left = parts;
#pragma unroll 1
  for (; left >= kAtOnce; left -= kAtOnce, from += kAtOnce * part) {
    float of_part[kAtOnce][kM][N];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) load_sums(from + n * part, gate_columns, of_part[n]);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
      for (int i = 0; i < kM * N; ++i) z[i / N][i % N] += of_part[n][i / N][i % N];
  }
#pragma unroll 1
  for (; left > 0; --left, from += part) {
    float of_part[kM][N];
    load_sums(from, gate_columns, of_part);
#pragma unroll
    for (int i = 0; i < kM * N; ++i) z[i / N][i % N] += of_part[i / N][i % N];
  }
}

// A float or two halves, as S has them, in the one register that they need between steps.
template <class S, int N>
FASTRNN_INLINE uint32_t hold(const float (&value)[N]) {
  if constexpr (N == 2) return dev::pack2(dev::from_float<S>(value[0]), dev::from_float<S>(value[1]));
  else return dev::float_to_bits(value[0]);
}
template <class S, int N>
FASTRNN_INLINE S element(uint32_t bits, int n) {
  if constexpr (N == 2) return n == 0 ? dev::unpack_low<S>(bits) : dev::unpack_high<S>(bits);
  else return dev::bits_to_float(bits);
}
template <class S, int N>
FASTRNN_INLINE float held(uint32_t bits, int n) {
  return dev::to_float(element<S, N>(bits, n));
}

// ---- words in arrays ----
//
// What a thread reads and writes of an array in a step are such words, too: `units` neighbouring elements each, which
// `pairs` says may be moved at once; the next word is `stride` elements further. Loads give 0 for elements that are not.

template <class S, int N, int W>
FASTRNN_INLINE void load_words(const S* from, int stride, int units, bool pairs, uint32_t (&words)[W]) {
  if (N == 2 && pairs) {
#pragma unroll
    for (int i = 0; i < W; ++i) words[i] = units ? *reinterpret_cast<const uint32_t*>(from + i * stride) : 0;
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const S* at = from + i * stride;
      if constexpr (N == 2) words[i] = dev::pack2(units > 0 ? at[0] : zero<S>(), units > 1 ? at[1] : zero<S>());
      else words[i] = units ? dev::float_to_bits(at[0]) : 0;
    }
  }
}
template <class S, int N>
FASTRNN_INLINE uint32_t load_word(const S* from, int units, bool pairs) {
  uint32_t word[1];
  load_words<S, N>(from, 0, units, pairs, word);
  return word[0];
}
template <class S, int N, int W>
FASTRNN_INLINE void store_words(S* to, int stride, int units, bool pairs, const uint32_t (&words)[W]) {
  if (N == 2 && pairs) {
    if (!units) return;
#pragma unroll
    for (int i = 0; i < W; ++i) *reinterpret_cast<uint32_t*>(to + i * stride) = words[i];
  } else {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      S* at = to + i * stride;
      if (units > 0) at[0] = element<S, N>(words[i], 0);
      if (units > 1) at[1] = element<S, N>(words[i], 1);
    }
  }
}

// May words of all these arrays, which begin at even offsets, be moved at once? Then no word is half a unit's.
template <int N, class... P>
FASTRNN_INLINE bool in_pairs(int64_t strides, const P*... arrays) {
  return N == 2 && strides % 2 == 0 && ((uint64_t(arrays) | ...) % 4) == 0;
}

// Where a row's elements of step k are: time passes evenly, so a step is a stride.
template <class S>
struct Steps {
  S* at;         // of step k
  int64_t step;  // from one step to the next

  // first: of time 0 and this row, group and unit
  FASTRNN_INLINE Steps(S* first, const RowWalk& r, int k, int64_t stride)
      : at(first + r.time(k) * stride), step(r.reverse ? -stride : stride) {}
};

// ---- launches ----

// Choice::variant of the grid tier: how its blocks exchange results.
constexpr int kGridWords = 0, kGridFlags = 1;

inline GridShape grid_shape(const ForwardParams& p, const Choice& choice, bool backward) {
  const bool half = tiles::is_half(p.dtype);
  const bool cluster = choice.tier == Tier::kCluster;
  return {kCells[p.cell].gates, int32_t(p.hidden), int32_t(p.batch), choice.units, choice.rows, choice.threads,
          backward, half || choice.tf32, half, !cluster && choice.variant == kGridFlags, cluster};
}

// Clears the exchange and packs weights; grid_prepare.cu.
int prepare_grid(const ForwardParams& p, int first_group, int groups, const GridShape& s, void* workspace,
                 dev::Stream stream);

// Blocks of the grid tier wait for each other, so all have to fit at once; those of a cluster wait for nobody else.
template <class Kernel, class Params>
int launch_grid(Kernel kernel, const LaunchParams<Params>& call, const GridShape& s, void* workspace, void* stream) {
  const unsigned unit_blocks = unsigned(s.unit_blocks());
  const dev::Launch launch{dim3(unit_blocks, unsigned(s.row_tiles()), unsigned(call.groups_here)),
                           unsigned(s.threads),
                           GridShared(nullptr, s).bytes,
                           s.cluster ? unit_blocks : 1u,
                           !s.cluster,
                           static_cast<dev::Stream>(stream)};
  const int error = prepare_grid(call, call.first_group, call.groups_here, s, workspace, launch.stream);
  return error != int(dev::kSuccess) ? error : int(dev::launch(kernel, launch, call, s, workspace));
}

// f(Type<Way>{}, Type<Cell>{}) -> int.
template <class F>
int with_exchange_and_cell(const GridShape& s, int32_t cell, F f) {
  return with_pointwise_cell(cell, [&](auto type) {
    return s.flags ? f(Type<ByFlags>{}, type) : f(Type<ByWords>{}, type);
  });
}

// Can these params run on this shape at all? float64, projections and cells with a Row are the per-step tier's.
inline bool grid_takes(const ForwardParams& p, const GridShape& s) {
  return p.dtype != DType::kFloat64 && !p.weight_hr && !has_masks(p) && is_pointwise(p.cell) && s.valid();
}

}  // namespace fastrnn::cuda
