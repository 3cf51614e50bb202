// The door: every check of an op's arguments and every allocation of its results. What passes here, kernels take
// as given. Devices share this file; only what runs afterwards differs.
#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "../params.h"

namespace fastrnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments that both ops share, in schema order; shapes as in params.h, with P groups in one batch of calls.
struct Recurrence {
  std::string_view cell;
  Tensor weight_hh;
  OptionalTensor bias_hh, weight_hr;
  Tensor h_0;
  OptionalTensor c_0, lengths, resets, reset_h, reset_c;
  c10::List<bool> reverse;
  // Of a packed sequence: int64 [T]; tensors [T, B, ..] are [N, ..] then, rows sorted by length.
  OptionalTensor batch_sizes = std::nullopt;
};

// What the params point at that no tensor holds.
struct Owned {
  std::vector<uint8_t> reverse;
  std::vector<int64_t> lengths, step_rows;
};

struct PreparedForward {
  ForwardParams params{};
  LayerParams layer{};       // of a whole layer's call
  Tensor output, h_n, c_n, saved;  // an absent one has size 0
  std::vector<Tensor> keep;        // inputs as the kernel reads them
  Owned own;
};

// What a backward call is given beside Recurrence.
struct Given {
  OptionalTensor grad_output, grad_h_n, grad_c_n;
  Tensor output, saved;
  double grad_clip;
};

struct PreparedBackward {
  BackwardParams params{};
  LayerBackwardParams layer{};  // of a whole layer's call
  Tensor grad_gates_ih, grad_gates_hh, grad_projected;  // of a recurrence's
  Tensor grad_input, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh;  // of a layer's
  Tensor grad_h_0, grad_c_0, grad_reset_h, grad_reset_c;
  std::vector<Tensor> keep;
  Owned own;
};

PreparedForward prepare_forward(const Recurrence& args, const Tensor& gates_ih, bool save);
PreparedForward prepare_layer(const Recurrence& args, const Tensor& input, const Tensor& weight_ih,
                              const OptionalTensor& bias_ih, bool save);

// Weights narrower than the input, which is float32: bfloat16 [P, G*h, n], or int8 blocks with scales and sums as at
// LayerParams. args.weight_hh is such a one, too.
struct Narrow {
  Tensor weight_ih;
  OptionalTensor scale_ih, sum_ih, scale_hh, sum_hh;
};
PreparedForward prepare_quantized(const Recurrence& args, const Tensor& input, const Narrow& narrow,
                                  const OptionalTensor& bias_ih);

PreparedBackward prepare_backward(const Recurrence& args, const Given& given, bool initial);
// grad_cells: of an LSTM's c after every step. wanted: the gradients of input (a part for every group), weight_ih,
// weight_hh, bias_ih, bias_hh; of h_0 and c_0.
PreparedBackward prepare_layer_backward(const Recurrence& args, const Given& given, const OptionalTensor& input,
                                        const OptionalTensor& weight_ih, const OptionalTensor& grad_cells,
                                        const c10::List<bool>& wanted);

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

// The position of a cell in kCells; throws ValueError naming the cells there are.
int find_cell(std::string_view name);

}  // namespace fastrnn
