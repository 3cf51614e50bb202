// The CUDA recurrences for callers, without a header of torch or CUDA: choose a kernel, ask for its workspace, launch.
// Errors are cudaError_t values as int (0: success); streams are cudaStream_t as void*. All pointers in
// the params are the device's but for `reverse`, which is the host's and is read before a launcher returns.
// Every launch is asynchronous, allocates nothing and can be captured in a graph. Sizes: params.h.
#pragma once
#include <cstdint>

#include "../params.h"

namespace fastrnn::cuda {

struct Device {
  int multiprocessors;
  int compute_capability;    // 80, 86, 90, ...
  int64_t shared_per_block;  // opt-in limit, bytes
  int cluster_blocks = 16;   // that a cluster may have
};
// That of the current device: fewer where its parts have fewer multiprocessors each.
int largest_cluster();

enum class Tier : int32_t { kStep, kResident, kGrid, kCluster, kUnknown };
inline constexpr const char* kTierNames[] = {"step", "resident", "grid", "cluster"};
Tier find_tier(const char* name);  // kUnknown, which runs nothing, for any other name

// What runs one call. Only `tier`, `rows`, `units`, `variant` and `tf32` steer a launcher; the rest is what
// follows from them, for people to read.
struct Choice {
  Tier tier;
  int32_t rows;     // batch rows of a block's tile
  int32_t units;    // grid, cluster: hidden units of a block; else 0
  int32_t variant;  // grid: how blocks exchange results (grid.cuh); else 0
  bool tf32;        // float32 products rounded to tf32 (only where the caller allows it)
  int64_t blocks;   // of the whole launch
  int32_t threads;  // of a block
  int64_t shared;   // dynamic shared memory of a block, bytes
  const char* description;
};

// The tier and tile of a call (tiles.h): the fastest measured one, or else the first that is worth it. Never fails: what
// no other tier takes goes to kStep.
Choice choose(const ForwardParams& params, bool backward, const Device& device, bool allow_tf32);
// The same from one tier alone, worth it or not. False where it cannot run the call.
bool choose_from(Tier tier, const ForwardParams& params, bool backward, const Device& device, bool allow_tf32,
                 Choice* choice);

// Recurrent dropout and zoneout (mask_h, keep_h, keep_c) are kStep's alone.

// Scratch of one launch, 256-byte aligned. It may hold anything: a launch clears what has to be clear, and keeps
// nothing for the next. 0 for kStep, whose buffers are StepBuffers.
int64_t workspace_bytes(const ForwardParams& params, const Choice& choice, bool backward);

// The whole recurrence in one launch (one for every kGroupsPerLaunch groups). cudaErrorInvalidValue where the
// choice cannot run these params, kStep included.
int recurrent_forward(const ForwardParams& params, const Choice& choice, void* workspace, void* stream);
int recurrent_backward(const BackwardParams& params, const Choice& choice, void* workspace, void* stream);

// ---- per-step tier: the caller does the products between these launches ----
//
// "wide": float32 where dtype is a half type, else dtype. Forward, for k = 0 .. T - 1:
//   start_forward
//   gates_hh = h @ weight_hh^T
//   of a cell with late gates: step_forward_late(k);  late_product = late @ (their weight_hh)^T
//   step_forward(k)
//   with weight_hr: projected = hidden @ weight_hr^T;  step_forward_projected(k)
// Backward, for k = T - 1 .. 0:
//   with weight_hr: step_backward_projected(k);  grad_hidden = grad_h @ weight_hr
//   of a cell with late gates: step_backward_late(k);  late_product = late @ (their weight_hh)
//   step_backward(k);  recurrent = grad_gates @ weight_hh
//   finish_backward; where neither grad_h_0 nor resets are given, it and the product before it may be left out
// Step k of the walk is time k, or length - 1 - k where a group runs in reverse. Buffers need no clearing: a row's
// part of what backward's products read and give means nothing until that row's last step, and is not looked at.
struct StepBuffers {
  // forward
  void* h;                // [P, B, R] dtype: what the product of the next step multiplies
  const void* gates_hh;   // [P, B, G*h] wide: the product, without bias
  void* hidden;           // [P, B, h] dtype: o tanh(c); null without weight_hr
  const void* projected;  // [P, B, R] wide; null without weight_hr
  // both
  // [P, B, h] wide: the last state before the step; backward: its pointwise gradient. Of a cell with C > 1 states besides
  // h [P, B, C*h], all of them
  void* carried;
  // backward
  void* grad_gates;         // [P, B, G*h] dtype: grad_gates_hh of the step
  const void* recurrent;    // [P, B, R] wide
  void* grad_h;             // [P, B, R] dtype; null without weight_hr
  const void* grad_hidden;  // [P, B, h] wide; null without weight_hr
  // of a cell with a Row: [P, B, W*h] wide, what its passes leave to each other; W = CellInfo::forward_work, or states and
  // backward_work. Of one with late gates: [P, B, h] wide, the gradient of h after the step
  void* work;
  // of a cell with K late gates. Forward: [P, B, h] dtype, what their product is with, and [P, B, K*h] wide, the product.
  // Backward: [P, B, K*h] dtype, their gradients, and [P, B, h] wide, the product. gates_hh and grad_gates are without
  // them then: [P, B, (G-K)*h]
  void* late;
  const void* late_product;
};
int start_forward(const ForwardParams& params, const StepBuffers& buffers, void* stream);
int step_forward_late(const ForwardParams& params, int64_t k, const StepBuffers& buffers, void* stream);
int step_forward(const ForwardParams& params, int64_t k, const StepBuffers& buffers, void* stream);
int step_forward_projected(const ForwardParams& params, int64_t k, const StepBuffers& buffers, void* stream);
int step_backward_projected(const BackwardParams& params, int64_t k, const StepBuffers& buffers, void* stream);
int step_backward_late(const BackwardParams& params, int64_t k, const StepBuffers& buffers, void* stream);
int step_backward(const BackwardParams& params, int64_t k, const StepBuffers& buffers, void* stream);
int finish_backward(const BackwardParams& params, const StepBuffers& buffers, void* stream);

// ---- the other tiers, as choose() and recurrent_* call them ----
//
// *_choice fills in `choice` and returns true if the tier can run the call on that device and, unless `forced`, should.

bool resident_choice(const ForwardParams& params, bool backward, const Device& device, Choice* choice);
int resident_forward(const ForwardParams& params, const Choice& choice, void* stream);
int resident_backward(const BackwardParams& params, const Choice& choice, void* stream);

bool grid_choice(const ForwardParams& params, bool backward, const Device& device, bool allow_tf32, bool forced,
                 Choice* choice);
int64_t grid_workspace_bytes(const ForwardParams& params, const Choice& choice, bool backward);
int grid_forward(const ForwardParams& params, const Choice& choice, void* workspace, void* stream);
int grid_backward(const BackwardParams& params, const Choice& choice, void* workspace, void* stream);

// choose() takes it where it was measured to be the fastest. Its workspace is as the grid tier's.
bool cluster_choice(const ForwardParams& params, bool backward, const Device& device, bool allow_tf32, Choice* choice);
int cluster_forward(const ForwardParams& params, const Choice& choice, void* workspace, void* stream);
int cluster_backward(const BackwardParams& params, const Choice& choice, void* workspace, void* stream);

}  // namespace fastrnn::cuda
