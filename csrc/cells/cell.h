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
//   kParams  extra per-unit parameter vectors (0 for every cell of torch.nn)
//   forward, backward
// and a line in registry.h.
#pragma once

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

template <class Cell, class V>
struct ForwardIn {
  Pack<V, Cell::kGates> gates_ih, gates_hh;
  Pack<V, Cell::kStates> state;  // before the step
  Pack<V, Cell::kParams> params;
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
