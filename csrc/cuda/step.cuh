// The per-step tier's launches: thread x of a launch is unit or column x of one row, y walks over rows, z over
// groups.
#pragma once
#include "common.cuh"
#include "tiles.h"

namespace fastrnn::cuda {

// kernel<<<..>>>(call, args...) for every (group, row, 0 .. n - 1)
template <class Params, class... KernelArgs, class... Args>
int launch_rows(void (*kernel)(KernelArgs...), const Params& p, int64_t n, void* stream, const Args&... args) {
  return for_each_launch(p, [&](const LaunchParams<Params>& call) {
    const int64_t whole_warps = tiles::ceil_div(n, 32) * 32;
    const unsigned threads = unsigned(whole_warps < tiles::kStepThreads ? whole_warps : tiles::kStepThreads);
    const int64_t rows = p.batch < tiles::kStepRowBlocks ? p.batch : tiles::kStepRowBlocks;
    dev::Launch launch{};
    launch.grid = dim3(unsigned(tiles::ceil_div(n, threads)), unsigned(rows), unsigned(call.groups_here));
    launch.block = threads;
    launch.stream = static_cast<dev::Stream>(stream);
    return int(dev::launch(kernel, launch, call, args...));
  });
}

// body(r, j) for this thread's rows
template <class Params, class Body>
FASTRNN_INLINE void for_each_row(const LaunchParams<Params>& call, Body body) {
  const int j = int(blockIdx.x * blockDim.x + threadIdx.x);
  for (int row = int(blockIdx.y); row < call.batch; row += int(gridDim.y))
    body(row_of(call, int(blockIdx.z), row), j);
}

// of (row, group, element j) in buffers [P, B, n]
FASTRNN_INLINE int64_t in_buffer(const ForwardParams& p, const Row& r, int64_t n, int64_t j) {
  return (r.group * p.batch + r.row) * n + j;
}

}  // namespace fastrnn::cuda
