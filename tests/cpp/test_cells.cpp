// Every registered cell's backward against central differences of its forward, in double, with what a Row
// and late gates (cells/cell.h) add to both; and the state that it makes again of its saved values. Prints one line a cell
// and exits with 1 if any is off by more than kTolerance.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cells/registry.h"

using namespace fastrnn;

constexpr double kStep = 1e-6;
constexpr int kUnits = 3;  // of a row
constexpr double kLateWeight = 0.7;  // of the product of late gates, a unit's with itself alone
// What a normalisation divides by may be small, which magnifies what differences leave out.
template <class Cell>
constexpr double kTolerance = kWholeRows<Cell> ? 1e-7 : 1e-8;

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
      const double error = std::abs((high - low) / (2 * kStep) - grad[k]);
      if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
    }
  return worst;
}

template <int N, class Terms>
Pack<double, N> mean(Terms terms) {
  Pack<double, N> means;
  for (int k = 0; k < N; ++k) means[k] = 0;
  for (int unit = 0; unit < kUnits; ++unit) {
    const Pack<double, N> some = terms(unit);
    for (int k = 0; k < N; ++k) means[k] += some[k] / kUnits;
  }
  return means;
}

template <class Passes, class In>
void run_passes(std::vector<In>& in) {
  for_each_pass<Passes>([&](auto pass) {
    constexpr int k = decltype(pass)::value;
    const auto means = mean<Passes::kMeans[k]>([&](int unit) { return Passes::template terms<k>(in[unit]); });
    Passes::template numbers<k>(means, in[0].row);
    for (auto& x : in) x.row = in[0].row;
  });
}

template <class Cell>
void forward(std::vector<ForwardIn<Cell, double>>& in, std::vector<ForwardOut<Cell, double>>& out) {
  if constexpr (kWholeRows<Cell>) run_passes<ForwardPasses<Cell>>(in);
  for (int unit = 0; unit < kUnits; ++unit) {
    auto x = in[unit];
    if constexpr (kHasLate<Cell>) {
      const double late = Cell::late_input(x);
      for (int k = kEarlyGates<Cell>; k < Cell::kGates; ++k) x.gates_hh[k] += kLateWeight * late;
    }
    cell_forward<Cell>(x, out[unit]);
  }
}

template <class Cell>
void backward(std::vector<BackwardIn<Cell, double>>& in, std::vector<BackwardOut<Cell, double>>& out) {
  if constexpr (kWholeRows<Cell>) run_passes<BackwardPasses<Cell>>(in);
  for (int unit = 0; unit < kUnits; ++unit) {
    if constexpr (kHasLate<Cell>) {
      in[unit].late_grad[0] = 0;
      const auto grads = Cell::late_grad(in[unit]);
      for (int k = 0; k < kLateGates<Cell>; ++k) in[unit].late_grad[0] += kLateWeight * grads[k];
    }
    Cell::backward(in[unit], out[unit]);
  }
}

template <class Cell>
double check() {
  double worst = 0;
  for (int trial = 0; trial < 1000; ++trial) {
    std::vector<ForwardIn<Cell, double>> in(kUnits);
    std::vector<ForwardOut<Cell, double>> out(kUnits);
    std::vector<BackwardIn<Cell, double>> back(kUnits);
    std::vector<BackwardOut<Cell, double>> grad(kUnits);
    for (auto& x : in) {
      fill(x.gates_ih);
      fill(x.gates_hh);
      fill(x.state);
      fill(x.params);
      if constexpr (Cell::kStates > 2) x.state[2] = 0.5 + std::abs(x.state[2]);  // an sLSTM's n, which is above 0
      // A relu has no derivative at its kink: stay away from it by more than the step.
      for (int gate = 0; gate < Cell::kGates; ++gate)
        if (std::abs(x.gates_ih[gate] + x.gates_hh[gate]) < 1e-3) x.gates_ih[gate] += 0.1;
    }
    forward<Cell>(in, out);
    for (int unit = 0; unit < kUnits; ++unit) {
      fill(back[unit].grad_state);
      back[unit].saved = out[unit].saved;
      back[unit].state_prev = in[unit].state;
      back[unit].state = out[unit].state;
      back[unit].params = in[unit].params;
      if constexpr (!kReadsState<Cell>) std::fill_n(back[unit].state.v, Cell::kStates, NAN);
      if constexpr (kRemakes<Cell>) {
        const double again = Cell::remake(out[unit].saved, in[unit].state);
        worst = std::fmax(worst, std::abs(again - out[unit].state[Cell::kStates - 1]));
      }
    }
    backward<Cell>(back, grad);
    const auto loss = [&] {
      std::vector<ForwardOut<Cell, double>> moved(kUnits);
      forward<Cell>(in, moved);
      double sum = 0;
      for (int unit = 0; unit < kUnits; ++unit)
        for (int k = 0; k < Cell::kStates; ++k) sum += moved[unit].state[k] * back[unit].grad_state[k];
      return sum;
    };
    for (int unit = 0; unit < kUnits; ++unit) {
      worst = std::fmax(worst, compare(in[unit].gates_ih, grad[unit].grad_gates_ih, loss));
      worst = std::fmax(worst, compare(in[unit].gates_hh, grad[unit].grad_gates_hh, loss));
      worst = std::fmax(worst, compare(in[unit].state, grad[unit].grad_state_prev, loss));
      worst = std::fmax(worst, compare(in[unit].params, grad[unit].grad_params, loss));
    }
  }
  return worst;
}

int main() {
  bool good = true;
#define FASTRNN_CHECK(name, Cell, separate)                              \
  {                                                                      \
    const double worst = check<Cell>();                                  \
    const bool near = worst < kTolerance<Cell>;                          \
    good = good && near;                                                 \
    std::printf("%s %.2e %s\n", name, worst, near ? "ok" : "FAILED");    \
  }
  FASTRNN_FOR_EACH_CELL(FASTRNN_CHECK)
  return good ? 0 : 1;
}
