// What both passes of the grid tier share. One launch runs the whole sequence: the weights of a group are spread
// over blocks that keep them on chip (registers and shared memory, grid_tiles.h), and in each step every block
// multiplies all of the last step's results by its weights, applies the cell to its units and hands its own
// results to the others through L2. Block (x, y, z) computes `units` units of tile y of the rows of group z.
//
// Exchange. A word of 64 bits holds one float or two halves, and the tag of the step that made it. Readers spin on
// the words themselves, so a step costs one trip through L2 (0.6 us), no fence, no flag and no second trip for the
// payload; it costs twice the bytes. Words have the order in which readers load them (word_of), 256 bytes a
// warp.
//
// Why it is safe. Tags of a launch are all different from each other and from 0, and a kernel before this one, in
// the stream's order, clears all words: whatever an earlier launch left, with any T, is gone, also when a captured
// graph is replayed with the same arguments, which an epoch kept by the host could not tell apart. Step n's words
// go to buffer n & 1. A block writes those of step n + 1 over those of step n - 1 only after its barrier of step
// n, when its warps between them have seen every word of step n; each block made its own after its barrier of step
// n - 1, when its warps had read all of n - 1. There is always one row running and one unit in every block, so
// nobody can be overtaken. A block's partial sums have two buffers too, so one barrier a step is enough: who
// writes a buffer again has passed the barrier that its readers reached after reading.
//
// Floor of a step (b rows of a tile, s bytes of an element, all of one block, 1.7 cycles a ns):
//   0.6 us + 2 b K s / 42 ns + max(product, shared weights / 128 B a cycle) + about 0.1 us for the cell
//   product: mma 1.5 cycles for each 16 x 8 x 16, FFMA b K columns / 128 cycles
// with K = h forward and G h backward. LSTM in bfloat16, h 1024, 16 rows in 2 tiles of 8: forward 0.6 + 0.8 + 0.3
// us, backward 0.6 + 3.1 + 0.3.
//
// What backward exchanges. Either each block owns columns of W_hh and reads all gate gradients (b G h s bytes a
// block and step), or it owns rows, multiplies its own gate gradients, and partial sums of grad_h in float32 are
// written and read (4 b h each way). The ratio is G s / 8: 1/4 to 1 in half types and for RNN, 3/2 and 2 for GRU
// and LSTM in float32. The first also writes a G h-th part as much, keeps one protocol and one product for both
// passes, and sums in an order that no other block influences; so it is taken for all. Float32 LSTM pays up to
// twice the bytes for that.
//
// Results are bitwise the same from run to run: warps split K, and their sums are added in the order of warps.
#pragma once
#include "common.cuh"
#include "grid_tiles.h"
#include "tiles.h"

namespace fastrnn::cuda {

using tiles::GridShape;

// ---- words ----

FASTRNN_INLINE uint64_t tagged(uint32_t tag, uint32_t value) { return uint64_t(tag) << 32 | value; }

// Debug builds (-DFASTRNN_BOUNDED_SPINS=16777216, some 10 s) end the launch with an error instead of hanging, after so
// many turns of one wait. Not by going on with NaN: each of the many waits behind the first would run out too.
#if defined(FASTRNN_BOUNDED_SPINS)
constexpr int kMostTurns = FASTRNN_BOUNDED_SPINS;
#else
constexpr int kMostTurns = 0;  // no bound
#endif

// Waits until those words[at(n)] that `wanted` has bit n for carry `tag`, and gives their values; 0 for the
// others. Orders no other memory. Loads that will miss cost as much as others on their way from L2, and 8 warps
// that look for all their words keep it busy longer than a trip takes. So after a miss a lane looks at one word
// until it is there, and then at the others, all loads in flight at once; and where many words are sure to be
// missing, `early`, it begins so.
template <int N, class At>
FASTRNN_INLINE void await(const uint64_t* words, At at, uint32_t wanted, uint32_t tag, bool early,
                          uint32_t (&value)[N]) {
  static_assert(N <= 32, "a bit for each");
  uint64_t word[N];
#pragma unroll
  for (int n = 0; n < N; ++n) word[n] = 0;
  uint32_t look = wanted, beyond_four = wanted;
#pragma unroll
  for (int n = 0; n < 4; ++n) beyond_four &= beyond_four - 1;
  if (early && beyond_four) look = wanted & (0u - wanted);
  for (int turn = 0; wanted; ++turn) {
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (look >> n & 1u) word[n] = dev::load_relaxed(words + at(n));
    uint32_t arrived = 0;  // tag is not 0
#pragma unroll
    for (int n = 0; n < N; ++n) arrived |= uint32_t(uint32_t(word[n] >> 32) == tag) << n;
    wanted &= ~arrived;
    if (look & arrived) {
      look = wanted;
      continue;
    }
    look = wanted & (0u - wanted);
    dev::spin_pause();
    if (kMostTurns && turn >= kMostTurns) dev::trap();
  }
#pragma unroll
  for (int n = 0; n < N; ++n) value[n] = uint32_t(word[n]);
}

// ---- shared memory ----

struct GridShared {
  uint4* weights;
  float *staged, *sums_even, *sums_odd;  // sums [parts, padded rows, stride]
  int *row, *length, *all_lengths;       // [rows] of the tile, longest first; [batch]
  size_t bytes;

