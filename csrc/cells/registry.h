// Every cell there is, one line each: X(name in Python, C++ type, does grad_gates_hh differ from grad_gates_ih?).
// The position in this list is the cell's number (ForwardParams::cell); Python asks cell_info() and repeats nothing.
#pragma once
#include "elman.h"
#include "gru.h"
#include "ligru.h"
#include "lstm.h"
#include "mgu.h"
#include "norm_gru.h"
#include "norm_lstm.h"
#include "peephole_lstm.h"
#include "reset_before_gru.h"
#include "slstm.h"

// The tests compile kernels with cells of their own, to see that a cell needs nothing but this: a header that the macro
// names defines FASTRNN_FOR_EACH_MORE_CELL.
#if defined(FASTRNN_MORE_CELLS)
#include FASTRNN_MORE_CELLS
#else
#define FASTRNN_FOR_EACH_MORE_CELL(X)
#endif

// They may also name the list, which is then all there is: every cell takes its time to compile.
#if !defined(FASTRNN_FOR_EACH_CELL)
#define FASTRNN_FOR_EACH_CELL(X)                    \
  X("lstm", ::fastrnn::LSTMCell, false)             \
  X("gru", ::fastrnn::GRUCell, true)                \
  X("rnn_tanh", ::fastrnn::ElmanCell<::fastrnn::Tanh>, false) \
  X("rnn_relu", ::fastrnn::ElmanCell<::fastrnn::Relu>, false) \
  X("lstm_peephole", ::fastrnn::PeepholeLSTMCell, false) \
  X("lstm_norm", ::fastrnn::NormLSTMCell, true) \
  X("gru_norm", ::fastrnn::NormGRUCell, true) \
  X("gru_reset_before", ::fastrnn::ResetBeforeGRUCell, false) \
  X("ligru", ::fastrnn::LiGRUCell, false) \
  X("mgu", ::fastrnn::MGUCell, false) \
  X("slstm", ::fastrnn::SLSTMCell, false) \
  FASTRNN_FOR_EACH_MORE_CELL(X)
#endif

namespace fastrnn {

struct CellInfo {
  const char* name;
  int gates, states, params;
  // Values per unit and step in the op's `saved`: the cell's own, then the states after the step, h excepted
  // (h is the output). Under zoneout there may be one more between them (saved_values).
  int saved;
  bool separate_gates_hh;  // backward returns grad_gates_hh as a tensor of its own
  bool saves_hidden;       // what a projection multiplies is saved (cell.h)
  int late_gates;          // see cell.h
  bool whole_rows;         // has a Row (cell.h)
  int forward_work, backward_work;  // values of a unit that its passes leave to each other
  bool keeps_made;         // zoneout of the last state needs one more saved value (kKeepsMade in cell.h)

  FASTRNN_HD int in_c() const { return states - 1; }  // how many states a call's "c" holds, side by side (params.h)
};

inline constexpr CellInfo kCells[] = {
#define FASTRNN_CELL_INFO(name, Cell, separate) \
  {name, Cell::kGates, Cell::kStates, Cell::kParams, Cell::kSaved + Cell::kStates - 1, separate, \
   kSavesHidden<Cell>, kLateGates<Cell>, kWholeRows<Cell>, ForwardPasses<Cell>::kWork, BackwardPasses<Cell>::kWork, \
   kKeepsMade<Cell>},
    FASTRNN_FOR_EACH_CELL(FASTRNN_CELL_INFO)
#undef FASTRNN_CELL_INFO
};
#define FASTRNN_CHECK_CELL(name, Cell, separate) \
  static_assert(!kHasLate<Cell> || (Cell::kStates == 1 && !kWholeRows<Cell> && !separate), name ": late gates: see cell.h");
FASTRNN_FOR_EACH_CELL(FASTRNN_CHECK_CELL)
#undef FASTRNN_CHECK_CELL
// Does it run under zoneout?
inline constexpr bool takes_zoneout(const CellInfo& info) { return info.states <= 2; }
// Values per unit and step in a call's `saved`.
inline constexpr int saved_values(const CellInfo& info, bool keep_h, bool keep_c) {
  return info.saved + (info.keeps_made && (info.states > 1 ? keep_c : keep_h));
}
inline constexpr int kNumCells = sizeof(kCells) / sizeof(kCells[0]);

}  // namespace fastrnn
