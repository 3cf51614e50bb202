// The ops' schemas, and the CPU's kernels of the recurrence. A schema is put together here from the lists of arguments.h,
// which says what the arguments are; fastrnn/ops.py gives the same ops their fake, autograd, vmap and autocast behaviour.
//
//   Results that do not apply have size 0; none aliases an argument or another result.
//   grad_clip: recurrent_forward and layer_forward have it for their derivatives.
//   initial: are the gradients of h_0 and c_0 wanted?
#include "ops.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "../cells/registry.h"
#include "../launch.h"
#include "autograd.h"
#include "check.h"

namespace fastrnn {
namespace {

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

LayerResults forward_cpu(const Recurrence& args, const Tensor& gates_ih, bool save, bool in_place) {
  PreparedForward run = prepare_forward(args, gates_ih, save, in_place);
  if (run.params.batch > 0) cpu::recurrent_forward(run.params, threads());
  return run.results();
}

RecurrentGradients backward_cpu(const Recurrence& args, const Given& given, bool initial) {
  PreparedBackward run = prepare_backward(args, given, initial);
  if (run.params.batch > 0) cpu::recurrent_backward(run.params, threads());
  return run.results();
}

Tensor gemm_cpu(const Tensor& a, const Tensor& b, const OptionalTensor& bias, bool transpose_a, bool transpose_b) {
  PreparedGemm call = prepare_gemm(a, b, bias, transpose_a, transpose_b);
  if (call.out.numel() > 0) cpu::gemm(call.params, threads());
  return call.out;
}

Tensor bernoulli_cpu(const Tensor& seed, at::IntArrayRef size, double p, at::ScalarType dtype) {
  RNN_CHECK_TYPE(seed.scalar_type() == at::kLong, "bernoulli: seed: expected dtype int64, got ", seed.scalar_type());
  check_storage("bernoulli", "seed", seed);
  RNN_CHECK_VALUE(p >= 0 && p <= 1, "bernoulli: p: expected a probability, 0 to 1, got ", p);
  // Before a tensor of it is made: torch lets any number through, and looks it up in a table that has no such entry.
  const std::optional<DType> type = dtype == at::kBool ? DType::kBool : kernel_dtype(dtype);
  RNN_CHECK_TYPE(type, "bernoulli: dtype: expected float32, float64, bfloat16, float16 or bool, got ", dtype);
  std::vector<int64_t> sizes = seed.sizes().vec();
  sizes.insert(sizes.end(), size.begin(), size.end());
  const Tensor out = at::empty(sizes, seed.options().dtype(dtype)), seeds = seed.contiguous();
  const int64_t each = seed.numel() > 0 ? out.numel() / seed.numel() : 0;
  char* const data = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t n = 0; n < seed.numel(); ++n)
    at::parallel_for(0, ceil_div(each, 2), 1 << 14, [&](int64_t begin, int64_t end) {
      cpu::bernoulli(*type, data + n * each * out.element_size(), 2 * begin, std::min(2 * end, each),
                     static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[n]), p);
    });
  return out;
}

bool has_gemm(const Tensor& x) { return x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble; }

// Below this many products of a row with a column the time goes into packing the other matrix.
constexpr int64_t kFewestRows = 32;

void product_cpu(const Tensor& out, const Tensor& a, const Tensor& b, bool add, int64_t) {
  Tensor to = out;
  if (add) {
    to.addmm_(a, b);
  } else if (has_gemm(a) && out.is_contiguous() && a.size(a.stride(0) == 1 ? 1 : 0) >= kFewestRows) {
    const bool turned = a.stride(0) == 1 && a.stride(1) != 1;
    const PreparedGemm run = prepare_gemm(turned ? a.t() : a, b, std::nullopt, turned, false, out);
    if (out.numel() > 0) cpu::gemm(run.params, threads());
  } else {
    at::mm_out(to, a, b);
  }
}

Tensor linear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t) {
  return at::linear(x, weight, bias);
}

Tensor sum_rows_cpu(const Tensor& x) { return x.sum(at::IntArrayRef{0, 1}); }

constexpr RecurrentKernels kKernels{forward_cpu, backward_cpu, product_cpu, linear_cpu, sum_rows_cpu};
[[maybe_unused]] const bool known = (set_recurrent_kernels(at::kCPU, kKernels), true);

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
  const CellInfo& info = kCells[known_cell(cell)];
  return {info.gates, info.states, info.saved, info.params, info.separate_gates_hh, info.keeps_made, takes_zoneout(info)};
}

