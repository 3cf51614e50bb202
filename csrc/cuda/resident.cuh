// The resident tier's products: a block holds all of a group's weight_hh, in registers and what does not fit
// there in shared memory, and multiplies it once a step with a tile of rows in shared memory. Forward
// multiplies h to make gates_hh; backward multiplies the gate gradients to make the gradient of h. Both are
// written once, for float32 by FFMA and for the half types by mma.
#pragma once
#include <type_traits>

#include "common.cuh"
#include "tiles.h"
#include "unit_forward.cuh"

namespace fastrnn::cuda {

// ---- float32 ----
//
// kLanes neighbouring lanes share kOut outputs of each of kRows rows. They split the sum in chunks of 4 terms:
// lane l takes chunks l, l + kLanes, ...

// What one block lays out. kBias: gates, or 0; kKept: chunks that stay in registers. `terms`: length of the sum,
// which is zero-padded to whole rounds of chunks.
template <int kOut_, int kLanes_, int kRows_, int kBias, int kKept_>
struct FfmaShared {
  static constexpr int kOut = kOut_, kLanes = kLanes_, kRows = kRows_, kKept = kKept_;
  float *even, *odd;   // [kRows, stride] each: the vectors to multiply, by parity of the step
  float4* weights;     // [chunks - kept, kOut, threads]
  float* bias;         // [kBias, units]
  int stride, chunks;  // chunks: of a lane
  int units;           // threads / kLanes
  size_t bytes;
  __host__ __device__ FfmaShared(char* base, int terms, int threads) {
    chunks = ceil_div(terms, 4 * kLanes);
    stride = chunks * 4 * kLanes;
    units = threads / kLanes;
    dev::Carver carver(base);
    even = carver.take<float>(size_t(kRows) * stride);
    odd = carver.take<float>(size_t(kRows) * stride);
    weights = carver.take<float4>(size_t(chunks < kKept ? 0 : chunks - kKept) * kOut * threads);
    bias = carver.take<float>(size_t(kBias) * units);
    bytes = carver.used;
  }
};

template <class Shared>
struct ResidentFfma {
  static constexpr int kOut = Shared::kOut, kLanes = Shared::kLanes, kRows = Shared::kRows, kKept = Shared::kKept;
  float4 kept[kKept][kOut];
  const float4* rest;  // shared, this thread's column
  int chunks, step;    // step: from weight to weight in rest
  int lane;            // in the group of kLanes

  // weight(out, term) -> float: 0 outside the matrix.
  template <class Weight>
  FASTRNN_INLINE void load(const Shared& s, Weight weight) {
    lane = int(threadIdx.x) % kLanes;
    chunks = s.chunks;
    step = int(blockDim.x);
    rest = s.weights + threadIdx.x;
    const auto chunk = [&](int i, int out) {
      const int term = (i * kLanes + lane) * 4;
      return make_float4(weight(out, term), weight(out, term + 1), weight(out, term + 2), weight(out, term + 3));
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
#pragma unroll
      for (int out = 0; out < kOut; ++out) kept[i][out] = i < chunks ? chunk(i, out) : make_float4(0, 0, 0, 0);
    }
    float4* column = s.weights + threadIdx.x;
    for (int i = kKept; i < chunks; ++i) {
#pragma unroll
      for (int out = 0; out < kOut; ++out) column[((i - kKept) * kOut + out) * step] = chunk(i, out);
    }
  }

  // This lane's part of the sums; x: shared [kRows, stride].
  FASTRNN_INLINE void multiply(const float* x, int stride, float (&sum)[kRows][kOut]) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int out = 0; out < kOut; ++out) sum[row][out] = 0.f;
    }
    x += lane * 4;
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      if (i < chunks) add(kept[i], x + i * kLanes * 4, stride, sum);
#pragma unroll 1  // no registers left to load ahead
    for (int i = kKept; i < chunks; ++i) {
      float4 w[kOut];
#pragma unroll
      for (int out = 0; out < kOut; ++out) w[out] = rest[((i - kKept) * kOut + out) * step];
      add(w, x + i * kLanes * 4, stride, sum);
    }
  }

 private:
  static FASTRNN_INLINE void add(const float4 (&w)[kOut], const float* x, int stride, float (&sum)[kRows][kOut]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float4 v = *reinterpret_cast<const float4*>(x + row * stride);
#pragma unroll
      for (int out = 0; out < kOut; ++out)
        sum[row][out] += w[out].x * v.x + w[out].y * v.y + w[out].z * v.z + w[out].w * v.w;
    }
  }
};

