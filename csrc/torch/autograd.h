// The derivative of a layer: one node of autograd, made in C++.
#pragma once
#include <pybind11/pybind11.h>

#include "ops.h"

namespace fastrnn {

// The kernel of layer_forward at the Autograd key.
void layer_forward_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// A layer of ordinary tensors (plain_thread.h) where a derivative is asked for, past the dispatcher. The GIL is held.
LayerResults differentiable_layer(const LayerCall& call);

// What makes a backward of ops that have derivatives: fastrnn/composed.py's layer_backward, for double backward and for
// gradients that functorch has wrapped.
void set_composed_backward(pybind11::object function);

}  // namespace fastrnn
