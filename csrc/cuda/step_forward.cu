// Per-step tier, forward: what stands between the products of a time loop (launch.h says in which order).
#include "step.cuh"
#include "unit_forward.cuh"

namespace fastrnn::cuda {

// h_0, c_0 or what a reset puts there, into h and carried. Columns up to the larger of h and R.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    start_forward_kernel(LaunchParams<ForwardParams> p, StepBuffers b) {
  for_each_row(p, [&](const RowWalk& r, int j) {
    const bool reset = reset_before(p, r, 0);
    Wide<S> h = 0;
    if (j < p.width) {
      h = start_h<S>(p, r, j, reset);
      store<S>(b.h, in_buffer(p, r, p.width, j), through_mask<S>(p, r, j, h));
    }
    if (j < p.hidden)
      store_carried<Cell, Wide<S>>(p, r, b.carried, j, start_carried<Cell, S>(p, r, j, reset, h));
  });
}

// The recurrent product of unit j < h, with its bias; of the first `gates` gates, or else of the late ones, too.
template <class Cell, class S, int gates = Cell::kGates>
FASTRNN_INLINE Pack<Wide<S>, Cell::kGates> load_product(const ForwardParams& p, const StepBuffers& b, const RowWalk& r,
                                                        int j) {
  constexpr int E = kEarlyGates<Cell>;
  Pack<Wide<S>, Cell::kGates> gates_hh;
  load_bias<Cell, S>(p, r.group, j, gates_hh);
#pragma unroll
  for (int g = 0; g < gates; ++g)
    gates_hh[g] += g < E ? load<Wide<S>>(b.gates_hh, in_buffer(p, r, E * p.hidden, g * p.hidden + j))
                         : load<Wide<S>>(b.late_product,
                                         in_buffer(p, r, (Cell::kGates - E) * p.hidden, (g - E) * p.hidden + j));
  return gates_hh;
}

// What the cell of unit j < h of a running row reads in step k, but for its row's numbers.
template <class Cell, class S, int gates = Cell::kGates>
FASTRNN_INLINE void step_forward_in(const ForwardParams& p, const StepBuffers& b, const RowWalk& r, int k, int j,
                                    ForwardIn<Cell, Wide<S>>& in) {
  Pack<S, Cell::kGates> gates_ih;
  load_gates<Cell, S>(p, r, k, j, gates_ih);
  make_forward_in<Cell, S>(p, r, j, gates_ih, load_product<Cell, S, gates>(p, b, r, j),
                           load_carried<Cell, Wide<S>>(p, r, b.carried, j), in);
}

// Stores what step k gave unit j < h of a running row.
template <class Cell, class S>
FASTRNN_INLINE void step_forward_store(const ForwardParams& p, const StepBuffers& b, const RowWalk& r, int k, int j,
                                       ForwardOut<Cell, Wide<S>>& out) {
  const bool reset_next = reset_before(p, r, k + 1);
  Carried<Cell, Wide<S>> carried = load_carried<Cell, Wide<S>>(p, r, b.carried, j);
  zone_out<Cell, S>(p, r, k, j, carried, out);
  store_cell<Cell, S, true>(p, r, k, j, out, reset_next, carried);
  if (p.weight_hr) {
    store<S>(b.hidden, in_buffer(p, r, p.hidden, j), out.state[0]);
  } else {
    const Wide<S> next = store_h<S>(p, r, k, j, zoned_out_h<S>(p, r, k, j, out.state[0]), reset_next);
    store<S>(b.h, in_buffer(p, r, p.width, j), through_mask<S>(p, r, j, next));
    if constexpr (Cell::kStates == 1) carried = next;
  }
  store_carried<Cell, Wide<S>>(p, r, b.carried, j, carried);
}

template <class Cell, class S>
FASTRNN_INLINE void step_forward_padding(const ForwardParams& p, const RowWalk& r, int k, int j) {
  if (!p.weight_hr) pad_output<S>(p, r, k, j);
  pad_saved<Cell, S, true>(p, r, k, j);
}

// Of a cell with late gates: what their product in step k is with.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_forward_late_kernel(LaunchParams<ForwardParams> p, StepBuffers b, int k) {
  for_each_row(p, [&](const RowWalk& r, int j) {
    if (j >= p.hidden) return;
    Wide<S> late = 0;  // of a row that has no such step: something that a product can bear
    if (r.running(k)) {
      ForwardIn<Cell, Wide<S>> in;
      step_forward_in<Cell, S, kEarlyGates<Cell>>(p, b, r, k, j, in);
      late = through_mask<S>(p, r, j, Cell::late_input(in));
    }
    store<S>(b.late, in_buffer(p, r, p.hidden, j), late);
  });
}

