// Host stand-in for the CUDA execution model: what device.cuh gives a kernel where there is no nvcc. Needs no
// CUDA toolkit. device_cuda.cuh says what each wrapper means; tests drive the emulator through emulator.h.
//
// Kernel files are compiled with -fsanitize=thread, but libtsan is not linked: every plain load and store
// of a kernel then calls memory.cpp, which checks bounds, initialisation, read-only inputs and happens-
// before, and may switch to another thread there. A block's threads are fibers; all blocks run in one OS
// thread. Warps have no lockstep: lanes meet only in warp operations.
//
// Catches: out-of-bounds and misaligned accesses; reads of memory nobody wrote (global, shared, workspace);
//   writes to inputs; host pointers; races of plain accesses, plain against word accesses, pushes and
//   asynchronous copies, mostly whatever the schedule; barriers and warp operations that not everybody
//   reaches; blocks that wait for a block which is not resident; protocols that rely on order (lost steps,
//   stale words: schedules vary who runs, and how old a relaxed load may be); misuse of mbarriers and
//   clusters; indices outside register and stack arrays, overflowing int, division by zero; overrun stacks;
//   loops that never end.
// Cannot catch: speed, bank conflicts, coalescing, occupancy, register spills. Wrong inline PTX
//   (device_cuda.cuh itself). Hardware reordering beyond this model: scopes (.cta, .cluster and .gpu are
//   one here), proxy fences. nvcc's own errors; the order in which mma adds; approximate tanh or ex2.
//   Uninitialised registers and stack arrays. An overrun inside one Carver piece or allocation (a row's
//   end, say), unless it races or reads unwritten bytes, and one that jumps over a red zone into other
//   valid memory. Relaxed loads older than a word's last kHistory stores. Spins that look at more than
//   kWatches words in one turn end by the watchdog only. Pure word protocols (no plain payload) are judged
//   by the schedules tried, not by a proof: run starve_each once. Two different races between the same pair
//   of source lines count as one. A struct returned by a call that cannot be inlined (recursion, another
//   file) and stored straight to memory.
#pragma once

// Struct copies that become a call of memcpy, and explicit ones, are checked like other accesses.
#ifdef __SANITIZE_THREAD__
extern "C" {
void* memcpy(void*, const void*, __SIZE_TYPE__) noexcept __asm__("fastrnn_emu_memcpy");
void* memmove(void*, const void*, __SIZE_TYPE__) noexcept __asm__("fastrnn_emu_memmove");
void* memset(void*, int, __SIZE_TYPE__) noexcept __asm__("fastrnn_emu_memset");
}
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// ---- the words of CUDA C++ ----

// flatten: g++ does not instrument the store of a struct that a call returns, so calls must not remain
#define __global__ __attribute__((flatten))
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// a promise g++ might use to move loads across what is modelled here
#undef __restrict__
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace fastrnn::emu {

struct Place {
  dim3 thread, block, block_dim, grid_dim;
};
const Place& place();  // of the running fiber

struct Config {
  dim3 grid;
  unsigned block;
  size_t shared;  // bytes, red zones included
  unsigned cluster;
  bool coresident;
};
// Runs the whole grid; body(context) is one thread. 0, or the number of a CUDA error if refused.
int run(const Config& config, void (*body)(void*), void* context);

void declare_shared(char* base, size_t offset, size_t bytes);
char* shared_base();
uint32_t shuffle(uint32_t v, int lane_or_mask, bool is_xor, unsigned mask);
void warp_sum(float* z, int n);
enum class Mma { kBf16, kF16, kTf32 };
void mma(Mma kind, float* d, const uint32_t* a, const uint32_t* b);
void copy_async_wait(int pending);
void push_async(void* dst, const void* v, size_t bytes, uint64_t* bar, unsigned rank);

// what the occupancy and attribute queries answer; tests set them
struct Device {
  int coresident_blocks = 64;
  int multiprocessors = 16;
  int compute_capability = 90;
  size_t shared_per_block = 232448;
};
extern Device device;

}  // namespace fastrnn::emu

#define threadIdx (::fastrnn::emu::place().thread)
#define blockIdx (::fastrnn::emu::place().block)
#define blockDim (::fastrnn::emu::place().block_dim)
#define gridDim (::fastrnn::emu::place().grid_dim)

