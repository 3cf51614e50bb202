// Per-step tier, backward: what stands between the products of a time loop (launch.h says in which order).
#include "step.cuh"
#include "unit_backward.cuh"

namespace fastrnn::cuda {

// With weight_hr: the gradient of state 0 in every column, which the projection's transpose multiplies.
template <class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_backward_projected_kernel(LaunchParams<BackwardParams> p, StepBuffers b, int k) {
  for_each_row(p, [&](const RowWalk& r, int j) {
    if (j >= p.width) return;
    if (k + 1 == p.steps) clear_sums_of_h<S>(p, r, j);
    if (!r.running(k)) return store<S>(p.grad_projected, r.padding(p, k) * p.width + j, 0);
    const int64_t at = in_buffer(p, r, p.width, j);
    const Wide<S> later = r.last(k) ? Wide<S>(0) : handed_on<S>(p, r, j, load<Wide<S>>(b.recurrent, at));
    const bool crossed = reset_before(p, r, k + 1);
    const Wide<S> grad =
        backward_h<S, true>(p, r, k, j, later, clip_limit<S>(p), crossed, load_grad_output<S>(p, r, k, j));
    store<S>(p.grad_projected, r.place(p, k) * p.width + j, grad);
    store<S>(b.grad_h, at, grad);
  });
}

// What step k does to unit j < h of every row, running or not.
template <class Cell, class S>
FASTRNN_INLINE void step_backward_start(const BackwardParams& p, const RowWalk& r, int k, int j) {
  if (k + 1 == p.steps) {
    if (!p.weight_hr) clear_sums_of_h<S>(p, r, j);
    clear_sums_of_unit<Cell, S>(p, r, j);
  }
  if (!r.running(k)) pad_grad_gates<Cell, S>(p, r, k, j);
}

template <class Cell, class S>
FASTRNN_INLINE void step_backward_loads(const BackwardParams& p, const RowWalk& r, int k, int j,
                                        BackwardLoads<Cell, S>& loads) {
  load_backward<Cell, S, true>(p, r, k, j, reset_before(p, r, k), loads);
}

// The gradients of the states after step k of a running row, unit j < h. They add to grad_reset_*: once a step.
template <class Cell, class S>
FASTRNN_INLINE Pack<Wide<S>, Cell::kStates> step_backward_states(const BackwardParams& p, const StepBuffers& b,
                                                                 const RowWalk& r, int k, int j, S grad_output) {
  using V = Wide<S>;
  const bool crossed = reset_before(p, r, k + 1);
  const int64_t at = in_buffer(p, r, p.hidden, j);
  const Carried<Cell, V> carried = load_carried<Cell, V>(p, r, b.carried, j, !r.last(k));
  Pack<V, Cell::kStates> grads;
  if (p.weight_hr) {
    grads[0] = load<V>(b.grad_hidden, at);
  } else {
    const V recurrent = r.last(k) ? V(0) : handed_on<S>(p, r, j, load<V>(b.recurrent, at));
    const V later = Cell::kStates == 1 ? recurrent + carried_at(carried, 0) : recurrent;
    grads[0] = backward_h<S, true>(p, r, k, j, later, clip_limit<S>(p), crossed, grad_output);
  }
  backward_c<Cell, S>(p, r, k, j, carried, clip_limit<S>(p), crossed, grads);
  return grads;
}

// Stores what step k's backward gave unit j < h of a running row.
template <class Cell, class S>
FASTRNN_INLINE void step_backward_store(const BackwardParams& p, const StepBuffers& b, const RowWalk& r, int k, int j,
                                        const BackwardOut<Cell, Wide<S>>& out) {
  constexpr int E = kEarlyGates<Cell>;
  Carried<Cell, Wide<S>> carried{};
  Pack<Wide<S>, Cell::kGates> grad_gates;
  store_backward<Cell, S>(p, r, k, j, out, carried, grad_gates);
  store_carried<Cell, Wide<S>>(p, r, b.carried, j, carried);
#pragma unroll
  for (int g = 0; g < E; ++g)
    store<S>(b.grad_gates, in_buffer(p, r, E * p.hidden, g * p.hidden + j), grad_gates[g]);
}

// One step of every unit.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_backward_kernel(LaunchParams<BackwardParams> p, StepBuffers b, int k) {
  for_each_row(p, [&](const RowWalk& r, int j) {
    if (j >= p.hidden) return;
    step_backward_start<Cell, S>(p, r, k, j);
    if (!r.running(k)) return;
    BackwardLoads<Cell, S> loads;
    BackwardIn<Cell, Wide<S>> in;
    BackwardOut<Cell, Wide<S>> out;
    step_backward_loads<Cell, S>(p, r, k, j, loads);
    make_backward_in<Cell, S, true>(p, r, j, loads, in);
    in.grad_state = step_backward_states<Cell, S>(p, b, r, k, j, loads.grad_output);
    [[maybe_unused]] Wide<S> past(0);
    if constexpr (Cell::kStates == 2) past = past_cell<S>(p, r, k, j, in.grad_state[1]);
    Cell::backward(in, out);
    if constexpr (Cell::kStates == 2) out.grad_state_prev[1] += past;
    step_backward_store<Cell, S>(p, b, r, k, j, out);
  });
}

