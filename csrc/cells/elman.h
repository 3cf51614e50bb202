#pragma once
#include "activations.h"

namespace fastrnn {

struct Tanh {
  template <class V>
  static FASTRNN_HD V value(V x) {
    return tanh(x);
  }
  template <class V>
  static FASTRNN_HD V pull(V y, V grad) {  // gradient of the input, from output y
    return grad * tanh_grad(y);
  }
};

struct Relu {
  template <class V>
  static FASTRNN_HD V value(V x) {
    return relu(x);
  }
  template <class V>
  static FASTRNN_HD V pull(V y, V grad) {
    return where_positive(y, grad);
  }
};

// Simple recurrent network (Elman 1990): h = act(..)
template <class Activation>
struct ElmanCell {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;  // h
  static constexpr int kSaved = 0;   // backward needs h alone
  static constexpr int kParams = 0;

  template <class V>
  static FASTRNN_HD void forward(const ForwardIn<ElmanCell, V>& in, ForwardOut<ElmanCell, V>& out) {
    out.state = {{Activation::value(in.gates_ih[0] + in.gates_hh[0])}};
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<ElmanCell, V>& in, BackwardOut<ElmanCell, V>& out) {
    out.grad_gates_ih = {{Activation::pull(in.state[0], in.grad_state[0])}};
    out.grad_gates_hh = out.grad_gates_ih;
    out.grad_state_prev = {{V(0)}};
  }
};

}  // namespace fastrnn