// One step of every unit.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_forward_kernel(LaunchParams<ForwardParams> p, StepBuffers b, int k) {
  for_each_row(p, [&](const RowWalk& r, int j) {
    if (j >= p.hidden) return;
    if (!r.running(k)) return step_forward_padding<Cell, S>(p, r, k, j);
    ForwardIn<Cell, Wide<S>> in;
    ForwardOut<Cell, Wide<S>> out;
    step_forward_in<Cell, S>(p, b, r, k, j, in);
    cell_forward<Cell>(in, out);
    step_forward_store<Cell, S>(p, b, r, k, j, out);
  });
}

// The same for a cell with a Row. A thread comes back to the same units in every pass.
template <class Cell, class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_forward_whole_rows_kernel(LaunchParams<ForwardParams> p, StepBuffers b, int k) {
  using V = Wide<S>;
  using Passes = ForwardPasses<Cell>;
  const RowShared<Passes, S> shared(dev::dynamic_shared(), int(blockDim.x));
  for_each_whole_row(p, [&](const RowWalk& r) {
    if (!r.running(k)) return for_each_unit(p, [&](int j) { step_forward_padding<Cell, S>(p, r, k, j); });
    const auto load_in = [&](int j, const auto& row, auto work) {
      ForwardIn<Cell, V> in;
      step_forward_in<Cell, S>(p, b, r, k, j, in);
      in.row = row;
      if constexpr (work) load_work(p, r, b.work, Passes::kWork, 0, j, in.work);
      return in;
    };
    const auto keep = [&](int j, const auto& in) { store_work(p, r, b.work, Passes::kWork, 0, j, in.work); };
    const auto row = run_passes<V, Passes>(p, shared.parts, load_in, keep);
    for_each_unit(p, [&](int j) {
      ForwardOut<Cell, V> out;
      cell_forward<Cell>(load_in(j, row, std::bool_constant<(Passes::kWork > 0)>()), out);
      step_forward_store<Cell, S>(p, b, r, k, j, out);
    });
  });
}

// State 0 of every column, from the projection.
template <class S>
__global__ void __launch_bounds__(tiles::kStepThreads)
    step_forward_projected_kernel(LaunchParams<ForwardParams> p, StepBuffers b, int k) {
  for_each_row(p, [&](const RowWalk& r, int j) {
    if (j >= p.width) return;
    if (!r.running(k)) return pad_output<S>(p, r, k, j);
    const int64_t at = in_buffer(p, r, p.width, j);
    const Wide<S> h = zoned_out_h<S>(p, r, k, j, load<Wide<S>>(b.projected, at));
    store<S>(b.h, at, through_mask<S>(p, r, j, store_h<S>(p, r, k, j, h, reset_before(p, r, k + 1))));
  });
}

int start_forward(const ForwardParams& p, const StepBuffers& b, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    return with_dtype(p.dtype, [&](auto storage) {
      using Cell = typename decltype(cell)::type;
      using S = typename decltype(storage)::type;
      const int64_t n = p.hidden > p.width ? p.hidden : p.width;
      return launch_rows(start_forward_kernel<Cell, S>, p, n, stream, b);
    });
  });
}

int step_forward_late(const ForwardParams& p, int64_t k, const StepBuffers& b, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    return with_dtype(p.dtype, [&](auto storage) {
      using Cell = typename decltype(cell)::type;
      using S = typename decltype(storage)::type;
      if constexpr (kHasLate<Cell>)
        return launch_rows(step_forward_late_kernel<Cell, S>, p, p.hidden, stream, b, int(k));
      else
        return int(dev::kInvalidValue);
    });
  });
}

int step_forward(const ForwardParams& p, int64_t k, const StepBuffers& b, void* stream) {
  return with_cell(p.cell, [&](auto cell) {
    return with_dtype(p.dtype, [&](auto storage) {
      using Cell = typename decltype(cell)::type;
      using S = typename decltype(storage)::type;
      if constexpr (kWholeRows<Cell>)
        return launch_whole_rows<ForwardPasses<Cell>, S>(step_forward_whole_rows_kernel<Cell, S>, p, stream, b, int(k));
      else
        return launch_rows(step_forward_kernel<Cell, S>, p, p.hidden, stream, b, int(k));
    });
  });
}

int step_forward_projected(const ForwardParams& p, int64_t k, const StepBuffers& b, void* stream) {
  return with_dtype(p.dtype, [&](auto storage) {
    using S = typename decltype(storage)::type;
    return launch_rows(step_forward_projected_kernel<S>, p, p.width, stream, b, int(k));
  });
}

}  // namespace fastrnn::cuda
