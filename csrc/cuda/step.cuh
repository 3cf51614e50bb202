// The per-step tier's launches: thread x of a launch is unit or column x of one row, y walks over rows, z over
// groups.
#pragma once
#include "common.cuh"
#include "tiles.h"

namespace fastrnn::cuda {

inline unsigned step_threads(int64_t n) {
  const int64_t whole_warps = round_up(n, 32);
  return unsigned(whole_warps < tiles::kStepThreads ? whole_warps : tiles::kStepThreads);
}
inline unsigned step_row_blocks(const ForwardParams& p) {
  return unsigned(p.batch < tiles::kStepRowBlocks ? p.batch : tiles::kStepRowBlocks);
}

// kernel<<<..>>>(params, args...) for every (group, row, 0 .. n - 1): the kernel says for_each_row
template <class Params, class... KernelArgs, class... Args>
int launch_rows(void (*kernel)(KernelArgs...), const Params& p, int64_t n, void* stream, const Args&... args) {
  return for_each_launch(p, [&](const LaunchParams<Params>& part) {
    dev::Launch launch{};
    launch.block = step_threads(n);
    launch.grid = dim3(unsigned(ceil_div(n, launch.block)), step_row_blocks(p), unsigned(part.groups_here));
    launch.stream = static_cast<dev::Stream>(stream);
    return int(dev::launch(kernel, launch, part, args...));
  });
}

// body(r, j) for this thread's rows
template <class Params, class Body>
FASTRNN_INLINE void for_each_row(const LaunchParams<Params>& p, Body body) {
  const int j = int(blockIdx.x * blockDim.x + threadIdx.x);
  for (int row = int(blockIdx.y); row < p.batch; row += int(gridDim.y)) body(row_of(p, int(blockIdx.z), row), j);
}

// of (row, group, element j) in buffers [P, B, n]
FASTRNN_INLINE int64_t in_buffer(const ForwardParams& p, const RowWalk& r, int64_t n, int64_t j) {
  return (r.group * p.batch + r.row) * n + j;
}

// What unit j < h carries, in a buffer [P, B, C*h]; zeros where it is not there.
template <class Cell, class V>
FASTRNN_INLINE Carried<Cell, V> load_carried(const ForwardParams& p, const RowWalk& r, const void* buffer, int j,
                                             bool there = true) {
  constexpr int N = kCarried<Cell>;
  Carried<Cell, V> carried;
#pragma unroll
  for (int c = 0; c < N; ++c)
    carried_at(carried, c) =
        there ? static_cast<const V*>(buffer)[in_buffer(p, r, N * p.hidden, c * p.hidden + j)] : V(0);
  return carried;
}
template <class Cell, class V>
FASTRNN_INLINE void store_carried(const ForwardParams& p, const RowWalk& r, void* buffer, int j,
                                  Carried<Cell, V> carried) {
  constexpr int N = kCarried<Cell>;
#pragma unroll
  for (int c = 0; c < N; ++c)
    static_cast<V*>(buffer)[in_buffer(p, r, N * p.hidden, c * p.hidden + j)] = carried_at(carried, c);
}

// ---- cells with a Row: a block takes whole rows, one after the other ----

template <class Passes>
constexpr int most_means() {
  int most = 0;
  for (int means : Passes::kMeans) most = means > most ? means : most;
  return most;
}
// Room for block_sum in any of the passes.
template <class Passes, class S>
struct RowShared {
  Wide<S>* parts;  // [sums, threads]
  size_t bytes;
  __host__ __device__ RowShared(char* base, int threads) {
    dev::Carver carver(base);
    parts = carver.take<Wide<S>>(size_t(most_means<Passes>()) * threads);
    bytes = carver.used;
  }
};

// kernel<<<..>>>(params, args...) for every (group, row): the kernel says for_each_whole_row
template <class Passes, class S, class Params, class... KernelArgs, class... Args>
int launch_whole_rows(void (*kernel)(KernelArgs...), const Params& p, void* stream, const Args&... args) {
  return for_each_launch(p, [&](const LaunchParams<Params>& part) {
    dev::Launch launch{};
    launch.block = step_threads(p.hidden);
    launch.grid = dim3(1, step_row_blocks(p), unsigned(part.groups_here));
    launch.shared = RowShared<Passes, S>(nullptr, int(launch.block)).bytes;
    launch.stream = static_cast<dev::Stream>(stream);
    return int(dev::launch(kernel, launch, part, args...));
  });
}

// body(r) for this block's rows
template <class Params, class Body>
FASTRNN_INLINE void for_each_whole_row(const LaunchParams<Params>& p, Body body) {
  for (int row = int(blockIdx.y); row < p.batch; row += int(gridDim.y)) body(row_of(p, int(blockIdx.z), row));
}

// body(j) for this thread's units of a row: the same ones whenever it is called.
template <class Body>
FASTRNN_INLINE void for_each_unit(const ForwardParams& p, Body body) {
  for (int j = int(threadIdx.x); j < p.hidden; j += int(blockDim.x)) body(j);
}

// The sums over the threads of the block, in every thread. All threads call it. The order of additions is fixed: the
// upper half of the parts is added to the lower half, and so on.
template <class V, int N>
FASTRNN_INLINE Pack<V, N> block_sum(Pack<V, N> sums, V* parts) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  dev::sync_block();  // before threads that still read the last sums lose them
#pragma unroll
  for (int i = 0; i < N; ++i) parts[i * threads + thread] = sums[i];
  for (int left = threads; left > 1; left = (left + 1) / 2) {
    dev::sync_block();
    const int half = (left + 1) / 2;
    if (thread + half >= left) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) parts[i * threads + thread] += parts[i * threads + thread + half];
  }
  dev::sync_block();
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = parts[i * threads];
  return sums;
}

