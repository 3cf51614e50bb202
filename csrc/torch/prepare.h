// Every check of an op's arguments and every allocation of its results. Kernels take for granted what passes here. Devices
// share this file; only what runs afterwards differs.
#pragma once
#include <optional>
#include <string_view>
#include <vector>

#include "../params.h"
#include "arguments.h"

namespace fastrnn {

// What every call of a recurrence is given, a layer's included.
struct Recurrence : Run {
  // [P, G*h, R], and those that follow likewise; of a layer of one group, or where they are not stacked, [G*h, R]: the
  // first group's.
  Tensor weight_hh;
  OptionalTensor bias_hh;
#define FASTRNN_FIELD(name) OptionalTensor name;
  FASTRNN_FOR_EACH_RECURRENT_WEIGHT(FASTRNN_FIELD)
#undef FASTRNN_FIELD
  States states;
  OptionalTensor batch_sizes = std::nullopt, offsets = std::nullopt;  // as in LayerCall
  bool of_layer = false;                      // are the states [P, B, n], and not [B, P*n]?
  bool stacked = true;                        // are the weights those of all groups?
};
// stack: copy the weights of several groups into tensors of all? Where not, a layer's kernel reads them where they are.
Recurrence recurrence_of(const LayerCall& call, bool stack);

// What kernels call this type; none where they do not compute with it.
std::optional<DType> kernel_dtype(at::ScalarType type);

// Has the tensor the memory that its sizes claim? Somebody may have resized the storage under it.
void check_storage(const char* op, const char* name, const Tensor& x);

// Where the values of sequences of different lengths, which stand in tensors [N, ..], belong in padded ones [T, B, ..].
struct Layout {
  int64_t T, B;
  std::vector<int64_t> lengths;                // [B]
  std::vector<int64_t> step_rows, row_starts;  // one of them: see ForwardParams
  int64_t place(int64_t t, int64_t b) const { return row_starts.empty() ? step_rows[t] + b : row_starts[b] + t; }
};
// Of one of batch_sizes and offsets, which are to be those of `rows` values, without lengths and resets beside them.
Layout layout_of(const char* op, const OptionalTensor& batch_sizes, const OptionalTensor& offsets, const States& states,
                 int64_t rows);

// A field of all groups: [P, ...], or of one group the tensor itself. None where there is none.
OptionalTensor stacked(const Group& group);

// What the params point at that no tensor holds.
struct Owned {
  std::vector<uint8_t> reverse;
  Layout layout;
};

struct PreparedForward {
  ForwardParams params{};
  LayerParams layer{};             // of a whole layer's call
  Tensor output, h_n, c_n, saved;  // an absent one has size 0
  std::vector<Tensor> keep;        // inputs as the kernel reads them
  Owned own;
  // What the kernel has written, as the op returns it.
  LayerResults results() const;
};

// What a backward call is given beside Recurrence.
struct Given {
  OptionalTensor grad_output, grad_h_n, grad_c_n, grad_cells;
  Tensor output, saved;
  bool in_place = false;  // the gradient of gates_ih goes where saved is
};

inline Given of_recurrence(const LayerGiven& given) {
  return {given.grad_output, given.grad_h_n, given.grad_c_n, given.grad_cells, given.output, given.saved};
}

// Where in place, gates_ih is `saved`, with a group's gradients in the first G*h of its S*h values.
struct RecurrentGradients {
#define FASTRNN_FIELD(name) Tensor name;
  FASTRNN_FOR_EACH_RECURRENT_GRADIENT(FASTRNN_FIELD)
#undef FASTRNN_FIELD
};

struct PreparedBackward {
  BackwardParams params{};
  LayerBackwardParams layer{};  // of a whole layer's call
  RecurrentGradients gradients;
  Tensor grad_input, grad_weight_ih, grad_weight_hh, grad_weight_hr, grad_bias_ih, grad_bias_hh;  // of a layer's
  // Of the gradients; the kernel gives reset_h, reset_c and params, to which every step adds, in float32 where this is a
  // half type.
  at::ScalarType dtype;
  std::vector<Tensor> keep;
  Owned own;
  // What the kernel has written, as the op returns it.
  RecurrentGradients results() const;
};

// in_place: as of RecurrentKernels (layer.h).
PreparedForward prepare_forward(const Recurrence& args, const Tensor& gates_ih, bool save, bool in_place);
PreparedForward prepare_layer(const LayerCall& call, bool save);

// Weights narrower than the input, which is float32: bfloat16 [P, G*h, n], or int8 blocks with scales and sums as at
// LayerParams. args.weight_hh is such a one, too.
struct Narrow {
  Tensor weight_ih;
  OptionalTensor scale_ih, sum_ih, scale_hh, sum_hh;
};
PreparedForward prepare_quantized(const Recurrence& args, const Tensor& input, const Narrow& narrow,
                                  const OptionalTensor& bias_ih);

PreparedBackward prepare_backward(const Recurrence& args, const Given& given, bool initial);
// grad_input has a part for every group.
PreparedBackward prepare_layer_backward(const LayerCall& call, const LayerGiven& given, const Needed& needed);

struct PreparedGemm {
  GemmParams params{};
  Tensor out;
  std::vector<Tensor> keep;
};

// Writes to `out` [m, n], contiguous, if it is given.
PreparedGemm prepare_gemm(const Tensor& a, const Tensor& b, const OptionalTensor& bias, bool transpose_a,
                          bool transpose_b, const Tensor& out = {});

// The products of groups: see their schemas in ops.cpp.
void check_grouped_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);
void check_grouped_outer(const Tensor& a, const Tensor& b);

// 0, or a limit above it.
void check_grad_clip(const char* op, double grad_clip);

// The position of a cell in kCells, whatever the case of its letters; -1 where there is none of this name.
int find_cell(std::string_view name);
// The same; throws ValueError naming the cells there are.
int known_cell(std::string_view name);

}  // namespace fastrnn
