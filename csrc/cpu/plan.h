// How a call is shared out among members, and in which order rows are worked on. Who runs the members: team.h.
#pragma once
#include <coroutine>
#include <cstdint>
#include <vector>

#include "../launch.h"
#include "../params.h"
#include "scalar.h"

namespace fastrnn::cpu {

// The rows of one group that one member computes, longest first, so that those with a step t are a prefix.
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

// Members form teams; a team works on one group at a time. Inside a team either rows are split (its members need not
// meet while the sequence runs) or hidden units are (they meet at every step, but each reads its share of the weights
// alone). A sum may be added up in another order under another number of members, but not by who runs them.
struct Plan {
  int teams, team_size;
  bool split_rows;
  // Are weight_hh and weight_hr packed into panels first, and weight_ih? A short call multiplies with the weights as
  // they are stored. Late: each panel of weight_hh, or of weight_ih, is packed just before its only use.
  bool pack_hh, pack_ih, hh_late, ih_late;
  bool uniform;                // no sum of a forward pass depends on how many steps or threads there are
  bool from_the_end;           // of a layer's call of one step: groups and units, and so weights, come last to first
  bool follows = false;        // of a layer's forward call: its input may not be complete yet, see Pipeline
  bool shared_lengths;         // all groups have the same
  int64_t work;                // multiply-adds of the call
  int64_t chunk;               // of a layer's call: steps whose gates, or gate gradients, are held at a time; else 0
  std::vector<Rows> all_rows;  // [groups or 1][members or 1]

  int members() const { return teams * team_size; }
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

// Of layers that follow each other through the steps in `stages` stages of as many threads: a plan for each.
struct PipelinePlan {
  std::vector<Plan> layers;
  std::vector<int> stage;  // of each layer
  int team_size;           // threads of a stage
  int64_t chunks;
  double time;  // as many multiply-adds of one thread take, by the cost model
};
PipelinePlan make_pipeline_plan(const std::vector<LayerCall>& layers, int stages, int threads);

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

// One member's part of a call: a coroutine that pauses wherever its team has to meet, and where its plan follows another
// layer's before it reads the input of a chunk.
struct Part {
  std::coroutine_handle<> coroutine;
  const bool* needs_input;  // is that why it has paused?
};

// The kernels of one instruction set, of every dtype; those of avx512bf16 of bfloat16 alone, and without
// gemm and bernoulli, which another table has for them.
// forward_workspace and its like say how many bytes a team's workspace has.
struct Kernels {
  const char* name;
  int64_t (*forward_workspace)(const ForwardParams&, const LayerParams*, const Plan&);
  int64_t (*backward_workspace)(const BackwardParams&, const LayerBackwardParams*, const Plan&);
  // The references must outlive the part; `workspace` is the team's.
  Part (*forward)(const ForwardParams&, const LayerParams*, const Plan&, char* workspace, int member);
  Part (*backward)(const BackwardParams&, const LayerBackwardParams*, const Plan&, char* workspace, int member);
  // The workspace is one member's own; members do not meet.
  int64_t (*gemm_workspace)(const GemmParams&) = nullptr;
  void (*gemm)(const GemmParams&, char* workspace, int member, int members) = nullptr;
  void (*bernoulli)(DType, void* out, int64_t begin, int64_t end, uint64_t seed, double p) = nullptr;
};

// May the kernels of avx512bf16 multiply by the processor's matrix unit (matrix-inl.h)?
bool has_matrix_unit();

const Kernels* baseline_kernels();
const Kernels* avx2_kernels();    // null where not built
const Kernels* avx512_kernels();  // null where not built
const Kernels* avx512bf16_kernels();

}  // namespace fastrnn::cpu
