#pragma once
#include "activations.h"

namespace fastrnn {

// Gated recurrent unit (Cho 2014, with the reset gate after the product as in torch.nn and cuDNN):
//   r, z = sigmoid(..)   n = tanh(n_ih + r n_hh)   h = (1 - z) n + z h' = n + z (h' - n)
struct GRUCell {
  static constexpr int kGates = 3;   // r, z, n
  static constexpr int kStates = 1;  // h
  static constexpr int kSaved = 4;   // r, z, n, n_hh
  static constexpr int kParams = 0;
  static constexpr bool kReadsState = false;

  template <class V>
  static FASTRNN_HD void begin(const ForwardIn<GRUCell, V>& in, ForwardOut<GRUCell, V>& out) {
    out.saved[0] = sigmoid(in.gates_ih[0] + in.gates_hh[0]);
    out.saved[1] = sigmoid(in.gates_ih[1] + in.gates_hh[1]);
  }
  template <class V>
  static FASTRNN_HD void end(const ForwardIn<GRUCell, V>& in, ForwardOut<GRUCell, V>& out) {
    const V r = out.saved[0], z = out.saved[1], n_hh = in.gates_hh[2];
    const V n = tanh(in.gates_ih[2] + r * n_hh);
    out.state = {{n + z * (in.state[0] - n)}};
    out.saved[2] = n;
    out.saved[3] = n_hh;
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<GRUCell, V>& in, BackwardOut<GRUCell, V>& out) {
    const V r = in.saved[0], z = in.saved[1], n = in.saved[2], n_hh = in.saved[3];
    const V grad_h = in.grad_state[0];
    const V grad_n = grad_h * (V(1) - z) * tanh_grad(n);
    const V grad_r = grad_n * n_hh * sigmoid_grad(r);
    const V grad_z = grad_h * (in.state_prev[0] - n) * sigmoid_grad(z);
    out.grad_gates_ih = {{grad_r, grad_z, grad_n}};
    out.grad_gates_hh = {{grad_r, grad_z, grad_n * r}};
    out.grad_state_prev = {{grad_h * z}};
  }
};

}  // namespace fastrnn
