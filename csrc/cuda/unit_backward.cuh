// What happens to one unit of one row in one step, backward; the same in every tier. csrc/cpu/step-inl.h is the twin.
#pragma once
#include <cmath>

#include "common.cuh"

namespace fastrnn::cuda {

// Before a row's first step of the walk backward, what its steps are added to begins at zero: column j < R of
// grad_reset_h, unit j < h of grad_reset_c and grad_params.
template <class S>
FASTRNN_INLINE void clear_sums_of_h(const BackwardParams& p, const RowWalk& r, int j) {
  if (p.grad_reset_h) store<Wide<S>>(p.grad_reset_h, r.place(p) * p.width + j, 0);
}
template <class Cell, class S>
FASTRNN_INLINE void clear_sums_of_unit(const BackwardParams& p, const RowWalk& r, int j) {
  if constexpr (Cell::kStates > 1) {
    if (p.grad_reset_c) {
#pragma unroll
      for (int c = 0; c < kCarried<Cell>; ++c) store<Wide<S>>(p.grad_reset_c, r.in_c<Cell>(p, j) + c * p.hidden, 0);
    }
  }
  if constexpr (Cell::kParams > 0) {
    if (!p.grad_params) return;
#pragma unroll
    for (int i = 0; i < Cell::kParams; ++i)
      store<Wide<S>>(p.grad_params, (r.place(p) * Cell::kParams + i) * p.hidden + j, 0);
  }
}
// Both, where nothing is projected.
template <class Cell, class S>
FASTRNN_INLINE void clear_sums(const BackwardParams& p, const RowWalk& r, int j) {
  clear_sums_of_h<S>(p, r, j);
  clear_sums_of_unit<Cell, S>(p, r, j);
}

// Gate gradients of unit j < h at a place (RowWalk::place). grad_gates_ih may lie where the place's values are saved
// (params.h): whoever stores them has read those.
template <class Cell, class S>
FASTRNN_INLINE void store_grad_gates(const BackwardParams& p, int64_t place, int j,
                                     const Pack<Wide<S>, Cell::kGates>& of_ih,
                                     const Pack<Wide<S>, Cell::kGates>& of_hh) {
  constexpr int G = Cell::kGates;
  const int64_t at_ih = place * p.grad_gates_stride + j, at_hh = place * G * p.hidden + j;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    store<S>(p.grad_gates_ih, at_ih + g * p.hidden, of_ih[g]);
    if constexpr (kSeparateGates<Cell>) store<S>(p.grad_gates_hh, at_hh + g * p.hidden, of_hh[g]);
  }
}

// Zeros in the gate gradients of unit j < h at time k behind the row's end; and at all such times.
template <class Cell, class S>
FASTRNN_INLINE void pad_grad_gates(const BackwardParams& p, const RowWalk& r, int64_t k, int j) {
  const Pack<Wide<S>, Cell::kGates> zeros{};
  store_grad_gates<Cell, S>(p, r.padding(p, k), j, zeros, zeros);
}
template <class Cell, class S>
FASTRNN_INLINE void pad_backward(const BackwardParams& p, const RowWalk& r, int j) {
  for (int64_t k = r.length; k < p.steps; ++k) pad_grad_gates<Cell, S>(p, r, k, j);
}

// What step k of unit j < h reads from memory, as stored.
template <class Cell, class S>
struct BackwardLoads {
  Pack<S, Cell::kSaved> saved;
  Carried<Cell, S> state, state_prev;  // after and before the step; the first of no use where it is made again
  S grad_output;        // of column j; where nothing is projected
};

// grad_output of step k, column j < R
template <class S>
FASTRNN_INLINE S load_grad_output(const BackwardParams& p, const RowWalk& r, int k, int j) {
  if (!p.grad_output) return zero<S>();
  return static_cast<const S*>(p.grad_output)[r.time(k) * p.grad_output_stride_t +
                                              r.row * p.grad_output_stride_b + r.group * p.width + j];
}

