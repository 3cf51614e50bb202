// fastrnn::dev for nvcc: each wrapper is one or two instructions. The host stand-in (emu.h) declares the same
// names; what one wrapper means stands here, what the checker makes of it stands there.
// Wrappers of instructions a target lacks trap there, so kernels need no architecture guards.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define FASTRNN_SM80(...) __trap()
#else
#define FASTRNN_SM80(...) __VA_ARGS__
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTRNN_SM90(...) __trap()
#else
#define FASTRNN_SM90(...) __VA_ARGS__
#endif
#define FASTRNN_DEV __device__ __forceinline__

namespace fastrnn::dev {

// ---- number formats ----

using bf16 = __nv_bfloat16;
using f16 = __half;

FASTRNN_DEV float to_float(float v) { return v; }
FASTRNN_DEV float to_float(bf16 v) { return __bfloat162float(v); }
FASTRNN_DEV float to_float(f16 v) { return __half2float(v); }

// round to nearest even
template <class T> FASTRNN_DEV T from_float(float v);
template <> FASTRNN_DEV float from_float<float>(float v) { return v; }
template <> FASTRNN_DEV bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }
template <> FASTRNN_DEV f16 from_float<f16>(float v) { return __float2half_rn(v); }

FASTRNN_DEV uint32_t float_to_bits(float v) { return __float_as_uint(v); }
FASTRNN_DEV float bits_to_float(uint32_t v) { return __uint_as_float(v); }

FASTRNN_DEV uint16_t half_to_bits(bf16 v) { return __bfloat16_as_ushort(v); }
FASTRNN_DEV uint16_t half_to_bits(f16 v) { return __half_as_ushort(v); }
template <class T> FASTRNN_DEV T bits_to_half(uint16_t v);
template <> FASTRNN_DEV bf16 bits_to_half<bf16>(uint16_t v) { return __ushort_as_bfloat16(v); }
template <> FASTRNN_DEV f16 bits_to_half<f16>(uint16_t v) { return __ushort_as_half(v); }

// T = bf16 or f16; `low` lands in bits 0-15, the element with the smaller index in mma's fragments
template <class T> FASTRNN_DEV uint32_t pack2(T low, T high) {
  return uint32_t(half_to_bits(low)) | uint32_t(half_to_bits(high)) << 16;
}
template <class T> FASTRNN_DEV T unpack_low(uint32_t v) { return bits_to_half<T>(uint16_t(v & 0xffffu)); }
template <class T> FASTRNN_DEV T unpack_high(uint32_t v) { return bits_to_half<T>(uint16_t(v >> 16)); }

// fp32 to tf32 (10-bit mantissa), ties away from zero
FASTRNN_DEV uint32_t to_tf32(float v) {
  uint32_t r = 0;
  FASTRNN_SM80(asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v)));
  return r;
}

// ---- shared memory ----

constexpr size_t kRedZone = 0;
__host__ __device__ inline void declare_shared(char*, size_t, size_t) {}

FASTRNN_DEV char* dynamic_shared() {
  extern __shared__ __align__(128) char fastrnn_dynamic_shared[];
  return fastrnn_dynamic_shared;
}

FASTRNN_DEV unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// The same value, which the compiler keeps rather than make it anew from the thread's number each time it is asked for.
FASTRNN_DEV int keep(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// ---- block and warp ----

constexpr unsigned kFullMask = 0xffffffffu;

FASTRNN_DEV void sync_block() { __syncthreads(); }
FASTRNN_DEV void sync_warp() { __syncwarp(); }

// T of 4 bytes: float, int, unsigned. These order no memory.
template <class T> FASTRNN_DEV T shuffle_xor(T v, int lane_mask, unsigned mask = kFullMask) {
  static_assert(sizeof(T) == 4, "one 32-bit register");
  return __shfl_xor_sync(mask, v, lane_mask);
}
template <class T> FASTRNN_DEV T shuffle(T v, int lane, unsigned mask = kFullMask) {
  static_assert(sizeof(T) == 4, "one 32-bit register");
  return __shfl_sync(mask, v, lane);
}

// z[i] becomes its sum over the warp, in every lane, in butterfly order (16, 8, 4, 2, 1)
template <int N> FASTRNN_DEV void warp_sum(float (&z)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int m = 16; m > 0; m >>= 1) z[i] += __shfl_xor_sync(kFullMask, z[i], m);
  }
}

// ---- words shared between blocks (global memory, gpu scope, naturally aligned) ----

