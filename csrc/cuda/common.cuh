// What every tier of the CUDA recurrences shares: number formats, which row meets which step when, and all that
// happens to one unit of one row in one step, forward and backward. A tier adds its product, its exchange and its
// schedule. csrc/cpu/{forward,backward}-inl.h is the twin.
//
// The walk. Each row of each group counts its own steps k = 0 .. length - 1 in the order in which it runs: step k
// is time k, or length - 1 - k where the group runs in reverse. So all rows start at k = 0, where backward ends
// for all of them, no code below knows a direction, and a row without a step k is idle there. length < 0: no such
// row.
//
// One unit's state. State 0 (h) goes through the product and so belongs to the tier. Besides it a unit carries one
// value from step to step, the last of its states in float32 or wider: c, or h itself where that is the only one.
// Backward carries that state's pointwise gradient likewise. (No cell of two states reads h; see carried_state.)
//
// Who may read and write what: each (row, unit) belongs to one thread for the whole launch, so nothing here
// needs a barrier and sums into grad_reset_* and grad_params are in a fixed order. Offsets are 64-bit; sizes fit
// 31 bits (check_sizes).
#pragma once
#include <cstdint>
#include <type_traits>

#include "../cells/registry.h"
#include "../params.h"
#include "device.cuh"
#include "launch.h"

#define FASTRNN_INLINE __device__ __forceinline__

namespace fastrnn::cuda {

// ---- number formats: S in memory, Wide<S> in registers ----

template <class S>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class S>
using Wide = typename WideOf<S>::type;

template <class S>
FASTRNN_INLINE Wide<S> widen(S x) {
  return dev::to_float(x);
}
template <>
FASTRNN_INLINE double widen<double>(double x) {
  return x;
}
template <class S>
FASTRNN_INLINE S narrow(Wide<S> x) {
  return dev::from_float<S>(x);
}
template <>
FASTRNN_INLINE double narrow<double>(double x) {
  return x;
}
template <class S>
FASTRNN_INLINE S zero() {
  return narrow<S>(Wide<S>(0));
}

template <class S>
FASTRNN_INLINE Wide<S> load(const void* p, int64_t at) {
  return widen(static_cast<const S*>(p)[at]);
}
template <class S>
FASTRNN_INLINE Wide<S> load_or_zero(const void* p, int64_t at) {
  return p ? load<S>(p, at) : Wide<S>(0);
}
template <class S>
FASTRNN_INLINE void store(void* p, int64_t at, Wide<S> x) {
  static_cast<S*>(p)[at] = narrow<S>(x);
}

// ---- launches ----

constexpr int kGroupsPerLaunch = 1024;

// What a kernel gets, by value: the call's params, which groups of them this launch runs, and their directions as bits
// (`reverse` is the host's memory, and null here).
template <class Params>
struct LaunchParams : Params {
  int32_t first_group, groups_here;
  uint32_t reverse_bits[kGroupsPerLaunch / 32];
};

inline bool check_sizes(const ForwardParams& p) {
  constexpr int64_t kMax = INT32_MAX / 8;  // leaves room for gates * hidden and rounding up
  return p.steps <= kMax && p.batch <= kMax && p.groups <= kMax && p.hidden <= kMax && p.width <= kMax &&
         p.cell >= 0 && p.cell < kNumCells;
}

// launch(const LaunchParams<Params>&) -> int, once for every kGroupsPerLaunch groups, until one fails.
template <class Params, class F>
int for_each_launch(const Params& p, F launch) {
  if (!check_sizes(p)) return int(dev::kInvalidValue);
  if (p.batch == 0) return int(dev::kSuccess);
  for (int64_t first = 0; first < p.groups; first += kGroupsPerLaunch) {
    LaunchParams<Params> part{};
    static_cast<Params&>(part) = p;
    part.reverse = nullptr;
    part.first_group = int32_t(first);
    part.groups_here = int32_t(p.groups - first < kGroupsPerLaunch ? p.groups - first : kGroupsPerLaunch);
    for (int i = 0; i < part.groups_here; ++i)
      part.reverse_bits[i / 32] |= uint32_t(p.reverse[first + i] != 0) << (i % 32);
    const int error = launch(part);
    if (error != int(dev::kSuccess)) return error;
  }
  return int(dev::kSuccess);
}

// The one dispatch from run time to compile time: f(Type<Cell>{}) and f(Type<S>{}), each -> int.
template <class T>
struct Type {
  using type = T;
};
template <class F>
int with_cell(int32_t cell, F f) {
  int32_t id = 0;
#define FASTRNN_DISPATCH(name, Cell, separate)                                                      \
  static_assert(kLateGates<Cell> == 0, name ": no tier has a second recurrent product inside a step"); \
  if (cell == id++) return f(Type<Cell>{});
  FASTRNN_FOR_EACH_CELL(FASTRNN_DISPATCH)
#undef FASTRNN_DISPATCH
  return int(dev::kInvalidValue);
}
// The same for cells whose units do not look at each other. Those that have a Row are the per-step tier's alone: in the
// other tiers no block sees a whole row between the product and the cells.
template <class F>
int with_pointwise_cell(int32_t cell, F f) {
  return with_cell(cell, [&](auto type) {
    if constexpr (kRowSums<typename decltype(type)::type> > 0) return int(dev::kInvalidValue);
    else return f(type);
  });
}
inline bool is_pointwise(int32_t cell) { return kCells[cell].row_sums == 0; }
template <class F>
int with_half(DType dtype, F f) {
  switch (dtype) {
    case DType::kBFloat16: return f(Type<dev::bf16>{});
    case DType::kFloat16: return f(Type<dev::f16>{});
    default: return int(dev::kInvalidValue);
  }
}
template <class F>
int with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(Type<float>{});
    case DType::kFloat64: return f(Type<double>{});
    default: return with_half(dtype, f);
  }
}