// The cell's own saved values of unit j < h at a place (RowWalk::place).
template <class Cell, class S, bool kMasks = false>
FASTRNN_INLINE void load_saved(const BackwardParams& p, int64_t place, int j, Pack<S, Cell::kSaved>& out) {
  if constexpr (Cell::kSaved > 0) {
    const S* saved = static_cast<const S*>(p.saved) + place * saved_values<Cell, kMasks>(p) * p.hidden + j;
#pragma unroll
    for (int i = 0; i < Cell::kSaved; ++i) out[i] = saved[i * p.hidden];
  }
}
template <class S, int N>
FASTRNN_INLINE Pack<Wide<S>, N> widen_all(const Pack<S, N>& x) {
  Pack<Wide<S>, N> wide;
  if constexpr (N > 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) wide[i] = widen(x[i]);
  }
  return wide;
}

// Zeros where the row has no step k. reset: reset_before(k).
template <class Cell, class S, bool kMasks = false>
FASTRNN_INLINE void load_backward(const BackwardParams& p, const RowWalk& r, int k, int j, bool reset,
                                  BackwardLoads<Cell, S>& out) {
  out = BackwardLoads<Cell, S>{};
  if (!r.running(k) || k < 0 || j >= p.hidden) return;
  const int64_t place = r.place(p, k), at = r.in_c<Cell>(p, j);
  const int64_t before = (r.reverse ? 1 : -1) * p.batch * p.groups;  // from place to that of step k - 1
  const S* saved = static_cast<const S*>(p.saved);
  load_saved<Cell, S, kMasks>(p, place, j, out.saved);
  // The carried state after every step is in `output`, or the last of the values in `saved`; as the cell made it, where
  // that is kept, right behind the cell's own.
  constexpr bool kIsH = Cell::kStates == 1;
  constexpr int N = kCarried<Cell>;
  const int values = saved_values<Cell, kMasks>(p), stride = kIsH ? 1 : values, made = kIsH ? 0 : Cell::kSaved;
  const S* sequence = kIsH ? static_cast<const S*>(p.output) : saved;
  const void* start = kIsH ? p.h_0 : p.c_0;
  const void* restart = kIsH ? p.reset_h : p.reset_c;
#pragma unroll
  for (int c = 0; c < N; ++c) carried_at(out.state, c) = sequence[(place * stride + made + c) * p.hidden + j];
  if constexpr (kMasks && kKeepsMade<Cell> && kIsH) {
    if (p.keep_h) out.state = saved[(place * values + Cell::kSaved) * p.hidden + j];
  }
  const void* given = reset ? restart : start;  // a state that no step made
#pragma unroll
  for (int c = 0; c < N; ++c) {
    S& state_prev = carried_at(out.state_prev, c);
    if (reset || k == 0)
      state_prev = given ? static_cast<const S*>(given)[at + c * p.hidden] : zero<S>();
    else
      state_prev = sequence[((place + before) * stride + stride - N + c) * p.hidden + j];
  }
  if (!p.weight_hr) out.grad_output = load_grad_output<S>(p, r, k, j);
}

// What gradients are clipped to on their way from step to step.
template <class S>
FASTRNN_INLINE Wide<S> clip_limit(const BackwardParams& p) {
  return p.grad_clip > 0 ? Wide<S>(p.grad_clip) : Wide<S>(INFINITY);
}

// The gradient of a state after step k (k = -1: of the initial one) by what came after: `later` from step k + 1,
// unless there is none or a reset cut it off. crossed: reset_before(k + 1). at: of the element in
// grad_last [B, P*n] and in grad_reset.
template <class S>
FASTRNN_INLINE Wide<S> arriving(const RowWalk& r, int k, int64_t at, Wide<S> later, Wide<S> limit, bool crossed,
                                const void* grad_last, void* grad_reset) {
  if (r.last(k)) return load_or_zero<S>(grad_last, at);
  later = later > limit ? limit : later < -limit ? -limit : later;  // comparisons; fmin and fmax lose NaN
  if (!crossed) return later;
  if (grad_reset) static_cast<Wide<S>*>(grad_reset)[at] += later;
  return Wide<S>(0);
}

// What the recurrent product of step k + 1, over its gate gradients, and zoneout hand to state 0 before it, column j < R;
// of a row that has such a step.
template <class S>
FASTRNN_INLINE Wide<S> handed_on(const BackwardParams& p, const RowWalk& r, int j, Wide<S> product) {
  const Wide<S> recurrent = through_mask<S>(p, r, j, product);
  return p.keep_h ? recurrent + load<Wide<S>>(p.kept_h, r.place(p) * p.width + j) : recurrent;
}

