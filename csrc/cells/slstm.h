#pragma once
#include "activations.h"

namespace fastrnn {

// The scalar memory of xLSTM (Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory", section 2.2) with a sigmoid
// forget gate. Its input gate is an exponential: n adds up the gates that c adds up values with, and both are kept
// divided by e^m, where m' makes the larger of the two new weights 1 (equations 8 to 17; i, f and z are pre-activations):
//   m' = max(log sigmoid(f) + m, i)   a = e^(log sigmoid(f) + m - m')   b = e^(i - m')
//   c' = a c + b tanh(z)              n' = a n + b                       h = sigmoid(o) c' / n'
//
// n = 0, as at the start, says that nothing has been seen. Then m' = i and b = 1, and a, which multiplies zeros, is at
// most 1: so n >= 1 from the first step on, and no h is 0 / 0, whatever the gates are.
// Where log sigmoid(f) + m = i, the gradient of the maximum is shared, as torch.maximum shares it.
struct SLSTMCell {
  static constexpr int kGates = 4;   // i, f, z, o
  static constexpr int kStates = 4;  // h, c, n, m
  // log sigmoid(f) + m - i, from whose sign and size a and b follow; sigmoid(-f), the slope of log sigmoid; tanh(z),
  // sigmoid(o)
  static constexpr int kSaved = 4;
  static constexpr int kParams = 0;

  template <class V>
  static FASTRNN_HD void forward(const ForwardIn<SLSTMCell, V>& in, ForwardOut<SLSTMCell, V>& out) {
    const V i = in.gates_ih[0] + in.gates_hh[0], f = in.gates_ih[1] + in.gates_hh[1];
    const V z = tanh(in.gates_ih[2] + in.gates_hh[2]), o = sigmoid(in.gates_ih[3] + in.gates_hh[3]);
    const V before = in.state[2], past = log_sigmoid(f) + in.state[3], distance = past - i;
    const V a = of_past(distance), b = of_new(distance, before);
    const V c = a * in.state[1] + b * z, n = a * before + b;
    out.state = {{o * (c / n), c, n, maximum(where_zero(before, i, past), i)}};
    out.saved = {{distance, sigmoid(-f), z, o}};
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<SLSTMCell, V>& in, BackwardOut<SLSTMCell, V>& out) {
    const V distance = in.saved[0], slope = in.saved[1], z = in.saved[2], o = in.saved[3];
    // The lanes of a vector beyond the last unit hold zeros alone, and are to give zeros.
    const V inverse = where_zero(in.state[2], V(0), V(1) / in.state[2]);
    const V before = in.state_prev[2], ratio = in.state[1] * inverse;
    const V a = of_past(distance), b = of_new(distance, before);
    const V grad_h = in.grad_state[0], grad_ratio = grad_h * o * inverse;
    const V grad_c = in.grad_state[1] + grad_ratio, grad_n = in.grad_state[2] - grad_ratio * ratio;
    // Of log a where it is not held at 0, and of log b.
    const V held = where_zero(before, where_positive(distance, V(1)), V(0));
    const V grad_a = (V(1) - held) * a * (grad_c * in.state_prev[1] + grad_n * before);
    const V grad_b = b * (grad_c * z + grad_n);
    // What part of m' is the past's: 1, 0, or a half of each.
    const V half = V(1) / V(2);
    const V part = where_zero(before, V(0), half + half * (where_positive(distance, V(1)) -
                                                           where_positive(-distance, V(1))));
    const V grad_past = (V(1) - part) * grad_a + part * (in.grad_state[3] - grad_b);
    const V grad_i = part * grad_b + (V(1) - part) * (in.grad_state[3] - grad_a);
    out.grad_gates_ih = {{grad_i, grad_past * slope, grad_c * b * tanh_grad(z), grad_h * ratio * sigmoid_grad(o)}};
    out.grad_gates_hh = out.grad_gates_ih;
    out.grad_state_prev = {{V(0), grad_c * a, grad_n * a, grad_past}};
  }

 private:
  template <class V>
  static FASTRNN_HD V of_past(V distance) {
    return exp(-relu(-distance));
  }
  template <class V>
  static FASTRNN_HD V of_new(V distance, V before) {
    return exp(where_zero(before, V(0), -relu(distance)));
  }
};

}  // namespace fastrnn
