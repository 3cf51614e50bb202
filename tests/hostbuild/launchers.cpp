// csrc/cuda/launch.h for callers that are not C++ (ctypes: tests/cuda/test_host.py), as a flat ABI.
#include "launchers.h"

#include <cstring>

#include "cells/registry.h"

using namespace fastrnn;
using namespace fastrnn::cuda;

// Cell number i of this library: its name, and the other members of CellInfo in their order. Null past the last one.
FASTRNN_EXPORT const char* cuda_cell(int i, int* numbers) {
  if (i >= kNumCells) return nullptr;
  const CellInfo& c = kCells[i];
  const int values[] = {c.gates, c.states, c.params, c.saved, c.separate_gates_hh,
                        c.late_gates, c.whole_rows, c.forward_work, c.backward_work, c.keeps_made};
  std::memcpy(numbers, values, sizeof values);
  return c.name;
}

FASTRNN_EXPORT const char* cuda_choose(const int64_t* sizes, void* const* addresses, int backward,
                                       int multiprocessors, int compute_capability, int64_t shared_per_block,
                                       int allow_tf32, int64_t* choice) {
  const Device device{multiprocessors, compute_capability, shared_per_block};
  const Choice c = choose(unpack(sizes, addresses, false), backward != 0, device, allow_tf32 != 0);
  const int64_t values[8] = {int64_t(c.tier), c.rows, c.units, c.variant, c.tf32, c.blocks, c.threads, c.shared};
  std::memcpy(choice, values, sizeof values);
  return c.description;
}

// the same from one tier; 0: it cannot run the call
FASTRNN_EXPORT int cuda_choose_from(const int64_t* sizes, void* const* addresses, const char* tier, int backward,
                                    int multiprocessors, int compute_capability, int64_t shared_per_block,
                                    int allow_tf32, int64_t* choice) {
  const Device device{multiprocessors, compute_capability, shared_per_block};
  Choice c{};
  if (!choose_from(find_tier(tier), unpack(sizes, addresses, false), backward != 0, device, allow_tf32 != 0, &c))
    return 0;
  const int64_t values[8] = {int64_t(c.tier), c.rows, c.units, c.variant, c.tf32, c.blocks, c.threads, c.shared};
  std::memcpy(choice, values, sizeof values);
  return 1;
}

FASTRNN_EXPORT int64_t cuda_workspace(const int64_t* sizes, void* const* addresses, int backward,
                                      const int64_t* choice) {
  return workspace_bytes(unpack(sizes, addresses, backward != 0), unpack_choice(choice), backward != 0);
}

FASTRNN_EXPORT int cuda_forward(const int64_t* sizes, void* const* addresses, const int64_t* choice,
                                void* workspace) {
  return recurrent_forward(unpack(sizes, addresses, false), unpack_choice(choice), workspace, nullptr);
}
FASTRNN_EXPORT int cuda_backward(const int64_t* sizes, void* const* addresses, const int64_t* choice,
                                 void* workspace) {
  return recurrent_backward(unpack(sizes, addresses, true), unpack_choice(choice), workspace, nullptr);
}

// which: start_forward, step_forward, step_forward_projected, step_forward_late, step_backward_projected, step_backward,
// step_backward_late, finish_backward; buffers: the members of StepBuffers
FASTRNN_EXPORT int cuda_step(const int64_t* sizes, void* const* addresses, void* const* buffers, int which,
                             int64_t k) {
  const StepBuffers b = unpack_buffers(buffers);
  const BackwardParams p = unpack(sizes, addresses, which >= 4);
  switch (which) {
    case 0: return start_forward(p, b, nullptr);
    case 1: return step_forward(p, k, b, nullptr);
    case 2: return step_forward_projected(p, k, b, nullptr);
    case 3: return step_forward_late(p, k, b, nullptr);
    case 4: return step_backward_projected(p, k, b, nullptr);
    case 5: return step_backward(p, k, b, nullptr);
    case 6: return step_backward_late(p, k, b, nullptr);
    default: return finish_backward(p, b, nullptr);
  }
}
