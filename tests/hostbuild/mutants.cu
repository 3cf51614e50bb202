// Small kernels with faults on demand: what the emulator has to find, so that "no findings" cannot mean
// "blind".
//
// Three of them compute the same recurrence, h_t[b,u] = tanh(x[t,b,u] + sum_k w[u,k] h_{t-1}[b,k]), by the
// three ways blocks exchange h: {value, step} words, a payload beside release/acquire flags, pushes in a
// cluster. The others are a few lines each. `fault` is a run-time argument: one compilation serves all.
#include "mutants.h"

#include "cuda/device.cuh"

namespace mutants {

using namespace fastrnn::dev;

constexpr int kThreads = 64, kWarps = kThreads / 32;

// ---- words: value and step flag in one relaxed 64-bit word ----

struct WordsShared {
  float *w, *h_even, *h_odd;  // w [U, H], h [B, H]
  size_t bytes;
  __host__ __device__ WordsShared(char* base, const Args& a) {
    Carver carver(base);
    w = carver.take<float>(size_t(a.U) * a.H);
    h_even = carver.take<float>(size_t(a.B) * a.H);
    h_odd = carver.take<float>(size_t(a.B) * a.H);
    bytes = carver.used;
  }
};

// words [2, B, H]: step in the high half, bits of h in the low one. kTwoWords has the steps in words of their own, [4,
// B, H]; kOneTagForPair beside the values, [2, B, H, 2], and reads both by one load, which is not one operation.
__global__ void __launch_bounds__(kThreads) words_kernel(Args a) {
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int H = a.H, BH = a.B * H, u0 = int(blockIdx.x) * a.U, fault = a.fault;
  const int units = H - u0 < a.U ? H - u0 : a.U, pairs = units > 0 ? a.B * units : 0;
  const WordsShared s(dynamic_shared(), a);

  for (int i = tid; i < a.U * H; i += kThreads) {
    bool in = i / H < units || fault == kNoTailGuard;
    s.w[i] = in ? a.w[size_t(u0) * H + i] : 0.f;
  }
  for (int t = 0; t < a.T; ++t) {
    float* h = t % 2 && fault != kOneSharedBuffer ? s.h_odd : s.h_even;
    const uint32_t step = a.epoch + uint32_t(t);
    for (int i = tid; i < BH; i += kThreads) {
      if (t == 0) {
        h[i] = a.h_0[i];
        continue;
      }
      const int parity = fault == kOneExchangeBuffer ? 0 : t % 2;
      const uint64_t* word = a.words + size_t(parity) * BH + i;
      uint64_t v = 0;
      if (fault == kNoFlagWait) {
        v = load_relaxed(word);
      } else if (fault == kTwoWords) {
        while (load_relaxed(word + 2 * BH) != step) spin_pause();
        v = load_relaxed(word);
      } else if (fault == kOneTagForPair) {
        uint64_t pair[2];
        while (load_relaxed(a.words + 2 * (size_t(parity) * BH + i), pair), pair[1] != step) spin_pause();
        v = pair[0];
      } else if (fault == kMisalignedPair) {
        uint64_t pair[2];
        while (load_relaxed(word, pair), pair[0] >> 32 != step) spin_pause();
        v = pair[0];
      } else {
        while ((v = load_relaxed(word)) >> 32 != step) spin_pause();
      }
      h[i] = bits_to_float(uint32_t(v));
    }
    if (fault == kWritePastEnd && tid == 0) h[BH] = 0.f;
    if (fault == kDivergentBarrier ? tid < 32 || t != 1 : fault != kNoBarrierAfterLoad) sync_block();

    for (int p = warp; p < pairs; p += kWarps) {
      const int b = p / units, u = p % units;
      float z[1] = {0.f};
      for (int k = lane; k < H; k += 32) z[0] += s.w[u * H + k] * h[b * H + k];
      if (fault != kDivergentShuffle || lane < H) warp_sum(z);
      if (lane == 0) {
        const size_t at = size_t(b) * H + u0 + u;
        const float h_new = tanhf(a.x[size_t(t) * BH + at] + z[0]);
        a.y[size_t(t) * BH + at] = h_new;
        if (t + 1 == a.T) continue;
        const int parity = fault == kOneExchangeBuffer ? 0 : fault == kWrongParity ? t % 2 : (t + 1) % 2;
        uint64_t* word = a.words + (size_t(parity) * BH + at) * (fault == kOneTagForPair ? 2 : 1);
        store_relaxed(word, uint64_t(step + 1) << 32 | float_to_bits(h_new));
        if (fault == kOneTagForPair) store_relaxed(word + 1, step + 1);
        if (fault == kTwoWords) store_relaxed(word + 2 * BH, step + 1);
      }
    }
  }
}

// ---- flags: h as bf16 in global memory, one release flag per block, mma ----

struct FlagsShared {
  bf16* h;  // [B rounded up to 8, stride]
  int columns, stride, rows;
  size_t bytes;
  __host__ __device__ FlagsShared(char* base, const Args& a) {
    columns = (a.H + 15) / 16 * 16;
    stride = columns + 8;
    rows = (a.B + 7) / 8 * 8;
    Carver carver(base);
    h = carver.take<bf16>(size_t(rows) * stride);
    bytes = carver.used;
  }
};

__device__ inline uint32_t weight_pair(const Args& a, int u, int k) {
  const float low = u < a.H && k < a.H ? a.w[size_t(u) * a.H + k] : 0.f;
  const float high = u < a.H && k + 1 < a.H ? a.w[size_t(u) * a.H + k + 1] : 0.f;
  return pack2(from_float<bf16>(low), from_float<bf16>(high));
}

// A warp owns 16 units. payload [2, B, H] bf16, words [blocks]: the step each block has published.
__global__ void __launch_bounds__(kThreads) flags_kernel(Args a) {
  const int tid = int(threadIdx.x), lane = tid % 32, g = lane / 4, q = lane % 4;
  const int H = a.H, BH = a.B * H, fault = a.fault, blocks = int(gridDim.x);
  const int u0 = (int(blockIdx.x) * kWarps + tid / 32) * 16;
  bf16* payload = static_cast<bf16*>(a.payload);
  const FlagsShared s(dynamic_shared(), a);

  for (int t = 0; t < a.T; ++t) {
    const uint64_t step = a.epoch + uint64_t(t);
    const int parity = fault == kOnePayloadBuffer ? 0 : t % 2;
    if (t > 0)
      for (int i = tid; i < blocks; i += kThreads)
        while ((fault == kRelaxedLoad ? load_relaxed(a.words + i) : load_acquire(a.words + i)) < step)
          spin_pause();
    if (fault != kNoBarrierAfterAcquire) sync_block();
    for (int i = tid; i < s.rows * s.columns; i += kThreads) {
      const int b = i / s.columns, k = i % s.columns;
      if (fault == kPaddingNotCleared && b >= a.B) continue;
      bf16 v = from_float<bf16>(0.f);
      if (b < a.B && k < H)
        v = t == 0 ? from_float<bf16>(a.h_0[b * H + k]) : payload[parity * BH + b * H + k];
      s.h[b * s.stride + k] = v;
    }
    sync_block();
    for (int n = 0; n < s.rows; n += 8) {
      float d[4] = {0.f, 0.f, 0.f, 0.f};
      for (int k = 0; k < s.columns; k += 16) {
        const int k0 = k + 2 * q;
        const uint32_t w[4] = {weight_pair(a, u0 + g, k0), weight_pair(a, u0 + g + 8, k0),
                               weight_pair(a, u0 + g, k0 + 8), weight_pair(a, u0 + g + 8, k0 + 8)};
        const bf16* row = s.h + (n + (fault == kRowsSwapped ? q : g)) * s.stride + k0;
        const int first = fault == kHalvesSwapped ? 8 : 0;
        const uint32_t h[2] = {pack2(row[first], row[first + 1]), pack2(row[8 - first], row[9 - first])};
        mma_16816<bf16>(d, w, h);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int u = u0 + g + 8 * (i / 2), b = n + 2 * q + i % 2;
        if (u >= H || b >= a.B) continue;
        const float h_new = tanhf(a.x[size_t(t) * BH + b * H + u] + d[i]);
        a.y[size_t(t) * BH + b * H + u] = h_new;
        const int next = fault == kOnePayloadBuffer ? 0 : (t + 1) % 2;
        payload[next * BH + b * H + u] = from_float<bf16>(h_new);
      }
    }
    if (fault != kNoBarrierBeforeRelease) sync_block();
    if (tid == 0) {
      if (fault == kRelaxedStore) store_relaxed(a.words + blockIdx.x, step + 1);
      else store_release(a.words + blockIdx.x, step + 1);
    }
  }
}

// ---- cluster: h pushed into every block's shared memory, one mbarrier per parity buffer ----

struct ClusterShared {
  uint64_t* bars;             // [2]
  float *w, *h_even, *h_odd;  // w [U, H], h [B, H]
  size_t bytes;
  __host__ __device__ ClusterShared(char* base, const Args& a) {
    Carver carver(base);
    bars = carver.take<uint64_t>(2);
    w = carver.take<float>(size_t(a.U) * a.H);
    h_even = carver.take<float>(size_t(a.B) * a.H);
    h_odd = carver.take<float>(size_t(a.B) * a.H);
    bytes = carver.used;
  }
};

// Every row of the grid (blockIdx.y) is a cluster with a batch of its own: x, y [groups, T, B, H],
// h_0 [groups, B, H].
__global__ void __launch_bounds__(kThreads) cluster_kernel(Args a) {
  const int tid = int(threadIdx.x), lane = tid % 32, warp = tid / 32, group = int(blockIdx.y);
  const int H = a.H, BH = a.B * H, fault = a.fault;
  const int rank = int(cluster_rank()), size = int(cluster_size()), u0 = rank * a.U;
  const int units = H - u0 < a.U ? H - u0 : a.U, pairs = units > 0 ? a.B * units : 0;
  const float *x = a.x + size_t(group) * a.T * BH, *h_0 = a.h_0 + size_t(group) * BH;
  float* y = a.y + size_t(group) * a.T * BH;
  const ClusterShared s(dynamic_shared(), a);

  if (tid == 0) {
    mbarrier_init(s.bars, 1);
    mbarrier_init(s.bars + 1, 1);
    if (fault != kNoInitFence) mbarrier_init_fence();
  }
  for (int i = tid; i < a.U * H; i += kThreads) s.w[i] = i / H < units ? a.w[size_t(u0) * H + i] : 0.f;
  for (int i = tid; i < BH; i += kThreads) s.h_even[i] = h_0[i];
  if (fault == kBlockBarrierAfterInit) sync_block();
  else sync_cluster();

  for (int t = 0; t < a.T; ++t) {
    const float* h = t % 2 && fault != kOneClusterBuffer ? s.h_odd : s.h_even;
    float* next = t % 2 || fault == kOneClusterBuffer ? s.h_even : s.h_odd;
    uint64_t *bar = s.bars + t % 2, *next_bar = s.bars + (t + 1) % 2;
    const bool last = t + 1 == a.T;
    if (tid == 0 && !last) {
      unsigned bytes = unsigned(BH) * 4u;
      if (fault == kCountTooLarge) bytes += 4;
      if (fault == kCountTooSmall) bytes /= 2;
      mbarrier_arrive_expect(next_bar, bytes);
    }
    if (t > 0 && fault != kNoPushWait)
      mbarrier_wait(bar, unsigned(fault == kWrongPhase ? t / 2 : (t - 1) / 2) % 2);
    for (int p = warp; p < pairs; p += kWarps) {
      const int b = p / units, u = p % units;
      float z[1] = {0.f};
      for (int k = lane; k < H; k += 32) z[0] += s.w[u * H + k] * h[b * H + k];
      warp_sum(z);
      // orders every lane's reads of h before the push that lets peers overwrite it
      if (fault != kNoSyncBeforePush) sync_warp();
      if (lane == 0) {
        const int at = b * H + u0 + u;
        const float h_new = tanhf(x[size_t(t) * BH + at] + z[0]);
        y[size_t(t) * BH + at] = h_new;
        if (last && fault != kPushOnLastStep) continue;
        for (int d = 0; d < size; ++d) push_async(next + at, h_new, next_bar, unsigned((rank + d) % size));
        // the same bytes once more, uncounted by the expectation
        if (fault == kPushTwice) push_async(next + at, h_new, next_bar, unsigned(rank));
      }
    }
    // keeps a warp that owns nothing from falling two phases behind
    if (fault != kIdleWarpUnheld) sync_block();
  }
}

// ---- operations: warp operations and each mma, one warp; y [9, 32] ----

__device__ inline float matrix(const float* m, int columns, int row, int column) {
  return m[row * columns + column];
}

template <class T>
__device__ inline void store_mma_16816(const float* a, const float* b, float* y, int lane, bool swapped) {
  const int g = lane / 4, q = lane % 4;
  uint32_t fa[4], fb[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i % 2), k = 2 * q + 8 * (i / 2);
    fa[i] = pack2(from_float<T>(matrix(a, 16, row, k)), from_float<T>(matrix(a, 16, row, k + 1)));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int k = 2 * q + 8 * (swapped ? 1 - i : i);
    fb[i] = pack2(from_float<T>(matrix(b, 8, k, g)), from_float<T>(matrix(b, 8, k + 1, g)));
  }
  float d[4] = {1.f, 1.f, 1.f, 1.f};
  mma_16816<T>(d, fa, fb);
#pragma unroll
  for (int i = 0; i < 4; ++i) y[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];
}

