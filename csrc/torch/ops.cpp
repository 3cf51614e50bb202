// The ops' schemas, and their CPU kernels. This is the only place where a schema stands; fastrnn/ops.py gives the
// same ops their fake, autograd, vmap and autocast behaviour.
//
//   T steps, B batch, P groups, G gates, h hidden units a group, R width of state 0 (h, or the projected size),
//   S saved values (cell_info). Results that do not apply have size 0; none aliases an argument or another result.
//   grad_clip: 0 (none), or what the states' gradient is clamped to; recurrent_forward has it for its derivative.
//   initial: are the gradients of h_0 and c_0 wanted?
//   batch_sizes [T]: of a packed sequence; tensors [T, B, ..] are [N, ..] then, as torch packs them.
//   lengths [B] or [B, P], any integer dtype; resets bool [T, B] or [T, B, P]; reverse: P values.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../cells/registry.h"
#include "../launch.h"
#include "check.h"
#include "ops.h"
#include "prepare.h"

namespace fastrnn {
namespace {

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(
    c10::string_view cell, const Tensor& gates_ih, const Tensor& weight_hh, const OptionalTensor& bias_hh,
    const OptionalTensor& weight_hr, const Tensor& h_0, const OptionalTensor& c_0, const OptionalTensor& lengths,
    const OptionalTensor& resets, const OptionalTensor& reset_h, const OptionalTensor& reset_c,
    const c10::List<bool>& reverse, bool save, double grad_clip) {
  check_grad_clip("recurrent_forward", grad_clip);  // for its derivative
  PreparedForward call = prepare_forward(
      {cell, weight_hh, bias_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c, reverse}, gates_ih, save);
  if (call.params.batch > 0) cpu::recurrent_forward(call.params, threads());
  return {call.output, call.h_n, call.c_n, call.saved};
}

std::tuple<Tensor, Tensor, Tensor> quantized_forward_cpu(
    c10::string_view cell, const Tensor& input, const Tensor& weight_ih, const OptionalTensor& scale_ih,
    const OptionalTensor& sum_ih, const OptionalTensor& bias_ih, const Tensor& weight_hh,
    const OptionalTensor& scale_hh, const OptionalTensor& sum_hh, const OptionalTensor& bias_hh,
    const OptionalTensor& weight_hr, const Tensor& h_0, const OptionalTensor& c_0, const OptionalTensor& lengths,
    const OptionalTensor& resets, const OptionalTensor& reset_h, const OptionalTensor& reset_c,
    const c10::List<bool>& reverse) {
  PreparedForward call =
      prepare_quantized({cell, weight_hh, bias_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c, reverse},
                        input, {weight_ih, scale_ih, sum_ih, scale_hh, sum_hh}, bias_ih);
  if (call.params.batch > 0) cpu::layer_forward(call.params, call.layer, threads());
  return {call.output, call.h_n, call.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    c10::string_view cell, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const Tensor& weight_hh, const OptionalTensor& weight_hr, const Tensor& h_0,
    const OptionalTensor& c_0, const OptionalTensor& lengths, const OptionalTensor& resets,
    const OptionalTensor& reset_h, const OptionalTensor& reset_c, const c10::List<bool>& reverse, const Tensor& output,
    const Tensor& saved, bool initial, double grad_clip) {
  PreparedBackward call = prepare_backward(
      {cell, weight_hh, std::nullopt, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c, reverse},
      {grad_output, grad_h_n, grad_c_n, output, saved, grad_clip}, initial);
  if (call.params.batch > 0) cpu::recurrent_backward(call.params, threads());
  const auto dtype = output.scalar_type();
  return {call.grad_gates_ih, call.grad_gates_hh, call.grad_projected,        call.grad_h_0,
          call.grad_c_0,      call.grad_reset_h.to(dtype), call.grad_reset_c.to(dtype)};
}

Tensor gemm_cpu(const Tensor& a, const Tensor& b, const OptionalTensor& bias, bool transpose_a, bool transpose_b) {
  PreparedGemm call = prepare_gemm(a, b, bias, transpose_a, transpose_b);
  if (call.out.numel() > 0) cpu::gemm(call.params, threads());
  return call.out;
}

// Products of many groups, each on one thread where there are enough of them. Small ones are ATen's: preparing a call
// of ours would cost more than the product.
bool are_large(int64_t m, int64_t n, int64_t k) { return m * n * k >= 1 << 16; }

void run(const std::vector<PreparedGemm>& calls) {
  if (calls.empty() || calls[0].out.numel() == 0) return;
  const int64_t count = calls.size();
  const int each = count < threads() ? threads() : 1;
  at::parallel_for(0, count, each == 1 ? 1 : count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) cpu::gemm(calls[i].params, each);
  });
}

Tensor grouped_linear_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  check_grouped_linear(input, weight, bias);
  const int64_t rows = input.size(0), P = input.size(1), m = weight.size(1), n = weight.size(2);
  if (!are_large(rows, m, n)) {
    Tensor out = at::bmm(input.transpose(0, 1), weight.transpose(1, 2));
    if (bias) out += bias->unsqueeze(1);
    return out.transpose(0, 1);
  }
  const Tensor out = at::empty({P, rows, m}, input.options());
  const bool columns = weight.stride(2) != 1 && weight.stride(1) == 1;
  std::vector<PreparedGemm> calls;
  for (int64_t p = 0; p < P; ++p) {
    const Tensor w = weight.select(0, p);
    calls.push_back(prepare_gemm(input.select(1, p), columns ? w.t() : w,
                                 bias ? OptionalTensor(bias->select(0, p)) : std::nullopt, false, !columns,
                                 out.select(0, p)));
  }
  run(calls);
  return out.transpose(0, 1);
}