// Of a cell with late gates: their gradients in step k, and in `work` that of h after the step.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_backward_late_kernel(LaunchParams<BackwardParams> p, StepBuffers b, int k) {
  constexpr int K = kLateGates<Cell>;
  for_each_row(p, [&](const RowWalk& r, int j) {
    if (j >= p.hidden) return;
    step_backward_start<Cell, S>(p, r, k, j);
    Pack<Wide<S>, K> grads{};  // of a row that has no such step: something that a product can bear
    if (r.running(k)) {
      BackwardLoads<Cell, S> loads;
      BackwardIn<Cell, Wide<S>> in;
      step_backward_loads<Cell, S>(p, r, k, j, loads);
      make_backward_in<Cell, S, true>(p, r, j, loads, in);
      in.grad_state = step_backward_states<Cell, S>(p, b, r, k, j, loads.grad_output);
      store_work(p, r, b.work, 1, 0, j, in.grad_state);
      grads = Cell::late_grad(in);
    }
#pragma unroll
    for (int g = 0; g < K; ++g) store<S>(b.late, in_buffer(p, r, K * p.hidden, g * p.hidden + j), grads[g]);
  });
}
// And then the rest of the step.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_backward_after_late_kernel(LaunchParams<BackwardParams> p, StepBuffers b, int k) {
  for_each_row(p, [&](const RowWalk& r, int j) {
    if (j >= p.hidden || !r.running(k)) return;
    BackwardLoads<Cell, S> loads;
    BackwardIn<Cell, Wide<S>> in;
    BackwardOut<Cell, Wide<S>> out;
    step_backward_loads<Cell, S>(p, r, k, j, loads);
    make_backward_in<Cell, S, true>(p, r, j, loads, in);
    load_work(p, r, b.work, 1, 0, j, in.grad_state);
    in.late_grad[0] = through_mask<S>(p, r, j, load<Wide<S>>(b.late_product, in_buffer(p, r, p.hidden, j)));
    Cell::backward(in, out);
    step_backward_store<Cell, S>(p, b, r, k, j, out);
  });
}

