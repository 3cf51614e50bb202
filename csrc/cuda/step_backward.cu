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
    const Wide<S> grad = backward_h<S, true>(p, r, k, j, later, crossed, load_grad_output<S>(p, r, k, j));
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

// Step k of unit j < h of a running row: all but what becomes of grad_gates_hh, which is returned.
template <class Cell, class S>
FASTRNN_INLINE Pack<Wide<S>, Cell::kGates> step_backward_unit(const BackwardParams& p, const StepBuffers& b,
                                                              const RowWalk& r, int k, int j) {
  using V = Wide<S>;
  BackwardLoads<Cell, S> loads;
  load_backward<Cell, S, true>(p, r, k, j, reset_before(p, r, k), loads);
  const bool crossed = reset_before(p, r, k + 1);
  const int64_t at = in_buffer(p, r, p.hidden, j);
  V now = r.last(k) ? V(0) : load<V>(b.carried, at);
  Pack<V, Cell::kGates> grad_gates;
  if (p.weight_hr) {
    backward_cell<Cell, S, true>(p, r, k, j, loads, load<V>(b.grad_hidden, at), crossed, now, grad_gates);
  } else {
    const V recurrent = r.last(k) ? V(0) : handed_on<S>(p, r, j, load<V>(b.recurrent, at));
    backward_step<Cell, S, true>(p, r, k, j, loads, recurrent, crossed, now, grad_gates);
  }
  store<V>(b.carried, at, now);
  return grad_gates;
}

// Of a unit's gate g, in buffers [P, B, G*h].
template <class Cell>
FASTRNN_INLINE int64_t gate_in_buffer(const ForwardParams& p, const RowWalk& r, int g, int j) {
  return in_buffer(p, r, Cell::kGates * p.hidden, g * p.hidden + j);
}

// One step of every unit.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_backward_kernel(LaunchParams<BackwardParams> p, StepBuffers b, int k) {
  constexpr int G = Cell::kGates;
  for_each_row(p, [&](const RowWalk& r, int j) {
    if (j >= p.hidden) return;
    step_backward_start<Cell, S>(p, r, k, j);
    if (!r.running(k)) return;
    Pack<Wide<S>, G> grad_gates = step_backward_unit<Cell, S>(p, b, r, k, j);
#pragma unroll
    for (int g = 0; g < G; ++g) store<S>(b.grad_gates, gate_in_buffer<Cell>(p, r, g, j), grad_gates[g]);
  });
}

// The same for a cell with a Row. A thread comes back to the units whose pointwise gradients it has stored.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_backward_whole_rows_kernel(LaunchParams<BackwardParams> p, StepBuffers b, int k) {
  constexpr int G = Cell::kGates;
  using V = Wide<S>;
  const RowShared<Cell, S> shared(dev::dynamic_shared(), int(blockDim.x));
  for_each_whole_row(p, [&](const RowWalk& r) {
    for (int j = int(threadIdx.x); j < p.hidden; j += int(blockDim.x)) step_backward_start<Cell, S>(p, r, k, j);
    if (!r.running(k)) return;
    const int64_t place = r.place(p, k);
    const auto saved_of = [&](int j) {
      Pack<S, Cell::kSaved> saved;
      load_saved<Cell, S, true>(p, place, j, saved);
      return widen_all<S>(saved);
    };
    const RowSums<Cell, S> sums = thread_sum<V, kRowSums<Cell>>(p.hidden, [&](int j) {
      Pack<V, G> grad_gates = step_backward_unit<Cell, S>(p, b, r, k, j);
#pragma unroll
      for (int g = 0; g < G; ++g) store<V>(b.grad_pointwise, gate_in_buffer<Cell>(p, r, g, j), grad_gates[g]);
      return Cell::Row::reduce_grad(saved_of(j), grad_gates);
    });
    const RowSums<Cell, S> row = Cell::Row::combine_grad(block_sum(sums, shared.parts), V(p.hidden));
    for (int j = int(threadIdx.x); j < p.hidden; j += int(blockDim.x)) {
      Pack<V, G> grad_gates;
#pragma unroll
      for (int g = 0; g < G; ++g) grad_gates[g] = load<V>(b.grad_pointwise, gate_in_buffer<Cell>(p, r, g, j));
      grad_gates = Cell::Row::project_grad(saved_of(j), row, grad_gates);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        store<S>(b.grad_gates, gate_in_buffer<Cell>(p, r, g, j), grad_gates[g]);
        store<S>(p.grad_gates_hh, (place * G + g) * p.hidden + j, grad_gates[g]);
      }
    }
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
    const V carried = stepped && j < p.hidden ? load<V>(b.carried, in_buffer(p, r, p.hidden, j)) : V(0);
    const V recurrent =
        stepped && j < p.width ? handed_on<S>(p, r, j, load<V>(b.recurrent, in_buffer(p, r, p.width, j))) : V(0);
    if (j < p.width) finish_h<S>(p, r, j, Cell::kStates == 1 ? recurrent + carried : recurrent, crossed);
    if (j < p.hidden) finish_carried<Cell, S>(p, r, j, carried, crossed);
  });
}

int step_backward_projected(const BackwardParams& p, int64_t k, const StepBuffers& b, void* stream) {
  return with_dtype(p.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    return launch_rows(step_backward_projected_kernel<S>, p, p.width, stream, b, int(k));
  });
}

int step_backward(const BackwardParams& p, int64_t k, const StepBuffers& b, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    return with_dtype(p.dtype, [&](auto storage) {
      using Cell = typename decltype(cell)::type;
      using S = typename decltype(storage)::type;
      if constexpr (kRowSums<Cell> > 0)
        return launch_whole_rows<Cell, S>(step_backward_whole_rows_kernel<Cell, S>, p, stream, b, int(k));
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