// ---- rows ----

struct Row {
  int32_t group, row, length;  // length clamped to [0, T]; -1: no such row
  bool reverse;

  FASTRNN_INLINE bool present() const { return length >= 0; }
  FASTRNN_INLINE bool running(int k) const { return k < length; }
  FASTRNN_INLINE bool last(int k) const { return k + 1 == length; }
  FASTRNN_INLINE int64_t time(int k) const { return reverse ? length - 1 - k : k; }
  // of (row, group) in arrays [B, P*..] and of (time, row, group) in [T, B, P*..]
  FASTRNN_INLINE int64_t place(const ForwardParams& p) const { return row * p.groups + group; }
  FASTRNN_INLINE int64_t place(const ForwardParams& p, int k) const {
    return (time(k) * p.batch + row) * p.groups + group;
  }
  // Behind the row's end, k >= length, where time is counted from the first step in either direction.
  FASTRNN_INLINE int64_t padding(const ForwardParams& p, int64_t k) const {
    return (k * p.batch + row) * p.groups + group;
  }
};

// The binding never looks at the values of lengths on a device, so they are clamped here.
FASTRNN_INLINE int length_of(const ForwardParams& p, int group, int row) {
  if (row >= p.batch) return -1;
  if (!p.lengths) return int(p.steps);
  const int64_t n = p.lengths[row * p.lengths_stride_b + group * p.lengths_stride_p];
  return int(n < 0 ? 0 : n > p.steps ? p.steps : n);
}

// group_here counts from the launch's first group; row may lie past the batch.
template <class Params>
FASTRNN_INLINE Row row_of(const LaunchParams<Params>& call, int group_here, int row) {
  const int group = call.first_group + group_here;
  const bool reverse = call.reverse_bits[group_here / 32] >> (group_here % 32) & 1u;
  return {group, row, length_of(call, group, row), reverse};
}

// The most steps of rows first .. first + count, at least 0: the same in every thread that asks.
FASTRNN_INLINE int longest(const ForwardParams& p, int group, int first, int count) {
  if (!p.lengths) return int(p.steps);
  int most = 0;
  for (int i = 0; i < count; ++i) {
    const int n = length_of(p, group, first + i);
    most = n > most ? n : most;
  }
  return most;
}

// Nonzero where the boundary that the row crosses to enter step k carries a reset. 0 past its end. Raw, so that
// the load may stay in flight until somebody asks.
FASTRNN_INLINE uint8_t reset_before(const ForwardParams& p, const Row& r, int k) {
  if (!p.resets || !r.running(k) || k < 0) return 0;
  if (r.reverse && k == 0) return 0;  // what a reset at time t + 1 cuts there is padding or nothing
  const int64_t t = r.time(k) + (r.reverse ? 1 : 0);
  return p.resets[t * p.resets_stride_t + r.row * p.resets_stride_b + r.group * p.resets_stride_p];
}

// ---- forward: one unit of one row ----

