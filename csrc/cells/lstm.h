#pragma once
#include "activations.h"

namespace fastrnn {

// Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers 2000):
//   i, f, o = sigmoid(..)   g = tanh(..)   c = f c' + i g   h = o tanh(c)
struct LSTMCell {
  static constexpr int kGates = 4;   // i, f, g, o
  static constexpr int kStates = 2;  // h, c
  static constexpr int kSaved = 4;   // i, f, g, o
  static constexpr int kParams = 0;

  template <class V>
  static FASTRNN_HD void begin(const ForwardIn<LSTMCell, V>& in, ForwardOut<LSTMCell, V>& out) {
    const V i = sigmoid(in.gates_ih[0] + in.gates_hh[0]);
    const V f = sigmoid(in.gates_ih[1] + in.gates_hh[1]);
    const V g = tanh(in.gates_ih[2] + in.gates_hh[2]);
    const V o = sigmoid(in.gates_ih[3] + in.gates_hh[3]);
    out.state[1] = f * in.state[1] + i * g;
    out.saved = {{i, f, g, o}};
  }
  template <class V>
  static FASTRNN_HD void end(const ForwardIn<LSTMCell, V>&, ForwardOut<LSTMCell, V>& out) {
    out.state[0] = out.saved[3] * tanh(out.state[1]);
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<LSTMCell, V>& in, BackwardOut<LSTMCell, V>& out) {
    const V i = in.saved[0], f = in.saved[1], g = in.saved[2], o = in.saved[3];
    const V tanh_c = tanh(in.state[1]);
    const V grad_h = in.grad_state[0];
    const V grad_c = in.grad_state[1] + grad_h * o * tanh_grad(tanh_c);
    out.grad_gates_ih = {{grad_c * g * sigmoid_grad(i), grad_c * in.state_prev[1] * sigmoid_grad(f),
                          grad_c * i * tanh_grad(g), grad_h * tanh_c * sigmoid_grad(o)}};
    out.grad_gates_hh = out.grad_gates_ih;
    out.grad_state_prev = {{V(0), grad_c * f}};
  }

  template <class V>
  static FASTRNN_HD V remake(const Pack<V, kSaved>& saved, const Pack<V, kStates>& state_prev) {
    return saved[1] * state_prev[1] + saved[0] * saved[2];
  }
};

}  // namespace fastrnn
