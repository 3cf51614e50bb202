#pragma once
#include "activations.h"

namespace fastrnn {

// Gated recurrent unit with the reset gate before the product (Cho 2014, as published; Keras' reset_after=False):
//   r, z = sigmoid(..)   n = tanh(W_in x + W_hn (r h') + biases)   h = (1 - z) n + z h' = n + z (h' - n)
struct ResetBeforeGRUCell {
  static constexpr int kGates = 3;   // r, z, n
  static constexpr int kLateGates = 1;
  static constexpr int kStates = 1;  // h
  static constexpr int kSaved = 3;   // r, z, n
  static constexpr int kParams = 0;
  static constexpr bool kReadsState = false;

  template <class V>
  static FASTRNN_HD V late_input(const ForwardIn<ResetBeforeGRUCell, V>& in) {
    return sigmoid(in.gates_ih[0] + in.gates_hh[0]) * in.state[0];
  }

  template <class V>
  static FASTRNN_HD void forward(const ForwardIn<ResetBeforeGRUCell, V>& in, ForwardOut<ResetBeforeGRUCell, V>& out) {
    const V r = sigmoid(in.gates_ih[0] + in.gates_hh[0]);
    const V z = sigmoid(in.gates_ih[1] + in.gates_hh[1]);
    const V n = tanh(in.gates_ih[2] + in.gates_hh[2]);
    out.state = {{n + z * (in.state[0] - n)}};
    out.saved = {{r, z, n}};
  }

  template <class V>
  static FASTRNN_HD Pack<V, 1> late_grad(const BackwardIn<ResetBeforeGRUCell, V>& in) {
    const V z = in.saved[1], n = in.saved[2];
    return {{in.grad_state[0] * (V(1) - z) * tanh_grad(n)}};
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<ResetBeforeGRUCell, V>& in, BackwardOut<ResetBeforeGRUCell, V>& out) {
    const V r = in.saved[0], z = in.saved[1], n = in.saved[2], h = in.state_prev[0];
    const V grad_h = in.grad_state[0], grad_rh = in.late_grad[0];
    out.grad_gates_ih = {{grad_rh * h * sigmoid_grad(r), grad_h * (h - n) * sigmoid_grad(z), late_grad(in)[0]}};
    out.grad_gates_hh = out.grad_gates_ih;
    out.grad_state_prev = {{grad_h * z + grad_rh * r}};
  }
};

}  // namespace fastrnn
