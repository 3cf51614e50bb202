// The recurrence's ops in forward-mode AD, on a CPU in float32 and float64: arguments and their tangents in, results and
// their tangents out. One run of the op's own kernel on dual numbers (csrc/cpu/dual-inl.h) makes both. Of backward that is
// half of a Hessian-vector product, forward over reverse. fastrnn/autograd.py calls them, and makes their derivatives.
#include <torch/library.h>

#include <initializer_list>

#include "check.h"
#include "dual_tensors.h"
#include "ops.h"
#include "prepare.h"

namespace fastrnn {
namespace {

using torch::jit::Stack;

// As messages say it: without its namespace.
const char* name_of(const c10::OperatorHandle& op) {
  return op.operator_name().name.c_str() + sizeof("fastrnn::") - 1;
}

// The tangents of a call, in their order.
class Tangents {
 public:
  Tangents(const c10::OperatorHandle& op, Reader& from) : op_(name_of(op)), from_(from) {}
  // Makes x dual with the next one. Is there one?
  bool join(const char* name, Tensor& x) {
    const OptionalTensor tangent = from_.optional();
    check_storage(op_, name, x);
    if (tangent) {
      RNN_CHECK(tangent->sizes() == x.sizes() && tangent->scalar_type() == x.scalar_type(), op_, ": tangent of ", name,
                ": expected ", x.sizes(), " of ", x.scalar_type(), ", got ", tangent->sizes(), " of ",
                tangent->scalar_type());
      check_storage(op_, name, *tangent);
    }
    x = dual(x, tangent ? *tangent : Tensor());
    return tangent.has_value();
  }
  bool join(const char* name, OptionalTensor& x) {
    if (x) return join(name, *x);
    RNN_CHECK(!from_.optional(), op_, ": tangent of ", name, ": expected none, as there is no ", name, ", got one");
    return false;
  }

 private:
  const char* const op_;
  Reader& from_;
};

const RecurrentKernels& kernels_for(const c10::OperatorHandle& op, const char* name, const Tensor& x) {
  RNN_CHECK_TYPE(kernel_dtype(x.scalar_type()), name_of(op), ": ", name,
                 ": expected float32, float64, bfloat16 or float16, got ", x.scalar_type());
  return *recurrent_kernels(at::kCPU);
}

// Says that a call's tensors are dual, and makes its constants so.
void mark_dual(const c10::OperatorHandle& op, Recurrence& args) {
  args.dual = true;
  const auto join = [&](const char* name, OptionalTensor& x) {
    if (!x) return;
    check_storage(name_of(op), name, *x);
    x = dual(x->scalar_type() == at::kBool ? x->to(c10::toRealValueType(args.weight_hh.scalar_type())) : *x);
  };
  join("mask_h", args.states.mask_h);
  join("keep_h", args.states.keep_h);
  join("keep_c", args.states.keep_c);
}

// As a call's results: the values of dual ones, and then their slopes. Dual numbers of half types are float32's; in these
// `wide` stays, as sums over steps do.
void give(const c10::OperatorHandle& op, Stack& stack, at::ScalarType dtype, std::initializer_list<const Tensor*> results,
          const Tensor* wide = nullptr) {
  torch::jit::drop(stack, op.schema().arguments().size());
  const auto own = [&](const Tensor* x) { return x == wide ? at::toOpMathType(dtype) : dtype; };
  for (const Tensor* x : results) stack.emplace_back(values_of(*x).to(own(x)));
  for (const Tensor* x : results) stack.emplace_back(slopes_of(*x).to(own(x)));
}

#define FASTRNN_JOIN(name) [[maybe_unused]] const bool slope_of_##name = tangents.join(#name, name);

void recurrent_forward_jvp(const c10::OperatorHandle& op, Stack* stack) {
  Reader from(op.schema(), *stack);
  RecurrentForwardArguments args = read_recurrent_forward(from);
  auto& [h_0, c_0, lengths, resets, reset_h, reset_c, mask_h, keep_h, keep_c] = args.call.states;
  Tensor &gates_ih = args.gates_ih, &weight_hh = args.call.weight_hh;
  OptionalTensor &bias_hh = args.call.bias_hh, &weight_hr = args.call.weight_hr, &params = args.call.params;
  const RecurrentKernels& kernels = kernels_for(op, "gates_ih", gates_ih);
  const auto dtype = gates_ih.scalar_type();
  Tangents tangents(op, from);
  FASTRNN_FOR_EACH_FORWARD_TANGENT(FASTRNN_JOIN)
  args.call.constant_weights = !slope_of_weight_hh && !slope_of_weight_hr;
  mark_dual(op, args.call);
  const LayerResults out = kernels.forward(args.call, gates_ih, args.save, /*in_place=*/false);
  give(op, *stack, dtype, {&out.output, &out.h_n, &out.c_n, &out.saved});
}

void recurrent_backward_jvp(const c10::OperatorHandle& op, Stack* stack) {
  Reader from(op.schema(), *stack);
  RecurrentBackwardArguments args = read_recurrent_backward(from);
  auto& [h_0, c_0, lengths, resets, reset_h, reset_c, mask_h, keep_h, keep_c] = args.call.states;
  auto& [grad_output, grad_h_n, grad_c_n, grad_cells, output, saved, in_place] = args.given;
  Tensor& weight_hh = args.call.weight_hh;
  OptionalTensor &weight_hr = args.call.weight_hr, &params = args.call.params;
  const RecurrentKernels& kernels = kernels_for(op, "output", output);
  const auto dtype = output.scalar_type();
  Tangents tangents(op, from);
  FASTRNN_FOR_EACH_BACKWARD_TANGENT(FASTRNN_JOIN)
  args.call.constant_weights = !slope_of_weight_hh && !slope_of_weight_hr;
  mark_dual(op, args.call);
  const RecurrentGradients out = kernels.backward(args.call, args.given, args.initial);
#define FASTRNN_ADDRESS(name) &out.name,
  give(op, *stack, dtype, {FASTRNN_FOR_EACH_RECURRENT_GRADIENT(FASTRNN_ADDRESS)}, &out.params);
#undef FASTRNN_ADDRESS
}
#undef FASTRNN_JOIN

TORCH_LIBRARY_IMPL(fastrnn, CPU, m) {
  m.impl("recurrent_forward_jvp", torch::CppFunction::makeFromBoxedFunction<&recurrent_forward_jvp>());
  m.impl("recurrent_backward_jvp", torch::CppFunction::makeFromBoxedFunction<&recurrent_backward_jvp>());
}

}  // namespace
}  // namespace fastrnn
