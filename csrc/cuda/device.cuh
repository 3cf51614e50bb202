// All that kernel sources know of the hardware; they include nothing else of it.
//
// nvcc gets device_cuda.cuh (intrinsics and inline PTX). Any other compiler gets emu.h, the host stand-in
// under tests/hostbuild, where a block's threads run as fibers under a checker. Both offer the same names in
// fastrnn::dev, so a kernel is written once and tested without a GPU. What a kernel must keep to:
//
//  1. Only fastrnn::dev touches intrinsics or PTX. No __shared__, <<<>>>, cooperative_groups, __CUDA_ARCH__,
//     memory order by volatile, or torch in a kernel file.
//  2. Shared memory is dynamic and carved by one struct around a Carver, built by the launcher with base =
//     nullptr (gives the launch size) and by the kernel with dynamic_shared() (gives pointers). Each parity
//     buffer is a piece of its own. Two named pointers and a select; an array of them indexed at run time
//     goes to local memory.
//  3. Spins read `while (load_x(p) != wanted) spin_pause();`, with at most 64 words looked at in one turn.
//  4. Collectives as one wrapper: warp_sum(z), not 20 shuffles. Whole warps, full masks, uniform trip counts.
//  5. No early return before the last barrier. Every block and warp of a flag or mbarrier protocol produces
//     something or meets a block barrier in each step; a block that would own nothing is not launched.
//  6. A payload beside a flag needs release/acquire, with a barrier on both sides of those threads (of a block or of
//     a warp) that share them. Relaxed suffices only where value and flag share one word; a load of two words is two
//     operations. Shuffles and mma order no memory: sync_warp does, and one belongs before a push that lets peers
//     overwrite what other lanes read.
//  7. Step flags count up over launches (an epoch) or the workspace is cleared before each.
//  8. Launchers return Error; a shape that does not fit gives kInvalidValue, never a silent fall-through.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include "device_cuda.cuh"
#else
#include "emu.h"
#endif

namespace fastrnn::dev {

// Lays pieces out behind each other in shared memory. The host build puts a red zone of kRedZone bytes behind
// each piece and counts it in `used`; the CUDA build has none.
struct Carver {
  char* base;
  size_t used = 0;  // bytes

  __host__ __device__ explicit Carver(char* base_or_null) : base(base_or_null) {}

  template <class T>
  __host__ __device__ T* take(size_t count, size_t align = 16) {
    used = (used + align - 1) / align * align;
    T* piece = reinterpret_cast<T*>(base + used);
    declare_shared(base, used, count * sizeof(T));
    used += count * sizeof(T) + kRedZone;
    return piece;
  }
};

}  // namespace fastrnn::dev
