#include "autograd.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "call_tensors.h"
#include "check.h"
#include "second_derivative.h"

namespace fastrnn {
namespace {

namespace py = pybind11;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const c10::OperatorHandle& op_named(const char* name) {
  static const c10::OperatorHandle forward = c10::Dispatcher::singleton().findSchemaOrThrow("fastrnn::layer_forward", ""),
                                   backward =
                                       c10::Dispatcher::singleton().findSchemaOrThrow("fastrnn::layer_backward", "");
  return name[0] == 'f' ? forward : backward;
}

// How many tensors a call has of each thing that may have a gradient, in the order of their gradients.
using Counts = std::array<int64_t, kGradients>;

LayerResults by_dispatcher(const LayerCall& call, bool save, bool all_states) {
  torch::jit::Stack stack = stack_of(call, save, all_states);
  op_named("forward").callBoxed(stack);
  const auto result = [&](int i) { return stack[i].toTensor(); };
  return {result(0), result(1), result(2), result(3), result(4)};
}

LayerGradients by_dispatcher(const LayerCall& call, const LayerGiven& given, const Needed& needed) {
  torch::jit::Stack stack = stack_of(call, given, needed);
  op_named("backward").callBoxed(stack);
  LayerGradients grads;
  for (int i = 0; i < kGradients; ++i)
    if (needed[i]) grads[i] = stack[i].toTensor();
  return grads;
}

PyObject *composed = nullptr, *composed_twice = nullptr;

// The weights that a first derivative does not look at, but a second one does. They are not saved as the others are, for
// until then anybody may write to them in place.
struct LeftOut {
  // looked_at: the call without them. Each has an entry of its own: compiled autograd looks into no list.
  static void put(const LayerCall& call, const LayerCall& looked_at, AutogradContext& ctx) {
    int64_t versions = 0, at = 0;
#define FASTRNN_PUT(name)                                 \
  if (looked_at.weights.name.empty())                     \
    for (const Tensor& x : call.weights.name) {           \
      ctx.saved_data[key(at++)] = x;                      \
      versions += version(x);                             \
    }
    FASTRNN_FOR_EACH_WEIGHT(FASTRNN_PUT)
#undef FASTRNN_PUT
    ctx.saved_data["versions"] = versions;
  }
  // Puts them into the call, unless one has been written to. counts: of the call's tensors.
  static bool take(AutogradContext& ctx, const Counts& counts, LayerCall& call) {
    int64_t versions = 0, at = 0;
#define FASTRNN_TAKE(name)                                         \
  if (call.weights.name.empty())                                   \
    for (int64_t i = 0; i < counts[kOf_##name]; ++i) {             \
      call.weights.name.push_back(ctx.saved_data[key(at++)].toTensor()); \
      versions += version(call.weights.name.back());               \
    }
    FASTRNN_FOR_EACH_WEIGHT(FASTRNN_TAKE)
#undef FASTRNN_TAKE
    return versions == ctx.saved_data["versions"].toInt();
  }

 private:
  static std::string key(int64_t i) { return "left_out_" + std::to_string(i); }
  // It only grows.
  static int64_t version(const Tensor& x) { return x.is_inference() ? 0 : x._version(); }
};

// Are these tensors, or the thread, functorch's, or have they tangents?
bool is_transformed(const variable_list& tensors) {
  static const c10::DispatchKeySet wrappers({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
                                             c10::DispatchKey::Batched});
  if (c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) return true;
  for (const Tensor& x : tensors)
    if (x.defined() && (x.key_set().has_any(wrappers) || x._fw_grad(/*level=*/0).defined())) return true;
  return false;
}

// A cell's single step, whose input and states are [B, n], as a layer of one step.
LayerCall as_layer(LayerCall call) {
  if (call.input.defined()) call.input = call.input.unsqueeze(0);
  if (call.states.h_0) call.states.h_0 = call.states.h_0->unsqueeze(0);
  if (call.states.c_0) call.states.c_0 = call.states.c_0->unsqueeze(0);
  return call;
}
// Such a step's results: its states are [B, n].
LayerResults of_step(LayerResults out) {
  out.h_n = out.h_n.squeeze(0);
  if (out.c_n.dim() == 3) out.c_n = out.c_n.squeeze(0);
  return out;
}

// The node. Saved: batch_sizes, offsets, input, all weights but the biases, the states, output and saved. A cell's step is
// reshaped within: views around the node would be nodes of their own, and take half as long as it again.
struct LayerFunction : torch::autograd::Function<LayerFunction> {
  static constexpr bool is_traceable = true;  // by compiled autograd: backward reads what ctx has, and calls ops

