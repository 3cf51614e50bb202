// The memory of a team, forward and backward: one allocation a call and team, in which every member finds the same
// arrays.
//
// Arrays of rows hold the rows that members own one member after another (Rows::first), not in the batch's order. Their
// rows are padded so that whole vectors can be stored, and by one vector more, which keeps power-of-two sizes from
// sharing a cache set.
#pragma once
#include "isa-inl.h"

#include "../cells/registry.h"
#include "dot-inl.h"
#include "gemm-inl.h"
#include "int8-inl.h"
#include "operands-inl.h"
#include "product-inl.h"
#include "scalar.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// The cells' numbers, for this instruction set alone: kCells, read when a call runs, would be one symbol for all of them.
struct CellTable {
  CellInfo of[kNumCells] = {};
  constexpr CellTable() {
    for (int i = 0; i < kNumCells; ++i) of[i] = kCells[i];
  }
};
inline constexpr CellTable kCellTable;
FASTRNN_HD const CellInfo& cell_info(const ForwardParams& p) { return kCellTable.of[p.cell]; }

template <class S>
struct ForwardBuffers {
  using T = typename Compute<S>::type;
  using A = typename Operand<S>::type;
  static constexpr int L = Vec<T>::kLanes;
  int64_t unit_vectors, width_vectors;  // of a row of h hidden units, and of a row of width R
  int64_t stride;                       // elements from row to row
  A *panels_hh, *panels_hr;             // weight_hh and weight_hr, packed (panels-inl.h); if late, a panel a member
  T* bias;                              // bias_hh, likewise
  // Where a row's values are in the call's tensors, for one step: made once for all of its units, of which a few take no
  // longer than this does. Null where there is no such tensor.
  struct Place {
    S *output, *saved, *h_n, *c_n;
    const S *reset_h, *reset_c, *mask_h, *gates_ih;
    int64_t keep_h, keep_c;  // elements from where keep_h and keep_c begin
    bool last, restarts;     // is it the row's last step; does a reset come after it?
  };
  Place* places;     // [team_size, B]: each member's own
  T* h[2];           // [B, stride]: state 0 before and after a step, in turn
  A* multiplied[2];  // [B, stride]: the same as the product reads it, where that differs: times mask_h, or as operands
  T* c;              // [C, B, stride]: the states besides h
  A* hidden;         // [B, stride]: o tanh(c), before it is projected
  // Of a cell that looks at whole rows or has late gates: a step's recurrent product, [B][unit_vectors][G][L]. Of the
  // first each member's room for one row, of the second [B, stride] what the late gates' product is with.
  T *gates_hh, *row_scratch;
  A* late;
  int64_t row_scratch_size;
  // Rows that meet weights as they are stored, as a panel of each member's own (dot-inl.h): those of h, and of a chunk's
  // input. Null where none is made of them.
  A *turned_h, *turned_input;
  int64_t turned_h_size, turned_input_size;

  // The rest is of a layer's call, whose gates_ih are made here, for a chunk of steps at a time. In arrays of
  // chunk_rows a member's part starts at chunk * Rows::first, and a step's rows follow those of the step before.
  int64_t chunk_rows, input_stride;
  A* panels_ih;  // if late, a panel a member
  T* bias_ih;
  A* input;            // [chunk_rows, input_stride]
  T* gates_ih;         // [panels][chunk_rows][a panel's vectors]
  int64_t* chunk_row;  // [team_size, chunk]: where each step's rows start in the member's part
  // With int8 weights, the chunk's input instead of `input`, and each member's copy of the rows of h; see int8-inl.h.
  int64_t quads_ih, quads_hh;
  uint8_t *quantized_input, *quantized_h;  // [chunk_rows, 4 quads_ih], [team_size, B, 4 quads_hh]
  float *input_scale, *h_scale;            // [chunk_rows], [team_size, B]

