// Let F(x) be a layer's results, x its input, weights and states, and B(x, g) = F'(x)^T g its backward. Where somebody asks
// for the gradients of <u, B(x, g)>, they are, since <u, F'(x)^T g> = <F'(x) u, g>,
//   by g   F'(x) u           the derivative of F in the direction u,
//   by x   d/dt B(x + t u, g) at t = 0    that of B, since second derivatives are symmetric.
// So forward and backward run once each on x with the slopes u, and what is asked for are the slopes of their results.
#include "second_derivative.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include "autograd.h"
#include "call_tensors.h"
#include "dual_tensors.h"
#include "layer.h"

namespace fastrnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr OptionalTensor LayerGiven::* kGivenGradients[] = {&LayerGiven::grad_output, &LayerGiven::grad_h_n,
                                                            &LayerGiven::grad_c_n, &LayerGiven::grad_cells};

// What the node is about.
struct Twice {
  LayerCall call;
  LayerGiven given;
  LayerGradients directions{};  // cotangents of the first derivatives, weights' [P, ...]; undefined: 0
};
struct SecondGradients {
  LayerGradients of_call{};            // weights' [P, ...]
  std::array<Tensor, 4> of_given{};  // of kGivenGradients
};

// wanted: of what second derivatives are asked for.
SecondGradients by_duals(const Twice& twice, const Needed& wanted) {
  LayerCall call = held_under_lock(twice.call);
  call.dual = true;
  const LayerGradients& u = twice.directions;
  call.constant_weights = !u[kOf_weight_ih].defined() && !u[kOf_weight_hh].defined() && !u[kOf_weight_hr].defined();
  call.input = dual(call.input, u[kOf_input]);
#define FASTRNN_DUAL(name)                                  \
  for (size_t p = 0; p < call.weights.name.size(); ++p)     \
    call.weights.name[p] = dual(call.weights.name[p], u[kOf_##name].defined() ? u[kOf_##name].select(0, p) : Tensor());
  FASTRNN_FOR_EACH_WEIGHT(FASTRNN_DUAL)
#undef FASTRNN_DUAL
  States& states = call.states;
  const auto state = [&](OptionalTensor& x, const Tensor& slope) {
    if (x) x = dual(*x, slope);
  };
  state(states.h_0, u[kOf_h_0]);
  state(states.c_0, u[kOf_c_0]);
  state(states.reset_h, u[kOf_reset_h]);
  state(states.reset_c, u[kOf_reset_c]);
  for (OptionalTensor* x : {&states.mask_h, &states.keep_h, &states.keep_c})
    if (*x) *x = dual((*x)->to(twice.call.input.scalar_type()));

  const LayerResults out = layer_forward(call, /*save=*/true, twice.given.grad_cells.has_value());
  SecondGradients found;
  const Tensor* results[] = {&out.output, &out.h_n, &out.c_n, &out.cells};
  const auto dtype = twice.call.input.scalar_type();
  for (int i = 0; i < 4; ++i)
    if (twice.given.*kGivenGradients[i]) found.of_given[i] = slopes_of(*results[i]).to(dtype);

  bool any = false;
  for (const bool one : wanted) any |= one;
  if (!any) return found;
  LayerGiven given;
  for (const auto grad : kGivenGradients)
    if (twice.given.*grad) given.*grad = dual(*(twice.given.*grad));
  given.output = out.output;
  given.saved = out.saved;
  given.may_overwrite = true;
  found.of_call = layer_backward(call, given, wanted);
  for (Tensor& x : found.of_call)
    if (x.defined()) x = slopes_of(x).to(dtype);
  return found;
}

// What the node is given, in this order.
variable_list arguments(const LayerCall& call, const LayerGiven& given) {
  variable_list tensors = differentiables(call);
  for (const auto grad : kGivenGradients)
    if (given.*grad) tensors.push_back(*(given.*grad));
  return tensors;
}

bool are_ordinary(const variable_list& tensors) {
  if (!is_plain_thread()) return false;
  for (const Tensor& x : tensors)
    if (x.defined() && !is_ordinary(x)) return false;
  return true;
}

struct LayerBackwardFunction : torch::autograd::Function<LayerBackwardFunction> {
  // tensors: the call's differentiable ones, and the gradients that were given. Results: the gradients that are defined.
  static variable_list forward(AutogradContext* ctx, const LayerCall& call, const LayerGiven& given,
                               const Needed& needed, at::TensorList) {
    LayerGradients grads;
    {
      const LayerCall own = held_under_lock(call);
      const at::AutoDispatchBelowADInplaceOrView below;
      RECORD_FUNCTION("fastrnn::layer_backward", {});
      grads = layer_backward(own, given, needed);
    }
    ctx->set_materialize_grads(false);
    variable_list kept = tensors_of(call), result;
    for (const auto grad : kGivenGradients) kept.push_back(or_undefined(given.*grad));
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["cell"] = call.cell;
    ctx->saved_data["reverse"] = list_of(call.reverse);
    std::vector<int64_t> found;  // all that are needed, in their order
    for (int of = 0; of < kGradients; ++of)
      if (needed[of]) {
        found.push_back(of);
        result.push_back(grads[of]);
      }
    ctx->saved_data["found"] = found;
    return result;
  }

  static variable_list backward(AutogradContext* ctx, variable_list cotangents) {
    Twice twice;
    LayerCall& call = twice.call;
    const variable_list kept = ctx->get_saved_variables();
    call.cell = ctx->saved_data["cell"].toStringRef();
    for (const bool flag : ctx->saved_data["reverse"].toBoolList()) call.reverse.push_back(flag);
    auto next = kept.begin();
    take_tensors(next, call);
    for (const auto grad : kGivenGradients) twice.given.*grad = or_none(*next++);
    const std::vector<int64_t> found = ctx->saved_data["found"].toIntVector();
    bool any = false;
    for (size_t i = 0; i < found.size(); ++i) {
      twice.directions[found[i]] = cotangents[i];
      any |= cotangents[i].defined();
    }
    constexpr size_t kFirst = 3;  // behind call, given and needed, which have no gradient
    variable_list result(kFirst + arguments(call, twice.given).size());
    if (!any) return result;
    if (at::GradMode::is_enabled() || !are_ordinary(cotangents)) {
      const variable_list grads = composed_second_derivative(call, twice.given, twice.directions);
      std::copy(grads.begin(), grads.end(), result.begin() + kFirst);
      return result;
    }
    Needed wanted{};
    size_t edge = 0;
    for_each_differentiable(call, [&](Gradient of, const Tensor&) { wanted[of] |= ctx->needs_input_grad(edge++); });
    const at::AutoDispatchBelowADInplaceOrView below;
    RECORD_FUNCTION("fastrnn::layer_second_derivative", {});
    const SecondGradients grads = by_duals(twice, wanted);
    edge = 0;
    std::array<int64_t, kGradients> count{};
    for_each_differentiable(call, [&](Gradient of, const Tensor&) {
      const int64_t p = count[of]++;
      if (ctx->needs_input_grad(edge) && grads.of_call[of].defined())
        result[kFirst + edge] = is_weight(of) ? grads.of_call[of].select(0, p) : grads.of_call[of];
      ++edge;
    });
    for (int i = 0; i < 4; ++i)
      if (twice.given.*kGivenGradients[i]) {
        if (ctx->needs_input_grad(edge)) result[kFirst + edge] = grads.of_given[i];
        ++edge;
      }
    return result;
  }
};

}  // namespace

bool has_second_derivative(const LayerCall& call) {
  // A clamped gradient is no linear function of what it is made of, so the two derivatives are not each other's mirror.
  return call.input.defined() && call.input.is_cpu() && call.input.is_floating_point() && call.grad_clip == 0;
}

LayerGradients differentiable_backward(const LayerCall& call, const LayerGiven& given, const Needed& needed) {
  const variable_list tensors = arguments(call, given);
  const variable_list found = LayerBackwardFunction::apply(call, given, needed, at::TensorList(tensors));
  LayerGradients grads;
  size_t next = 0;
  for (int of = 0; of < kGradients && next < found.size(); ++of)
    if (needed[of]) grads[of] = found[next++];
  return grads;
}

}  // namespace fastrnn
