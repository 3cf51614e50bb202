// csrc/cuda/launch.h for callers that are not C++ (ctypes: tests/test_cuda_host.py), as a flat ABI: sizes in one
// array, addresses in another, in the order of params.h.
#include <cstring>

#include "cuda/launch.h"

#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))

using namespace fastrnn;
using namespace fastrnn::cuda;

namespace {

// sizes: T, B, P, h, R, cell, dtype, then the strides of gates_ih (t, b), lengths (b, p), resets (t, b, p) and
// grad_output (t, b). addresses: as below; forward reads the first 15.
BackwardParams unpack(const int64_t* n, void* const* a, bool backward) {
  BackwardParams p{};
  p.steps = n[0], p.batch = n[1], p.groups = n[2], p.hidden = n[3], p.width = n[4];
  p.cell = int32_t(n[5]), p.dtype = DType(n[6]);
  p.gates_ih_stride_t = n[7], p.gates_ih_stride_b = n[8];
  p.lengths_stride_b = n[9], p.lengths_stride_p = n[10];
  p.resets_stride_t = n[11], p.resets_stride_b = n[12], p.resets_stride_p = n[13];
  p.gates_ih = a[0], p.weight_hh = a[1], p.bias_hh = a[2], p.weight_hr = a[3], p.h_0 = a[4], p.c_0 = a[5];
  p.lengths = static_cast<const int64_t*>(a[6]), p.resets = static_cast<const uint8_t*>(a[7]);
  p.reset_h = a[8], p.reset_c = a[9], p.reverse = static_cast<const uint8_t*>(a[10]);
  p.output = a[11], p.h_n = a[12], p.c_n = a[13], p.saved = a[14];
  if (!backward) return p;
  p.grad_output_stride_t = n[14], p.grad_output_stride_b = n[15];
  p.grad_output = a[15], p.grad_h_n = a[16], p.grad_c_n = a[17];
  p.grad_gates_ih = a[18], p.grad_gates_hh = a[19], p.grad_projected = a[20];
  p.grad_h_0 = a[21], p.grad_c_0 = a[22], p.grad_reset_h = a[23], p.grad_reset_c = a[24];
  return p;
}

// choice: tier, rows, units, variant, tf32, blocks, threads, shared
Choice unpack_choice(const int64_t* c) {
  Choice choice{};
  choice.tier = Tier(c[0]), choice.rows = int32_t(c[1]), choice.units = int32_t(c[2]);
  choice.variant = int32_t(c[3]), choice.tf32 = c[4] != 0;
  choice.blocks = c[5], choice.threads = int32_t(c[6]), choice.shared = c[7];
  return choice;
}

}  // namespace

FASTRNN_EXPORT const char* cuda_choose(const int64_t* sizes, void* const* addresses, int backward,
                                       int multiprocessors, int compute_capability, int64_t shared_per_block,
                                       int allow_tf32, int64_t* choice) {
  const Device device{multiprocessors, compute_capability, shared_per_block};
  const Choice c = choose(unpack(sizes, addresses, false), backward != 0, device, allow_tf32 != 0);
  const int64_t values[8] = {int64_t(c.tier), c.rows, c.units, c.variant, c.tf32, c.blocks, c.threads, c.shared};
  std::memcpy(choice, values, sizeof values);
  return c.description;
}

// bytes, and how many of them, the first, have to be zero
FASTRNN_EXPORT void cuda_workspace(const int64_t* sizes, void* const* addresses, int backward,
                                   const int64_t* choice, int64_t* bytes) {
  const ForwardParams p = unpack(sizes, addresses, backward != 0);
  bytes[0] = workspace_bytes(p, unpack_choice(choice), backward != 0);
  bytes[1] = workspace_zeroed_bytes(p, unpack_choice(choice), backward != 0);
}

FASTRNN_EXPORT int cuda_forward(const int64_t* sizes, void* const* addresses, const int64_t* choice,
                                void* workspace) {
  return recurrent_forward(unpack(sizes, addresses, false), unpack_choice(choice), workspace, nullptr);
}
FASTRNN_EXPORT int cuda_backward(const int64_t* sizes, void* const* addresses, const int64_t* choice,
                                 void* workspace) {
  return recurrent_backward(unpack(sizes, addresses, true), unpack_choice(choice), workspace, nullptr);
}

// which: start_forward, step_forward, step_forward_projected, step_backward_projected, step_backward,
// finish_backward; buffers: the members of StepBuffers
FASTRNN_EXPORT int cuda_step(const int64_t* sizes, void* const* addresses, void* const* buffers, int which,
                             int64_t k) {
  StepBuffers b{};
  b.h = buffers[0], b.gates_hh = buffers[1], b.hidden = buffers[2], b.projected = buffers[3];
  b.carried = buffers[4], b.grad_gates = buffers[5], b.recurrent = buffers[6];
  b.grad_h = buffers[7], b.grad_hidden = buffers[8];
  const BackwardParams p = unpack(sizes, addresses, which >= 3);
  switch (which) {
    case 0: return start_forward(p, b, nullptr);
    case 1: return step_forward(p, k, b, nullptr);
    case 2: return step_forward_projected(p, k, b, nullptr);
    case 3: return step_backward_projected(p, k, b, nullptr);
    case 4: return step_backward(p, k, b, nullptr);
    default: return finish_backward(p, b, nullptr);
  }
}
