// What a cell is: the pointwise half of one recurrent step. It turns the gate pre-activations of one
// hidden unit into that unit's new state, and back. It knows no pointers, loops, weights or storage types.
//
// V is a value type: float, double, or a SIMD vector of either. The two products arrive separately:
//   gates_ih = W_ih x + b_ih      gates_hh = W_hh h + b_hh
// because a GRU's candidate gate multiplies the second one alone.
//
// A cell is a struct with
//   kGates   gate pre-activations per unit, in torch.nn's order
//   kStates  states per unit; state 0 is h, the one that recurs through weight_hh. The others are what calls name c: one,
//            or several side by side, and then there is no projection and no zoneout. A cell that has others does not look
//            at h: in.state[0] and in.state_prev[0] are none of its
//   kSaved   values that forward hands to backward, besides the states themselves
//   kParams  vectors of one number per unit beside the weights, as peepholes are (0 for every cell of torch.nn)
//   forward, backward
// and a line in registry.h.
//
// forward sets every member of ForwardOut, backward every member of BackwardOut.
//
// Where an activation waits for others, a cell without Row or late gates may have begin and end in the place of forward,
// which is one after the other: begin sets some members of `out`, and end the rest. A CPU's kernel begins several rows
// before it ends one, since a processor does not look far enough ahead to find other work for the time of that activation.
//
// Under zoneout the state that forward made is not the one that was stored. Where backward reads the last of its states, it
// has to know that one: a cell may have
//   V remake(saved, state_prev)                the last of its states, as forward made it
// and of a cell without it that state is kept beside the saved values, unless the cell says kReadsState = false: its
// backward does not look at in.state.
//
// A cell with two states may have its h projected. The gradient of the projection's weight needs that h, which is
// o tanh(c), where o is the last of the cell's own saved values; or, in a cell with kSavesHidden, that value itself.
//
// A cell whose units depend on all units of their row, as layer normalization makes them, has a member type Row too,
// with two types in it, Row::Forward and Row::Backward. Before it runs forward (backward) of a row's units, a kernel then
// goes over them in passes. In pass k every unit gives kMeans[k] terms, and what the units need to know of their means
// over the row becomes a number of the row, which later passes and the cell find in `row`. A unit may leave values to
// itself, which they find in `work`. With numbers X = float or double, and In = ForwardIn or BackwardIn:
//   kMeans[]                            how many means each pass has
//   kNumbers, kWork                     how many values `row` and `work` hold
//   kFirstWork                          the first pass that sets in.work, where kWork > 0
//   Pack<V, kMeans[k]> terms<k>(In& in) one unit's terms; may set in.work, from kFirstWork on
//   void numbers<k>(const Pack<X, kMeans[k]>& means, Pack<X, kNumbers>& row)    once a row
// What a pass has not set, nothing may depend on.
//
// A cell may have kLateGates: the recurrent product of so many of its last gates is not with h, but with a vector that
// the other gates make of it, as in a GRU whose reset gate comes before the product. Such a cell has one state and no
// Row, and besides
//   V late_input(const ForwardIn& in)                    a unit's part of the vector; in.gates_hh lacks the late gates
//   Pack<V, kLateGates> late_grad(const BackwardIn& in)  the gradients of the late gates, in.late_grad being unknown yet
// With them a kernel makes the vector's gradient, BackwardIn::late_grad; backward then gives the other gates' gradients
// besides. The first value that the cell saves is what it multiplies h with to make the vector: so it is made again for
// the gradient of weight_hh. Under recurrent dropout that product, too, is with the masked h: the kernels multiply the
// vector and its gradient with the mask, and the cell knows of none.
#pragma once
#include <type_traits>

#include "../host_device.h"