  // tensors: what for_each_differentiable visits.
  static variable_list forward(AutogradContext* ctx, const LayerCall& call, bool all_states, bool plain, bool step,
                               at::TensorList tensors) {
    LayerResults out;
    if (plain) {
      LayerCall own = held_call(call);
      const py::gil_scoped_release released;
      const at::AutoDispatchBelowADInplaceOrView below;
      if (step) own = as_layer(std::move(own));
      RECORD_FUNCTION("fastrnn::layer_forward", {});
      out = layer_forward(own, /*save=*/true, all_states);
      if (step) out = of_step(std::move(out));
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      out = by_dispatcher(call, /*save=*/true, all_states);
    }
    ctx->set_materialize_grads(false);
    Counts counts{};
    for_each_differentiable(call, [&](Gradient of, const Tensor&) { ++counts[of]; });
    // What may be asked for. (needs_input_grad would answer for the backward in whose midst this may run, as a checkpoint's
    // second forward pass does.)
    bool of_weight_ih = false;
    for (const Tensor& x : call.weights.weight_ih) of_weight_ih |= x.requires_grad();
    // Biases are not looked at again; the input is for weight_ih's gradient alone, and weight_ih for the input's. Of
    // tokens weight_ih says how many there may be.
    const bool tokens = call.input.scalar_type() != out.output.scalar_type();
    LayerCall looked_at = call;
    if (!of_weight_ih) looked_at.input = Tensor();
    if (!call.input.requires_grad() && !(tokens && of_weight_ih)) looked_at.weights.weight_ih.clear();
    looked_at.weights.bias_ih.clear();
    looked_at.weights.bias_hh.clear();
    variable_list kept = tensors_of(looked_at);
    kept.push_back(out.output);
    kept.push_back(out.saved);
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data.reserve(16);  // for all that follows, at once
    LeftOut::put(call, looked_at, *ctx);
    ctx->saved_data["cell"] = call.cell;
    ctx->saved_data["reverse"] = list_of(call.reverse);
    ctx->saved_data["grad_clip"] = call.grad_clip;
    ctx->saved_data["step"] = step;
    ctx->saved_data["hooked"] = at::SavedTensorDefaultHooks::get_hooks().has_value();
    ctx->saved_data["counts"] = c10::IValue(c10::IntArrayRef(counts));
    return {out.output, out.h_n, out.c_n, out.cells, out.saved};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Counts counts;
    const auto saved_counts = ctx->saved_data["counts"].toIntVector();
    std::copy(saved_counts.begin(), saved_counts.end(), counts.begin());
    int64_t all = 0;
    for (const int64_t count : counts) all += count;
    size_t at = 4;  // behind call, all_states, plain and step, which have no gradient
    variable_list result(at + all);
    bool any = false;
    for (Tensor& grad : grads) {
      if (grad.defined() && grad.dim() == 1) grad = Tensor();  // of a result that does not apply, which has size 0
      any |= grad.defined();
    }
    if (!any) return result;

    Needed needed{};
    size_t edge = 0;
    for (int of = 0; of < kGradients; ++of)
      for (int64_t i = 0; i < counts[of]; ++i) needed[of] |= ctx->needs_input_grad(edge++);

    const variable_list kept = ctx->get_saved_variables();
    auto next = kept.begin();
    LayerCall call;
    LayerGiven given;
    call.cell = ctx->saved_data["cell"].toStringRef();
    for (const bool flag : ctx->saved_data["reverse"].toBoolList()) call.reverse.push_back(flag);
    call.grad_clip = ctx->saved_data["grad_clip"].toDouble();
    take_tensors(next, call);
    given.output = *next++;
    given.saved = *next++;
    const bool again = at::GradMode::is_enabled();  // is a derivative of this one asked for?
    const bool composed = grads[4].defined() || is_transformed(grads);
    const bool ordinary = is_plain_thread() && are_ordinary(kept) && are_ordinary(grads);
    const bool by_kernel = ordinary && !again && !composed;
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;  // nobody asks what is a view of what
    if (by_kernel) below.emplace();
    const bool step = ctx->saved_data["step"].toBool();
    if (step) {
      call = as_layer(std::move(call));
      for (const int i : {1, 2})
        if (grads[i].defined()) grads[i] = grads[i].unsqueeze(0);
    }
    given.grad_output = or_none(grads[0]);
    given.grad_h_n = or_none(grads[1]);
    given.grad_c_n = or_none(grads[2]);
    given.grad_cells = or_none(grads[3]);

    LayerGradients found;
    if (by_kernel) {
      const LayerCall own = held_under_lock(call);
      given.may_overwrite = !ctx->saved_data["hooked"].toBool() && is_last_look(given.saved);
      RECORD_FUNCTION("fastrnn::layer_backward", {});
      found = layer_backward(own, given, needed);
    } else if (again && !composed && ordinary && LeftOut::take(*ctx, counts, call) && has_second_derivative(call)) {
      found = differentiable_backward(call, given, needed);
    } else if (again || composed) {
      found = composed_backward(call, given, grads[4], needed);
    } else {
      found = by_dispatcher(call, given, needed);
    }

    edge = 0;
    for (int of = 0; of < kGradients; ++of)
      for (int64_t i = 0; i < counts[of]; ++i, ++at, ++edge) {
        if (!ctx->needs_input_grad(edge) || !found[of].defined()) continue;
        result[at] = is_weight(of) ? found[of].select(0, i) : step ? found[of].squeeze(0) : found[of];
      }
    return result;
  }

