// A layer's backward as something to differentiate again, by the layer's own kernels: they run on dual numbers
// (csrc/cpu/dual-inl.h), each a value and its derivative in one direction.
#pragma once
#include "arguments.h"

namespace fastrnn {

// Is there such a kernel for the call, whose tensors are ordinary ones? A CPU has one of whole layers in float32 and
// float64 (layer.cpp).
bool has_second_derivative(const LayerCall& call);

// layer_backward with a node of autograd. The call has all that the layer was given.
LayerGradients differentiable_backward(const LayerCall& call, const LayerGiven& given, const Needed& needed);

}  // namespace fastrnn
