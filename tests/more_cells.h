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
    struct Forward {
      static constexpr int kMeans[] = {1, 1};
      static constexpr int kNumbers = 2, kWork = 0;  // mean, 1 / sqrt(..)

      template <int k, class V>
      static FASTRNN_HD Pack<V, 1> terms(ForwardIn<NormCell, V>& in) {
        if constexpr (k == 0) return in.gates_hh;
        const V d = in.gates_hh[0] - in.row[0];
        return {{d * d}};
      }
      template <int k, class X>
      static FASTRNN_HD void numbers(const Pack<X, 1>& means, Pack<X, 2>& row) {
        row[k] = k == 0 ? means[0] : X(1) / sqrt(means[0] + X(1e-2));
      }
    };
    // n's gradient flows through the mean and the variance too: d a = r (d n - mean(d n) - n mean(n d n))
    struct Backward {
      static constexpr int kMeans[] = {2};
      static constexpr int kNumbers = 2, kWork = 1, kFirstWork = 0;  // the gradient of the argument of tanh

      template <int k, class V>
      static FASTRNN_HD Pack<V, 2> terms(BackwardIn<NormCell, V>& in) {
        in.work[0] = in.grad_state[0] * tanh_grad(in.state[0]);
        const V grad_n = in.work[0] * in.params[0];
        return {{grad_n, grad_n * in.saved[0]}};
      }
      template <int k, class X>
      static FASTRNN_HD void numbers(const Pack<X, 2>& means, Pack<X, 2>& row) {
        row = means;
      }
    };
  };

  template <class V>
  static FASTRNN_HD void forward(const ForwardIn<NormCell, V>& in, ForwardOut<NormCell, V>& out) {
    const V n = (in.gates_hh[0] - in.row[0]) * in.row[1];
    out.state = {{tanh(in.gates_ih[0] + in.params[0] * n)}};
    out.saved = {{n, in.row[1]}};
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<NormCell, V>& in, BackwardOut<NormCell, V>& out) {
    const V n = in.saved[0], grad_n = in.work[0] * in.params[0];
    out.grad_gates_ih = {{in.work[0]}};
    out.grad_gates_hh = {{(grad_n - in.row[0] - n * in.row[1]) * in.saved[1]}};
    out.grad_state_prev = {{V(0)}};
    out.grad_params = {{in.work[0] * n}};
  }
};

}  // namespace fastrnn

#define FASTRNN_FOR_EACH_MORE_CELL(X) X("norm", ::fastrnn::NormCell, true)