  ForwardBuffers(const ForwardParams& p, const LayerParams* layer, const Plan& plan, Arena& arena)
      : unit_vectors(ceil_div(p.hidden, L)), width_vectors(ceil_div(p.width, L)) {
    const CellInfo& cell = cell_info(p);
    stride = ((unit_vectors > width_vectors ? unit_vectors : width_vectors) + kMaxVectors) * L;
    const auto panels = [&](int64_t depth, bool late) {
      return arena.take<A>(late ? plan.team_size * late_panel(depth, cell.gates)
                                : unit_vectors * cell.gates * L * padded_depth<A>(depth));
    };
    panels_hh = plan.pack_hh ? panels(p.width, plan.hh_late) : nullptr;
    bias = arena.take<T>(unit_vectors * cell.gates * L);
    panels_hr = p.weight_hr && plan.pack_hh ? arena.take<A>(width_vectors * L * padded_depth<A>(p.hidden)) : nullptr;
    places = arena.take<Place>(plan.team_size * p.batch);
    for (T*& x : h) x = arena.take<T>(p.batch * stride);
    const bool differs = p.mask_h || !std::is_same_v<A, T>;
    for (A*& x : multiplied) x = differs ? arena.take<A>(p.batch * stride) : nullptr;
    c = arena.take<T>(cell.in_c() * p.batch * stride);
    hidden = p.weight_hr ? arena.take<A>(p.batch * stride) : nullptr;
    if (cell.whole_rows || cell.late_gates)
      gates_hh = arena.take<T>(p.batch * unit_vectors * cell.gates * L);
    if (cell.late_gates) late = arena.take<A>(p.batch * stride);
    if (cell.whole_rows) {
      row_scratch_size = unit_vectors * (cell.gates + cell.forward_work) * L;
      row_scratch = arena.take<T>(plan.team_size * row_scratch_size);
    }
    const bool turns = kTurns<A, S> && !plan.uniform && (!layer || layer->weight_dtype == p.dtype);
    const int64_t own_rows = ceil_div(p.batch, plan.split_rows ? plan.team_size : 1);  // of a member, at most
    const auto turned = [&](bool packed, int64_t rows, int64_t depth, int64_t& size) {
      size = turns && !packed && rows >= L ? round_up(rows, L) * depth : 0;
      return size > 0 ? arena.take<A>(plan.team_size * size) : nullptr;
    };
    turned_h = turned(plan.pack_hh, own_rows, p.width > p.hidden ? p.width : p.hidden, turned_h_size);
    if (!layer) return;
    chunk_rows = plan.chunk * p.batch;
    turned_input = turned(plan.pack_ih, plan.chunk * own_rows, layer->size, turned_input_size);
    input_stride = round_up(layer->size, L * kDepth<A>) + L * kDepth<A>;
    panels_ih = plan.pack_ih ? panels(layer->size, plan.ih_late) : nullptr;
    bias_ih = arena.take<T>(unit_vectors * cell.gates * L);
    if (layer->weight_dtype == DType::kInt8) {
      quads_ih = ceil_div(layer->size, kInt8Depth);
      quads_hh = ceil_div(p.width, kInt8Depth);
      quantized_input = arena.take<uint8_t>(chunk_rows * quads_ih * kInt8Depth);
      input_scale = arena.take<float>(chunk_rows);
      quantized_h = arena.take<uint8_t>(plan.team_size * p.batch * quads_hh * kInt8Depth);
      h_scale = arena.take<float>(plan.team_size * p.batch);
    } else
      input = arena.take<A>(chunk_rows * input_stride);
    gates_ih = arena.take<T>(chunk_rows * unit_vectors * cell.gates * L);
    chunk_row = arena.take<int64_t>(plan.team_size * plan.chunk);
  }

  // What one panel takes at most, of weights of so many inputs: all gates of a vector of units, or as many vectors.
  static int64_t late_panel(int64_t depth, int gates) {
    return (gates > kMaxVectors ? gates : kMaxVectors) * L * padded_depth<A>(depth);
  }
};

// The step after the last one is there for the initial state's gradient, or a reset's at the first step.
inline int64_t backward_steps(const BackwardParams& p) { return p.grad_h_0 || p.resets ? p.steps + 1 : p.steps; }

template <class S>
struct BackwardBuffers {
  using T = typename Compute<S>::type;
  using A = typename Operand<S>::type;
  static constexpr int L = Vec<T>::kLanes;
  int64_t unit_vectors, width_vectors;  // of a row of h hidden units, and of a row of width R
  int64_t stride;                       // elements from row to row of states
  int64_t gates_padded;                 // elements of a gate, padded to whole vectors
  int64_t gates_stride;                 // elements from row to row of gates
  // Rows of the weights serve as panels where whole vectors of them, of the right type, can be read: else, and in longer
  // calls, weight_hh and weight_hr are packed (panels-inl.h), if anything is multiplied with them; weight_hh, if late, a
  // panel a member.
  bool packed;
  A *panels_hh, *panels_hr;
  // [(slots + 1) B, gates_stride]: grad_gates_hh. A member's rows are together: first those of the step before, then
  // those of the steps since, of which there are `slots`.
  int64_t slots;
  A* grad_gates;
  T *carry_h, *carry_c;  // [B, stride], [C, B, stride]: the part of grad_state_prev that does not come through weight_hh
  A* grad_h;             // [slots * B, stride]: the gradient of the projection's output, rows as below
  // Of a cell that looks at whole rows or has late gates: [B, stride], the gradient of o tanh(c), or of state 0 where
  // nothing is projected; of the first each member's room for one row.
  T *grad_hidden, *row_scratch;
  int64_t row_scratch_size;
  T* sums;  // [team_size][max(B, kBlockM)][kMaxVectors * L]: where deep products add up
  int64_t sums_size;

