#pragma once
#include "activations.h"

namespace fastrnn {

// Long short-term memory with peepholes (Gers & Schmidhuber 2000): its gates see c, through a weight of each unit.
//   i, f = sigmoid(.. + p c')   g = tanh(..)   c = f c' + i g   o = sigmoid(.. + p c)   h = o tanh(c)
struct PeepholeLSTMCell {
  static constexpr int kGates = 4;   // i, f, g, o
  static constexpr int kStates = 2;  // h, c
  static constexpr int kSaved = 4;   // i, f, g, o
  static constexpr int kParams = 3;  // p of i, f, o

  template <class V>
  static FASTRNN_HD void begin(const ForwardIn<PeepholeLSTMCell, V>& in, ForwardOut<PeepholeLSTMCell, V>& out) {
    const V i = sigmoid(in.gates_ih[0] + in.gates_hh[0] + in.params[0] * in.state[1]);
    const V f = sigmoid(in.gates_ih[1] + in.gates_hh[1] + in.params[1] * in.state[1]);
    const V g = tanh(in.gates_ih[2] + in.gates_hh[2]);
    out.state[1] = f * in.state[1] + i * g;
    out.saved = {{i, f, g, V(0)}};
  }
  template <class V>
  static FASTRNN_HD void end(const ForwardIn<PeepholeLSTMCell, V>& in, ForwardOut<PeepholeLSTMCell, V>& out) {
    const V c = out.state[1], o = sigmoid(in.gates_ih[3] + in.gates_hh[3] + in.params[2] * c);
    out.state[0] = o * tanh(c);
    out.saved[3] = o;
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<PeepholeLSTMCell, V>& in, BackwardOut<PeepholeLSTMCell, V>& out) {
    const V i = in.saved[0], f = in.saved[1], g = in.saved[2], o = in.saved[3];
    const V tanh_c = tanh(in.state[1]);
    const V grad_h = in.grad_state[0];
    const V grad_o = grad_h * tanh_c * sigmoid_grad(o);
    const V grad_c = in.grad_state[1] + grad_h * o * tanh_grad(tanh_c) + grad_o * in.params[2];
    const V grad_i = grad_c * g * sigmoid_grad(i);
    const V grad_f = grad_c * in.state_prev[1] * sigmoid_grad(f);
    out.grad_gates_ih = {{grad_i, grad_f, grad_c * i * tanh_grad(g), grad_o}};
    out.grad_gates_hh = out.grad_gates_ih;
    out.grad_state_prev = {{V(0), grad_c * f + grad_i * in.params[0] + grad_f * in.params[1]}};
    out.grad_params = {{grad_i * in.state_prev[1], grad_f * in.state_prev[1], grad_o * in.state[1]}};
  }

  template <class V>
  static FASTRNN_HD V remake(const Pack<V, kSaved>& saved, const Pack<V, kStates>& state_prev) {
    return saved[1] * state_prev[1] + saved[0] * saved[2];
  }
};

}  // namespace fastrnn