// `work` [P, B, N*h] of unit j, from the value number `first` on.
template <class V, int N>
FASTRNN_INLINE void load_work(const ForwardParams& p, const RowWalk& r, const void* work, int values, int first, int j,
                              Pack<V, N>& out) {
  if constexpr (N > 0) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      out[i] = static_cast<const V*>(work)[in_buffer(p, r, values * p.hidden, (first + i) * p.hidden + j)];
  }
}
template <class V, int N>
FASTRNN_INLINE void store_work(const ForwardParams& p, const RowWalk& r, void* work, int values, int first, int j,
                               const Pack<V, N>& in) {
  if constexpr (N > 0) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      static_cast<V*>(work)[in_buffer(p, r, values * p.hidden, (first + i) * p.hidden + j)] = in[i];
  }
}

// The passes of a cell's Row over a row's units; all threads call it. load(j, row, work) gives what unit j knows (ForwardIn,
// BackwardIn) where the row's numbers are `row`; work, a std::bool_constant, says whether in.work was kept. keep(j, in)
// keeps it, for the thread itself.
template <class V, class Passes, class Load, class Keep>
FASTRNN_INLINE Pack<V, Passes::kNumbers> run_passes(const ForwardParams& p, V* parts, Load load, Keep keep) {
  Pack<V, Passes::kNumbers> row{};
  const V each = V(1) / V(p.hidden);
  for_each_pass<Passes>([&](auto pass) {
    constexpr int k = decltype(pass)::value;
    constexpr int M = Passes::kMeans[k];
    Pack<V, M> sums{};
    for_each_unit(p, [&](int j) {
      auto in = load(j, row, std::bool_constant<finds_work<Passes, k>()>());
      const auto terms = Passes::template terms<k>(in);
#pragma unroll
      for (int i = 0; i < M; ++i) sums[i] += terms[i];
      if constexpr (leaves_work<Passes, k>()) keep(j, in);
    });
    Pack<V, M> means = block_sum(sums, parts);
#pragma unroll
    for (int i = 0; i < M; ++i) means[i] *= each;
    Passes::template numbers<k>(means, row);
  });
  return row;
}

}  // namespace fastrnn::cuda
