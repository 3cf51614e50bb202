// A cell that no module has: the tests compile kernels with it (FASTRNN_MORE_CELLS, registry.h) to see that a cell needs
// nothing but its formulas and a line.
#pragma once

namespace fastrnn {

// Elman's network with a normalised recurrent product (after Ba 2016), over the units of a row:
//   n = (a - mean) / sqrt(variance + 1e-2), a = W h' + b   h = tanh(x + gain n)
struct NormCell {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;  // h
  static constexpr int kSaved = 2;   // n, 1 / sqrt(variance + 1e-2)
  static constexpr int kParams = 1;  // gain

  struct Row {
    static constexpr int kSums = 2;

    template <class V>
    static FASTRNN_HD Pack<V, 2> reduce(const Pack<V, 1>& gates_hh) {
      return {{gates_hh[0], gates_hh[0] * gates_hh[0]}};
    }
    template <class X>
    static FASTRNN_HD Pack<X, 2> combine(const Pack<X, 2>& sums, X units) {
      const X mean = sums[0] / units, variance = sums[1] / units - mean * mean;
      return {{mean, X(1) / sqrt(where_positive(variance, variance) + X(1e-2))}};
    }
    // n's gradient flows through the mean and the variance too: d a = r (d n - mean(d n) - n mean(n d n))
    template <class V>
    static FASTRNN_HD Pack<V, 2> reduce_grad(const Pack<V, 2>& saved, const Pack<V, 1>& grad_gates_hh) {
      return {{grad_gates_hh[0], grad_gates_hh[0] * saved[0]}};
    }
    template <class X>
    static FASTRNN_HD Pack<X, 2> combine_grad(const Pack<X, 2>& sums, X units) {
      return {{sums[0] / units, sums[1] / units}};
    }
    template <class V>
    static FASTRNN_HD Pack<V, 1> project_grad(const Pack<V, 2>& saved, const Pack<V, 2>& row,
                                              const Pack<V, 1>& grad_gates_hh) {
      return {{grad_gates_hh[0] - row[0] - saved[0] * row[1]}};
    }
  };

  template <class V>
  static FASTRNN_HD void forward(const ForwardIn<NormCell, V>& in, ForwardOut<NormCell, V>& out) {
    const V n = (in.gates_hh[0] - in.row[0]) * in.row[1];
    out.state = {{tanh(in.gates_ih[0] + in.params[0] * n)}};
    out.saved = {{n, in.row[1]}};
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<NormCell, V>& in, BackwardOut<NormCell, V>& out) {
    const V grad = in.grad_state[0] * tanh_grad(in.state[0]);
    out.grad_gates_ih = {{grad}};
    out.grad_gates_hh = {{grad * in.params[0] * in.saved[1]}};
    out.grad_state_prev = {{V(0)}};
    out.grad_params = {{grad * in.saved[0]}};
  }
};

}  // namespace fastrnn

#define FASTRNN_FOR_EACH_MORE_CELL(X) X("norm", ::fastrnn::NormCell, true)