Tensor grouped_outer_cpu(const Tensor& a, const Tensor& b) {
  check_grouped_outer(a, b);
  const int64_t rows = a.size(0), P = a.size(1), m = a.size(2), n = b.size(2);
  if (!are_large(m, n, rows)) return at::bmm(a.permute({1, 2, 0}), b.transpose(0, 1));
  const Tensor out = at::empty({P, m, n}, a.options());
  std::vector<PreparedGemm> calls;
  for (int64_t p = 0; p < P; ++p)
    calls.push_back(prepare_gemm(a.select(1, p), b.select(1, p), std::nullopt, true, false, out.select(0, p)));
  run(calls);
  return out;
}

// For ops that only fastrnn's own autograd calls, where no derivative is asked for: a call that would need one fails,
// instead of giving a result without a history.
void without_derivative(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const c10::IValue& x : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (!x.isTensor() || !x.toTensor().defined()) continue;
    const Tensor& tensor = x.toTensor();
    RNN_CHECK_NOT_IMPLEMENTED(
        !(at::GradMode::is_enabled() && tensor.requires_grad()) && !tensor._fw_grad(/*level=*/0).defined(),
        op.operator_name().name, ": it has no derivative; fastrnn.functional and the modules make one around it");
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

std::vector<std::string> cell_names() {
  std::vector<std::string> names;
  for (const CellInfo& cell : kCells) names.emplace_back(cell.name);
  return names;
}

std::vector<int64_t> cell_info(c10::string_view cell) {
  const CellInfo& info = kCells[find_cell(cell)];
  return {info.gates, info.states, info.saved, info.params, info.separate_gates_hh};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_forward_cpu(
    c10::string_view cell, const Tensor& input, const Tensor& weight_ih, const OptionalTensor& bias_ih,
    const Tensor& weight_hh, const OptionalTensor& bias_hh, const OptionalTensor& weight_hr, const Tensor& h_0,
    const OptionalTensor& c_0, const OptionalTensor& lengths, const OptionalTensor& resets,
    const OptionalTensor& reset_h, const OptionalTensor& reset_c, const c10::List<bool>& reverse, bool save,
    const OptionalTensor& batch_sizes) {
  PreparedForward call = prepare_layer(
      {cell, weight_hh, bias_hh, weight_hr, h_0, c_0, lengths, resets, reset_h, reset_c, reverse, batch_sizes}, input,
      weight_ih, bias_ih, save);
  if (call.params.batch > 0) cpu::layer_forward(call.params, call.layer, threads());
  return {call.output, call.h_n, call.c_n, call.saved};
}

Gradients layer_backward_cpu(c10::string_view cell, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                             const OptionalTensor& grad_c_n, const OptionalTensor& input,
                             const OptionalTensor& weight_ih, const Tensor& weight_hh, const Tensor& h_0,
                             const OptionalTensor& c_0, const OptionalTensor& lengths, const OptionalTensor& resets,
                             const OptionalTensor& reset_h, const OptionalTensor& reset_c,
                             const c10::List<bool>& reverse, const Tensor& output, const Tensor& saved,
                             const c10::List<bool>& wanted, const OptionalTensor& batch_sizes, double grad_clip,
                             const OptionalTensor& grad_cells) {
  PreparedBackward call = prepare_layer_backward({cell, weight_hh, std::nullopt, std::nullopt, h_0, c_0, lengths, resets,
                                                  reset_h, reset_c, reverse, batch_sizes},
                                                 {grad_output, grad_h_n, grad_c_n, output, saved, grad_clip}, input,
                                                 weight_ih, grad_cells, wanted);
  if (call.params.batch > 0) {
    cpu::layer_backward(call.params, call.layer, threads());
  } else {
    for (const Tensor& x : {call.grad_weight_ih, call.grad_weight_hh, call.grad_bias_ih, call.grad_bias_hh}) x.zero_();
  }
  if (wanted[0]) call.grad_input = call.params.groups == 1 ? call.grad_input[0] : call.grad_input.sum(0);
  return {call.grad_input, call.grad_weight_ih, call.grad_weight_hh, call.grad_bias_ih, call.grad_bias_hh,
          call.grad_h_0,   call.grad_c_0,       call.grad_reset_h,   call.grad_reset_c};
}

TORCH_LIBRARY(fastrnn, m) {
  m.def(
      "recurrent_forward(str cell, Tensor gates_ih, Tensor weight_hh, Tensor? bias_hh, Tensor? weight_hr, "
      "Tensor h_0, Tensor? c_0, Tensor? lengths, Tensor? resets, Tensor? reset_h, Tensor? reset_c, bool[] reverse, "
      "bool save, float grad_clip=0.0) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "recurrent_backward(str cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor weight_hh, "
      "Tensor? weight_hr, Tensor h_0, Tensor? c_0, Tensor? lengths, Tensor? resets, Tensor? reset_h, Tensor? reset_c, "
      "bool[] reverse, Tensor output, Tensor saved, bool initial=True, float grad_clip=0.0) -> "
      "(Tensor grad_gates_ih, Tensor grad_gates_hh, Tensor grad_projected, Tensor grad_h_0, Tensor grad_c_0, "
      "Tensor grad_reset_h, Tensor grad_reset_c)",
      {at::Tag::pt2_compliant_tag});
  // recurrent_forward of gates_ih = weight_ih input + bias_ih, which are made a few steps at a time and never stored.
  // weight_ih [P, G*h, I], bias_ih [P, G*h]. No derivative of its own: fastrnn/layer.py makes the node.
  m.def(
      "layer_forward(str cell, Tensor input, Tensor weight_ih, Tensor? bias_ih, Tensor weight_hh, Tensor? bias_hh, "
      "Tensor? weight_hr, Tensor h_0, Tensor? c_0, Tensor? lengths, Tensor? resets, Tensor? reset_h, Tensor? reset_c, "
      "bool[] reverse, bool save, Tensor? batch_sizes=None) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved)",
      {at::Tag::pt2_compliant_tag});
  // Its gradients; recurrent_backward and the products around it. wanted: those of input, weight_ih, weight_hh, bias_ih,
  // bias_hh, and of h_0 with c_0. grad_cells [T, B, P*h]: of an LSTM's c after every step, which lies in saved. Not with
  // weight_hr; float32 and float64.
  m.def(
      "layer_backward(str cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? input, "
      "Tensor? weight_ih, Tensor weight_hh, Tensor h_0, Tensor? c_0, Tensor? lengths, Tensor? resets, Tensor? reset_h, "
      "Tensor? reset_c, bool[] reverse, Tensor output, Tensor saved, bool[] wanted, Tensor? batch_sizes=None, "
      "float grad_clip=0.0, Tensor? grad_cells=None) -> "
      "(Tensor grad_input, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh, "
      "Tensor grad_h_0, Tensor grad_c_0, Tensor grad_reset_h, Tensor grad_reset_c)",
      {at::Tag::pt2_compliant_tag});
  // layer_forward for inference on a float32 input with weights of bfloat16 (no scales, no sums) or int8 in blocks; see
  // LayerParams in params.h and fastrnn/quantized.py.
  m.def(
      "quantized_forward(str cell, Tensor input, Tensor weight_ih, Tensor? scale_ih, Tensor? sum_ih, Tensor? bias_ih, "
      "Tensor weight_hh, Tensor? scale_hh, Tensor? sum_hh, Tensor? bias_hh, Tensor? weight_hr, Tensor h_0, Tensor? c_0, "
      "Tensor? lengths, Tensor? resets, Tensor? reset_h, Tensor? reset_c, bool[] reverse) "
      "-> (Tensor output, Tensor h_n, Tensor c_n)",
      {at::Tag::pt2_compliant_tag});
  // op(a) op(b) + bias on matrices, op transposing or not; float32 and float64. No derivative of its own: fastrnn's
  // autograd calls it where none is asked for.
  m.def("gemm(Tensor a, Tensor b, Tensor? bias, bool transpose_a, bool transpose_b) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  // linear and a sum of outer products for each of P groups: input [rows, P, n], weight [P, m, n], bias [P, m] to
  // [rows, P, m]; a [rows, P, m], b [rows, P, n] to [P, m, n]. float32 and float64.
  m.def("grouped_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("grouped_outer(Tensor a, Tensor b) -> Tensor", {at::Tag::pt2_compliant_tag});
  // x, whose gradient is clamped to [-limit, limit]: what grad_clip means, for the composite of fastrnn/reference.py.
  m.def("clamp_gradient(Tensor x, float limit) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("cell_names() -> str[]", cell_names);
  // gates, states, saved, params, 1 if grad_gates_hh is a tensor of its own
  m.def("cell_info(str cell) -> int[]", cell_info);
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("recurrent_forward", forward_cpu);
  m.impl("recurrent_backward", backward_cpu);
  m.impl("layer_forward", layer_forward_cpu);
  m.impl("layer_backward", layer_backward_cpu);
  m.impl("quantized_forward", quantized_forward_cpu);
  m.impl("gemm", gemm_cpu);
  m.impl("grouped_linear", grouped_linear_cpu);
  m.impl("grouped_outer", grouped_outer_cpu);
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("clamp_gradient", [](const Tensor& x, double) { return x.clone(); });
}

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
  m.impl("layer_forward", torch::CppFunction::makeFromBoxedFunction<&without_derivative>());
  m.impl("layer_backward", torch::CppFunction::makeFromBoxedFunction<&without_derivative>());
  m.impl("gemm", torch::CppFunction::makeFromBoxedFunction<&without_derivative>());
}

}  // namespace fastrnn