  __host__ __device__ GridShared(char* base, const GridShape& s) {
    dev::Carver carver(base);
    weights = carver.take<uint4>(size_t(s.weight_quads()));
    staged = carver.take<float>(size_t(s.staged_floats()));
    sums_even = carver.take<float>(size_t(s.sums_floats()));
    sums_odd = carver.take<float>(size_t(s.sums_floats()));
    row = carver.take<int>(size_t(s.rows));
    length = carver.take<int>(size_t(s.rows));
    all_lengths = carver.take<int>(size_t(s.batch));
    bytes = carver.used;
  }
};

// ---- rows ----

// The tile's rows: rank y * rows and on of the batch by length, longest first, so that the running ones are a
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
  o.units = 0;
  o.row = RowWalk{call.first_group, 0, -1, false};
  if (o.position < s.rows && shared.length[o.position] >= 0) {
    o.units = o.unit < end ? (end - o.unit < s.values() ? end - o.unit : s.values()) : 0;
    o.row = row_of(call, int(blockIdx.z), shared.row[o.position]);
  }
  return o;
}

// Where the words of this block's group and tile begin, buffer n & 1.
FASTRNN_INLINE uint64_t* grid_words(uint64_t* workspace, const GridShape& s, int n) {
  const int64_t place = int64_t(blockIdx.z) * s.row_tiles() + blockIdx.y;
  return workspace + (place * 2 + (n & 1)) * s.words();
}

// This block's weights, in the workspace behind the words.
FASTRNN_INLINE const uint4* grid_packed(const uint64_t* workspace, const GridShape& s) {
  const uint4* packed = reinterpret_cast<const uint4*>(workspace + s.all_words(int(gridDim.z)));
  return packed + (int64_t(blockIdx.z) * s.unit_blocks() + blockIdx.x) * s.packed_quads();
}

// What a row's columns column + n of each of kM gates of M end with: the sums over all parts of K, in their order.
template <int kM, int N>
FASTRNN_INLINE void grid_sums(const float* sums, const GridShape& s, int position, int column, float (&z)[kM][N]) {
  const float* from = sums + position * s.sums_stride() + column;
  const int part = s.padded_rows() * s.sums_stride(), gate = s.gate_columns();
#pragma unroll
  for (int i = 0; i < kM * N; ++i) z[i / N][i % N] = 0.f;
#pragma unroll 4
  for (int n = s.parts(); n > 0; --n, from += part) {
#pragma unroll
    for (int i = 0; i < kM * N; ++i) z[i / N][i % N] += from[i / N * gate + i % N];
  }
}

// ---- launches ----

inline dim3 grid_blocks(const GridShape& s, int groups) {
  return dim3(unsigned(s.unit_blocks()), unsigned(s.row_tiles()), unsigned(groups));
}

inline GridShape grid_shape(const ForwardParams& p, const Choice& choice, bool backward) {
  const bool half = tiles::is_half(p.dtype);
  return {kCells[p.cell].gates, int32_t(p.hidden), int32_t(p.batch), choice.units, choice.rows, choice.threads,
          backward,             half || choice.tf32, half};
}

// Clears words and packs weights; grid_prepare.cu.
int prepare_grid(const ForwardParams& p, int first_group, int groups, const GridShape& s, void* workspace,
                 dev::Stream stream);

template <class Kernel, class Params>
int launch_grid(Kernel kernel, const LaunchParams<Params>& call, const GridShape& s, void* workspace, void* stream) {
  const auto on = static_cast<dev::Stream>(stream);
  const int error = prepare_grid(call, call.first_group, call.groups_here, s, workspace, on);
  if (error != int(dev::kSuccess)) return error;
  const GridShared shared(nullptr, s);
  dev::Launch launch{grid_blocks(s, call.groups_here), unsigned(s.threads), shared.bytes, 1, true, on};
  return int(dev::launch(kernel, launch, call, s, static_cast<uint64_t*>(workspace)));
}

// Can these params run on this shape at all? float64, projections and cells with a Row are the per-step tier's.
inline bool grid_takes(const ForwardParams& p, const GridShape& s) {
  return p.dtype != DType::kFloat64 && !p.weight_hr && is_pointwise(p.cell) && s.valid();
}

}  // namespace fastrnn::cuda
