// How launchers.cpp, and faulty copies of tiers (tests/cuda/test_host_faults.py), take a call from ctypes: sizes in one
// array, addresses in another, in the order of params.h.
#pragma once
#include <cstring>

#include "cuda/launch.h"

#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastrnn::cuda {

// sizes: T, B, P, h, R, cell, dtype, then the strides of gates_ih (t, b), lengths (b, p), resets (t, b, p) and
// grad_output (t, b), the bits of grad_clip, the strides of keep_h, keep_c and grad_cells (t, b), and those of groups
// in gates_ih and in its gradient. addresses: as below; forward reads the first 19.
inline BackwardParams unpack(const int64_t* n, void* const* a, bool backward) {
  BackwardParams p{};
  p.steps = n[0], p.batch = n[1], p.groups = n[2], p.hidden = n[3], p.width = n[4];
  p.cell = int32_t(n[5]), p.dtype = DType(n[6]);
  p.gates_ih_stride_t = n[7], p.gates_ih_stride_b = n[8], p.gates_ih_stride_p = n[23];
  p.lengths_stride_b = n[9], p.lengths_stride_p = n[10];
  p.resets_stride_t = n[11], p.resets_stride_b = n[12], p.resets_stride_p = n[13];
  p.gates_ih = a[0], p.weight_hh = a[1], p.bias_hh = a[2], p.weight_hr = a[3], p.params = a[4];
  p.h_0 = a[5], p.c_0 = a[6];
  p.lengths = static_cast<const int64_t*>(a[7]), p.resets = static_cast<const uint8_t*>(a[8]);
  p.reset_h = a[9], p.reset_c = a[10], p.reverse = static_cast<const uint8_t*>(a[11]);
  p.mask_h = a[12], p.keep_h = a[13], p.keep_c = a[14];
  p.keep_h_stride_t = n[17], p.keep_h_stride_b = n[18], p.keep_c_stride_t = n[19], p.keep_c_stride_b = n[20];
  p.output = a[15], p.h_n = a[16], p.c_n = a[17], p.saved = a[18];
  if (!backward) return p;
  p.grad_output_stride_t = n[14], p.grad_output_stride_b = n[15];
  p.grad_output = a[19], p.grad_h_n = a[20], p.grad_c_n = a[21];
  p.grad_gates_ih = a[22], p.grad_gates_stride = n[24], p.grad_gates_hh = a[23], p.grad_projected = a[24];
  p.grad_h_0 = a[25], p.grad_c_0 = a[26], p.grad_reset_h = a[27], p.grad_reset_c = a[28], p.grad_params = a[29];
  p.kept_h = a[30];
  p.grad_cells = a[31], p.grad_cells_stride_t = n[21], p.grad_cells_stride_b = n[22];
  std::memcpy(&p.grad_clip, &n[16], sizeof p.grad_clip);
  return p;
}

// choice: tier, rows, units, variant, tf32, blocks, threads, shared
inline Choice unpack_choice(const int64_t* c) {
  Choice choice{};
  choice.tier = Tier(c[0]), choice.rows = int32_t(c[1]), choice.units = int32_t(c[2]);
  choice.variant = int32_t(c[3]), choice.tf32 = c[4] != 0;
  choice.blocks = c[5], choice.threads = int32_t(c[6]), choice.shared = c[7];
  return choice;
}

// the members of StepBuffers in their order
inline StepBuffers unpack_buffers(void* const* buffers) {
  StepBuffers b{};
  b.h = buffers[0], b.gates_hh = buffers[1], b.hidden = buffers[2], b.projected = buffers[3];
  b.carried = buffers[4], b.grad_gates = buffers[5], b.recurrent = buffers[6];
  b.grad_h = buffers[7], b.grad_hidden = buffers[8], b.work = buffers[9];
  b.late = buffers[10], b.late_product = buffers[11];
  return b;
}

}  // namespace fastrnn::cuda
