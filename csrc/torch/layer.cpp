// A layer is one kernel's work on a CPU (csrc/cpu). Elsewhere (CUDA, tokens) it is the recurrence's kernel with the
// matrix products before and behind it.
#include "layer.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <utility>

#include "../cells/registry.h"
#include "../launch.h"
#include "check.h"

namespace fastrnn {
namespace {

constinit std::array<const RecurrentKernels*, c10::COMPILE_TIME_MAX_DEVICE_TYPES> kernels_by_device{};

const RecurrentKernels& kernels_of(const Tensor& x) {
  const RecurrentKernels* found = recurrent_kernels(x.device().type());
  RNN_CHECK_NOT_IMPLEMENTED(found, "layer: there are no kernels for ", x.device());
  return *found;
}

bool are_tokens(const Tensor& input) { return input.defined() && at::isIntegralType(input.scalar_type(), false); }

thread_local bool by_products = false;

// Is the whole layer one kernel, for tensors like this one (the input, or in backward the output)? Of dual numbers it always
// is: torch's products would take them for complex ones.
bool is_one_kernel(const LayerCall& call, const Tensor& like) {
  return call.dual || (like.is_cpu() && !are_tokens(call.input) && !by_products);
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// A weight of all groups, one below the other: [P*m, n].
Tensor one_matrix(const Group& group) { return group.size() == 1 ? group[0] : at::cat(at::TensorList(group)); }
OptionalTensor one_vector(const Group& group) {
  return group.empty() ? OptionalTensor() : OptionalTensor(one_matrix(group));
}

// ---- packed sequences and nested rows, where the kernels want padded ones; on the CPU alone ----

struct Padded {
  LayerCall call;

  // like: of whose rows there are as many as the sequences have together
  Padded(const char* op, const LayerCall& ragged, const Tensor& like)
      : call(ragged), op_(op), rows_(like.dim() > 0 ? like.size(0) : 0) {
    RNN_CHECK(like.dim() > 0, op, ": input: expected rows of sequences, got ", like.sizes());
    const Layout layout = layout_of(op, ragged.batch_sizes, ragged.offsets, ragged.states, rows_);
    T_ = layout.T, B_ = layout.B;
    places_ = at::empty({rows_}, at::kLong);
    int64_t* places = places_.mutable_data_ptr<int64_t>();
    for (int64_t b = 0; b < B_; ++b)
      for (int64_t t = 0; t < layout.lengths[b]; ++t) places[layout.place(t, b)] = t * B_ + b;
    call.states.lengths = at::tensor(layout.lengths, at::kLong);
    call.batch_sizes = call.offsets = std::nullopt;
  }
  // [N, n] -> [T, B, n], zeros behind each row's end
  Tensor pad(const char* name, const Tensor& x) {
    check_storage(op_, name, x);
    RNN_CHECK(x.dim() > 0 && x.size(0) == rows_, op_, ": ", name, ": expected ", rows_,
              " rows of sequences, got ", x.sizes());
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes[0] = T_ * B_;
    const Tensor padded = at::zeros(sizes, x.options()).index_copy_(0, places_, x);
    sizes[0] = B_;
    sizes.insert(sizes.begin(), T_);
    return padded.view(sizes);
  }
  OptionalTensor pad(const char* name, const OptionalTensor& x) {
    return x ? OptionalTensor(pad(name, *x)) : std::nullopt;
  }
  void pad_states() {
    call.states.keep_h = pad("keep_h", call.states.keep_h);
    call.states.keep_c = pad("keep_c", call.states.keep_c);
  }
  Tensor pack(const Tensor& x) const {
    return x.defined() && x.dim() == 3 ? x.flatten(0, 1).index_select(0, places_) : x;
  }

 private:
  const char* op_;
  int64_t rows_, T_, B_;
  Tensor places_;  // of each value among the T * B padded ones
};

// ---- rows of different lengths ----

// The steps that rows have, [T, B, 1]; lengths [B], or [B, P] of which group p is meant.
Tensor lengths_of(const Tensor& lengths, int64_t p, const Tensor& like) {
  const Tensor own = lengths.dim() == 1 ? lengths : lengths.select(1, p);
  return own.to(like.device(), at::kLong, /*non_blocking=*/own.is_cpu()).view({1, -1, 1});
}
Tensor steps_like(const Tensor& x) { return at::arange(x.size(0), x.options().dtype(at::kLong)).view({-1, 1, 1}); }

// x [T, B, n] with zeros behind each row's end: a NaN there would reach a sum through 0 * NaN.
Tensor without_padding(const Tensor& x, const Tensor& lengths) {
  const Tensor most = lengths.dim() == 1 ? lengths : std::get<0>(lengths.max(1));
  return at::where(steps_like(x) < lengths_of(most, 0, x), x, 0);
}

// A call's input, of either kind.
Tensor without_padding(const LayerCall& call) {
  if (!call.states.lengths) return call.input;
  if (!are_tokens(call.input)) return without_padding(call.input, *call.states.lengths);
  return without_padding(call.input.unsqueeze(2), *call.states.lengths).squeeze(2);
}

// Values of a unit and step in `saved`.
int64_t values_in(const LayerCall& call) {
  return saved_values(kCells[known_cell(call.cell)], call.states.keep_h.has_value(), call.states.keep_c.has_value());
}

// ---- gates in the memory of saved ----
//
// A step's gates_ih may lie where its values are going to be saved, and their gradients where they were (params.h).

// Have the gates of a step room where the cell's own values of the step are saved?
bool fit_in_saved(const LayerCall& call) {
  const CellInfo& cell = kCells[known_cell(call.cell)];
  return cell.gates <= cell.saved - cell.in_c();
}

// May forward make the gates there? bias: is there one to be added to them? That would be a pass of its own there. A
// CPU's kernel leaves alone what is behind a row's end, where saved is to be zero.
bool gates_in_saved(const LayerCall& call, bool bias) {
  return fit_in_saved(call) && !bias && !(call.states.lengths && call.input.is_cpu());
}

// Of a few groups the input's gradient is a product for each, added to the one before; of more, one product of gates side
// by side with weights put together, for a half type is rounded with every addition.
bool are_few(int64_t groups) { return groups <= 2; }

// May backward leave the gates' gradients there? Those of weight_hr and of late gates look at the values once more; the one
// of tokens, and the input's of more than a few groups, would copy gates that lie apart.
bool gradients_in_saved(const LayerCall& call, const LayerGiven& given, const Needed& needed) {
  const bool copied = are_tokens(call.input) && needed[kOf_weight_ih];
  return given.may_overwrite && fit_in_saved(call) && given.saved.is_contiguous() && are_few(call.groups()) &&
         call.weights.weight_hr.empty() && kCells[known_cell(call.cell)].late_gates == 0 && !copied;
}

// [T, B, P, n]: of every group the first n values, gates or their gradients, where they lie so or one behind the other.
Tensor by_group(const Tensor& x, int64_t P, int64_t n) {
  return x.view({x.size(0), x.size(1), P, x.size(2) / P}).narrow(3, 0, n);
}

// ---- forward ----

// W_ih x for the one-hot rows x that tokens stand for: rows of the transposed weight.
Tensor look_up(const Tensor& tokens, const Tensor& weight) {
  Tensor indices = tokens;
  if (tokens.scalar_type() != at::kLong && tokens.scalar_type() != at::kInt) indices = tokens.to(at::kLong);
  if (tokens.is_cpu() && tokens.numel()) {  // elsewhere a look at the values would wait for the device
    const int64_t low = indices.min().item<int64_t>(), high = indices.max().item<int64_t>();
    TORCH_CHECK_INDEX(low >= 0 && high < weight.size(1), message("input: expected tokens in [0, ", weight.size(1),
                                                                 ") (input_size), got ", low, " to ", high));
  }
  return at::embedding(weight.t(), indices);
}

LayerResults forward_by_products(const LayerCall& call, bool save) {
  check_storage("layer_forward", "input", call.input);
  if (call.states.lengths) check_storage("layer_forward", "lengths", *call.states.lengths);
  if (call.batch_sizes || call.offsets) {
    Padded padded("layer_forward", call, call.input);
    padded.call.input = padded.pad("input", call.input);
    padded.pad_states();
    LayerResults out = forward_by_products(padded.call, save);
    out.output = padded.pack(out.output);
    out.saved = padded.pack(out.saved);
    return out;
  }
  Recurrence args = recurrence_of(call, /*stack=*/true);
  const Tensor& input = call.input;
  const bool tokens = are_tokens(input);
  RNN_CHECK(input.dim() == (tokens ? 2 : 3), "layer_forward: input: expected ", tokens ? 2 : 3, " dimensions, got ",
            input.sizes());
  RNN_CHECK(!call.weights.weight_ih.empty() && (tokens || call.weights.weight_ih[0].size(-1) == input.size(2)),
            "layer_forward: weight_ih: expected ", tokens ? 0 : input.size(2), " columns (features of input)");
  for (const Tensor& x : call.weights.weight_ih)
    RNN_CHECK(x.sizes() == call.weights.weight_ih[0].sizes(), "layer_forward: weight_ih: expected ",
              call.weights.weight_ih[0].sizes(), " as of the first group, got ", x.sizes());
  OptionalTensor bias = one_vector(call.weights.bias_ih);
  // Where both biases are added to the same gates, the kernel adds them: no pass over all gates.
  if (bias && args.bias_hh && !kCells[known_cell(call.cell)].separate_gates_hh && (tokens || !input.is_cpu())) {
    args.bias_hh = *args.bias_hh + bias->view(args.bias_hh->sizes());
    bias = std::nullopt;
  }
  if (tokens) {
    const Tensor indices = without_padding(call);
    std::vector<Tensor> parts;  // of each group: all weights in one matrix would be a copy of a large one
    for (const Tensor& weight : call.weights.weight_ih) parts.push_back(look_up(indices, weight));
    Tensor gates = parts.size() == 1 ? parts[0] : at::cat(parts, -1);
    if (bias) gates += *bias;
    return kernels_of(gates).forward(args, gates, save, /*in_place=*/false);
  }
  const RecurrentKernels& kernels = kernels_of(input);
  const Group& weights = call.weights.weight_ih;
  const int64_t T = input.size(0), B = input.size(1), P = call.groups(), Gh = weights[0].size(0);
  const Tensor x = input.reshape({T * B, input.size(2)});
  if (!save || !gates_in_saved(call, bias.has_value())) {
    const Tensor gates = kernels.linear(x, one_matrix(weights), bias, T).view({T, B, P * Gh});
    return kernels.forward(args, gates, save, /*in_place=*/false);
  }
  const int64_t h = Gh / kCells[known_cell(call.cell)].gates;
  const Tensor saved = at::empty({T, B, P * values_in(call) * h}, input.options());
  const Tensor gates = by_group(saved, P, Gh).flatten(0, 1);
  for (int64_t p = 0; p < P; ++p) kernels.product(gates.select(1, p), x, weights[p].t(), false, T);
  return kernels.forward(args, saved, save, /*in_place=*/true);
}

// ---- backward ----

// A state of group p before every step, [T, B, n], from those after [T, B, n], where rows start and what resets put there.
Tensor states_before(const LayerCall& call, const Tensor& after, const OptionalTensor& initial,
                     const OptionalTensor& restart, int64_t p) {
  const auto own = [&](const OptionalTensor& x) {
    return (x ? x->select(0, p) : at::zeros_like(after.select(0, 0))).unsqueeze(0);
  };
  const OptionalTensor &resets = call.states.resets, &lengths = call.states.lengths;
  const bool reverse = call.reverse[p];
  const int64_t T = after.size(0);
  if (T == 0) return after;
  const Tensor start = own(initial);
  Tensor before = reverse ? at::cat({after.narrow(0, 1, T - 1), start}) : at::cat({start, after.narrow(0, 0, T - 1)});
  if (resets) {
    Tensor crossed = resets->dim() == 2 ? resets->unsqueeze(2) : resets->narrow(2, p, 1);
    if (reverse)  // entering step t from t + 1 crosses the boundary of t + 1
      crossed = at::cat({crossed.narrow(0, 1, T - 1), at::zeros_like(crossed.narrow(0, 0, 1))});
    else if (lengths)
      crossed = crossed & (steps_like(after) < lengths_of(*lengths, p, after));
    before = at::where(crossed, own(restart), before);
  }
  if (!reverse || !lengths) return before;
  return at::where(steps_like(after) + 1 < lengths_of(*lengths, p, after), before, start);  // a row's last step
}

// State 0 of group p before every step, [T, B, R], as the products read it.
Tensor multiplied_states(const LayerCall& call, const Tensor& output, int64_t p) {
  const Tensor before = states_before(call, output, call.states.h_0, call.states.reset_h, p);
  return call.states.mask_h ? before * call.states.mask_h->select(0, p) : before;
}

// grad [G*h, R] of weight_hh of group p, from the group's gate gradients [T, B, G*h] and output [T, B, R].
void weight_hh_gradient(const LayerCall& call, const Tensor& gates, const Tensor& output, int64_t p, const Tensor& out) {
  const auto product = [&](const Tensor& a, const Tensor& b, bool add) {
    kernels_of(output).product(out, a.t(), b, add, output.size(0));
  };
  const int64_t T = output.size(0), B = output.size(1);
  if (T == 0) return void(out.zero_());
  const Tensor grad = gates.flatten(0, 1), h = output.flatten(0, 1);
  if (call.states.resets || call.states.mask_h)
    return product(grad, multiplied_states(call, output, p).flatten(0, 1), false);
  // The states before are the outputs one step on, so views of both serve and nothing is copied: at padded steps both
  // are 0. What is left is each row's first step, whose state before is h_0.
  const bool reverse = call.reverse[p], start = call.states.h_0.has_value();
  if (T > 1)
    product(grad.narrow(0, reverse ? 0 : B, (T - 1) * B), h.narrow(0, reverse ? B : 0, (T - 1) * B), false);
  else if (!start)
    out.zero_();
  if (!start) return;
  Tensor first = gates.select(0, reverse ? T - 1 : 0);
  if (reverse && call.states.lengths) {
    const Tensor last = (lengths_of(*call.states.lengths, p, gates) - 1).clamp_min(0);
    first = gates.gather(0, last.expand({1, B, gates.size(2)})).squeeze(0);
  }
  product(first, call.states.h_0->select(0, p), T > 1);
}

// What the recurrence's kernel has made of a layer's gradients by itself.
LayerGradients from_recurrence(const LayerCall& call, const LayerGiven& given, const RecurrentGradients& found,
                               const Needed& needed) {
  LayerGradients grads;
  grads[kOf_h_0] = found.h_0;
  grads[kOf_c_0] = found.c_0;
  grads[kOf_reset_h] = found.reset_h;
  grads[kOf_reset_c] = found.reset_c;
  if (needed[kOf_params] && !call.weights.params.empty()) {
    const Tensor& like = call.weights.params[0];
    const Tensor of_rows = found.params.view({found.params.size(0), call.groups(), like.size(0), like.size(1)});
    grads[kOf_params] = of_rows.sum(0).to(given.output.scalar_type());
  }
  return grads;
}

LayerGradients backward_by_products(const LayerCall& call, const LayerGiven& given, const Needed& needed) {
  check_storage("layer_backward", "input", call.input);
  const RecurrentKernels& kernels = kernels_of(given.output);
  if (call.batch_sizes || call.offsets) {
    Padded padded("layer_backward", call, given.output);
    if (call.input.defined()) padded.call.input = padded.pad("input", call.input);
    LayerGiven all = given;
    all.output = padded.pad("output", given.output);
    all.saved = padded.pad("saved", given.saved);
    all.grad_output = padded.pad("grad_output", given.grad_output);
    all.grad_cells = padded.pad("grad_cells", given.grad_cells);
    all.may_overwrite = true;  // the padded copy
    padded.pad_states();
    LayerGradients grads = backward_by_products(padded.call, all, needed);
    grads[kOf_input] = padded.pack(grads[kOf_input]);
    return grads;
  }
  const Recurrence args = recurrence_of(call, /*stack=*/true);
  const bool initial = needed[kOf_h_0] || needed[kOf_c_0];
  Given of_kernel = of_recurrence(given);
  of_kernel.in_place = gradients_in_saved(call, given, needed);
  const RecurrentGradients found = kernels.backward(args, of_kernel, initial);
  LayerGradients grads = from_recurrence(call, given, found, needed);
  const int64_t T = given.output.size(0), B = given.output.size(1), P = call.groups();
  if (call.input.defined()) {
    const int64_t dims = are_tokens(call.input) ? 2 : 3;
    RNN_CHECK(call.input.dim() == dims && call.input.size(0) == T && call.input.size(1) == B,
              "layer_backward: input: expected ", dims, " dimensions that begin with ", T, " steps of ", B,
              " rows, got ", call.input.sizes());
  }
  const int64_t Gh = args.weight_hh.size(-2);
  const Tensor gates_ih = by_group(found.gates_ih, P, Gh);
  const Tensor gates_hh = found.gates_hh.numel() ? by_group(found.gates_hh, P, Gh) : gates_ih;
  const auto rows_of = [&](const Tensor& gates, int64_t p) { return gates.select(2, p).flatten(0, 1); };  // a view
  const auto empty = [&](at::IntArrayRef sizes) { return at::empty(sizes, gates_ih.options()); };
  const auto of_group = [&](const Tensor& x, int64_t p) {
    const int64_t n = x.size(2) / P;
    return P == 1 ? x : x.narrow(2, p * n, n);
  };
  if (needed[kOf_weight_hr] && !call.weights.weight_hr.empty()) {  // first, for it makes the largest tensors of its own
    const int64_t R = given.output.size(2) / P, h = Gh / kCells[known_cell(call.cell)].gates;
    // What was projected: the last of the cell's own values, or o tanh(c) where that is o; c stands last.
    const CellInfo& cell = kCells[known_cell(call.cell)];
    const int64_t own = cell.saved - cell.in_c();
    const Tensor saved = given.saved.view({T, B, P, values_in(call), h});
    Tensor hidden = saved.select(3, own - 1);
    if (!cell.saves_hidden) {
      Tensor c = saved.select(3, own);
      if (call.states.keep_c) {  // before zoneout: f c' + i g
        std::vector<Tensor> before;
        for (int64_t p = 0; p < P; ++p)
          before.push_back(states_before(call, c.select(2, p), call.states.c_0, call.states.reset_c, p));
        c = at::stack(before, 2).mul_(saved.select(3, 1)).add_(saved.select(3, 0) * saved.select(3, 2));
      }
      hidden = at::tanh(c).mul_(hidden);
    }
    grads[kOf_weight_hr] = empty({P, R, h});
    for (int64_t p = 0; p < P; ++p)
      kernels.product(grads[kOf_weight_hr].select(0, p), of_group(found.projected, p).flatten(0, 1).t(),
                      hidden.select(2, p).flatten(0, 1), false, T);
  }
  if (needed[kOf_input]) {
    const Group& weights = call.weights.weight_ih;
    const Tensor out = empty({T * B, weights[0].size(1)});
    if (are_few(P))
      for (int64_t p = 0; p < P; ++p) kernels.product(out, rows_of(gates_ih, p), weights[p], p > 0, T);
    else
      kernels.product(out, found.gates_ih.flatten(0, 1), one_matrix(weights), false, T);
    grads[kOf_input] = out.view({T, B, out.size(1)});
  }
  if (needed[kOf_weight_ih]) {
    if (are_tokens(call.input)) {
      const int64_t I = call.weights.weight_ih[0].size(1);
      const Tensor of_tokens =  // [I, P*G*h]
          at::embedding_dense_backward(gates_ih.flatten(2), without_padding(call).to(at::kLong), I, -1, false);
      grads[kOf_weight_ih] = of_tokens.view({I, P, Gh}).permute({1, 2, 0});
    } else {
      const Tensor input = without_padding(call);
      const int64_t I = input.size(2);
      const Tensor x = input.reshape({T * B, I});
      grads[kOf_weight_ih] = empty({P, Gh, I});
      for (int64_t p = 0; p < P; ++p)
        kernels.product(grads[kOf_weight_ih].select(0, p), rows_of(gates_ih, p).t(), x, false, T);
    }
  }
  if (needed[kOf_weight_hh]) {
    const int64_t R = given.output.size(2) / P;
    grads[kOf_weight_hh] = empty({P, Gh, R});
    const CellInfo& cell = kCells[known_cell(call.cell)];
    for (int64_t p = 0; p < P; ++p) {
      Tensor gates = gates_hh.select(2, p), out = grads[kOf_weight_hh].select(0, p);
      const Tensor output = of_group(given.output, p);
      if (cell.late_gates > 0) {  // whose product was with the first saved value times h
        const int64_t late = Gh / cell.gates * cell.late_gates, early = Gh - late;
        const Tensor saved = given.saved.narrow(2, p * values_in(call) * R, R);
        const Tensor x = saved * multiplied_states(call, output, p);
        kernels.product(out.narrow(0, early, late), gates.narrow(2, early, late).flatten(0, 1).t(), x.flatten(0, 1),
                        false, T);
        gates = gates.narrow(2, 0, early), out = out.narrow(0, 0, early);
      }
      weight_hh_gradient(call, gates, output, p, out);
    }
  }
  const bool equal = !found.gates_hh.numel() && needed[kOf_bias_ih];
  if (needed[kOf_bias_ih]) grads[kOf_bias_ih] = kernels.sum_rows(gates_ih);
  if (needed[kOf_bias_hh]) grads[kOf_bias_hh] = equal ? grads[kOf_bias_ih].clone() : kernels.sum_rows(gates_hh);
  return grads;
}

LayerGradients backward_by_kernel(const LayerCall& call, const LayerGiven& given, const Needed& needed) {
  PreparedBackward run = prepare_layer_backward(call, given, needed);
  if (run.params.batch > 0) {
    cpu::layer_backward(run.params, run.layer, threads());
  } else {
    for (const Tensor& x : {run.grad_weight_ih, run.grad_weight_hh, run.grad_weight_hr, run.grad_bias_ih, run.grad_bias_hh})
      x.zero_();
  }
  if (needed[kOf_input]) run.grad_input = call.groups() == 1 ? run.grad_input[0] : run.grad_input.sum(0);
  LayerGradients grads = from_recurrence(call, given, run.results(), needed);
  grads[kOf_input] = run.grad_input;
  grads[kOf_weight_ih] = run.grad_weight_ih;
  grads[kOf_weight_hh] = run.grad_weight_hh;
  grads[kOf_weight_hr] = run.grad_weight_hr;
  grads[kOf_bias_ih] = run.grad_bias_ih;
  grads[kOf_bias_hh] = run.grad_bias_hh;
  return grads;
}

}  // namespace

bool set_layers_by_products(bool on) { return std::exchange(by_products, on); }

const RecurrentKernels* recurrent_kernels(c10::DeviceType device) {
  return kernels_by_device[static_cast<size_t>(device)];
}

void set_recurrent_kernels(c10::DeviceType device, const RecurrentKernels& kernels) {
  kernels_by_device[static_cast<size_t>(device)] = &kernels;
}

LayerResults layer_forward(const LayerCall& call, bool save, bool all_states) {
  check_grad_clip("layer_forward", call.grad_clip);
  RNN_CHECK(!all_states || kCells[known_cell(call.cell)].states > 1,
            "layer_forward: all_states: expected False for cell '", call.cell, "', got True");
  const bool keep = save || all_states;
  LayerResults out;
  if (is_one_kernel(call, call.input)) {
    PreparedForward run = prepare_layer(call, keep);
    if (run.params.batch > 0) cpu::layer_forward(run.params, run.layer, threads());
    out = run.results();
  } else {
    out = forward_by_products(call, keep);
  }
  if (all_states) {  // the last of each group's values
    const auto sizes = out.saved.sizes();
    const CellInfo& cell = kCells[known_cell(call.cell)];
    const int64_t P = call.groups(), S = values_in(call), C = cell.in_c(), h = sizes.back() / (P * S);
    std::vector<int64_t> split(sizes.begin(), sizes.end() - 1), joined = split;
    split.insert(split.end(), {P, S, h});
    joined.push_back(P * C * h);
    out.cells = out.saved.view(split).narrow(-2, S - C, C).reshape(joined);
    if (out.cells.is_alias_of(out.saved)) out.cells = out.cells.clone();
  }
  if (!save) out.saved = out.output.new_empty({0});
  return out;
}

LayerGradients layer_backward(const LayerCall& call, const LayerGiven& given, const Needed& needed) {
  const char* op = "layer_backward";
  const bool weight_ih = !call.weights.weight_ih.empty();
  RNN_CHECK(!needed[kOf_input] || weight_ih, op, ": weight_ih: expected a tensor where input's gradient is needed, got none");
  RNN_CHECK(!needed[kOf_weight_ih] || call.input.defined(), op,
            ": input: expected a tensor where weight_ih's gradient is needed, got none");
  RNN_CHECK(!needed[kOf_weight_ih] || weight_ih || !are_tokens(call.input), op,
            ": weight_ih: expected a tensor where its gradient is of tokens, got none");
  LayerGradients grads = is_one_kernel(call, given.output) ? backward_by_kernel(call, given, needed)
                                                           : backward_by_products(call, given, needed);
  for (int i = 0; i < kGradients; ++i)
    if (!needed[i]) grads[i] = Tensor();
  return grads;
}

}  // namespace fastrnn
