#pragma once
#include "layer_norm.h"

namespace fastrnn {

// Long short-term memory with layer normalization (Ba, Kiros & Hinton 2016, supplement). There a mean is of all gates
// together; here each gate has its own:
//   i, f, o = sigmoid(LN(W_ih x) + LN(W_hh h'))   g = tanh(likewise)   c = f c' + i g   h = o tanh(LN(c))
struct NormLSTMCell {
  using Gates = NormGates<4>;  // i, f, g, o
  static constexpr int kGates = 4;
  static constexpr int kStates = 2;                   // h, c
  static constexpr int kSaved = Gates::N + 1;         // a - mean of the gates, h before a projection
  static constexpr bool kSavesHidden = true;
  static constexpr int kParams = 2 * Gates::N + 2;    // gains and biases of the gates, those of c
  static constexpr int kGainC = 2 * Gates::N, kBiasC = kGainC + 1;

  struct Row {
    struct Forward {
      static constexpr int kMeans[] = {8, 8, 1, 1};
      static constexpr int kMeanC = 2 * Gates::N, kScaleC = kMeanC + 1, kNumbers = kMeanC + 2;
      static constexpr int kWork = 2, kFirstWork = 2;  // o, c

      template <int k, class V>
      static FASTRNN_HD Pack<V, kMeans[k]> terms(ForwardIn<NormLSTMCell, V>& in) {
        if constexpr (k == 0) return Gates::both(in);
        if constexpr (k == 1) return squares(Gates::deviations(in));
        if constexpr (k == 2) {
          const Pack<V, 8> y = Gates::normalised(in);
          const V i = sigmoid(y[0] + y[4]), f = sigmoid(y[1] + y[5]), g = tanh(y[2] + y[6]);
          in.work = {{sigmoid(y[3] + y[7]), f * in.state[1] + i * g}};
          return {{in.work[1]}};
        }
        if constexpr (k == 3) return squares(Pack<V, 1>{{in.work[1] - in.row[kMeanC]}});
      }
      template <int k, class X>
      static FASTRNN_HD void numbers(const Pack<X, kMeans[k]>& means, Pack<X, kNumbers>& row) {
        if constexpr (k == 0) set_means<0>(means, row);
        if constexpr (k == 1) set_scales<Gates::N>(means, row);
        if constexpr (k == 2) set_means<kMeanC>(means, row);
        if constexpr (k == 3) set_scales<kScaleC>(means, row);
      }
    };

    struct Backward {
      static constexpr int kMeans[] = {9, 1, 2, 16};
      // scales of the gates, mean and scale of c, means that c's gradient wants, means that the gates' want
      static constexpr int kMeanC = Gates::N, kScaleC = kMeanC + 1, kMeansC = kScaleC + 1, kFirstMean = kMeansC + 2;
      static constexpr int kNumbers = kFirstMean + 2 * Gates::N;
      static constexpr int kWork = 6, kFirstWork = 2;  // gradients of i, f, g, o before their functions, of c', and of LN(c)

      template <int k, class V>
      static FASTRNN_HD Pack<V, kMeans[k]> terms(BackwardIn<NormLSTMCell, V>& in) {
        if constexpr (k == 0) {
          Pack<V, 9> terms;
          FASTRNN_UNROLL for (int m = 0; m < Gates::N; ++m) terms[m] = in.saved[m] * in.saved[m];
          terms[Gates::N] = in.state[1];
          return terms;
        }
        if constexpr (k == 1) return squares(Pack<V, 1>{{in.state[1] - in.row[kMeanC]}});
        if constexpr (k == 2) {
          const V o = sigmoid(Gates::normalised(in, 3) + Gates::normalised(in, 7)), n = n_of_c(in);
          const V tanh_c = tanh(n * in.params[kGainC] + in.params[kBiasC]);
          in.work[3] = in.grad_state[0] * tanh_c * sigmoid_grad(o);
          in.work[5] = in.grad_state[0] * o * tanh_grad(tanh_c);
          const V grad_n = in.work[5] * in.params[kGainC];
          return {{grad_n, grad_n * n}};
        }
        if constexpr (k == 3) {
          const V i = sigmoid(Gates::normalised(in, 0) + Gates::normalised(in, 4));
          const V f = sigmoid(Gates::normalised(in, 1) + Gates::normalised(in, 5));
          const V g = tanh(Gates::normalised(in, 2) + Gates::normalised(in, 6));
          const V grad_n = in.work[5] * in.params[kGainC] - in.row[kMeansC] - n_of_c(in) * in.row[kMeansC + 1];
          const V grad_c = in.grad_state[1] + in.row[kScaleC] * grad_n;
          in.work[0] = grad_c * g * sigmoid_grad(i);
          in.work[1] = grad_c * in.state_prev[1] * sigmoid_grad(f);
          in.work[2] = grad_c * i * tanh_grad(g);
          in.work[4] = grad_c * f;
          return Gates::gradient_terms(in, grad_of_gates(in));
        }
      }
      template <int k, class X>
      static FASTRNN_HD void numbers(const Pack<X, kMeans[k]>& means, Pack<X, kNumbers>& row) {
        if constexpr (k == 0) {
          FASTRNN_UNROLL for (int m = 0; m < Gates::N; ++m) row[m] = norm_scale(means[m]);
          row[kMeanC] = means[Gates::N];
        }
        if constexpr (k == 1) set_scales<kScaleC>(means, row);
        if constexpr (k == 2) set_means<kMeansC>(means, row);
        if constexpr (k == 3) set_means<kFirstMean>(means, row);
      }
      template <class V>
      static FASTRNN_HD V n_of_c(const BackwardIn<NormLSTMCell, V>& in) {
        return (in.state[1] - in.row[kMeanC]) * in.row[kScaleC];
      }
      // Both terms of a gate's sum have its gradient.
      template <class V>
      static FASTRNN_HD Pack<V, Gates::N> grad_of_gates(const BackwardIn<NormLSTMCell, V>& in) {
        Pack<V, Gates::N> grad;
        FASTRNN_UNROLL for (int k = 0; k < Gates::N; ++k) grad[k] = in.work[k % kGates];
        return grad;
      }
    };
  };

  template <class V>
  static FASTRNN_HD void forward(const ForwardIn<NormLSTMCell, V>& in, ForwardOut<NormLSTMCell, V>& out) {
    using Passes = Row::Forward;
    const V o = in.work[0], c = in.work[1], n = (c - in.row[Passes::kMeanC]) * in.row[Passes::kScaleC];
    out.state = {{o * tanh(n * in.params[kGainC] + in.params[kBiasC]), c}};
    const Pack<V, Gates::N> of_gates = Gates::deviations(in);
    FASTRNN_UNROLL for (int k = 0; k < Gates::N; ++k) out.saved[k] = of_gates[k];
    out.saved[Gates::N] = out.state[0];
  }

  template <class V>
  static FASTRNN_HD void backward(const BackwardIn<NormLSTMCell, V>& in, BackwardOut<NormLSTMCell, V>& out) {
    using Passes = Row::Backward;
    Gates::template finish<Passes::kFirstMean>(in, Passes::grad_of_gates(in), out);
    out.grad_params[kGainC] = in.work[5] * Passes::n_of_c(in);
    out.grad_params[kBiasC] = in.work[5];
    out.grad_state_prev = {{V(0), in.work[4]}};
  }
};

}  // namespace fastrnn