// ---- kernels of the ops: arguments from the stack, results onto it ----

using Stack = torch::jit::Stack;

template <class... Results>
void give(const c10::OperatorHandle& op, Stack& stack, const Results&... results) {
  torch::jit::drop(stack, op.schema().arguments().size());
  (stack.emplace_back(results), ...);
}

void read_recurrence(Reader& from, Recurrence& args) {
#define FASTRNN_READ(name) args.name = from.optional();
  FASTRNN_FOR_EACH_RECURRENT_WEIGHT(FASTRNN_READ)
#undef FASTRNN_READ
  from.read(args.states);
  args.reverse = from.flags();
}

// Of a device whose kernels `args` name: arguments may lie on several, which a check then tells.
const RecurrentKernels& kernels_for(const Tensor& x, const char* op, const char* name) {
  const RecurrentKernels* found = recurrent_kernels(x.device().type());
  RNN_CHECK(found, op, ": ", name, ": expected a device of ours, as that of another argument, got ", x.device());
  return *found;
}

void recurrent_forward(const c10::OperatorHandle& op, Stack* stack) {
  Reader from(op.schema(), *stack);
  const auto [args, gates_ih, save] = read_recurrent_forward(from);
  const LayerResults out = kernels_for(gates_ih, "recurrent_forward", "gates_ih").forward(args, gates_ih, save, false);
  give(op, *stack, out.output, out.h_n, out.c_n, out.saved);
}

void recurrent_backward(const c10::OperatorHandle& op, Stack* stack) {
  Reader from(op.schema(), *stack);
  const auto [args, given, initial] = read_recurrent_backward(from);
  const RecurrentGradients out =
      kernels_for(given.output, "recurrent_backward", "output").backward(args, given, initial);
  torch::jit::drop(*stack, op.schema().arguments().size());
#define FASTRNN_GIVE(name) stack->emplace_back(out.name);
  FASTRNN_FOR_EACH_RECURRENT_GRADIENT(FASTRNN_GIVE)
#undef FASTRNN_GIVE
}

void quantized_forward(const c10::OperatorHandle& op, Stack* stack) {
  Reader from(op.schema(), *stack);
  Recurrence args;
  Narrow narrow;
  args.cell = from.text();
  const Tensor input = from.tensor();
  narrow.weight_ih = from.tensor();
  narrow.scale_ih = from.optional();
  narrow.sum_ih = from.optional();
  const OptionalTensor bias_ih = from.optional();
  args.weight_hh = from.tensor();
  narrow.scale_hh = from.optional();
  narrow.sum_hh = from.optional();
  args.bias_hh = from.optional();
  read_recurrence(from, args);
  PreparedForward run = prepare_quantized(args, input, narrow, bias_ih);
  if (run.params.batch > 0) cpu::layer_forward(run.params, run.layer, threads());
  give(op, *stack, run.output, run.h_n, run.c_n);
}

void layer_forward_kernel(const c10::OperatorHandle& op, Stack* stack) {
  const LayerArguments args = read_layer_forward(Reader(op.schema(), *stack));
  const LayerResults out = layer_forward(args.call, args.save, args.all_states);
  give(op, *stack, out.output, out.h_n, out.c_n, out.cells, out.saved);
}

void layer_backward_kernel(const c10::OperatorHandle& op, Stack* stack) {
  const LayerBackwardArguments args = read_layer_backward(Reader(op.schema(), *stack));
  LayerGradients grads = layer_backward(args.call, args.given, args.needed);
  torch::jit::drop(*stack, op.schema().arguments().size());
  for (Tensor& x : grads) stack->emplace_back(x.defined() ? x : args.given.output.new_empty({0}));
}

}  // namespace

RecurrentForwardArguments read_recurrent_forward(Reader& from) {
  RecurrentForwardArguments args;
  args.call.cell = from.text();
  args.gates_ih = from.tensor();
  args.call.weight_hh = from.tensor();
  args.call.bias_hh = from.optional();
  read_recurrence(from, args.call);
  args.save = from.value().toBool();
  check_grad_clip("recurrent_forward", from.value().toDouble());
  return args;
}