// The same for a cell with a Row. A thread comes back to the same units in every pass, and finds in `work` what it left
// there: the gradients of the states as the cell made them, then the Row's. What zoneout hands past the cell waits in
// `carried`.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_backward_whole_rows_kernel(LaunchParams<BackwardParams> p, StepBuffers b, int k) {
  using V = Wide<S>;
  using Passes = BackwardPasses<Cell>;
  constexpr int kStates = Cell::kStates, kValues = kStates + Passes::kWork;
  const RowShared<Passes, S> shared(dev::dynamic_shared(), int(blockDim.x));
  for_each_whole_row(p, [&](const RowWalk& r) {
    for_each_unit(p, [&](int j) {
      step_backward_start<Cell, S>(p, r, k, j);
      if (!r.running(k)) return;
      const S grad_output = p.weight_hr ? zero<S>() : load_grad_output<S>(p, r, k, j);
      auto grads = step_backward_states<Cell, S>(p, b, r, k, j, grad_output);
      if constexpr (kStates == 2) {
        if (p.keep_c) store_carried<Cell, V>(p, r, b.carried, j, past_cell<S>(p, r, k, j, grads[1]));
      }
      store_work(p, r, b.work, kValues, 0, j, grads);
    });
    if (!r.running(k)) return;
    const auto load_in = [&](int j, const auto& row, auto work) {
      BackwardLoads<Cell, S> loads;
      BackwardIn<Cell, V> in;
      step_backward_loads<Cell, S>(p, r, k, j, loads);
      make_backward_in<Cell, S, true>(p, r, j, loads, in);
      in.row = row;
      load_work(p, r, b.work, kValues, 0, j, in.grad_state);
      if constexpr (work) load_work(p, r, b.work, kValues, kStates, j, in.work);
      return in;
    };
    const auto keep = [&](int j, const auto& in) { store_work(p, r, b.work, kValues, kStates, j, in.work); };
    const auto row = run_passes<V, Passes>(p, shared.parts, load_in, keep);
    for_each_unit(p, [&](int j) {
      BackwardOut<Cell, V> out;
      Cell::backward(load_in(j, row, std::bool_constant<(Passes::kWork > 0)>()), out);
      if constexpr (kStates == 2) {
        if (p.keep_c) out.grad_state_prev[1] += load_carried<Cell, V>(p, r, b.carried, j);
      }
      step_backward_store<Cell, S>(p, b, r, k, j, out);
    });
  });
}

// grad_h_0 and grad_c_0. Columns up to the larger of h and R.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    finish_backward_kernel(LaunchParams<BackwardParams> p, StepBuffers b) {
  using V = Wide<S>;
  for_each_row(p, [&](const RowWalk& r, int j) {
    const bool crossed = reset_before(p, r, 0);
    const bool stepped = r.length > 0;
    const Carried<Cell, V> carried = load_carried<Cell, V>(p, r, b.carried, j, stepped && j < p.hidden);
    const V recurrent =
        stepped && j < p.width ? handed_on<S>(p, r, j, load<V>(b.recurrent, in_buffer(p, r, p.width, j))) : V(0);
    if (j < p.width)
      finish_h<S>(p, r, j, Cell::kStates == 1 ? recurrent + carried_at(carried, 0) : recurrent, crossed);
    if (j < p.hidden) finish_carried<Cell, S>(p, r, j, carried, crossed);
  });
}

int step_backward_projected(const BackwardParams& p, int64_t k, const StepBuffers& b, void* stream) {
  return with_dtype(p.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    return launch_rows(step_backward_projected_kernel<S>, p, p.width, stream, b, int(k));
  });
}

int step_backward_late(const BackwardParams& p, int64_t k, const StepBuffers& b, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    return with_dtype(p.dtype, [&](auto storage) {
      using Cell = typename decltype(cell)::type;
      using S = typename decltype(storage)::type;
      if constexpr (kHasLate<Cell>)
        return launch_rows(step_backward_late_kernel<Cell, S>, p, p.hidden, stream, b, int(k));
      else
        return int(dev::kInvalidValue);
    });
  });
}

int step_backward(const BackwardParams& p, int64_t k, const StepBuffers& b, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    return with_dtype(p.dtype, [&](auto storage) {
      using Cell = typename decltype(cell)::type;
      using S = typename decltype(storage)::type;
      if constexpr (kWholeRows<Cell>)
        return launch_whole_rows<BackwardPasses<Cell>, S>(step_backward_whole_rows_kernel<Cell, S>, p, stream, b, int(k));
      else if constexpr (kHasLate<Cell>)
        return launch_rows(step_backward_after_late_kernel<Cell, S>, p, p.hidden, stream, b, int(k));
      else
        return launch_rows(step_backward_kernel<Cell, S>, p, p.hidden, stream, b, int(k));
    });
  });
}

int finish_backward(const BackwardParams& p, const StepBuffers& b, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    return with_dtype(p.dtype, [&](auto storage) {
      using Cell = typename decltype(cell)::type;
      using S = typename decltype(storage)::type;
      const int64_t n = p.hidden > p.width ? p.hidden : p.width;
      return launch_rows(finish_backward_kernel<Cell, S>, p, n, stream, b);
    });
  });
}

}  // namespace fastrnn::cuda