 private:
  static bool are_ordinary(const variable_list& tensors) {
    for (const Tensor& x : tensors)
      if (x.defined() && !(is_ordinary(x) || is_ordinary_on_cuda(x))) return false;
    return true;
  }

  // Will nobody look at a saved tensor after this backward pass? Without retain_graph the node cannot run again, and then
  // none but itself holds the memory: what it keeps, and the variable that it has been given of it. (Where hooks have
  // packed it, it is theirs.)
  static bool is_last_look(const Tensor& saved) {
    return !torch::autograd::get_current_graph_task_keep_graph() && saved.has_storage() &&
           saved.storage().use_count() <= 2;
  }
};

}  // namespace

LayerCall held_under_lock(const LayerCall& call) {
  if (!Py_IsInitialized()) return held_call(call);
  const py::gil_scoped_acquire gil;
  return held_call(call);
}

void layer_forward_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const LayerArguments args = read_layer_forward(Reader(op.schema(), *stack));
  const variable_list tensors = differentiables(args.call);
  bool needed = false;
  for (const Tensor& x : tensors) {
    RNN_CHECK_NOT_IMPLEMENTED(!x._fw_grad(/*level=*/0).defined(), op.operator_name().name,
                              ": it has no forward derivative; fastrnn.functional and the modules compose one");
    needed |= x.requires_grad();
  }
  if (!needed || !at::GradMode::is_enabled()) return op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  const variable_list out = LayerFunction::apply(args.call, args.all_states, /*plain=*/false, /*step=*/false,
                                                   at::TensorList(tensors));
  torch::jit::drop(*stack, count);
  for (const Tensor& x : out) stack->emplace_back(x);
}

namespace {

py::object for_python(const OptionalTensor& x) { return x ? py::cast(*x) : py::none(); }
py::tuple for_python(const Group& x) {
  py::tuple items(x.size());
  for (size_t i = 0; i < x.size(); ++i) items[i] = py::cast(x[i]);
  return items;
}

// function(cell, grads, input, weights, states, batch_sizes, offsets, reverse, more..) of fastrnn/composed.py; grads are of
// what forward gives, and `last`.
template <class... More>
py::tuple call_python(PyObject* function, const LayerCall& call, const LayerGiven& given, const Tensor& last,
                      const More&... more) {
  RNN_CHECK(function, "layer_backward: fastrnn has not been imported");
  py::dict weights, states;
#define FASTRNN_GIVE(name) weights[#name] = for_python(call.weights.name);
  FASTRNN_FOR_EACH_WEIGHT(FASTRNN_GIVE)
#undef FASTRNN_GIVE
#define FASTRNN_GIVE(name) states[#name] = for_python(call.states.name);
  FASTRNN_FOR_EACH_STATE(FASTRNN_GIVE)
#undef FASTRNN_GIVE
  const py::tuple grads = py::make_tuple(for_python(given.grad_output), for_python(given.grad_h_n),
                                         for_python(given.grad_c_n), for_python(given.grad_cells),
                                         for_python(or_none(last)));
  const py::list reverse = py::cast(call.reverse);
  return py::handle(function)(call.cell, grads, for_python(or_none(call.input)), weights, states,
                              for_python(call.batch_sizes), for_python(call.offsets), reverse, more...);
}

// body() under the GIL, an error of Python's as one that autograd raises again.
template <class Body>
auto with_python(Body body) {
  const py::gil_scoped_acquire gil;
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
    python_error kept;
    kept.persist();
    throw std::move(kept);
  }
}

}  // namespace

