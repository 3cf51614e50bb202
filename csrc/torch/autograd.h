// The derivative of a layer: one node of autograd, made in C++.
#pragma once
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/variable.h>

#include "ops.h"

namespace fastrnn {

// The kernel of layer_forward at the Autograd key.
void layer_forward_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// A layer of ordinary tensors (plain_thread.h) where a derivative is asked for, past the dispatcher. The GIL is held. With
// `step` input, h_0 and c_0 are [B, n], and so are h_n and c_n.
LayerResults differentiable_layer(const LayerCall& call, bool step);

// The call on tensors of its own (plain_thread.h), for a node: what it has saved of parameters is them, whose memory another
// thread may exchange.
LayerCall held_under_lock(const LayerCall& call);

// The backward of ops that have derivatives (fastrnn/composed.py's layer_backward), for gradients that functorch has
// wrapped, and for what second_derivative.h has no kernel for. grad_saved: the gradient of saved, or undefined.
LayerGradients composed_backward(const LayerCall& call, const LayerGiven& given, const Tensor& grad_saved,
                                 const Needed& needed);
// The gradients that second_derivative.cpp makes by kernels (Twice), likewise: of batched directions, and where a third
// derivative is asked for. In the order of the node's arguments.
torch::autograd::variable_list composed_second_derivative(const LayerCall& call, const LayerGiven& given,
                                                          const LayerGradients& directions);
// Both functions of composed.py.
void set_composed(pybind11::object backward, pybind11::object second_derivative);

}  // namespace fastrnn