// Sums n values over groups of kLanes lanes and spreads the results: lane l of its group gets the sum of value
// l / (kLanes / n). n <= kLanes, powers of two. The order of additions is fixed. (A recursion, since a loop whose
// trips halve n is not unrolled for every target, and then v is in local memory.)
template <int kLanes, int n, int kMask = kLanes / 2, int kRoom>
FASTRNN_INLINE float group_sum(float (&v)[kRoom]) {
  static_assert(n <= 2 * kMask && kLanes <= 32, "a value for every lane");
  if constexpr (n == 1) {
    v[0] += dev::shuffle_xor(v[0], kMask);
  } else {
    const bool upper = (int(threadIdx.x) & kMask) != 0;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const float send = upper ? v[i] : v[n / 2 + i];
      v[i] = (upper ? v[n / 2 + i] : v[i]) + dev::shuffle_xor(send, kMask);
    }
  }
  if constexpr (kMask == 1)
    return v[0];
  else
    return group_sum<kLanes, (n > 1 ? n / 2 : 1), kMask / 2>(v);
}

// ---- bfloat16, float16 ----
//
// A warp owns 16 outputs (hidden units; backward: columns of h), the block 8 rows; sums run over the units of
// each gate in tiles of 16. A lane (g = lane / 4, q = lane % 4) ends with outputs g, g + 8 of rows 2q, 2q + 1.
// So that it can store its two outputs as one word, terms are ordered so that units u and u + 8 of a tile stand
// together: word u of a tile is {unit u, unit u + 8}. The weights' fragments follow the same order.

constexpr int kMmaRows = 8;  // of a block's tile

// kSegments: parts of the vectors (1: h; kGates: gate gradients). kBias: gates, or 0. kKept: tiles in registers.
// kAll: there are never more.
template <class S_, int kGates_, int kSegments, int kBias, int kWarps, int kKept_>
struct MmaShared {
  using S = S_;
  static constexpr int kGates = kGates_, kKept = kKept_;
  static constexpr bool kAll = kWarps <= kKept;
  uint32_t *even, *odd;  // [kMmaRows, stride] words each, by parity of the step
  uint4* weights;        // [tiles - kept, kGates, threads]: fragments
  float* bias;           // [kBias, units]
  int tiles, stride;
  int gate_stride;       // from segment to segment of a row
  int units;  // 16 a warp
  size_t bytes;
  __host__ __device__ MmaShared(char* base, int hidden, int threads) {
    tiles = ceil_div(hidden, 16);
    gate_stride = tiles * 8;
    stride = kSegments * gate_stride + 4;  // rows 4 banks apart (mod 8): neither reads nor stores collide
    dev::Carver carver(base);
    even = carver.take<uint32_t>(size_t(kMmaRows) * stride);
    odd = carver.take<uint32_t>(size_t(kMmaRows) * stride);
    weights = carver.take<uint4>(size_t(tiles < kKept ? 0 : tiles - kKept) * kGates * threads);
    units = threads / 2;
    bias = carver.take<float>(size_t(kBias) * units);
    bytes = carver.used;
  }
};

template <class Shared>
struct ResidentMma {
  using S = typename Shared::S;
  static constexpr int kGates = Shared::kGates, kKept = Shared::kKept;
  uint32_t kept[kKept][kGates][4];
  const uint4* rest;  // shared, this thread's column
  int tiles, step;

  // weight(gate, output, term) -> S: output and term count units; 0 outside the matrix.
  template <class Weight>
  FASTRNN_INLINE void load(const Shared& s, Weight weight) {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, q = lane % 4, first = int(threadIdx.x) / 32 * 16;
    tiles = s.tiles;
    step = int(blockDim.x);
    rest = s.weights + threadIdx.x;
    const auto pair = [&](int tile, int gate, int i) {
      const int output = first + g + 8 * (i % 2), term = tile * 16 + q + 4 * (i / 2);
      return dev::pack2(weight(gate, output, term), weight(gate, output, term + 8));
    };
#pragma unroll
    for (int tile = 0; tile < kKept; ++tile) {
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[tile][gate][i] = tile < tiles ? pair(tile, gate, i) : 0u;
      }
      dev::sync_warp();  // else all tiles' loads are in flight at once, in more registers than there are
    }
    if constexpr (!Shared::kAll) {
      uint4* column = s.weights + threadIdx.x;
      for (int tile = kKept; tile < tiles; ++tile) {
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          column[((tile - kKept) * kGates + gate) * step] = make_uint4(
              pair(tile, gate, 0), pair(tile, gate, 1), pair(tile, gate, 2), pair(tile, gate, 3));
      }
    }
  }

  // sum[gate][i] = products of one gate's weights: output g + 8 (i / 2), row 2q + i % 2. x: shared [8, stride]
  // words; the gates' parts stand gate_stride words apart (0: one vector for all).
  FASTRNN_INLINE void multiply(const uint32_t* x, int stride, int gate_stride, float (&sum)[kGates][4]) const {
    const int lane = int(threadIdx.x) % 32;
    x += lane / 4 * stride + lane % 4;
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[gate][i] = 0.f;
    }
