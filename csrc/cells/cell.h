// What a cell is: the pointwise half of one recurrent step. It turns the gate pre-activations of one
// hidden unit into that unit's new state, and back. It knows no pointers, loops, weights or storage types.
//
// V is a value type: float, double, or a SIMD vector of either. The two products arrive separately:
//   gates_ih = W_ih x + b_ih      gates_hh = W_hh h + b_hh
// because a GRU's candidate gate multiplies the second one alone.
//
// A cell is a struct with
//   kGates   gate pre-activations per unit, in torch.nn's order
//   kStates  states per unit; state 0 is h, the one that recurs through weight_hh
//   kSaved   values that forward hands to backward, besides the states themselves
//   kParams  vectors of one number per unit beside the weights, as peepholes are (0 for every cell of torch.nn)
//   forward, backward
// and a line in registry.h.
//
// forward sets every member of ForwardOut, backward every member of BackwardOut.
//
// Under zoneout the state that forward made is not the one that was stored, and backward has to know it: a cell may have
//   V remake(saved, state_prev)                the last of its states, as forward made it
// and one with two states must. Of a cell without it that state is kept beside the saved values.
//
// A cell whose gates depend on all units of a row together, as layer normalization makes them, has a member type Row
// too. It says which sums over the row's units a cell needs of the recurrent product (gates_hh, with its bias), and
// what becomes of their gradient. With n units in a row, and numbers X = float or double:
//   kSums                                      how many sums there are
//   Pack<V, kSums> reduce(gates_hh)            one unit's terms of the sums
//   Pack<X, kSums> combine(sums, X n)          once a row: what the units need to know of the sums
// forward then finds the combined numbers in ForwardIn::row, and does with them and the product what it will; what
// backward needs of either it saves. backward treats the combined numbers as constants. The rest of the gradient is
// made from the grad_gates_hh that it returns:
//   Pack<V, kSums> reduce_grad(saved, grad_gates_hh)             one unit's terms of the sums
//   Pack<X, kSums> combine_grad(sums, X n)                       once a row
//   Pack<V, kGates> project_grad(saved, row, grad_gates_hh)      the gradient of the recurrent product itself; `row` holds
//                                                                the numbers that combine_grad made
// The gradients of weight_hh, of bias_hh and of the state before the step are made from the last of these.
//
// A cell may have kLateGates: the recurrent product of so many of its last gates is not with h, but with a vector that
// the other gates make of it (a GRU whose reset gate comes before the product). No kernel takes more than 0 of them
// yet.
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

// The sums over a row that a cell asks for: Cell::Row::kSums, or 0.
template <class Cell, class = void>
inline constexpr int kRowSums = 0;
template <class Cell>
inline constexpr int kRowSums<Cell, std::void_t<typename Cell::Row>> = Cell::Row::kSums;

template <class Cell, class = void>
inline constexpr int kLateGates = 0;
template <class Cell>
inline constexpr int kLateGates<Cell, std::void_t<decltype(Cell::kLateGates)>> = Cell::kLateGates;

template <class Cell, class = void>
inline constexpr bool kRemakes = false;
template <class Cell>
inline constexpr bool kRemakes<Cell, std::void_t<decltype(&Cell::template remake<float>)>> = true;

// Zoneout (Krueger 2016): what is left of a state. keep is 0 or 1 in training, and gives one of the two exactly.
template <class V>
FASTRNN_HD V zoned_out(V keep, V before, V made) {
  return keep * before + (V(1) - keep) * made;
}

template <class Cell, class V>
struct ForwardIn {
  Pack<V, Cell::kGates> gates_ih, gates_hh;
  Pack<V, Cell::kStates> state;  // before the step
  Pack<V, Cell::kParams> params;
  Pack<V, kRowSums<Cell>> row;  // what Row::combine made, the same for all units of a row
};

template <class Cell, class V>
struct ForwardOut {
  Pack<V, Cell::kStates> state;  // after the step
  Pack<V, Cell::kSaved> saved;
};

template <class Cell, class V>
struct BackwardIn {
  Pack<V, Cell::kSaved> saved;
  Pack<V, Cell::kStates> state_prev, state, grad_state;
  Pack<V, Cell::kParams> params;
};

template <class Cell, class V>
struct BackwardOut {
  Pack<V, Cell::kGates> grad_gates_ih, grad_gates_hh;
  // Without what flows back through weight_hh: the recurrence adds grad_gates_hh @ weight_hh to state 0.
  Pack<V, Cell::kStates> grad_state_prev;
  Pack<V, Cell::kParams> grad_params;
};

}  // namespace fastrnn
