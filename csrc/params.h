// What one call of a recurrence works on: plain data, no torch. Shapes stand behind each pointer:
//   T steps, B batch, P groups (independent recurrences that share the call: directions, heads, members of an
//   ensemble), G gates and S saved values of the cell, h hidden units of a group, R width of a group's state 0
//   (R = h, or the projected size where weight_hr is given), C states of a unit besides h, which stand side by side in
//   what is named c here: [C, h] of a group, and C = 1 but for cells with more than two states.
// All tensors are row-major and contiguous but for the strides given, which count elements.
// Elements have type `dtype`; lengths are int64 and resets are bytes.
#pragma once
#include <cstdint>

namespace fastrnn {

// Dual numbers are a value and its derivative in one direction, side by side: of a CPU's calls alone. kBool is of masks.
enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8, kDualFloat32, kDualFloat64, kBool };

// Bytes that a CPU's kernels hold one number in.
inline int64_t computed_bytes(DType dtype) {
  switch (dtype) {
    case DType::kDualFloat64: return 16;
    case DType::kFloat64:
    case DType::kDualFloat32: return 8;
    default: return 4;
  }
}

// Of the weights of a call's groups: how many elements stand between the end of one group's and the start of the next
// one's. 0 where they stand one behind the other, as they have to for CUDA's kernels and where they are narrow.
struct Gaps {
  int64_t weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, params;
};

struct ForwardParams {
  int64_t steps, batch, groups, hidden, width;  // T, B, P, h, R
  int32_t cell;                                 // index into kCells
  DType dtype;
  bool constant_weights;  // of dual numbers: do weight_ih, weight_hh and weight_hr have slopes of zero?

  const void* gates_ih;  // [T, B, P, G*h], last dimension contiguous
  int64_t gates_ih_stride_t, gates_ih_stride_b, gates_ih_stride_p;
  const void* weight_hh;  // [P, G*h, R]
  const void* bias_hh;    // [P, G*h] or null
  const void* weight_hr;  // [P, R, h] or null: h' = weight_hr (o tanh(c))
  const void* params;     // [P, kParams, h], null for cells without such
  Gaps gaps;
  const void* h_0;        // [B, P*R] or null for zeros
  const void* c_0;        // [B, P*C*h] or null for zeros, and for cells with one state

  // A row's valid steps: row b of group p at lengths[b * stride_b + p * stride_p]; null means T for all.
  const int64_t* lengths;
  int64_t lengths_stride_b, lengths_stride_p;
  // resets[t, b] (or [t, b, p]): the boundary between steps t-1 and t; nothing is carried across it, in either
  // direction. The state past it is reset_h, reset_c (null: zeros). Ignored at padded steps.
  const uint8_t* resets;
  int64_t resets_stride_t, resets_stride_b, resets_stride_p;
  const void* reset_h;  // [B, P*R] or null
  const void* reset_c;  // [B, P*C*h] or null

  // Recurrent dropout: what h is multiplied with where it enters the recurrent product, and only there, in every step.
  const void* mask_h;  // [B, P*R] or null for ones
  // Zoneout: a state after a step is keep times the one before it plus (1 - keep) times the one that the cell made.
  // Ignored at padded steps. Last dimension contiguous, or null for zeros. Of type dtype or, for a CPU's kernels, bytes 0
  // and 1, of which a step reads a quarter of the memory.
  const void* keep_h;  // [T, B, P*R]
  int64_t keep_h_stride_t, keep_h_stride_b;
  const void* keep_c;  // [T, B, P*h]
  int64_t keep_c_stride_t, keep_c_stride_b;
  bool keep_is_bool;

  const uint8_t* reverse;  // [P]: 1 where the group runs from the last step to the first

  // Where tensors [N, ..] stand in place of [T, B, ..], here and in what derives from this, lengths are given, and one of
  //   step_rows: where step t's rows start, of a packed sequence, whose rows are sorted by length
  //   row_starts: where row b's steps start, of rows one behind the other (nested)
  // Else both are null.
  const int64_t *step_rows, *row_starts;
  bool ragged() const { return step_rows || row_starts; }
  int64_t place(int64_t t, int64_t row) const {
    return row_starts ? row_starts[row] + t : (step_rows ? step_rows[t] : t * batch) + row;
  }

  // Where lengths are given, output and saved, and backward's first three results, are zero behind each row's end. The
  // CPU's kernels find them zeroed; CUDA's write the zeros themselves.
  void* output;  // [T, B, P*R]
  void* h_n;     // [B, P*R]
  void* c_n;     // [B, P*C*h] or null
  // [T, B, P*S*h], S = saved_values (registry.h), or null: backward will not follow. A group's gates_ih may lie in the
  // first G*h of its S*h values, and in a backward pass their gradients. So one thread reads what a step needs of a
  // unit there, and writes only then; other steps look only at the states, which stand last, behind the gates.
  void* saved;
};

