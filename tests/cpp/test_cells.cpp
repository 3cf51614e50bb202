// Every registered cell's backward against central differences of its forward, in double. Prints one line a cell and
// exits with 1 if any is off by more than kTolerance.
#include <cmath>
#include <cstdio>
#include <random>

#include "cells/registry.h"

using namespace fastrnn;

constexpr double kStep = 1e-6, kTolerance = 1e-8;

std::mt19937_64 generator(20260101);
double uniform() { return std::uniform_real_distribution<double>(-2, 2)(generator); }

template <int N>
void fill(Pack<double, N>& pack) {
  if constexpr (N > 0)
    for (int k = 0; k < N; ++k) pack[k] = uniform();
}

// Worst error over the inputs in `pack`, whose analytic gradients are `grad`.
template <int N, class Loss>
double compare(Pack<double, N>& pack, const Pack<double, N>& grad, Loss loss) {
  double worst = 0;
  if constexpr (N > 0)
    for (int k = 0; k < N; ++k) {
      const double x = pack[k];
      pack[k] = x + kStep;
      const double high = loss();
      pack[k] = x - kStep;
      const double low = loss();
      pack[k] = x;
      worst = std::fmax(worst, std::abs((high - low) / (2 * kStep) - grad[k]));
    }
  return worst;
}

template <class Cell>
double check() {
  double worst = 0;
  for (int trial = 0; trial < 1000; ++trial) {
    ForwardIn<Cell, double> in;
    ForwardOut<Cell, double> out;
    BackwardIn<Cell, double> back;
    BackwardOut<Cell, double> grad;
    fill(in.gates_ih);
    fill(in.gates_hh);
    fill(in.state);
    fill(in.params);
    fill(back.grad_state);
    // A relu has no derivative at its kink: stay away from it by more than the step.
    if (Cell::kGates == 1 && std::abs(in.gates_ih[0] + in.gates_hh[0]) < 1e-3) in.gates_ih[0] += 0.1;
    Cell::forward(in, out);
    back.saved = out.saved;
    back.state_prev = in.state;
    back.state = out.state;
    back.params = in.params;
    Cell::backward(back, grad);
    const auto loss = [&] {
      ForwardOut<Cell, double> moved;
      Cell::forward(in, moved);
      double sum = 0;
      for (int k = 0; k < Cell::kStates; ++k) sum += moved.state[k] * back.grad_state[k];
      return sum;
    };
    worst = std::fmax(worst, compare(in.gates_ih, grad.grad_gates_ih, loss));
    worst = std::fmax(worst, compare(in.gates_hh, grad.grad_gates_hh, loss));
    worst = std::fmax(worst, compare(in.state, grad.grad_state_prev, loss));
    worst = std::fmax(worst, compare(in.params, grad.grad_params, loss));
  }
  return worst;
}

int main() {
  bool good = true;
#define FASTRNN_CHECK(name, Cell, separate)                              \
  {                                                                      \
    const double worst = check<Cell>();                                  \
    good = good && worst < kTolerance;                                   \
    std::printf("%s %.2e %s\n", name, worst, worst < kTolerance ? "ok" : "FAILED"); \
  }
  FASTRNN_FOR_EACH_CELL(FASTRNN_CHECK)
  return good ? 0 : 1;
}