template <class Cell>
constexpr int kSavedAll = Cell::kSaved + Cell::kStates - 1;  // values a unit and step in `saved`
template <class Cell>
constexpr int carried_state = Cell::kStates - 1;

// Is grad_gates_hh another tensor than grad_gates_ih (registry.h)?
template <class Cell>
constexpr bool kSeparateGates = false
#define FASTRNN_SEPARATE(name, C, separate) || (std::is_same<Cell, C>::value && separate)
    FASTRNN_FOR_EACH_CELL(FASTRNN_SEPARATE)
#undef FASTRNN_SEPARATE
    ;

// gates_ih of step k, unit j, as stored; zeros where the row has no such step.
template <class Cell, class S>
FASTRNN_INLINE void load_gates(const ForwardParams& p, const Row& r, int k, int j, Pack<S, Cell::kGates>& out) {
  constexpr int G = Cell::kGates;
  const bool there = r.running(k) && j < p.hidden;
  const S* gates = static_cast<const S*>(p.gates_ih);
  if (there)
    gates += r.time(k) * p.gates_ih_stride_t + r.row * p.gates_ih_stride_b + int64_t(r.group) * G * p.hidden + j;
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

// The parameters of unit j < h. They are read anew in every step: that is a hit in the first cache, and costs no
// register between steps.
template <class Cell, class S>
FASTRNN_INLINE void load_params(const ForwardParams& p, int group, int j, Pack<Wide<S>, Cell::kParams>& out) {
  if constexpr (Cell::kParams > 0) {
#pragma unroll
    for (int i = 0; i < Cell::kParams; ++i)
      out[i] = load<S>(p.params, (int64_t(group) * Cell::kParams + i) * p.hidden + j);
  }
}

// State 0 that step 0 multiplies, column j < R; a row without steps ends here. reset: reset_before(0).
template <class S>
FASTRNN_INLINE Wide<S> start_h(const ForwardParams& p, const Row& r, int j, bool reset) {
  const int64_t at = r.place(p) * p.width + j;
  const Wide<S> h = load_or_zero<S>(p.h_0, at);
  if (r.length == 0) store<S>(p.h_n, at, h);
  return reset ? load_or_zero<S>(p.reset_h, at) : h;
}

// What unit j < h carries into step 0. Where h is the only state, that is start_h's result.
template <class Cell, class S>
FASTRNN_INLINE Wide<S> start_carried(const ForwardParams& p, const Row& r, int j, bool reset, Wide<S> start) {
  if constexpr (Cell::kStates == 1) return start;
  const int64_t at = r.place(p) * p.hidden + j;
  const Wide<S> c = load_or_zero<S>(p.c_0, at);
  if (r.length == 0) store<S>(p.c_n, at, c);
  return reset ? load_or_zero<S>(p.reset_c, at) : c;
}

// The numbers that a cell with a Row knows of all units of a row; nothing for other cells.
template <class Cell, class S>
using RowSums = Pack<Wide<S>, kRowSums<Cell>>;

// One step of unit j < h of a running row: stores saved and c_n, returns state 0 (o tanh(c) where it will be
// projected). gates_hh: product and bias. reset_next: reset_before(k + 1). carried: before the step, then after
// it; the caller sets it to store_h's result where h is the only state. row: what Row::combine made of them.
template <class Cell, class S>
FASTRNN_INLINE Wide<S> forward_cell(const ForwardParams& p, const Row& r, int k, int j,
                                    const Pack<S, Cell::kGates>& gates_ih,
                                    const Pack<Wide<S>, Cell::kGates>& gates_hh, bool reset_next,
                                    Wide<S>& carried, const RowSums<Cell, S>& row = {}) {
  using V = Wide<S>;
  ForwardIn<Cell, V> in;
  ForwardOut<Cell, V> out;
#pragma unroll
  for (int g = 0; g < Cell::kGates; ++g) in.gates_ih[g] = widen(gates_ih[g]);
  in.gates_hh = gates_hh;
  in.state[0] = V(0);
  in.state[carried_state<Cell>] = carried;
  load_params<Cell, S>(p, r.group, j, in.params);
  in.row = row;
  Cell::forward(in, out);

  if (p.saved) {
    const int64_t at = r.place(p, k) * kSavedAll<Cell> * p.hidden + j;
    if constexpr (Cell::kSaved > 0) {
#pragma unroll
      for (int i = 0; i < Cell::kSaved; ++i) store<S>(p.saved, at + i * p.hidden, out.saved[i]);
    }
    if constexpr (Cell::kStates > 1) store<S>(p.saved, at + Cell::kSaved * p.hidden, out.state[1]);
  }
  if constexpr (Cell::kStates > 1) {
    const int64_t at = r.place(p) * p.hidden + j;
    if (r.last(k)) store<S>(p.c_n, at, out.state[1]);
    carried = reset_next ? load_or_zero<S>(p.reset_c, at) : out.state[1];
  }
  return out.state[0];
}

// State 0 after step k of a running row, column j < R: stores output and h_n, returns what the next step
// multiplies.
template <class S>
FASTRNN_INLINE Wide<S> store_h(const ForwardParams& p, const Row& r, int k, int j, Wide<S> h, bool reset_next) {
  const int64_t at = r.place(p) * p.width + j;
  store<S>(p.output, r.place(p, k) * p.width + j, h);
  if (r.last(k)) store<S>(p.h_n, at, h);
  return reset_next ? load_or_zero<S>(p.reset_h, at) : h;
}

// Both, where nothing is projected: returns what the next step multiplies.
template <class Cell, class S>
FASTRNN_INLINE Wide<S> forward_step(const ForwardParams& p, const Row& r, int k, int j,
                                    const Pack<S, Cell::kGates>& gates_ih,
                                    const Pack<Wide<S>, Cell::kGates>& gates_hh, bool reset_next,
                                    Wide<S>& carried, const RowSums<Cell, S>& row = {}) {
  const Wide<S> h = forward_cell<Cell, S>(p, r, k, j, gates_ih, gates_hh, reset_next, carried, row);
  const Wide<S> next = store_h<S>(p, r, k, j, h, reset_next);
  if constexpr (Cell::kStates == 1) carried = next;
  return next;
}

// Zeros in output, column j < R, and in saved, unit j < h, at time k behind the row's end.
template <class S>
FASTRNN_INLINE void pad_output(const ForwardParams& p, const Row& r, int64_t k, int j) {
  store<S>(p.output, r.padding(p, k) * p.width + j, 0);
}
template <class Cell, class S>
FASTRNN_INLINE void pad_saved(const ForwardParams& p, const Row& r, int64_t k, int j) {
  if (!p.saved) return;
#pragma unroll
  for (int i = 0; i < kSavedAll<Cell>; ++i)
    store<S>(p.saved, (r.padding(p, k) * kSavedAll<Cell> + i) * p.hidden + j, 0);
}
// Both, for all the steps that the row does not have; where nothing is projected.
template <class Cell, class S>
FASTRNN_INLINE void pad_forward(const ForwardParams& p, const Row& r, int j) {
  for (int64_t k = r.length; k < p.steps; ++k) {
    pad_output<S>(p, r, k, j);
    pad_saved<Cell, S>(p, r, k, j);
  }
}

// ---- backward: one unit of one row ----

// Before a row's first step of the walk backward, what its steps are added to begins at zero: column j < R of
// grad_reset_h, unit j < h of grad_reset_c and grad_params.
template <class S>
FASTRNN_INLINE void clear_sums_of_h(const BackwardParams& p, const Row& r, int j) {
  if (p.grad_reset_h) store<Wide<S>>(p.grad_reset_h, r.place(p) * p.width + j, 0);
}
template <class Cell, class S>
FASTRNN_INLINE void clear_sums_of_unit(const BackwardParams& p, const Row& r, int j) {
  if constexpr (Cell::kStates > 1) {
    if (p.grad_reset_c) store<Wide<S>>(p.grad_reset_c, r.place(p) * p.hidden + j, 0);
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
FASTRNN_INLINE void clear_sums(const BackwardParams& p, const Row& r, int j) {
  clear_sums_of_h<S>(p, r, j);
  clear_sums_of_unit<Cell, S>(p, r, j);
}

// Zeros in the gate gradients of unit j < h at time k behind the row's end; and at all such times.
template <class Cell, class S>
FASTRNN_INLINE void pad_grad_gates(const BackwardParams& p, const Row& r, int64_t k, int j) {
  constexpr int G = Cell::kGates;
  const int64_t at = r.padding(p, k) * G * p.hidden + j;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    store<S>(p.grad_gates_ih, at + g * p.hidden, 0);
    if constexpr (kSeparateGates<Cell>) store<S>(p.grad_gates_hh, at + g * p.hidden, 0);
  }
}
template <class Cell, class S>
FASTRNN_INLINE void pad_backward(const BackwardParams& p, const Row& r, int j) {
  for (int64_t k = r.length; k < p.steps; ++k) pad_grad_gates<Cell, S>(p, r, k, j);
}

// What step k of unit j < h reads from memory, as stored.
template <class Cell, class S>
struct BackwardLoads {
  Pack<S, Cell::kSaved> saved;
  S state, state_prev;  // the carried state after and before the step
  S grad_output;        // of column j; where nothing is projected
};

// grad_output of step k, column j < R
template <class S>
FASTRNN_INLINE S load_grad_output(const BackwardParams& p, const Row& r, int k, int j) {
  if (!p.grad_output) return zero<S>();
  return static_cast<const S*>(p.grad_output)[r.time(k) * p.grad_output_stride_t +
                                              r.row * p.grad_output_stride_b + r.group * p.width + j];
}

// The cell's own saved values of unit j < h at a place (Row::place).
template <class Cell, class S>
FASTRNN_INLINE void load_saved(const BackwardParams& p, int64_t place, int j, Pack<S, Cell::kSaved>& out) {
  if constexpr (Cell::kSaved > 0) {
    const S* saved = static_cast<const S*>(p.saved) + place * kSavedAll<Cell> * p.hidden + j;
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
template <class Cell, class S>
FASTRNN_INLINE void load_backward(const BackwardParams& p, const Row& r, int k, int j, bool reset,
                                  BackwardLoads<Cell, S>& out) {
  out = BackwardLoads<Cell, S>{};
  if (!r.running(k) || k < 0 || j >= p.hidden) return;
  const int64_t place = r.place(p, k), at = r.place(p) * p.hidden + j;
  const int64_t before = (r.reverse ? 1 : -1) * p.batch * p.groups;  // from place to that of step k - 1
  const S* saved = static_cast<const S*>(p.saved);
  load_saved<Cell, S>(p, place, j, out.saved);
  // The carried state of all steps lies in `output`, or last in `saved`.
  constexpr bool kIsH = Cell::kStates == 1;
  constexpr int kStride = kIsH ? 1 : kSavedAll<Cell>;
  const S* sequence = kIsH ? static_cast<const S*>(p.output) : saved;
  const void* start = kIsH ? p.h_0 : p.c_0;
  const void* restart = kIsH ? p.reset_h : p.reset_c;
  out.state = sequence[(place * kStride + kStride - 1) * p.hidden + j];
  const void* given = reset ? restart : start;  // a state that no step made
  if (reset || k == 0)
    out.state_prev = given ? static_cast<const S*>(given)[at] : zero<S>();
  else
    out.state_prev = sequence[((place + before) * kStride + kStride - 1) * p.hidden + j];
  if (!p.weight_hr) out.grad_output = load_grad_output<S>(p, r, k, j);
}

// The gradient of a state after step k (k = -1: of the initial one) by what came after: `later` from step k + 1,
// unless there is none or a reset cut it off. crossed: reset_before(k + 1). at: of the element in
// grad_last [B, P*n] and in grad_reset.
template <class S>
FASTRNN_INLINE Wide<S> arriving(const BackwardParams& p, const Row& r, int k, int64_t at, Wide<S> later, bool crossed,
                                const void* grad_last, void* grad_reset) {
  if (r.last(k)) return load_or_zero<S>(grad_last, at);
  if (p.grad_clip > 0) {  // comparisons, and not fmin and fmax, which lose NaN
    const Wide<S> limit = Wide<S>(p.grad_clip);
    later = later > limit ? limit : later < -limit ? -limit : later;
  }
  if (!crossed) return later;
  if (grad_reset) static_cast<Wide<S>*>(grad_reset)[at] += later;
  return Wide<S>(0);
}

// The whole gradient of state 0 after step k of a running row, column j < R. later: the product over step k + 1's
// gate gradients, and the carried gradient where h is the only state.
template <class S>
FASTRNN_INLINE Wide<S> backward_h(const BackwardParams& p, const Row& r, int k, int j, Wide<S> later, bool crossed,
                                  S grad_output) {
  return arriving<S>(p, r, k, r.place(p) * p.width + j, later, crossed, p.grad_h_n, p.grad_reset_h) +
         widen(grad_output);
}

// Step k of unit j < h of a running row, given the gradient of its state 0: stores the gate gradients and hands
// grad_gates_hh on to the product. Where the cell has a Row, grad_gates_hh goes through that first, and is not stored
// here. carried: of step k + 1, then of step k; not read in a row's last step.
template <class Cell, class S>
FASTRNN_INLINE void backward_cell(const BackwardParams& p, const Row& r, int k, int j,
                                  const BackwardLoads<Cell, S>& loads, Wide<S> grad_h, bool crossed,
                                  Wide<S>& carried, Pack<Wide<S>, Cell::kGates>& grad_gates_hh) {
  using V = Wide<S>;
  constexpr int C = carried_state<Cell>, G = Cell::kGates;
  BackwardIn<Cell, V> in;
  BackwardOut<Cell, V> out;
  in.saved = widen_all<S>(loads.saved);
  in.state[0] = in.state_prev[0] = V(0);
  in.state[C] = widen(loads.state);
  in.state_prev[C] = widen(loads.state_prev);
  in.grad_state[0] = grad_h;
  if constexpr (C > 0)
    in.grad_state[C] =
        arriving<S>(p, r, k, r.place(p) * p.hidden + j, carried, crossed, p.grad_c_n, p.grad_reset_c);
  load_params<Cell, S>(p, r.group, j, in.params);
  Cell::backward(in, out);

  if constexpr (Cell::kParams > 0) {
    if (p.grad_params) {
      Wide<S>* sums = static_cast<Wide<S>*>(p.grad_params) + r.place(p) * Cell::kParams * p.hidden + j;
#pragma unroll
      for (int i = 0; i < Cell::kParams; ++i) sums[i * p.hidden] += out.grad_params[i];
    }
  }
  carried = out.grad_state_prev[C];
  grad_gates_hh = out.grad_gates_hh;
  const int64_t at = r.place(p, k) * G * p.hidden + j;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    store<S>(p.grad_gates_ih, at + g * p.hidden, out.grad_gates_ih[g]);
    if constexpr (kSeparateGates<Cell> && kRowSums<Cell> == 0)
      store<S>(p.grad_gates_hh, at + g * p.hidden, out.grad_gates_hh[g]);
  }
}

// Both, where nothing is projected. recurrent: the product over step k + 1's gate gradients.
template <class Cell, class S>
FASTRNN_INLINE void backward_step(const BackwardParams& p, const Row& r, int k, int j,
                                  const BackwardLoads<Cell, S>& loads, Wide<S> recurrent, bool crossed,
                                  Wide<S>& carried, Pack<Wide<S>, Cell::kGates>& grad_gates_hh) {
  const Wide<S> later = Cell::kStates == 1 ? recurrent + carried : recurrent;
  const Wide<S> grad_h = backward_h<S>(p, r, k, j, later, crossed, loads.grad_output);
  backward_cell<Cell, S>(p, r, k, j, loads, grad_h, crossed, carried, grad_gates_hh);
}

// Is there something to do after step 0, for which the last product is needed: the initial state's gradient, or a
// reset's at the first step?
__host__ __device__ inline bool finish_wanted(const BackwardParams& p) { return p.grad_h_0 || p.resets; }

// After step 0 of a row that is present: grad_h_0, column j < R. crossed: reset_before(0). `later` as in
// backward_h.
template <class S>
FASTRNN_INLINE void finish_h(const BackwardParams& p, const Row& r, int j, Wide<S> later, bool crossed) {
  const int64_t at = r.place(p) * p.width + j;
  const Wide<S> grad = arriving<S>(p, r, -1, at, later, crossed, p.grad_h_n, p.grad_reset_h);
  if (p.grad_h_0) store<S>(p.grad_h_0, at, grad);
}
// grad_c_0, unit j < h; nothing where h is the only state.
template <class Cell, class S>
FASTRNN_INLINE void finish_carried(const BackwardParams& p, const Row& r, int j, Wide<S> carried, bool crossed) {
  if constexpr (Cell::kStates > 1) {
    const int64_t at = r.place(p) * p.hidden + j;
    const Wide<S> grad = arriving<S>(p, r, -1, at, carried, crossed, p.grad_c_n, p.grad_reset_c);
    if (p.grad_c_0) store<S>(p.grad_c_0, at, grad);
  }
}
// Both, where nothing is projected.
template <class Cell, class S>
FASTRNN_INLINE void finish_backward_unit(const BackwardParams& p, const Row& r, int j, Wide<S> recurrent,
                                         Wide<S> carried, bool crossed) {
  finish_h<S>(p, r, j, Cell::kStates == 1 ? recurrent + carried : recurrent, crossed);
  finish_carried<Cell, S>(p, r, j, carried, crossed);
}

}  // namespace fastrnn::cuda