// The whole gradient of state 0 after step k of a running row, column j < R; under zoneout of what the cell or the
// projection made of it. later: from step k + 1, and the carried gradient where h is the only state.
template <class S, bool kMasks = false>
FASTRNN_INLINE Wide<S> backward_h(const BackwardParams& p, const RowWalk& r, int k, int j, Wide<S> later,
                                  Wide<S> limit, bool crossed, S grad_output) {
  const int64_t at = r.place(p) * p.width + j;
  const Wide<S> grad =
      arriving<S>(r, k, at, later, limit, crossed, p.grad_h_n, p.grad_reset_h) + widen(grad_output);
  if constexpr (kMasks) {
    if (p.keep_h) {
      const Wide<S> keep = load_keep_h<S>(p, r, k, j);
      store<Wide<S>>(p.kept_h, at, keep * grad);
      return (Wide<S>(1) - keep) * grad;
    }
  }
  return grad;
}

// The whole gradients of the states besides h after step k of a running row, unit j < h. carried: as run_backward_step's.
template <class Cell, class S>
FASTRNN_INLINE void backward_c(const BackwardParams& p, const RowWalk& r, int k, int j, Carried<Cell, Wide<S>> carried,
                               Wide<S> limit, bool crossed, Pack<Wide<S>, Cell::kStates>& grads) {
  if constexpr (Cell::kStates > 1) {
    const int64_t at = r.in_c<Cell>(p, j);
#pragma unroll
    for (int c = 0; c < kCarried<Cell>; ++c)
      grads[1 + c] =
          arriving<S>(r, k, at + c * p.hidden, carried_at(carried, c), limit, crossed, p.grad_c_n, p.grad_reset_c);
    if (p.grad_cells) {
      const int64_t place = r.time(k) * p.grad_cells_stride_t + r.row * p.grad_cells_stride_b +
                            int64_t(r.group) * kCarried<Cell> * p.hidden + j;
#pragma unroll
      for (int c = 0; c < kCarried<Cell>; ++c) grads[1 + c] += load<S>(p.grad_cells, place + c * p.hidden);
    }
  }
}

// Of that gradient what zoneout hands past the cell of unit j < h, which is returned; grad is what the cell gets.
template <class S>
FASTRNN_INLINE Wide<S> past_cell(const BackwardParams& p, const RowWalk& r, int k, int j, Wide<S>& grad) {
  if (!p.keep_c) return Wide<S>(0);
  const Wide<S> keep = load_keep_c<S>(p, r, k, j), whole = grad;
  grad = (Wide<S>(1) - keep) * whole;
  return keep * whole;
}

// What the cell's backward of unit j < h reads, but for the gradients that arrive and its row's numbers.
template <class Cell, class S, bool kMasks = false>
FASTRNN_INLINE void make_backward_in(const BackwardParams& p, const RowWalk& r, int j,
                                     const BackwardLoads<Cell, S>& loads, BackwardIn<Cell, Wide<S>>& in) {
  constexpr int C = carried_state<Cell>;
  in.saved = widen_all<S>(loads.saved);
  in.state[0] = in.state_prev[0] = Wide<S>(0);
#pragma unroll
  for (int c = 0; c < kCarried<Cell>; ++c) {
    in.state[C + c] = widen(carried_at(loads.state, c));
    in.state_prev[C + c] = widen(carried_at(loads.state_prev, c));
  }
  load_params<Cell, S>(p, r.group, j, in.params);
  if constexpr (kMasks && kRemakes<Cell>) {
    if (C > 0 ? p.keep_c : p.keep_h) in.state[C] = Cell::remake(in.saved, in.state_prev);
  }
}

template <class Cell, class S>
FASTRNN_INLINE void add_grad_params(const BackwardParams& p, const RowWalk& r, int j,
                                    const BackwardOut<Cell, Wide<S>>& out) {
  if constexpr (Cell::kParams > 0) {
    if (!p.grad_params) return;
    Wide<S>* sums = static_cast<Wide<S>*>(p.grad_params) + r.place(p) * Cell::kParams * p.hidden + j;
#pragma unroll
    for (int i = 0; i < Cell::kParams; ++i) sums[i * p.hidden] += out.grad_params[i];
  }
}

