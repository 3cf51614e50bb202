// How a call is shared out over threads, and in which order rows are worked on.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "../params.h"
#include "scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrnn::cpu {

// A barrier for the threads of one team, met once or twice a step. It spins, and yields once the wait is long, so
// that an oversubscribed machine still gets on.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    if (size_ == 1) return;
    const uint64_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < kSpins)
        pause();
      else
        sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 20000;  // about 0.3 ms: far above a step, far below a time slice
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint64_t> generation_{0};
};

// The rows of one group that one thread computes, longest first, so that those with a step t are a prefix.
struct Rows {
  std::vector<int64_t> row, length;
  int64_t first = 0;  // where they start in the workspace
  int64_t size() const { return static_cast<int64_t>(row.size()); }
  int64_t active(int64_t t) const {  // how many have a step t
    if (length.empty() || length.back() > t) return size();
    int64_t low = 0, high = size();
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (length[middle] > t)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// Threads form teams; a team works on one group at a time. Inside a team either rows are split (no barrier while
// the sequence runs) or hidden units are (a barrier a step, but each thread reads its share of the weights alone).
struct Plan {
  int teams, team_size;
  bool split_rows;
  // Weights are packed first; a short call reads them as they lie. pack_late: those of the projection just before use.
  bool pack_hh, pack_ih, pack_late;
  bool uniform;                // no sum of a forward pass depends on how many steps or threads there are
  bool shared_lengths;         // all groups have the same
  int64_t chunk;               // of a layer's call: steps whose gates, or gate gradients, are held at a time; else 0
  std::vector<Rows> all_rows;  // [groups or 1][members or 1]

  int threads() const { return teams * team_size; }
  const Rows& rows(int64_t group, int member) const {
    return all_rows[split_rows ? (shared_lengths ? 0 : group) * team_size + member : shared_lengths ? 0 : group];
  }
};

// Are the plans that this thread makes uniform from now on? Returns whether they were: false at first.
bool set_uniform(bool on);

// layer: null where gates_ih are given.
Plan make_plan(const ForwardParams& params, const LayerParams* layer, int threads);
Plan make_backward_plan(const BackwardParams& params, const LayerBackwardParams* layer, int threads);
// make_plan's last part: all_rows, from the teams and the way to split.
void share_rows(const ForwardParams& params, Plan& plan);

// Does the boundary that a group crosses to enter step t carry a reset? `length` is the row's.
inline bool reset_before(const ForwardParams& p, int64_t group, int64_t row, int64_t length, int64_t t) {
  if (!p.resets) return false;
  if (p.reverse[group] && ++t >= length) return false;
  return p.resets[t * p.resets_stride_t + row * p.resets_stride_b + group * p.resets_stride_p];
}

// Bytes handed out one after another, 64-byte aligned, from one allocation a call.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// What an instruction set offers. The workspace of team k starts at workspace + k * workspace_bytes(..).
struct Kernels {
  const char* name;
  int64_t (*forward_workspace)(const ForwardParams&, const LayerParams*, const Plan&);
  int64_t (*backward_workspace)(const BackwardParams&, const LayerBackwardParams*, const Plan&);
  void (*forward)(const ForwardParams&, const LayerParams*, const Plan&, Barrier&, char* workspace, int thread);
  void (*backward)(const BackwardParams&, const LayerBackwardParams*, const Plan&, Barrier&, char* workspace,
                   int thread);
  // The workspace is one thread's own.
  int64_t (*gemm_workspace)(const GemmParams&);
  void (*gemm)(const GemmParams&, char* workspace, int thread, int threads);
};

const Kernels* baseline_kernels();
const Kernels* avx2_kernels();    // null where not built
const Kernels* avx512_kernels();  // null where not built

}  // namespace fastrnn::cpu
