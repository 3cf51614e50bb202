#pragma once
#include "layer_norm.h"

namespace fastrnn {

// Gated recurrent unit with layer normalization (Ba, Kiros & Hinton 2016), of the GRU in gru.h: what the reset gate
// multiplies is normalised before.
//   r, z = sigmoid(LN(W_ih x) + LN(W_hh h'))   n = tanh(LN(W_ih x) + r LN(W_hh h'))   h = n + z (h' - n)
struct NormGRUCell {
  using Gates = NormGates<3>;  // r, z, n
  static constexpr int kGates = 3;
  static constexpr int kStates = 1;               // h
  static constexpr int kSaved = Gates::N;         // a - mean
  static constexpr int kParams = 2 * Gates::N;    // gains, biases
  static constexpr bool kReadsState = false;

  struct Row {
    struct Forward {
      static constexpr int kMeans[] = {6, 6};
      static constexpr int kNumbers = 2 * Gates::N, kWork = 0;

      template <int k, class V>
      static FASTRNN_HD Pack<V, kMeans[k]> terms(ForwardIn<NormGRUCell, V>& in) {
        if constexpr (k == 0) return Gates::both(in);
        if constexpr (k == 1) return squares(Gates::deviations(in));
      }
      template <int k, class X>
      static FASTRNN_HD void numbers(const Pack<X, kMeans[k]>& means, Pack<X, kNumbers>& row) {
        if constexpr (k == 0) set_means<0>(means, row);
        if constexpr (k == 1) set_scales<Gates::N>(means, row);
      }
    };

    struct Backward {
      static constexpr int kMeans[] = {6, 12};
      static constexpr int kFirstMean = Gates::N, kNumbers = kFirstMean + 2 * Gates::N;
      static constexpr int kWork = 5, kFirstWork = 1;  // gradients of r, z, n before their functions, of LN(W_hn h'), of h'

      template <int k, class V>
      static FASTRNN_HD Pack<V, kMeans[k]> terms(BackwardIn<NormGRUCell, V>& in) {
        if constexpr (k == 0) return squares(in.saved);
        if constexpr (k == 1) {
          const V r = sigmoid(Gates::normalised(in, 0) + Gates::normalised(in, 3));
          const V z = sigmoid(Gates::normalised(in, 1) + Gates::normalised(in, 4));
          const V n_hh = Gates::normalised(in, 5), n = tanh(Gates::normalised(in, 2) + r * n_hh);
          const V grad_h = in.grad_state[0], grad_n = grad_h * (V(1) - z) * tanh_grad(n);
          in.work = {{grad_n * n_hh * sigmoid_grad(r), grad_h * (in.state_prev[0] - n) * sigmoid_grad(z), grad_n,
                      grad_n * r, grad_h * z}};
          return Gates::gradient_terms(in, grad_of_gates(in));
        }
      }
      template <int k, class X>
      static FASTRNN_HD void numbers(const Pack<X, kMeans[k]>& means, Pack<X, kNumbers>& row) {
        if constexpr (k == 0) set_scales<0>(means, row);
        if constexpr (k == 1) set_means<kFirstMean>(means, row);
      }
      template <class V>
      static FASTRNN_HD Pack<V, Gates::N> grad_of_gates(const BackwardIn<NormGRUCell, V>& in) {
        return {{in.work[0], in.work[1], in.work[2], in.work[0], in.work[1], in.work[3]}};
      }
    };
  };

  template <class V>
  static FASTRNN_HD void forward(const ForwardIn<NormGRUCell, V>& in, ForwardOut<NormGRUCell, V>& out) {
    const Pack<V, Gates::N> y = Gates::normalised(in);
    const V r = sigmoid(y[0] + y[3]), z = sigmoid(y[1] + y[4]), n = tanh(y[2] + r * y[5]);
    out.state = {{n + z * (in.state[0] - n)}};
    out.saved = Gates::deviations(in);
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<NormGRUCell, V>& in, BackwardOut<NormGRUCell, V>& out) {
    using Passes = Row::Backward;
    Gates::template finish<Passes::kFirstMean>(in, Passes::grad_of_gates(in), out);
    out.grad_state_prev = {{in.work[4]}};
  }
};

}  // namespace fastrnn