namespace fastrnn {

template <class V, int N>
struct Pack {
  V v[N];
  FASTRNN_HD V& operator[](int k) { return v[k]; }
  FASTRNN_HD const V& operator[](int k) const { return v[k]; }
};
template <class V>
struct Pack<V, 0> {};

// What stands for the Row of a cell without one.
struct NoRow {
  struct Forward {
    static constexpr int kNumbers = 0, kWork = 0;
  };
  using Backward = Forward;
};
template <class Cell, class = void>
struct RowOf {
  using type = NoRow;
};
template <class Cell>
struct RowOf<Cell, std::void_t<typename Cell::Row>> {
  using type = typename Cell::Row;
};
template <class Cell>
using ForwardPasses = typename RowOf<Cell>::type::Forward;
template <class Cell>
using BackwardPasses = typename RowOf<Cell>::type::Backward;
template <class Cell>
inline constexpr bool kWholeRows = !std::is_same_v<typename RowOf<Cell>::type, NoRow>;

// Does pass k find something in `work`, and does it leave something there?
template <class Passes, int k>
constexpr bool finds_work() {
  if constexpr (Passes::kWork > 0) return k > Passes::kFirstWork;
  return false;
}
template <class Passes, int k>
constexpr bool leaves_work() {
  return finds_work<Passes, k + 1>();
}

// body(std::integral_constant<int, k>()) for each pass k.
template <class Passes, int k = 0, class Body>
FASTRNN_HD void for_each_pass(Body&& body) {
  if constexpr (k < int(sizeof(Passes::kMeans) / sizeof(int))) {
    body(std::integral_constant<int, k>());
    for_each_pass<Passes, k + 1>(body);
  }
}

// States besides h.
template <class Cell>
inline constexpr int kInC = Cell::kStates - 1;

// May h be projected?
template <class Cell>
inline constexpr bool kTakesProjection = Cell::kStates == 2;

template <class Cell, class = void>
inline constexpr bool kSavesHidden = false;
template <class Cell>
inline constexpr bool kSavesHidden<Cell, std::void_t<decltype(Cell::kSavesHidden)>> = Cell::kSavesHidden;

template <class Cell, class = void>
inline constexpr int kLateGates = 0;
template <class Cell>
inline constexpr int kLateGates<Cell, std::void_t<decltype(Cell::kLateGates)>> = Cell::kLateGates;

template <class Cell, class = void>
inline constexpr bool kRemakes = false;
template <class Cell>
inline constexpr bool kRemakes<Cell, std::void_t<decltype(&Cell::template remake<float>)>> = true;

template <class Cell, class = void>
inline constexpr bool kReadsState = true;
template <class Cell>
inline constexpr bool kReadsState<Cell, std::void_t<decltype(Cell::kReadsState)>> = Cell::kReadsState;

// Under zoneout of the last state, is that state, as forward made it, one more of the saved values? It stands behind the
// cell's own and before the states.
template <class Cell>
inline constexpr bool kKeepsMade = kReadsState<Cell> && !kRemakes<Cell> && Cell::kStates <= 2;

// Zoneout (Krueger 2016): what is left of a state. keep is 0 or 1 in training, and gives one of the two exactly.
template <class V>
FASTRNN_HD V zoned_out(V keep, V before, V made) {
  return keep * before + (V(1) - keep) * made;
}
template <class Cell>
inline constexpr bool kHasLate = kLateGates<Cell> > 0;
// The gates whose product is with h.
template <class Cell>
inline constexpr int kEarlyGates = Cell::kGates - kLateGates<Cell>;

template <class Cell, class V>
struct ForwardIn {
  Pack<V, Cell::kGates> gates_ih, gates_hh;
  Pack<V, Cell::kStates> state;  // before the step
  Pack<V, Cell::kParams> params;
  Pack<V, ForwardPasses<Cell>::kNumbers> row;  // the same for all units of a row
  Pack<V, ForwardPasses<Cell>::kWork> work;
};

template <class Cell, class V>
struct ForwardOut {
  Pack<V, Cell::kStates> state;  // after the step
  Pack<V, Cell::kSaved> saved;
};

template <class Cell, class = void>
inline constexpr bool kHasEnd = false;
template <class Cell>
inline constexpr bool kHasEnd<Cell, std::void_t<decltype(&Cell::template end<float>)>> = true;

template <class Cell, class V>
FASTRNN_HD void cell_forward(const ForwardIn<Cell, V>& in, ForwardOut<Cell, V>& out) {
  if constexpr (kHasEnd<Cell>) {
    Cell::begin(in, out);
    Cell::end(in, out);
  } else {
    Cell::forward(in, out);
  }
}

template <class Cell, class V>
struct BackwardIn {
  Pack<V, Cell::kSaved> saved;
  Pack<V, Cell::kStates> state_prev, state, grad_state;
  Pack<V, Cell::kParams> params;
  Pack<V, BackwardPasses<Cell>::kNumbers> row;
  Pack<V, BackwardPasses<Cell>::kWork> work;
  Pack<V, kHasLate<Cell>> late_grad;
};

template <class Cell, class V>
struct BackwardOut {
  Pack<V, Cell::kGates> grad_gates_ih, grad_gates_hh;
  // Without what flows back through weight_hh: the recurrence adds grad_gates_hh @ weight_hh to state 0.
  Pack<V, Cell::kStates> grad_state_prev;
  Pack<V, Cell::kParams> grad_params;
};

}  // namespace fastrnn