RecurrentBackwardArguments read_recurrent_backward(Reader& from) {
  RecurrentBackwardArguments args;
  args.call.cell = from.text();
  args.given.grad_output = from.optional();
  args.given.grad_h_n = from.optional();
  args.given.grad_c_n = from.optional();
  args.call.weight_hh = from.tensor();
  read_recurrence(from, args.call);
  args.given.output = from.tensor();
  args.given.saved = from.tensor();
  args.initial = from.value().toBool();
  args.call.grad_clip = from.value().toDouble();
  return args;
}

LayerArguments read_layer_forward(Reader from) {
  LayerArguments args;
  args.call.cell = from.text();
  args.call.input = from.tensor();
  from.read(args.call.weights);
  from.read(args.call.states);
  args.call.batch_sizes = from.optional();
  args.call.reverse = from.flags();
  args.save = from.value().toBool();
  args.call.grad_clip = from.value().toDouble();
  args.all_states = from.value().toBool();
  args.call.offsets = from.optional();
  return args;
}

LayerBackwardArguments read_layer_backward(Reader from) {
  LayerBackwardArguments args;
  args.call.cell = from.text();
  args.given.grad_output = from.optional();
  args.given.grad_h_n = from.optional();
  args.given.grad_c_n = from.optional();
  args.given.grad_cells = from.optional();
  if (const OptionalTensor input = from.optional()) args.call.input = *input;
  from.read(args.call.weights);
  from.read(args.call.states);
  args.call.batch_sizes = from.optional();
  args.call.reverse = from.flags();
  args.given.output = from.tensor();
  args.given.saved = from.tensor();
  const std::vector<bool> needed = from.flags();
  RNN_CHECK(needed.size() == kGradients, "layer_backward: needed: expected ", static_cast<int64_t>(kGradients),
            " values, got ", needed.size());
  std::copy(needed.begin(), needed.end(), args.needed.begin());
  args.call.grad_clip = from.value().toDouble();
  args.call.offsets = from.optional();
  return args;
}

torch::jit::Stack stack_of(const LayerCall& call, bool save, bool all_states) {
  Stack stack;
  stack.reserve(32);
  stack.emplace_back(call.cell);
  stack.emplace_back(call.input);
  push(stack, call.weights);
  push(stack, call.states);
  stack.push_back(value_of(call.batch_sizes));
  stack.emplace_back(list_of(call.reverse));
  stack.emplace_back(save);
  stack.emplace_back(call.grad_clip);
  stack.emplace_back(all_states);
  stack.push_back(value_of(call.offsets));
  return stack;
}

torch::jit::Stack stack_of(const LayerCall& call, const LayerGiven& given, const Needed& needed) {
  Stack stack;
  stack.reserve(32);
  stack.emplace_back(call.cell);
  for (const OptionalTensor* x : {&given.grad_output, &given.grad_h_n, &given.grad_c_n, &given.grad_cells})
    stack.push_back(value_of(*x));
  stack.push_back(call.input.defined() ? c10::IValue(call.input) : c10::IValue());
  push(stack, call.weights);
  push(stack, call.states);
  stack.push_back(value_of(call.batch_sizes));
  stack.emplace_back(list_of(call.reverse));
  stack.emplace_back(given.output);
  stack.emplace_back(given.saved);
  stack.emplace_back(list_of(std::vector<bool>(needed.begin(), needed.end())));
  stack.emplace_back(call.grad_clip);
  stack.push_back(value_of(call.offsets));
  return stack;
}