namespace fastrnn::dev {

// ---- number formats ----

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline uint32_t float_to_bits(float v) {
  uint32_t u;
  __builtin_memcpy(&u, &v, 4);
  return u;
}
inline float bits_to_float(uint32_t v) {
  float f;
  __builtin_memcpy(&f, &v, 4);
  return f;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
inline float to_float(f16 v) {
  uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 31, mantissa = v.bits & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    float magnitude = float(mantissa) * (1.f / (1 << 24));
    return sign ? -magnitude : magnitude;
  }
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

template <class T> T from_float(float v);
template <> inline float from_float<float>(float v) { return v; }
template <> inline bf16 from_float<bf16>(float v) {
  uint32_t u = float_to_bits(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
// A float's mantissa has 13 bits more than a half's; below 2^-14 a half has the spacing 2^-24.
template <> inline f16 from_float<f16>(float v) {
  uint32_t u = float_to_bits(v), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};  // 65536 and more
  if (magnitude < 0x38800000u) {                                    // below 2^-14
    float rounded = bits_to_float(magnitude) + 0.5f;                // 0.5 has that spacing
    return {uint16_t(sign | (float_to_bits(rounded) - float_to_bits(0.5f)))};
  }
  uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return {uint16_t(sign | (rounded - 0x38000000u) >> 13)};
}

inline uint16_t half_to_bits(bf16 v) { return v.bits; }
inline uint16_t half_to_bits(f16 v) { return v.bits; }
template <class T> T bits_to_half(uint16_t v) { return T{v}; }
template <class T> uint32_t pack2(T low, T high) { return uint32_t(low.bits) | uint32_t(high.bits) << 16; }
template <class T> T unpack_low(uint32_t v) { return T{uint16_t(v & 0xffffu)}; }
template <class T> T unpack_high(uint32_t v) { return T{uint16_t(v >> 16)}; }
inline uint32_t to_tf32(float v) {
  uint32_t u = float_to_bits(v);
  bool finite = (u & 0x7f800000u) != 0x7f800000u;
  return finite ? (u + 0x1000u) & ~0x1fffu : u;
}

// ---- shared memory ----

constexpr size_t kRedZone = 32;
inline void declare_shared(char* base, size_t offset, size_t bytes) {
  if (base) emu::declare_shared(base, offset, bytes);
}
inline char* dynamic_shared() { return emu::shared_base(); }

// ---- block and warp ----

constexpr unsigned kFullMask = 0xffffffffu;
void sync_block();
void sync_warp();

template <class T> inline T shuffle_bits(T v, int lane_or_mask, bool is_xor, unsigned mask) {
  static_assert(sizeof(T) == 4, "one 32-bit register");
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  bits = emu::shuffle(bits, lane_or_mask, is_xor, mask);
  __builtin_memcpy(&v, &bits, 4);
  return v;
}
template <class T> inline T shuffle_xor(T v, int lane_mask, unsigned mask = kFullMask) {
  return shuffle_bits(v, lane_mask, true, mask);
}
template <class T> inline T shuffle(T v, int lane, unsigned mask = kFullMask) {
  return shuffle_bits(v, lane, false, mask);
}
template <int N> inline void warp_sum(float (&z)[N]) { emu::warp_sum(z, N); }

// ---- words shared between blocks ----

uint64_t load_relaxed(const uint64_t* p);
uint32_t load_relaxed(const uint32_t* p);
void load_relaxed(const uint64_t* p, uint64_t (&v)[2]);
uint64_t load_acquire(const uint64_t* p);
uint32_t load_acquire(const uint32_t* p);
void store_relaxed(uint64_t* p, uint64_t v);
void store_relaxed(uint32_t* p, uint32_t v);
void store_release(uint64_t* p, uint64_t v);
void store_release(uint32_t* p, uint32_t v);
void spin_pause();
void trap();

// ---- tensor cores ----

template <class T> void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <> inline void mma_16816<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma(emu::Mma::kBf16, d, a, b);
}
template <> inline void mma_16816<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma(emu::Mma::kF16, d, a, b);
}
inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emu::mma(emu::Mma::kTf32, d, a, b);
}

// ---- asynchronous copies ----

void copy_async16(void* shared, const void* global);
void copy_async_commit();
template <int kPending> inline void copy_async_wait() { emu::copy_async_wait(kPending); }

// ---- clusters, mbarriers, pushes ----

constexpr bool kClusters = true;
unsigned cluster_rank();
unsigned cluster_size();
void sync_cluster();
void mbarrier_init(uint64_t* bar, unsigned arrivals);
void mbarrier_init_fence();
void mbarrier_arrive_expect(uint64_t* bar, unsigned bytes);
bool mbarrier_test(uint64_t* bar, unsigned parity);
void mbarrier_wait(uint64_t* bar, unsigned parity);
inline int keep(int v) { return v; }
inline void push_async(uint32_t* dst, uint32_t v, uint64_t* bar, unsigned rank) {
  emu::push_async(dst, &v, 4, bar, rank);
}
inline void push_async(uint64_t* dst, uint64_t v, uint64_t* bar, unsigned rank) {
  emu::push_async(dst, &v, 8, bar, rank);
}
inline void push_async(uint4* dst, uint4 v, uint64_t* bar, unsigned rank) {
  emu::push_async(dst, &v, 16, bar, rank);
}
inline void push_async(float* dst, float v, uint64_t* bar, unsigned rank) {
  emu::push_async(dst, &v, 4, bar, rank);
}

// ---- host side: errors carry CUDA's numbers ----

enum Error : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kCooperativeLaunchTooLarge = 720,
};
using Stream = void*;
const char* error_string(Error e);

struct Launch {
  dim3 grid;
  unsigned block;
  size_t shared;
  unsigned cluster = 1;
  bool coresident = false;
  Stream stream = nullptr;
};

struct DeviceInfo {
  int multiprocessors;
  int compute_capability;
  size_t shared_per_block;
};
inline Error device_info(DeviceInfo* info) {
  *info = {emu::device.multiprocessors, emu::device.compute_capability, emu::device.shared_per_block};
  return kSuccess;
}

template <class... P>
Error max_coresident_blocks(void (*)(P...), unsigned, size_t, int* blocks) {
  *blocks = emu::device.coresident_blocks;
  return kSuccess;
}

template <class... P>
Error max_cluster_blocks(void (*)(P...), unsigned, int* blocks) {
  *blocks = 16;
  return kSuccess;
}

// Synchronous: returns when the grid has ended, with what it did wrong in emu::findings().
template <class... P, class... A>
Error launch(void (*kernel)(P...), const Launch& l, A... args) {
  auto body = [=] { kernel(static_cast<P>(args)...); };
  auto call = [](void* context) { (*static_cast<decltype(body)*>(context))(); };
  return Error(emu::run({l.grid, l.block, l.shared, l.cluster, l.coresident}, call, &body));
}

}  // namespace fastrnn::dev