LayerGradients composed_backward(const LayerCall& call, const LayerGiven& given, const Tensor& grad_saved,
                                 const Needed& needed) {
  return with_python([&] {
    const py::list wanted = py::cast(std::vector<bool>(needed.begin(), needed.end()));
    const py::tuple found =
        call_python(composed, call, given, grad_saved, given.output, given.saved, wanted, call.grad_clip);
    LayerGradients result;
    for (int i = 0; i < kGradients; ++i)
      if (needed[i] && !found[i].is_none()) result[i] = found[i].cast<Tensor>();
    return result;
  });
}

variable_list composed_second_derivative(const LayerCall& call, const LayerGiven& given,
                                         const LayerGradients& directions) {
  return with_python([&] {
    py::tuple along(size_t{kGradients});
    for (int i = 0; i < kGradients; ++i) along[i] = for_python(or_none(directions[i]));
    variable_list result;
    for (const py::handle x : call_python(composed_twice, call, given, {}, along)) result.push_back(x.cast<Tensor>());
    return result;
  });
}

LayerResults differentiable_layer(const LayerCall& call, bool step) {
  const variable_list tensors = differentiables(call);
  if (!at::GradMode::is_enabled() || !torch::autograd::any_variable_requires_grad(tensors)) {
    LayerCall own = held_call(call);
    const py::gil_scoped_release released;
    const at::AutoDispatchBelowADInplaceOrView below;
    if (step) own = as_layer(std::move(own));
    RECORD_FUNCTION("fastrnn::layer_forward", {});
    LayerResults out = layer_forward(own, /*save=*/false, /*all_states=*/false);
    return step ? of_step(std::move(out)) : out;
  }
  const variable_list out =
      LayerFunction::apply(call, /*all_states=*/false, /*plain=*/true, step, at::TensorList(tensors));
  return {out[0], out[1], out[2], out[3], out[4]};
}

void set_composed(py::object backward, py::object second_derivative) {
  composed = backward.release().ptr();
  composed_twice = second_derivative.release().ptr();
}

}  // namespace fastrnn
