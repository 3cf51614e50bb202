// A whole layer on any device: input projection, recurrence, and in backward all gradients, in one call each.
#pragma once
#include <c10/core/DeviceType.h>

#include "prepare.h"

namespace fastrnn {

// What a device supplies. A layer is made of these where the device has no kernel of the whole.
struct RecurrentKernels {
  // in_place: gates_ih is [T, B, P*S*h] and becomes what is saved; a group's gates are the first G*h of its S*h values.
  LayerResults (*forward)(const Recurrence& args, const Tensor& gates_ih, bool save, bool in_place);
  RecurrentGradients (*backward)(const Recurrence& args, const Given& given, bool initial);
  // out [m, n] = a [m, k] @ b [k, n], or what is there and that. Of how many steps the call is says which of torch's
  // switches for TF32 it obeys (precision.h).
  void (*product)(const Tensor& out, const Tensor& a, const Tensor& b, bool add, int64_t steps);
  // x [rows, k] @ weight [m, k]^T + bias [m], which may be absent.
  Tensor (*linear)(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t steps);
  // x [T, B, P, m] -> [P, m], in float32 or wider between; no TF32.
  Tensor (*sum_rows)(const Tensor& x);
};
void set_recurrent_kernels(c10::DeviceType device, const RecurrentKernels& kernels);
const RecurrentKernels* recurrent_kernels(c10::DeviceType device);  // null where there are none

// Are the layers that this thread makes on a CPU the recurrence's kernel with products around it from now on, as CUDA's
// are? So tests reach that code without a GPU. Returns whether they were: false at first.
bool set_layers_by_products(bool on);

LayerResults layer_forward(const LayerCall& call, bool save, bool all_states);
LayerGradients layer_backward(const LayerCall& call, const LayerGiven& given, const Needed& needed);

}  // namespace fastrnn