// Stores what the cell's backward made in step k of unit j < h, and hands grad_gates_hh on to the product.
template <class Cell, class S>
FASTRNN_INLINE void store_backward(const BackwardParams& p, const RowWalk& r, int k, int j,
                                   const BackwardOut<Cell, Wide<S>>& out, Carried<Cell, Wide<S>>& carried,
                                   Pack<Wide<S>, Cell::kGates>& grad_gates_hh) {
  constexpr int C = carried_state<Cell>;
  add_grad_params<Cell, S>(p, r, j, out);
#pragma unroll
  for (int c = 0; c < kCarried<Cell>; ++c) carried_at(carried, c) = out.grad_state_prev[C + c];
  grad_gates_hh = out.grad_gates_hh;
  store_grad_gates<Cell, S>(p, r.place(p, k), j, out.grad_gates_ih, out.grad_gates_hh);
}

// What step k of unit j < h of a running row makes, where nothing is projected; none of it stored. recurrent: the product
// over step k + 1's gate gradients. carried: of step k + 1; not read in a row's last step.
template <class Cell, class S>
FASTRNN_INLINE void run_backward_step(const BackwardParams& p, const RowWalk& r, int k, int j,
                                      const BackwardLoads<Cell, S>& loads, Wide<S> recurrent, Wide<S> limit,
                                      bool crossed, Wide<S> carried, BackwardOut<Cell, Wide<S>>& out) {
  const Wide<S> later = Cell::kStates == 1 ? recurrent + carried : recurrent;
  const Wide<S> grad_h = backward_h<S>(p, r, k, j, later, limit, crossed, loads.grad_output);
  BackwardIn<Cell, Wide<S>> in;
  make_backward_in<Cell, S>(p, r, j, loads, in);
  in.grad_state[0] = grad_h;
  backward_c<Cell, S>(p, r, k, j, carried, limit, crossed, in.grad_state);
  Cell::backward(in, out);
}

// The same, with what it makes stored. carried: of step k + 1, then of step k.
template <class Cell, class S>
FASTRNN_INLINE void backward_step(const BackwardParams& p, const RowWalk& r, int k, int j,
                                  const BackwardLoads<Cell, S>& loads, Wide<S> recurrent, bool crossed,
                                  Wide<S>& carried, Pack<Wide<S>, Cell::kGates>& grad_gates_hh) {
  BackwardOut<Cell, Wide<S>> out;
  run_backward_step<Cell, S>(p, r, k, j, loads, recurrent, clip_limit<S>(p), crossed, carried, out);
  store_backward<Cell, S>(p, r, k, j, out, carried, grad_gates_hh);
}

// Is there something to do after step 0, for which the last product is needed: the initial state's gradient, or a
// reset's at the first step?
__host__ __device__ inline bool finish_wanted(const BackwardParams& p) { return p.grad_h_0 || p.resets; }

// After step 0 of a row that is present: grad_h_0, column j < R. crossed: reset_before(0). `later` as in
// backward_h.
template <class S>
FASTRNN_INLINE void finish_h(const BackwardParams& p, const RowWalk& r, int j, Wide<S> later, bool crossed) {
  const int64_t at = r.place(p) * p.width + j;
  const Wide<S> grad = arriving<S>(r, -1, at, later, clip_limit<S>(p), crossed, p.grad_h_n, p.grad_reset_h);
  if (p.grad_h_0) store<S>(p.grad_h_0, at, grad);
}
// grad_c_0, unit j < h; nothing where h is the only state.
template <class Cell, class S>
FASTRNN_INLINE void finish_carried(const BackwardParams& p, const RowWalk& r, int j, Carried<Cell, Wide<S>> carried,
                                   bool crossed) {
  if constexpr (Cell::kStates > 1) {
#pragma unroll
    for (int c = 0; c < kCarried<Cell>; ++c) {
      const int64_t at = r.in_c<Cell>(p, j) + c * p.hidden;
      const Wide<S> grad =
          arriving<S>(r, -1, at, carried_at(carried, c), clip_limit<S>(p), crossed, p.grad_c_n, p.grad_reset_c);
      if (p.grad_c_0) store<S>(p.grad_c_0, at, grad);
    }
  }
}
// Both, where nothing is projected.
template <class Cell, class S>
FASTRNN_INLINE void finish_backward_unit(const BackwardParams& p, const RowWalk& r, int j, Wide<S> recurrent,
                                         Wide<S> carried, bool crossed) {
  finish_h<S>(p, r, j, Cell::kStates == 1 ? recurrent + carried : recurrent, crossed);
  finish_carried<Cell, S>(p, r, j, carried, crossed);
}

}  // namespace fastrnn::cuda
