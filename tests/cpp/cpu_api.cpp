// The CPU's kernels for callers that are not C++ (ctypes: tests/kernels/test_more_cells.py): a call is a set of named
// pointers and numbers, those of params.h, and then it is run. Beside csrc/cpu/{recurrent,team,processors}.cpp it is
// compiled with one isa_*.cpp, which TEST_avx512, TEST_avx2 or TEST_baseline names, or, with TEST_avx512bf16, two of them.
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cells/registry.h"
#include "cpu/plan.h"
#include "launch.h"

#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastrnn::cpu {  // recurrent.cpp names all of them
#if !defined(TEST_avx512bf16)
const Kernels* avx512bf16_kernels() { return nullptr; }
#endif
#if !defined(TEST_avx512)
const Kernels* avx512_kernels() { return nullptr; }
#endif
#if !defined(TEST_avx2)
const Kernels* avx2_kernels() { return nullptr; }
#endif
#if !defined(TEST_baseline)
const Kernels* baseline_kernels() { return nullptr; }
#endif
}  // namespace fastrnn::cpu

using namespace fastrnn;

namespace {

struct NamedCall {
  BackwardParams p{};
  LayerParams forward{};
  LayerBackwardParams backward{};

  template <class Found>
  bool find_pointer(const std::string& name, Found found) {
#define FASTRNN_POINTER(owner, member) \
  if (name == #member) return found(owner.member), true;
    FASTRNN_POINTER(p, gates_ih) FASTRNN_POINTER(p, weight_hh) FASTRNN_POINTER(p, bias_hh) FASTRNN_POINTER(p, weight_hr)
    FASTRNN_POINTER(p, params) FASTRNN_POINTER(p, h_0) FASTRNN_POINTER(p, c_0) FASTRNN_POINTER(p, lengths)
    FASTRNN_POINTER(p, resets) FASTRNN_POINTER(p, reset_h) FASTRNN_POINTER(p, reset_c) FASTRNN_POINTER(p, reverse)
    FASTRNN_POINTER(p, mask_h) FASTRNN_POINTER(p, keep_h) FASTRNN_POINTER(p, keep_c)
    FASTRNN_POINTER(p, output) FASTRNN_POINTER(p, h_n) FASTRNN_POINTER(p, c_n) FASTRNN_POINTER(p, saved)
    FASTRNN_POINTER(p, grad_output) FASTRNN_POINTER(p, grad_h_n) FASTRNN_POINTER(p, grad_c_n)
    FASTRNN_POINTER(p, grad_gates_ih) FASTRNN_POINTER(p, grad_gates_hh) FASTRNN_POINTER(p, grad_projected)
    FASTRNN_POINTER(p, grad_h_0) FASTRNN_POINTER(p, grad_c_0) FASTRNN_POINTER(p, grad_reset_h)
    FASTRNN_POINTER(p, grad_reset_c) FASTRNN_POINTER(p, grad_params)
    FASTRNN_POINTER(backward, grad_input) FASTRNN_POINTER(backward, grad_weight_ih)
    FASTRNN_POINTER(backward, grad_weight_hh) FASTRNN_POINTER(backward, grad_bias_ih)
    FASTRNN_POINTER(backward, grad_bias_hh)
    FASTRNN_POINTER(forward, bias) FASTRNN_POINTER(forward, weight) FASTRNN_POINTER(forward, input)
#undef FASTRNN_POINTER
    return false;
  }
};

template <class T>
void point(T*& member, void* to) {
  member = static_cast<T*>(to);
}

}  // namespace

// cells of the registry, or -1 past the last: name, then gates, states, saved, params, separate_gates_hh, keeps_made,
// zoneout
FASTRNN_EXPORT const char* cell_info(int cell, int64_t* numbers) {
  if (cell >= kNumCells) return nullptr;
  const CellInfo& c = kCells[cell];
  const int64_t values[] = {c.gates, c.states, c.saved, c.params, c.separate_gates_hh, c.keeps_made, takes_zoneout(c)};
  std::memcpy(numbers, values, sizeof values);
  return c.name;
}
FASTRNN_EXPORT const char* instruction_set() { return cpu::instruction_set(); }

FASTRNN_EXPORT NamedCall* call_new() { return new NamedCall; }
FASTRNN_EXPORT void call_delete(NamedCall* call) { delete call; }
// Returns 0 where there is no such pointer.
FASTRNN_EXPORT int call_point(NamedCall* call, const char* name, void* to) {
  return call->find_pointer(name, [&](auto& member) { point(member, to); });
}
// T, B, P, h, R, cell, dtype, I; the strides of lengths and resets in the order of params.h. Tensors are contiguous.
FASTRNN_EXPORT void call_sizes(NamedCall* call, const int64_t* n) {
  BackwardParams& p = call->p;
  p.steps = n[0], p.batch = n[1], p.groups = n[2], p.hidden = n[3], p.width = n[4];
  p.cell = int32_t(n[5]);
  p.dtype = static_cast<DType>(n[6]);
  const int64_t size = n[7], gates = p.groups * kCells[p.cell].gates * p.hidden, width = p.groups * p.width;
  p.gates_ih_stride_p = gates / p.groups, p.gates_ih_stride_b = gates, p.gates_ih_stride_t = p.batch * gates;
  p.grad_output_stride_b = width, p.grad_output_stride_t = p.batch * width;
  p.keep_h_stride_b = width, p.keep_h_stride_t = p.batch * width;
  p.keep_c_stride_b = p.groups * p.hidden, p.keep_c_stride_t = p.batch * p.groups * p.hidden;
  p.lengths_stride_b = n[8], p.lengths_stride_p = n[9];
  p.resets_stride_t = n[10], p.resets_stride_b = n[11], p.resets_stride_p = n[12];
  call->forward.size = call->backward.size = size;
  call->forward.weight_dtype = p.dtype;
  call->forward.input_stride_b = call->backward.input_stride_b = size;
  call->forward.input_stride_t = call->backward.input_stride_t = p.batch * size;
  call->backward.rows = p.steps * p.batch;
  call->backward.separate_gates_hh = kCells[p.cell].separate_gates_hh;
  p.grad_gates_stride = kCells[p.cell].gates * p.hidden;
}
// what: "recurrent_forward" and so on, as in launch.h
FASTRNN_EXPORT int call_run(NamedCall* call, const char* what, int threads) {
  call->backward.input = call->forward.input;
  call->backward.weight = call->forward.weight;
  const std::string name = what;
  if (name == "recurrent_forward") return cpu::recurrent_forward(call->p, threads), 1;
  if (name == "recurrent_backward") return cpu::recurrent_backward(call->p, threads), 1;
  if (name == "layer_forward") return cpu::layer_forward(call->p, call->forward, threads), 1;
  if (name == "layer_backward") return cpu::layer_backward(call->p, call->backward, threads), 1;
  return 0;
}