// What a layer's call has beside ForwardParams: it makes gates_ih = weight_ih input + bias_ih itself, a few steps at a
// time, instead of being given them.
//
// weight_dtype: of weight_ih, weight_hh and weight_hr, else of ForwardParams::dtype. For inference alone it may be
//   kBFloat16 beside float32, or
//   kInt8, where weight_ih and weight_hh hold blocks [P, ceil(h / 16), ceil(K / 4), G, 16 units, 4 inputs] (what is
//   beyond h or K is 0), and scale and sum [P, ceil(h / 16), G, 16] a row's scale and 128 times the sum of its bytes.
//   weight_hr stays float32.
struct LayerParams {
  int64_t size;       // I
  const void* input;  // [T, B, I], last dimension contiguous
  int64_t input_stride_t, input_stride_b;
  const void* weight;  // [P, G*h, I]
  const void* bias;    // [P, G*h] or null
  DType weight_dtype;
  const float *scale_ih, *scale_hh;
  const int32_t *sum_ih, *sum_hh;
};

// The forward call's inputs, its output and saved, and:
struct BackwardParams : ForwardParams {
  const void* grad_output;  // [T, B, P*R], last dimension contiguous, or null for zeros
  int64_t grad_output_stride_t, grad_output_stride_b;
  const void* grad_h_n;  // [B, P*R] or null
  const void* grad_c_n;  // [B, P*C*h] or null
  const void* grad_cells;  // [T, B, P*C*h], last dimension contiguous: gradient of c after every step, or null
  int64_t grad_cells_stride_t, grad_cells_stride_b;

  // [T, B, P, ..], of one group G*h, and grad_gates_stride elements from that of a group to the next: G*h, or S*h where
  // it lies in the memory of `saved`.
  void* grad_gates_ih;
  int64_t grad_gates_stride;
  void* grad_gates_hh;   // [T, B, P*G*h], or null where the cell's is equal to grad_gates_ih
  void* grad_projected;  // [T, B, P*R]: the whole gradient of weight_hr's product; null without weight_hr
  void* grad_h_0;        // [B, P*R], or null: neither it nor grad_c_0 is wanted, and the last product is saved
  void* grad_c_0;        // [B, P*C*h] or null
  // Sums over a row's steps, in float32 where dtype is a half type; null where not wanted. The CPU's kernels find them
  // zeroed; CUDA's clear them where there is a step.
  void* grad_reset_h;  // [B, P*R]
  void* grad_reset_c;  // [B, P*C*h]
  // A part for every row, which the caller adds up: nobody else then writes where a row does.
  void* grad_params;  // [B, P*kParams*h]
  // Scratch of CUDA's kernels where keep_h is given, else null, in float32 where dtype is a half type: the part of h's gradient that
  // goes past a step to the one before it.
  void* kept_h;  // [B, P*R]
  // The gradient of the states, as a step hands it to the one before or to what it started from, is clamped to
  // [-grad_clip, grad_clip]; 0: it is not.
  double grad_clip;
};

// What a layer's backward call has beside BackwardParams: it makes the gradients of weights and input from the gate
// gradients of a few steps at a time, which are never stored (grad_gates_ih, grad_gates_hh, grad_projected are null).
// Gradients may be null where they are not wanted. Those of weights and biases are sums in float32 where dtype is a half
// type, and rounded at the end.
struct LayerBackwardParams {
  int64_t size;       // I
  int64_t rows;       // T * B, or N
  bool separate_gates_hh;  // as in CellInfo
  const void* input;  // [T, B, I], last dimension contiguous; null without grad_weight_ih
  int64_t input_stride_t, input_stride_b;
  const void* weight;    // [P, G*h, I]; null without grad_input
  void* grad_input;      // [P, T, B, I], a part for every group; already zero where lengths are given
  void* grad_weight_ih;  // [P, G*h, I]
  void* grad_weight_hh;  // [P, G*h, R]
  void* grad_weight_hr;  // [P, R, h]; null without weight_hr
  void *grad_bias_ih, *grad_bias_hh;  // [P, G*h]
};

// out = op(a) op(b) + bias, where op transposes or not; float32 or float64.
struct GemmParams {
  int64_t m, n, k;
  DType dtype;
  const void* a;  // [m, k], or [k, m] where transpose_a; rows a_stride elements apart
  const void* b;  // [k, n], or [n, k] where transpose_b; rows b_stride elements apart
  const void* bias;  // [n] or null
  int64_t a_stride, b_stride;
  bool transpose_a, transpose_b;
  void* out;  // [m, n], contiguous
};

}  // namespace fastrnn