FASTRNN_DEV uint64_t load_relaxed(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
// Two neighbouring words by one load, aligned to 16 bytes. It is two operations of 64 bits in an unspecified order, not
// one of 128: each word must say for itself how old it is (PTX ISA, Memory Operations on Vector Data Types).
FASTRNN_DEV void load_relaxed(const uint64_t* p, uint64_t (&v)[2]) {
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0,%1}, [%2];" : "=l"(v[0]), "=l"(v[1]) : "l"(p) : "memory");
}
FASTRNN_DEV uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FASTRNN_DEV uint64_t load_acquire(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
FASTRNN_DEV uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
FASTRNN_DEV void store_relaxed(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
FASTRNN_DEV void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FASTRNN_DEV void store_release(uint64_t* p, uint64_t v) {
  asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
FASTRNN_DEV void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// between two looks at a word in a spin loop; no nanosleep, whose granularity is longer than a step
FASTRNN_DEV void spin_pause() {}

// ends the launch with an error that stays with the process's context: for debug builds
FASTRNN_DEV void trap() { asm volatile("trap;"); }

// ---- tensor cores: d [16, 8] += a [16, K] * b [K, 8], fp32 accumulation ----
// With g = lane / 4 and q = lane % 4, a lane holds
//   d[i]: row g + 8 (i / 2), column 2 q + i % 2
//   16-bit, K = 16: a[i]: row g + 8 (i % 2), k = 2 q + 8 (i / 2) + {0, 1}
//                   b[i]: k = 2 q + 8 i + {0, 1}, column g
//   tf32,    K = 8: a[i]: row g + 8 (i % 2), k = q + 4 (i / 2)
//                   b[i]: k = q + 4 i, column g

// T = bf16 or f16, two to a register (pack2)
template <class T>
FASTRNN_DEV void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
FASTRNN_DEV void mma_16816<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FASTRNN_SM80(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])));
}
template <>
FASTRNN_DEV void mma_16816<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FASTRNN_SM80(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])));
}
// a and b from to_tf32
FASTRNN_DEV void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FASTRNN_SM80(asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                            "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])));
}

// ---- asynchronous copies, global to shared, 16 bytes, both sides 16-byte aligned ----
// A thread sees its own copies after the wait, other threads after a barrier behind that wait.

FASTRNN_DEV void copy_async16(void* shared, const void* global) {
  FASTRNN_SM80(asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                            ::"r"(shared_address(shared)), "l"(global) : "memory"));
}
FASTRNN_DEV void copy_async_commit() { FASTRNN_SM80(asm volatile("cp.async.commit_group;" ::: "memory")); }
// waits until at most kPending of this thread's committed groups are in flight
template <int kPending> FASTRNN_DEV void copy_async_wait() {
  FASTRNN_SM80(asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"));
}

// ---- thread-block clusters (sm_90): blocks of one cluster are neighbours in x ----

// Is this pass for a target whose clusters our kernels are made for, 9.0 or 10.x? Others compile none of their bodies.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1100)
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif

FASTRNN_DEV unsigned cluster_rank() {
  unsigned r = 0;
  FASTRNN_SM90(asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)));
  return r;
}
FASTRNN_DEV unsigned cluster_size() {
  unsigned r = 0;
  FASTRNN_SM90(asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)));
  return r;
}
FASTRNN_DEV void sync_cluster() {
  FASTRNN_SM90(asm volatile("barrier.cluster.arrive.release.aligned;\n\t"
                            "barrier.cluster.wait.acquire.aligned;" ::: "memory"));
}

// ---- mbarriers: one phase ends after `arrivals` arrivals and as many pushed bytes as were expected ----

FASTRNN_DEV void mbarrier_init(uint64_t* bar, unsigned arrivals) {
  FASTRNN_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                            ::"r"(shared_address(bar)), "r"(arrivals) : "memory"));
}
// by the thread that did the inits, after the last of them and before sync_cluster
FASTRNN_DEV void mbarrier_init_fence() {
  FASTRNN_SM90(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"));
}
FASTRNN_DEV void mbarrier_arrive_expect(uint64_t* bar, unsigned bytes) {
  FASTRNN_SM90(asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;"
                            ::"r"(shared_address(bar)), "r"(bytes) : "memory"));
}
FASTRNN_DEV bool mbarrier_test(uint64_t* bar, unsigned parity) {
  unsigned done = 1;
  FASTRNN_SM90(asm volatile("{\n\t.reg .pred p;\n\t"
                            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
                            "selp.u32 %0, 1, 0, p;\n\t}"
                            : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory"));
  return done != 0;
}
// returns once the phase of this parity has ended; the k-th phase (from 0) has parity k % 2
FASTRNN_DEV void mbarrier_wait(uint64_t* bar, unsigned parity) {
  while (!mbarrier_test(bar, parity)) {
  }
}

FASTRNN_DEV unsigned peer_address(const void* p, unsigned rank) {
  unsigned r = 0;
  FASTRNN_SM90(asm("mapa.shared::cluster.u32 %0, %1, %2;"
                   : "=r"(r) : "r"(shared_address(p)), "r"(rank)));
  return r;
}
// Writes v behind dst's twin in block `rank` of the cluster (itself allowed) and counts its bytes on the twin
// of bar there. dst and bar are this block's own addresses; all blocks carve alike.
FASTRNN_DEV void push_async(uint32_t* dst, uint32_t v, uint64_t* bar, unsigned rank) {
  FASTRNN_SM90(asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                            ::"r"(peer_address(dst, rank)), "r"(v), "r"(peer_address(bar, rank)) : "memory"));
}
FASTRNN_DEV void push_async(uint64_t* dst, uint64_t v, uint64_t* bar, unsigned rank) {
  FASTRNN_SM90(asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];"
                            ::"r"(peer_address(dst, rank)), "l"(v), "r"(peer_address(bar, rank)) : "memory"));
}
// 16 bytes, aligned to as many
FASTRNN_DEV void push_async(uint4* dst, uint4 v, uint64_t* bar, unsigned rank) {
  FASTRNN_SM90(asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];"
                            ::"r"(peer_address(dst, rank)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w),
                              "r"(peer_address(bar, rank)) : "memory"));
}
FASTRNN_DEV void push_async(float* dst, float v, uint64_t* bar, unsigned rank) {
  push_async(reinterpret_cast<uint32_t*>(dst), float_to_bits(v), bar, rank);
}

