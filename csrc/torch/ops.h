// The layer's ops as C++ calls them: arguments from and to a stack in schema order. Schemas: ops.cpp.
#pragma once
#include <torch/library.h>

#include "layer.h"

namespace fastrnn {

struct LayerArguments {
  LayerCall call;
  bool save, all_states;
};
LayerArguments read_layer_forward(Reader from);
torch::jit::Stack stack_of(const LayerCall& call, bool save, bool all_states);

struct LayerBackwardArguments {
  LayerCall call;
  LayerGiven given;
  Needed needed;
};
LayerBackwardArguments read_layer_backward(Reader from);
torch::jit::Stack stack_of(const LayerCall& call, const LayerGiven& given, const Needed& needed);

// The recurrence's, which fastrnn/autograd.py calls.
struct RecurrentForwardArguments {
  Recurrence call;
  Tensor gates_ih;
  bool save;
};
RecurrentForwardArguments read_recurrent_forward(Reader& from);

struct RecurrentBackwardArguments {
  Recurrence call;
  Given given;
  bool initial;
};
RecurrentBackwardArguments read_recurrent_backward(Reader& from);

// The recurrence's ops and the layer's, for a device that set_recurrent_kernels knows.
void register_kernels(torch::Library& m);

}  // namespace fastrnn
