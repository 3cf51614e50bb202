// Layer normalization (Ba, Kiros & Hinton 2016) of the G gates of W_ih x and of those of W_hh h'. Each of these N = 2 G
// vectors over a row's units is normalised by itself, with a gain and a bias of every unit:
//   n = (a - mean) / sqrt(variance + 1e-5)    LN(a) = gain n + bias
// The variance is the mean of (a - mean)^2, made after the mean. Here 0 .. G-1 are the gates of W_ih x, G .. N-1 those
// of W_hh h'. A cell's parameters are the gains of all N, their biases, and then what else it has. It saves a - mean,
// of which backward makes n again: of a small n, half types round little away.
#pragma once
#include "activations.h"

namespace fastrnn {

template <class X>
FASTRNN_HD X norm_scale(X mean_of_squares) {
  return X(1) / sqrt(mean_of_squares + X(1e-5));
}

// row[first ..] = the means
template <int first, class X, int M, int R>
FASTRNN_HD void set_means(const Pack<X, M>& means, Pack<X, R>& row) {
  FASTRNN_UNROLL for (int k = 0; k < M; ++k) row[first + k] = means[k];
}
// row[first ..] = the scales of the vectors whose squares have these means
template <int first, class X, int M, int R>
FASTRNN_HD void set_scales(const Pack<X, M>& means, Pack<X, R>& row) {
  FASTRNN_UNROLL for (int k = 0; k < M; ++k) row[first + k] = norm_scale(means[k]);
}

template <class V, int M>
FASTRNN_HD Pack<V, M> squares(const Pack<V, M>& x) {
  Pack<V, M> y;
  FASTRNN_UNROLL for (int k = 0; k < M; ++k) y[k] = x[k] * x[k];
  return y;
}

template <int G>
struct NormGates {
  static constexpr int N = 2 * G;

  // ---- forward: row[0 .. N-1] are the means, row[N .. 2N-1] the scales ----

  template <class Cell, class V>
  static FASTRNN_HD Pack<V, N> both(const ForwardIn<Cell, V>& in) {
    Pack<V, N> a;
    FASTRNN_UNROLL for (int k = 0; k < G; ++k) a[k] = in.gates_ih[k], a[G + k] = in.gates_hh[k];
    return a;
  }
  template <class Cell, class V>
  static FASTRNN_HD Pack<V, N> deviations(const ForwardIn<Cell, V>& in) {
    Pack<V, N> a = both(in);
    FASTRNN_UNROLL for (int k = 0; k < N; ++k) a[k] = a[k] - in.row[k];
    return a;
  }
  template <class Cell, class V>
  static FASTRNN_HD Pack<V, N> normalised(const ForwardIn<Cell, V>& in) {
    Pack<V, N> y = deviations(in);
    FASTRNN_UNROLL for (int k = 0; k < N; ++k) y[k] = y[k] * in.row[N + k] * in.params[k] + in.params[N + k];
    return y;
  }

  // ---- backward: saved[0 .. N-1] are a - mean, row[0 .. N-1] the scales ----

  template <class Cell, class V>
  static FASTRNN_HD V n(const BackwardIn<Cell, V>& in, int k) {
    return in.saved[k] * in.row[k];
  }
  template <class Cell, class V>
  static FASTRNN_HD V normalised(const BackwardIn<Cell, V>& in, int k) {
    return n(in, k) * in.params[k] + in.params[N + k];
  }
  // The terms of two means for each vector, which finish() wants in row[first ..]. grad: of LN(a).
  template <class Cell, class V>
  static FASTRNN_HD Pack<V, 2 * N> gradient_terms(const BackwardIn<Cell, V>& in, const Pack<V, N>& grad) {
    Pack<V, 2 * N> terms;
    FASTRNN_UNROLL for (int k = 0; k < N; ++k) {
      terms[k] = rounded_product(grad[k], in.params[k]);
      terms[N + k] = terms[k] * n(in, k);
    }
    return terms;
  }
  // The gradients of a and of gains and biases. A change of one a moves mean and scale, and so all n:
  //   grad a = scale (grad n - mean(grad n) - n mean(n grad n))
  template <int first, class Cell, class V>
  static FASTRNN_HD void finish(const BackwardIn<Cell, V>& in, const Pack<V, N>& grad, BackwardOut<Cell, V>& out) {
    FASTRNN_UNROLL for (int k = 0; k < N; ++k) {
      const V grad_n = rounded_product(grad[k], in.params[k]);  // of a single unit its mean is the same
      const V grad_a = in.row[k] * (grad_n - in.row[first + k] - n(in, k) * in.row[first + N + k]);
      (k < G ? out.grad_gates_ih[k] : out.grad_gates_hh[k - G]) = grad_a;
      out.grad_params[k] = grad[k] * n(in, k);
      out.grad_params[N + k] = grad[k];
    }
  }
};

}  // namespace fastrnn