TORCH_LIBRARY(fastrnn, m) {
  const auto def = [&m](std::initializer_list<const char*> parts) {
    std::string schema;
    for (const char* part : parts) schema += part;
    m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  };
  const char forward[] = "(str cell, Tensor gates_ih, Tensor weight_hh, Tensor? bias_hh, ",
             backward[] = "(str cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor weight_hh, ",
             forward_results[] = "Tensor output, Tensor h_n, Tensor c_n, Tensor saved";
  def({"recurrent_forward", forward, kRecurrentWeightsText, kStatesText,
       "bool[] reverse, bool save, float grad_clip=0.0) -> (", forward_results, ")"});
  def({"recurrent_backward", backward, kRecurrentWeightsText, kStatesText,
       "bool[] reverse, Tensor output, Tensor saved, bool initial=True, float grad_clip=0.0) -> (",
       kRecurrentGradientsText + 2, ")"});
  // Both with tangents beside their arguments and results: jvp.cpp.
  def({"recurrent_forward_jvp", forward, kRecurrentWeightsText, kStatesText, "bool[] reverse, bool save, float grad_clip",
       kForwardTangentsText, ") -> (", forward_results,
       ", Tensor tangent_output, Tensor tangent_h_n, Tensor tangent_c_n, Tensor tangent_saved)"});
  def({"recurrent_backward_jvp", backward, kRecurrentWeightsText, kStatesText,
       "bool[] reverse, Tensor output, Tensor saved, bool initial, float grad_clip", kBackwardTangentsText, ") -> (",
       kRecurrentGradientsText + 2, kTangentGradientsText, ")"});
  // recurrent_forward of gates_ih = weight_ih input + bias_ih, which on a CPU are made a few steps at a time and never
  // stored. Its derivative is made by autograd.cpp.
  def({"layer_forward(str cell, Tensor input, ", kWeightsText, kStatesText,
       "Tensor? batch_sizes, bool[] reverse, bool save, float grad_clip=0.0, bool all_states=False, Tensor? offsets=None) -> "
       "(Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor saved)"});
  // Its gradients, weights' [P, ...]; needed: a flag for each of them.
  def({"layer_backward(str cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, "
       "Tensor? input, ",
       kWeightsText, kStatesText,
       "Tensor? batch_sizes, bool[] reverse, Tensor output, Tensor saved, bool[] needed, float grad_clip=0.0, "
       "Tensor? offsets=None) -> (",
       kGradientsText + 2, ")"});
  // layer_forward for inference on a float32 input with weights of bfloat16 (no scales, no sums) or int8 in blocks; see
  // LayerParams in params.h and fastrnn/quantized.py.
  def({"quantized_forward(str cell, Tensor input, Tensor weight_ih, Tensor? scale_ih, Tensor? sum_ih, Tensor? bias_ih, "
       "Tensor weight_hh, Tensor? scale_hh, Tensor? sum_hh, Tensor? bias_hh, ",
       kRecurrentWeightsText, kStatesText, "bool[] reverse) -> (Tensor output, Tensor h_n, Tensor c_n)"});
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
  // A number of a device's generator in, each element of [*seed.shape, *size] 1 with probability p and else 0.
  m.def("bernoulli(Tensor seed, SymInt[] size, float p, ScalarType dtype) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("cell_names() -> str[]", cell_names);
  // gates, states, saved, params, 1 if grad_gates_hh is a tensor of its own, 1 if zoneout needs no more saved values,
  // 1 if it takes mask_h, keep_h and keep_c
  m.def("cell_info(str cell) -> int[]", cell_info);
}

void register_kernels(torch::Library& m) {
  m.impl("recurrent_forward", torch::CppFunction::makeFromBoxedFunction<&recurrent_forward>());
  m.impl("recurrent_backward", torch::CppFunction::makeFromBoxedFunction<&recurrent_backward>());
  m.impl("layer_forward", torch::CppFunction::makeFromBoxedFunction<&layer_forward_kernel>());
  m.impl("layer_backward", torch::CppFunction::makeFromBoxedFunction<&layer_backward_kernel>());
}

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  register_kernels(m);
  m.impl("quantized_forward", torch::CppFunction::makeFromBoxedFunction<&quantized_forward>());
  m.impl("gemm", gemm_cpu);
  m.impl("grouped_linear", grouped_linear_cpu);
  m.impl("grouped_outer", grouped_outer_cpu);
  m.impl("bernoulli", bernoulli_cpu);
}

TORCH_LIBRARY_IMPL(fastrnn, CompositeExplicitAutograd, m) {
  m.impl("clamp_gradient", [](const Tensor& x, double) {
    check_storage("clamp_gradient", "x", x);
    return x.clone();
  });
}

TORCH_LIBRARY_IMPL(fastrnn, Autograd, m) {
  m.impl("layer_forward", torch::CppFunction::makeFromBoxedFunction<&layer_forward_autograd>());
  m.impl("layer_backward", torch::CppFunction::makeFromBoxedFunction<&without_derivative>());
  m.impl("gemm", torch::CppFunction::makeFromBoxedFunction<&without_derivative>());
}

}  // namespace fastrnn