// ---- host side ----

using Error = cudaError_t;
using Stream = cudaStream_t;
constexpr Error kSuccess = cudaSuccess;
constexpr Error kInvalidValue = cudaErrorInvalidValue;
inline const char* error_string(Error e) { return cudaGetErrorString(e); }

struct Launch {
  dim3 grid;
  unsigned block;            // threads, a multiple of 32
  size_t shared;             // dynamic bytes, Carver::used
  unsigned cluster = 1;      // blocks in x that form a cluster; divides grid.x
  bool coresident = false;   // blocks wait for each other: all must fit at once, or the launch is refused
  Stream stream = nullptr;
};

struct DeviceInfo {
  int multiprocessors;
  int compute_capability;    // 80, 90, ...
  size_t shared_per_block;   // opt-in limit, bytes
};

// gives `e` back and clears it from the runtime, so that it is not reported twice
inline Error checked(Error e) {
  if (e != cudaSuccess) (void)cudaGetLastError();
  return e;
}

inline Error device_info(DeviceInfo* info) {
  int device = 0, major = 0, minor = 0, shared = 0;
  Error e = cudaGetDevice(&device);
  if (e == cudaSuccess)
    e = cudaDeviceGetAttribute(&info->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  info->compute_capability = 10 * major + minor;
  info->shared_per_block = size_t(shared);
  return checked(e);
}

// what a kernel may use without asking for more
constexpr size_t kDefaultShared = 48 << 10;

// Lets every launch of the kernel on this device have all the shared memory that there is, not this launch its share:
// the limit is the kernel's, and another thread may stand between setting it and its own, larger launch.
template <class... P>
Error allow_shared(void (*kernel)(P...), size_t shared) {
  if (shared <= kDefaultShared) return cudaSuccess;
  DeviceInfo info{};
  Error e = device_info(&info);
  if (e == cudaSuccess)
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(info.shared_per_block));
  return e;
}

// how many blocks of this shape the current device holds at once
template <class... P>
Error max_coresident_blocks(void (*kernel)(P...), unsigned block, size_t shared, int* blocks) {
  DeviceInfo info{};
  int per_multiprocessor = 0;
  Error e = device_info(&info);
  if (e == cudaSuccess) e = allow_shared(kernel, shared);
  if (e == cudaSuccess)
    e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, int(block), shared);
  *blocks = e == cudaSuccess ? per_multiprocessor * info.multiprocessors : 0;
  return checked(e);
}

// how many blocks of this kernel, with all the shared memory that there is, may form a cluster on the current device
template <class... P>
Error max_cluster_blocks(void (*kernel)(P...), unsigned block, int* blocks) {
  DeviceInfo info{};
  Error e = device_info(&info);
  if (e == cudaSuccess) e = allow_shared(kernel, info.shared_per_block);
  if (e == cudaSuccess) e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(16);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = info.shared_per_block;
  if (e == cudaSuccess) e = cudaOccupancyMaxPotentialClusterSize(blocks, kernel, &config);
  return checked(e);
}

// Asynchronous on l.stream and capturable in a graph. Arguments are passed by value.
template <class... P, class... A>
Error launch(void (*kernel)(P...), const Launch& l, A... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = l.grid;
  config.blockDim = dim3(l.block);
  config.dynamicSmemBytes = l.shared;
  config.stream = l.stream;
  config.attrs = attributes;
  if (l.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = l.cluster;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
  }
  if (l.coresident) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
  Error e = allow_shared(kernel, l.shared);
  // more than 8 blocks in a cluster is not portable between devices and has to be asked for
  if (e == cudaSuccess && l.cluster > 8)
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (e == cudaSuccess) e = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  return checked(e);
}

}  // namespace fastrnn::dev
