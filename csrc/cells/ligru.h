#pragma once
#include "activations.h"

namespace fastrnn {

// Light gated recurrent unit (Ravanelli 2018, without its batch normalization): a GRU without a reset gate, with relu.
//   z = sigmoid(..)   n = relu(..)   h = z h' + (1 - z) n = n + z (h' - n)
struct LiGRUCell {
  static constexpr int kGates = 2;   // z, n
  static constexpr int kStates = 1;  // h
  static constexpr int kSaved = 2;   // z, n
  static constexpr int kParams = 0;
  static constexpr bool kReadsState = false;

  template <class V>
  static FASTRNN_HD void forward(const ForwardIn<LiGRUCell, V>& in, ForwardOut<LiGRUCell, V>& out) {
    const V z = sigmoid(in.gates_ih[0] + in.gates_hh[0]);
    const V n = relu(in.gates_ih[1] + in.gates_hh[1]);
    out.state = {{n + z * (in.state[0] - n)}};
    out.saved = {{z, n}};
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<LiGRUCell, V>& in, BackwardOut<LiGRUCell, V>& out) {
    const V z = in.saved[0], n = in.saved[1], grad_h = in.grad_state[0];
    const V grad_z = grad_h * (in.state_prev[0] - n) * sigmoid_grad(z);
    out.grad_gates_ih = {{grad_z, where_positive(n, grad_h * (V(1) - z))}};
    out.grad_gates_hh = out.grad_gates_ih;
    out.grad_state_prev = {{grad_h * z}};
  }
};

}  // namespace fastrnn