// x [16, 16] is the a of mma, w [16, 8] its b; y: sum [32], xor 5 [32], lane 3 [32], three times d [16, 8]
__global__ void __launch_bounds__(32) operations_kernel(Args a) {
  const int lane = int(threadIdx.x), g = lane / 4, q = lane % 4, fault = a.fault;
  float z[2] = {a.x[lane], 1.f};
  warp_sum(z);
  a.y[lane] = z[0] + z[1];
  const bool half = fault == kWrongMask || (fault == kSourceOutsideMask && lane < 16);
  const unsigned mask = half ? 0xffffu : kFullMask;
  if (fault == kSourceOutsideMask && lane >= 16) {
    a.y[32 + lane] = 0.f;
  } else {
    a.y[32 + lane] = shuffle_xor(a.x[lane], fault == kSourceOutsideMask ? 16 : 5, mask);
  }
  if (fault == kEndedLane && lane == 7) return;
  a.y[64 + lane] = shuffle(a.x[lane], 3);
  store_mma_16816<bf16>(a.x, a.w, a.y + 96, lane, fault == kHalvesSwapped);
  store_mma_16816<f16>(a.x, a.w, a.y + 224, lane, false);
  float d[4] = {1.f, 1.f, 1.f, 1.f};
  for (int k = 0; k < 16; k += 8) {
    uint32_t fa[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) fa[i] = to_tf32(matrix(a.x, 16, g + 8 * (i % 2), k + q + 4 * (i / 2)));
    const uint32_t fb[2] = {to_tf32(matrix(a.w, 8, k + q, g)), to_tf32(matrix(a.w, 8, k + q + 4, g))};
    mma_1688_tf32(d, fa, fb);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) a.y[352 + (g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];
}

// ---- tile: plain shared memory, asynchronous copies, element sizes; y [blocks, kThreads] ----

struct Wide {
  float v[12];  // long enough that copying it is a call of memcpy
};
struct TileShared {
  float* tile;     // [kThreads, 4]
  uint8_t* bytes8;  // [kThreads]
  bf16* halves;    // [kThreads]
  Wide* wide;      // [1]
  size_t bytes;
  __host__ __device__ explicit TileShared(char* base) {
    Carver carver(base);
    tile = carver.take<float>(size_t(kThreads) * 4);
    bytes8 = carver.take<uint8_t>(kThreads);
    halves = carver.take<bf16>(kThreads);
    wide = carver.take<Wide>(1);
    bytes = carver.used;
  }
};

// these would need local memory on a device
#if !defined(__CUDACC__)
inline float element(float4 v, int i) {
  const float array[4] = {v.x, v.y, v.z, v.w};
  return array[i];
}
float deep(int n) {
  volatile float room[256];
  room[n & 255] = 1.f;
  return n < 0 ? 0.f : deep(n + 1) + room[n & 255];
}
#endif

// y[block, i] = sum of x[(i + 1) % kThreads, 0..3] + i
__global__ void __launch_bounds__(kThreads) tile_kernel(Args a) {
  const int tid = int(threadIdx.x), fault = a.fault, next = (tid + 1) % kThreads;
  const TileShared s(dynamic_shared());
  copy_async16(s.tile + tid * 4, a.x + tid * 4 + (fault == kMisalignedCopy ? 1 : 0));
  copy_async_commit();
  s.bytes8[tid] = uint8_t(tid);  // neighbours' bytes and halves are no races
  s.halves[tid] = from_float<bf16>(0.f);
  const int wide_at = fault == kStructCopyPastEnd ? 4 * kThreads - 4 : 0;
  if (tid == 0) *s.wide = *reinterpret_cast<const Wide*>(a.x + wide_at);
  if (fault == kCopyBarrierBeforeWait) sync_block();
  if (fault != kNoCopyWait) copy_async_wait<0>();
  if (fault != kCopyBarrierBeforeWait && fault != kNoTileBarrier) sync_block();
  const float4 v = *reinterpret_cast<const float4*>(s.tile + next * 4 + (fault == kMisalignedVector ? 1 : 0));
  float sum = v.x + v.y + v.z + v.w + float(s.bytes8[tid]) + to_float(s.halves[next]);
  if (tid == 1) sum += s.wide->v[0] - a.x[0];
  if (fault == kWriteInput && tid == 5) const_cast<float*>(a.x)[5] = sum;
  if (fault == kNeighbourBlock) a.y[tid] = sum;
#if !defined(__CUDACC__)
  if (fault == kRegisterOverrun) sum += element(v, tid % 8);
  if (fault == kNullPointer) sum += a.w[tid];
  if (fault == kDeepStack) sum += deep(fault);
  if (fault == kHostPointer) sum += *a.w;
#endif
  a.y[int(blockIdx.x) * kThreads + tid] = sum;
}

// ---- waits: loops that never end, hidden waits between blocks; words [blocks], y [blocks] ----

__global__ void __launch_bounds__(kThreads) waits_kernel(Args a) {
  const int block = int(blockIdx.x), blocks = int(gridDim.x), fault = a.fault;
  if (threadIdx.x == 0) {
    const bool plain_spin = fault == kPlainSpin || fault == kPlainSpinForever;
    if (plain_spin && block > 0) {
      while (*static_cast<const volatile uint64_t*>(a.words) < (fault == kPlainSpin ? 1u : 2u)) {
      }
    }
    if (fault == kEndlessLoop && block == 0) {
      volatile int never = 0;
      while (never == 0) {
      }
    }
    if (fault == kPlainStore && block == 0) a.words[0] = 1;
    else store_release(a.words + block, 1);
    if (fault == kSpinWithoutPause)
      while (load_acquire(a.words + (block + 1) % blocks) < 1) {
      }
    else if (!plain_spin)
      while (load_acquire(a.words + (block + 1) % blocks) < 1) spin_pause();
    a.y[block] = float(block);
  }
}

// ---- launchers ----

static unsigned parts(int n, int of) { return unsigned((n + of - 1) / of); }

int launch_words(const Args& a) {
  const WordsShared s(nullptr, a);
  const unsigned blocks = parts(a.H, a.U) + unsigned(a.extra_blocks);
  return launch(words_kernel, Launch{blocks, kThreads, s.bytes, 1, true}, a);
}
int launch_flags(const Args& a) {
  const FlagsShared s(nullptr, a);
  return launch(flags_kernel, Launch{parts(a.H, 16 * kWarps), kThreads, s.bytes, 1, true}, a);
}
int launch_cluster(const Args& a) {
  const ClusterShared s(nullptr, a);
  const unsigned size = parts(a.H, a.U);
  return launch(cluster_kernel, Launch{dim3(size, unsigned(a.groups)), kThreads, s.bytes, size}, a);
}
int launch_operations(const Args& a) { return launch(operations_kernel, Launch{1, 32, 0}, a); }
int launch_tile(const Args& a) {
  const TileShared s(nullptr);
  return launch(tile_kernel, Launch{unsigned(a.groups), kThreads, s.bytes}, a);
}
int launch_waits(const Args& a) {
  const bool coresident = a.fault != kHiddenWait;
  return launch(waits_kernel, Launch{unsigned(a.groups), kThreads, 0, 1, coresident}, a);
}

}  // namespace mutants