  // The rest is of a layer's call, for a chunk of steps: its rows as in grad_gates, without the first B of them.
  int64_t input_vectors;      // of a row of I inputs
  A* panels_ih;  // weight_ih, packed for the input's gradient, or null; if late, one panel of it
  A* grad_gates_ih;           // [slots * B, gates_stride], or null where grad_gates serves
  const S **input, **before;  // [slots * B]: the step's input, and the state before it; null for zeros
  const S** mask;             // [slots * B]: the row of mask_h; null without one
  // Of a cell with late gates, or where h is projected: what the product of those, or the projection, was with, and where
  // each row of it starts. Null else.
  S* inner;             // [slots * B, stride]
  const S** inner_row;  // [slots * B]
  int64_t* place;             // [slots * B]: the row in tensors [T, B, ..]
  T* bias;                    // [2][gates_stride]: sums of grad_gates_ih and of grad_gates_hh
  // Of half types, where a weight's gradient is a sum of several products: the group's sums, as in WeightSums. Null else.
  S *lower_ih, *lower_hh, *lower_hr;  // [G*h, I], [G*h, R], [R, h]
  GemmBuffers<A> products;    // the member's own

  BackwardBuffers(const BackwardParams& p, const LayerBackwardParams* layer, const Plan& plan, Arena& arena,
                  int member = 0)
      : unit_vectors(ceil_div(p.hidden, L)), width_vectors(ceil_div(p.width, L)), slots(layer ? plan.chunk : 1) {
    const CellInfo& cell = cell_info(p);
    stride = ((unit_vectors > width_vectors ? unit_vectors : width_vectors) + kMaxVectors) * L;
    gates_padded = unit_vectors * L;
    gates_stride = round_up(gates_padded * cell.gates, L * kDepth<A>) + L * kDepth<A>;
    packed = plan.pack_hh || !std::is_same_v<S, T> || p.hidden % L != 0 || p.width % L != 0;
    const bool multiplied = cell.late_gates || backward_steps(p) > 1;
    const int64_t vectors = plan.hh_late ? plan.team_size * kMaxVectors : width_vectors;
    panels_hh = packed && multiplied ? arena.take<A>(vectors * L * gates_padded * cell.gates) : nullptr;
    panels_hr = packed && p.weight_hr ? arena.take<A>(unit_vectors * L * padded_depth<A>(p.width)) : nullptr;
    grad_gates = arena.take<A>((slots + 1) * p.batch * gates_stride);
    carry_h = arena.take<T>(p.batch * stride);
    carry_c = arena.take<T>(cell.in_c() * p.batch * stride);
    grad_h = p.weight_hr ? arena.take<A>(slots * p.batch * stride) : nullptr;
    if (cell.whole_rows || cell.late_gates) grad_hidden = arena.take<T>(p.batch * stride);
    if (cell.whole_rows) {
      row_scratch_size = unit_vectors * (cell.backward_work + (p.keep_c != nullptr)) * L;
      row_scratch = arena.take<T>(plan.team_size * row_scratch_size);
    }
    sums_size = (p.batch > kBlockM ? p.batch : kBlockM) * kMaxVectors * L;
    sums = arena.take<T>(plan.team_size * sums_size);
    if (!layer) return;
    input_vectors = ceil_div(layer->size, L);
    const int64_t vectors_ih = plan.ih_late ? kMaxVectors : input_vectors;
    const bool packed_ih = layer->grad_input && (packed || layer->size % L != 0);
    panels_ih = packed_ih ? arena.take<A>(vectors_ih * L * gates_padded * cell.gates) : nullptr;
    grad_gates_ih = layer->separate_gates_hh ? arena.take<A>(slots * p.batch * gates_stride) : nullptr;
    input = arena.take<const S*>(slots * p.batch);
    before = arena.take<const S*>(slots * p.batch);
    mask = p.mask_h ? arena.take<const S*>(slots * p.batch) : nullptr;
    const bool has_inner = cell.late_gates || layer->grad_weight_hr;
    inner = has_inner ? arena.take<S>(slots * p.batch * stride) : nullptr;
    inner_row = has_inner ? arena.take<const S*>(slots * p.batch) : nullptr;
    place = arena.take<int64_t>(slots * p.batch);
    bias = arena.take<T>(2 * gates_stride);
    const int segments = plan.split_rows ? plan.team_size : 1;
    // Then multiply() keeps each sum once (gradients-inl.h).
    const bool one_product = plan.chunk >= p.steps && segments == 1 && layer->rows <= kPartK;
    const auto lower = [&](const void* grad, int64_t size) {
      return grad && !std::is_same_v<S, T> && !one_product ? arena.take<S>(size) : nullptr;
    };
    lower_ih = lower(layer->grad_weight_ih, cell.gates * p.hidden * layer->size);
    lower_hh = lower(layer->grad_weight_hh, cell.gates * p.hidden * p.width);
    lower_hr = lower(layer->grad_weight_hr, p.width * p.hidden);
    const int64_t states = p.hidden > p.width ? p.hidden : p.width;
    const int64_t columns = layer->size > states ? layer->size : states;
    products = {columns, slots * p.batch, /*transpose_a=*/true, arena, plan.team_size, member};
  }
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
