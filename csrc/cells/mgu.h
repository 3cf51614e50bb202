#pragma once
#include "activations.h"

namespace fastrnn {

// Minimal gated unit (Zhou 2016): one gate, which both resets and updates.
//   f = sigmoid(..)   n = tanh(W_in x + W_hn (f h') + biases)   h = (1 - f) h' + f n = h' + f (n - h')
struct MGUCell {
  static constexpr int kGates = 2;  // f, n
  static constexpr int kLateGates = 1;
  static constexpr int kStates = 1;  // h
  static constexpr int kSaved = 2;   // f, n
  static constexpr int kParams = 0;
  static constexpr bool kReadsState = false;

  template <class V>
  static FASTRNN_HD V late_input(const ForwardIn<MGUCell, V>& in) {
    return sigmoid(in.gates_ih[0] + in.gates_hh[0]) * in.state[0];
  }

  template <class V>
  static FASTRNN_HD void forward(const ForwardIn<MGUCell, V>& in, ForwardOut<MGUCell, V>& out) {
    const V f = sigmoid(in.gates_ih[0] + in.gates_hh[0]);
    const V n = tanh(in.gates_ih[1] + in.gates_hh[1]);
    out.state = {{in.state[0] + f * (n - in.state[0])}};
    out.saved = {{f, n}};
  }

  template <class V>
  static FASTRNN_HD Pack<V, 1> late_grad(const BackwardIn<MGUCell, V>& in) {
    return {{in.grad_state[0] * in.saved[0] * tanh_grad(in.saved[1])}};
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<MGUCell, V>& in, BackwardOut<MGUCell, V>& out) {
    const V f = in.saved[0], n = in.saved[1], h = in.state_prev[0];
    const V grad_h = in.grad_state[0], grad_fh = in.late_grad[0];
    out.grad_gates_ih = {{(grad_h * (n - h) + grad_fh * h) * sigmoid_grad(f), late_grad(in)[0]}};
    out.grad_gates_hh = out.grad_gates_ih;
    out.grad_state_prev = {{grad_h * (V(1) - f) + grad_fh * f}};
  }
};

}  // namespace fastrnn