#pragma unroll
    for (int tile = 0; tile < kKept; ++tile)
      if (tile < tiles) {
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          add(kept[tile][gate], x + gate * gate_stride + tile * 8, sum[gate]);
      }
    if constexpr (!Shared::kAll) {
#pragma unroll 1  // no registers left to load ahead
      for (int tile = kKept; tile < tiles; ++tile) {
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          const uint4 w = rest[((tile - kKept) * kGates + gate) * step];
          const uint32_t a[4] = {w.x, w.y, w.z, w.w};
          add(a, x + gate * gate_stride + tile * 8, sum[gate]);
        }
      }
    }
  }

 private:
  static FASTRNN_INLINE void add(const uint32_t (&a)[4], const uint32_t* x, float (&sum)[4]) {
    const uint32_t b[2] = {x[0], x[4]};
    dev::mma_16816<S>(sum, a, b);
  }
};

// ---- both ----

// Zeroes this thread's share of n words.
template <class T>
FASTRNN_INLINE void clear_shared(T* p, int n) {
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) p[i] = T(0);
}

// The bias of all units, into s.bias [G, units].
template <class Cell, class S, class Shared>
FASTRNN_INLINE void keep_bias(const ForwardParams& p, int group, const Shared& s) {
  for (int j = int(threadIdx.x); j < s.units; j += int(blockDim.x)) {
    Pack<float, Cell::kGates> bias;
    load_bias<Cell, S>(p, group, j, bias);
#pragma unroll
    for (int g = 0; g < Cell::kGates; ++g) s.bias[g * s.units + j] = bias[g];
  }
}

// ---- launches ----

constexpr int kFfmaThreads = 512;  // of a block, at most: they give the registers of tiles.h

// 4 threads a unit; 32 for 16 units.
inline int resident_threads(const ForwardParams& p) {
  return tiles::is_half(p.dtype) ? round_up(int(p.hidden), 16) * 2 : round_up(int(p.hidden) * 4, 32);
}

template <class Cell, int kRows, int G = Cell::kGates>
using FfmaForward = FfmaShared<G, 4, kRows, G, tiles::resident_register_chunks(G, kRows, false)>;
template <class Cell, int kRows, int G = Cell::kGates>
using FfmaBackward = FfmaShared<4, 16, kRows, 0, tiles::resident_register_chunks(G, kRows, true)>;
template <class Cell, class S, int kWarps, int G = Cell::kGates>
using MmaForward = MmaShared<S, G, 1, G, kWarps, tiles::resident_register_tiles(G, Cell::kParams, kWarps, false)>;
template <class Cell, class S, int kWarps, int G = Cell::kGates>
using MmaBackward = MmaShared<S, G, G, 0, kWarps, tiles::resident_register_tiles(G, Cell::kParams, kWarps, true)>;

// Gate gradients of a row stand in segments of this many floats: whole chunks.
__host__ __device__ constexpr int ffma_segment(int hidden) { return round_up(hidden, 4); }

// f(Type<Cell>{}, constant of rows), and f(Type<Cell>{}, Type<S>{}, constant of warps): the kernels there are.
template <int n>
using Constant = std::integral_constant<int, n>;
template <class F>
int with_ffma_tile(const ForwardParams& p, int rows, F f) {
  if (p.dtype != DType::kFloat32 || p.weight_hr || has_masks(p) || p.hidden > kFfmaThreads / 4)
    return int(dev::kInvalidValue);
  return with_pointwise_cell(p.cell, [&](auto cell) {
    return rows == 1 ? f(cell, Constant<1>{}) : rows == 4 ? f(cell, Constant<4>{}) : int(dev::kInvalidValue);
  });
}
template <class F>
int with_mma_tile(const ForwardParams& p, int rows, F f) {
  if (!tiles::is_half(p.dtype) || p.weight_hr || has_masks(p) || p.hidden > 12 * 16 || rows != kMmaRows)
    return int(dev::kInvalidValue);
  return with_pointwise_cell(p.cell, [&](auto cell) {
    return with_half(p.dtype, [&](auto storage) {
      return tiles::resident_warps(p.hidden) == 8 ? f(cell, storage, Constant<8>{})
                                                  : f(cell, storage, Constant<12>{});
    });
  });
}

template <class Params, class Kernel>
int launch_resident(Kernel kernel, const Params& p, int rows, size_t shared, void* stream) {
  return for_each_launch(p, [&](const LaunchParams<Params>& call) {
    dev::Launch launch{};
    launch.grid = dim3(unsigned(ceil_div(p.batch, rows)), unsigned(call.groups_here));
    launch.block = unsigned(resident_threads(p));
    launch.shared = shared;
    launch.stream = static_cast<dev::Stream>(stream);
    return int(dev::launch(kernel, launch, call));
  });
}

}  // namespace fastrnn::cuda
