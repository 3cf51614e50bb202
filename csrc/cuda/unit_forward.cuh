// What happens to one unit of one row in one step, forward; the same in every tier. csrc/cpu/step-inl.h is the twin.
#pragma once
#include "common.cuh"

namespace fastrnn::cuda {

// gates_ih of step k, unit j, as stored; zeros where the row has no such step.
template <class Cell, class S>
FASTRNN_INLINE void load_gates(const ForwardParams& p, const RowWalk& r, int k, int j, Pack<S, Cell::kGates>& out) {
  constexpr int G = Cell::kGates;
  const bool there = r.running(k) && j < p.hidden;
  const S* gates = static_cast<const S*>(p.gates_ih);
  if (there)
    gates += r.time(k) * p.gates_ih_stride_t + r.row * p.gates_ih_stride_b + r.group * p.gates_ih_stride_p + j;
#pragma unroll
  for (int g = 0; g < G; ++g) out[g] = there ? gates[g * p.hidden] : zero<S>();
}

template <class Cell, class S>
FASTRNN_INLINE void load_bias(const ForwardParams& p, int group, int j, Pack<Wide<S>, Cell::kGates>& out) {
#pragma unroll
  for (int g = 0; g < Cell::kGates; ++g)
    out[g] = p.bias_hh && j < p.hidden
                 ? load<S>(p.bias_hh, (int64_t(group) * Cell::kGates + g) * p.hidden + j)
                 : Wide<S>(0);
}

// State 0 before step 0, column j < R; a row without steps ends here. reset: reset_before(0).
template <class S>
FASTRNN_INLINE Wide<S> start_h(const ForwardParams& p, const RowWalk& r, int j, bool reset) {
  const int64_t at = r.place(p) * p.width + j;
  const Wide<S> h = load_or_zero<S>(p.h_0, at);
  if (r.length == 0) store<S>(p.h_n, at, h);
  return reset ? load_or_zero<S>(p.reset_h, at) : h;
}

// What unit j < h carries into step 0. Where h is the only state, that is start_h's result.
template <class Cell, class S>
FASTRNN_INLINE Carried<Cell, Wide<S>> start_carried(const ForwardParams& p, const RowWalk& r, int j, bool reset,
                                                    Wide<S> start) {
  if constexpr (Cell::kStates == 1) return start;
  else {
    Carried<Cell, Wide<S>> all;
#pragma unroll
    for (int c = 0; c < kCarried<Cell>; ++c) {
      const int64_t at = r.in_c<Cell>(p, j) + c * p.hidden;
      const Wide<S> first = load_or_zero<S>(p.c_0, at);
      if (r.length == 0) store<S>(p.c_n, at, first);
      carried_at(all, c) = reset ? load_or_zero<S>(p.reset_c, at) : first;
    }
    return all;
  }
}

// State 0 after step k, column j < R, of what the cell or the projection made: what zoneout keeps comes from the state
// before, as it was stored.
template <class S>
FASTRNN_INLINE Wide<S> zoned_out_h(const ForwardParams& p, const RowWalk& r, int k, int j, Wide<S> made) {
  if (!p.keep_h) return made;
  const int64_t at = r.place(p) * p.width + j;
  const Wide<S> before = reset_before(p, r, k) ? load_or_zero<S>(p.reset_h, at)
                         : k == 0              ? load_or_zero<S>(p.h_0, at)
                                               : load<S>(p.output, r.place(p, k - 1) * p.width + j);
  return zoned_out(load_keep_h<S>(p, r, k, j), before, made);
}

// What zoneout leaves of the other state of unit j < h; and what backward will need of the last one as the cell made it is
// saved. carried: before the step.
template <class Cell, class S>
FASTRNN_INLINE void zone_out(const ForwardParams& p, const RowWalk& r, int k, int j, Carried<Cell, Wide<S>> carried,
                             ForwardOut<Cell, Wide<S>>& out) {
  if constexpr (kKeepsMade<Cell>) {
    if (p.saved && saved_states<Cell, true>(p) > Cell::kSaved)
      store<S>(p.saved, (r.place(p, k) * saved_values<Cell, true>(p) + Cell::kSaved) * p.hidden + j,
               out.state[Cell::kStates - 1]);
  }
  if constexpr (Cell::kStates == 2) {
    if (p.keep_c) out.state[1] = zoned_out(load_keep_c<S>(p, r, k, j), carried, out.state[1]);
  }
}

// What the cell of unit j < h reads, but for its row's numbers. gates_hh: product and bias.
template <class Cell, class S>
FASTRNN_INLINE void make_forward_in(const ForwardParams& p, const RowWalk& r, int j,
                                    const Pack<S, Cell::kGates>& gates_ih,
                                    const Pack<Wide<S>, Cell::kGates>& gates_hh, Carried<Cell, Wide<S>> carried,
                                    ForwardIn<Cell, Wide<S>>& in) {
#pragma unroll
  for (int g = 0; g < Cell::kGates; ++g) in.gates_ih[g] = widen(gates_ih[g]);
  in.gates_hh = gates_hh;
  in.state[0] = Wide<S>(0);
#pragma unroll
  for (int c = 0; c < kCarried<Cell>; ++c) in.state[carried_state<Cell> + c] = carried_at(carried, c);
  load_params<Cell, S>(p, r.group, j, in.params);
}

// The cell of unit j < h: its values after a step, none of them stored.
template <class Cell, class S>
FASTRNN_INLINE void run_cell(const ForwardParams& p, const RowWalk& r, int j, const Pack<S, Cell::kGates>& gates_ih,
                             const Pack<Wide<S>, Cell::kGates>& gates_hh, Wide<S> carried,
                             ForwardOut<Cell, Wide<S>>& out) {
  ForwardIn<Cell, Wide<S>> in;
  make_forward_in<Cell, S>(p, r, j, gates_ih, gates_hh, carried, in);
  cell_forward<Cell>(in, out);
}

// Stores what step k of a running row gave unit j < h besides state 0: saved and c_n. carried: before the step, then
// after it; the caller sets it to store_h's result where h is the only state. reset_next: reset_before(k + 1).
template <class Cell, class S, bool kMasks = false>
FASTRNN_INLINE void store_cell(const ForwardParams& p, const RowWalk& r, int k, int j,
                               const ForwardOut<Cell, Wide<S>>& out, bool reset_next,
                               Carried<Cell, Wide<S>>& carried) {
  if (p.saved) {
    const int64_t at = r.place(p, k) * saved_values<Cell, kMasks>(p) * p.hidden + j;
    if constexpr (Cell::kSaved > 0) {
#pragma unroll
      for (int i = 0; i < Cell::kSaved; ++i) store<S>(p.saved, at + i * p.hidden, out.saved[i]);
    }
    if constexpr (Cell::kStates > 1) {
#pragma unroll
      for (int c = 0; c < kCarried<Cell>; ++c)
        store<S>(p.saved, at + (saved_states<Cell, kMasks>(p) + c) * p.hidden, out.state[1 + c]);
    }
  }
  if constexpr (Cell::kStates > 1) {
#pragma unroll
    for (int c = 0; c < kCarried<Cell>; ++c) {
      const int64_t at = r.in_c<Cell>(p, j) + c * p.hidden;
      if (r.last(k)) store<S>(p.c_n, at, out.state[1 + c]);
      carried_at(carried, c) = reset_next ? load_or_zero<S>(p.reset_c, at) : out.state[1 + c];
    }
  }
}

// h_n and c_n of unit j < h, where nothing is projected: of a row whose last step made `out`.
template <class Cell, class S>
FASTRNN_INLINE void store_last(const ForwardParams& p, const RowWalk& r, int j, const ForwardOut<Cell, Wide<S>>& out) {
  store<S>(p.h_n, r.place(p) * p.width + j, out.state[0]);
  if constexpr (Cell::kStates == 2) store<S>(p.c_n, r.in_c<Cell>(p, j), out.state[1]);
}

// Both: returns state 0 as the cell made it (o tanh(c) where it will be projected).
template <class Cell, class S>
FASTRNN_INLINE Wide<S> forward_cell(const ForwardParams& p, const RowWalk& r, int k, int j,
                                    const Pack<S, Cell::kGates>& gates_ih,
                                    const Pack<Wide<S>, Cell::kGates>& gates_hh, bool reset_next,
                                    Wide<S>& carried) {
  ForwardOut<Cell, Wide<S>> out;
  run_cell<Cell, S>(p, r, j, gates_ih, gates_hh, carried, out);
  store_cell<Cell, S>(p, r, k, j, out, reset_next, carried);
  return out.state[0];
}

// State 0 before the next step, column j < R.
template <class S>
FASTRNN_INLINE Wide<S> next_h(const ForwardParams& p, const RowWalk& r, int j, Wide<S> h, bool reset_next) {
  return reset_next ? load_or_zero<S>(p.reset_h, r.place(p) * p.width + j) : h;
}
// State 0 after step k of a running row, column j < R: stores output and h_n, returns state 0 before the next step.
template <class S>
FASTRNN_INLINE Wide<S> store_h(const ForwardParams& p, const RowWalk& r, int k, int j, Wide<S> h, bool reset_next) {
  store<S>(p.output, r.place(p, k) * p.width + j, h);
  if (r.last(k)) store<S>(p.h_n, r.place(p) * p.width + j, h);
  return next_h<S>(p, r, j, h, reset_next);
}

// Both, where nothing is projected: returns what the next step multiplies.
template <class Cell, class S>
FASTRNN_INLINE Wide<S> forward_step(const ForwardParams& p, const RowWalk& r, int k, int j,
                                    const Pack<S, Cell::kGates>& gates_ih,
                                    const Pack<Wide<S>, Cell::kGates>& gates_hh, bool reset_next,
                                    Wide<S>& carried) {
  const Wide<S> h = forward_cell<Cell, S>(p, r, k, j, gates_ih, gates_hh, reset_next, carried);
  const Wide<S> next = store_h<S>(p, r, k, j, h, reset_next);
  if constexpr (Cell::kStates == 1) carried = next;
  return next;
}

// Zeros in output, column j < R, and in saved, unit j < h, at time k behind the row's end.
template <class S>
FASTRNN_INLINE void pad_output(const ForwardParams& p, const RowWalk& r, int64_t k, int j) {
  store<S>(p.output, r.padding(p, k) * p.width + j, 0);
}
template <class Cell, class S, bool kMasks = false>
FASTRNN_INLINE void pad_saved(const ForwardParams& p, const RowWalk& r, int64_t k, int j) {
  if (!p.saved) return;
  const int values = saved_values<Cell, kMasks>(p);
#pragma unroll
  for (int i = 0; i < values; ++i) store<S>(p.saved, (r.padding(p, k) * values + i) * p.hidden + j, 0);
}
// Both, for all the steps that the row does not have; where nothing is projected.
template <class Cell, class S>
FASTRNN_INLINE void pad_forward(const ForwardParams& p, const RowWalk& r, int j) {
  for (int64_t k = r.length; k < p.steps; ++k) {
    pad_output<S>(p, r, k, j);
    pad_saved<Cell, S>(p, r, k, j);
  }
}

}  // namespace fastrnn::cuda
