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
// A cell whose gates depend on all units of a row together, as layer normalization makes them, also has a member type Row
// with
//   kSums          how many numbers are summed over the units of a row; they may be of all gates, or of one each
//   reduce         one unit's terms of these sums, from the recurrent product (ForwardIn::gates_hh, still without bias_hh)
//   combine        once a row, from the sums and the number of units, what the units need of them, as many numbers
//   project        what replaces a unit's recurrent product; the bias is added behind it
//   reduce_grad, combine_grad, project_grad
//                  the same backward: from the gradient of what project gave (BackwardOut::grad_gates_hh) to that of the
//                  recurrent product
// forward finds the combined numbers in ForwardIn::row, so that it can save what backward needs of them.
//
// A cell may have kLateGates: the recurrent product of so many of its last gates is not with h, but with a vector that the
// other gates make of it (a GRU whose reset gate comes before the product). No kernel takes more than 0 of them yet.
#pragma once
#include <type_traits>

#if defined(__CUDACC__)
#define FASTRNN_HD __host__ __device__ __forceinline__
#else
#define FASTRNN_HD inline __attribute__((always_inline))
#endif

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

template <class Cell, class V>
struct ForwardIn {
  Pack<V, Cell::kGates> gates_ih, gates_hh;
  Pack<V, Cell::kStates> state;  // before the step
  Pack<V, Cell::kParams> params;
  Pack<V, kRowSums<Cell>> row;  // what Row::combine made
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
