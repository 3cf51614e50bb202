// A module's call from Python without the way through checks, dispatcher and a loop over layers, for the common case:
// ordinary CPU tensors. That way takes 25 us and more, as much as a step of 512 units itself.
//
// module_forward(tensors, names, cell, directions, heads, batch_first, input, hx, resets, grad_clip, recompute, masks) ->
// (output, h_n[, c_n]), or None where the call is any other: network.py then makes it, and knows what is wrong with it.
// batch_first is None for a cell's single step, whose input is [B, I] and whose states are [B, n]. Where a derivative is
// asked for, every layer is a node of autograd (autograd.cpp); with recompute above 0 such a call is none for here.
// masks(T, B), where it is not None, gives a layer's (mask_h, keep_h, keep_c) of fastrnn/masks.py.
//
// names are of every layer, and in it of every direction, the keys of its weights in the dict `tensors`: weight_ih,
// weight_hh[, bias_ih, bias_hh][, weight_hr][, params], as the modules list them. Quantized modules list all of weight_ih,
// weight_hh, bias_ih, bias_hh, weight_hr, scale_ih, sum_ih, scale_hh and sum_hh, None for what there is not, and then the
// numbers R, h and I, which blocks of int8 do not tell; their tensors are [1, ..].
#include "module_call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <optional>
#include <vector>

#include "../cells/registry.h"
#include "../launch.h"
#include "../params.h"
#include "autograd.h"
#include "plain_thread.h"
#include "prepare.h"

namespace fastrnn {
namespace {

// The tensor, where it is an ordinary one; else null.
const Tensor* ordinary(PyObject* x) {
  if (!x || !THPVariable_CheckExact(x)) return nullptr;
  const Tensor& t = THPVariable_Unpack(x);
  return is_ordinary(t) ? &t : nullptr;
}

// The same of this dtype, or of one that kernels compute with if none is given. `differentiable` becomes true where a
// derivative by it is asked for.
const Tensor* plain(PyObject* x, std::optional<at::ScalarType> dtype, bool& differentiable) {
  const Tensor* t = ordinary(x);
  if (!t) return nullptr;
  const auto type = t->scalar_type();
  if (dtype ? type != *dtype : !kernel_dtype(type)) return nullptr;
  differentiable |= at::GradMode::is_enabled() && t->requires_grad();
  return t;
}

// Has it its memory? Somebody may have resized the storage.
bool has_memory(const Tensor& t) {
  if (t.is_contiguous()) return (t.storage_offset() + t.numel()) * t.itemsize() <= t.storage().nbytes();
  return at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), t.storage_offset()) <=
         t.storage().nbytes();
}

bool has_sizes(const Tensor& t, std::initializer_list<int64_t> sizes) {
  return t.sizes() == at::IntArrayRef(sizes) && t.is_contiguous() && has_memory(t);
}

// What a call reads once the GIL is released: another thread may give a parameter other memory then, or let it go.
struct Held {
  c10::Storage storage;
  const void* data = nullptr;

  Held() = default;
  explicit Held(const Tensor& t) : storage(t.storage()), data(t.const_data_ptr()) {}
  const void* at(int64_t bytes) const { return data ? static_cast<const char*>(data) + bytes : nullptr; }
};

constexpr int kNarrowFields = 9;

// Of a direction of a layer.
struct HeldWeights {
  int64_t size, width, hidden;  // I, R, H
  DType dtype;                  // of ih and hh
  Held ih, hh, bias_ih, bias_hh, hr, params, scale_ih, sum_ih, scale_hh, sum_hh;
};

class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

// What a call of a module has been found to be.
struct ModuleCall {
  int cell;
  int64_t directions, heads;
  bool step;            // a cell's
  bool differentiable;  // somebody asks for a derivative
  at::ScalarType dtype;
  int64_t T, B, stride_t, stride_b;  // of input
  Held input, h_0, c_0;              // states without data for zeros
  Held resets;
  int64_t resets_stride_t, resets_stride_b;
  std::vector<HeldWeights> weights;  // of all layers' directions
  int64_t layers() const { return int64_t(weights.size()) / directions; }
};

DType dtype_of(const ModuleCall& call) { return *kernel_dtype(call.dtype); }

// A call without derivatives, of one direction and without heads: output [T, B, R], h_n [L, B, R], c_n [L, B, H].
std::array<Tensor, 3> run(const ModuleCall& call) {
  const int64_t T = call.T, B = call.B, L = call.layers();
  const bool second = kCells[call.cell].states > 1;
  const int64_t R = call.weights[0].width, h = call.weights[0].hidden, element = c10::elementSize(call.dtype);
  const auto empty = [&](at::IntArrayRef sizes) { return at::detail::empty_cpu(sizes, call.dtype); };
  const auto state = [&](int64_t n) { return call.step ? empty({B, n}) : empty({L, B, n}); };
  Tensor h_n = state(R), c_n = second ? state(h) : Tensor();
  const ReleasedGil released;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const uint8_t reverse = 0;
  std::vector<cpu::LayerCall> layers(L);
  for (int64_t i = 0; i < L; ++i) {
    const HeldWeights& w = call.weights[i];
    auto& [p, layer] = layers[i];
    layer.size = w.size;
    layer.input = call.input.data;
    layer.input_stride_t = i == 0 ? call.stride_t : B * R;
    layer.input_stride_b = i == 0 ? call.stride_b : R;
    layer.weight = w.ih.data;
    layer.bias = w.bias_ih.data;
    layer.weight_dtype = w.dtype;
    layer.scale_ih = static_cast<const float*>(w.scale_ih.data);
    layer.scale_hh = static_cast<const float*>(w.scale_hh.data);
    layer.sum_ih = static_cast<const int32_t*>(w.sum_ih.data);
    layer.sum_hh = static_cast<const int32_t*>(w.sum_hh.data);
    p.steps = T;
    p.batch = B;
    p.groups = 1;
    p.hidden = h;
    p.width = R;
    p.cell = call.cell;
    p.dtype = dtype_of(call);
    p.weight_hh = w.hh.data;
    p.bias_hh = w.bias_hh.data;
    p.weight_hr = w.hr.data;
    p.params = w.params.data;
    p.h_0 = call.h_0.at(i * B * R * element);
    if (second) p.c_0 = call.c_0.at(i * B * h * element);
    p.resets = static_cast<const uint8_t*>(call.resets.data);
    p.resets_stride_t = call.resets_stride_t;
    p.resets_stride_b = call.resets_stride_b;
    p.reverse = &reverse;
    p.h_n = static_cast<char*>(h_n.mutable_data_ptr()) + i * B * R * element;
    if (second) p.c_n = static_cast<char*>(c_n.mutable_data_ptr()) + i * B * h * element;
  }
  // One layer after the other needs two outputs, that of the layer below and its own.
  const int stages = cpu::stages_of(layers, threads);
  std::vector<Tensor> outputs;
  for (int64_t i = 0; i < L; ++i) {
    outputs.push_back(i < 2 || stages > 1 ? empty({T, B, R}) : outputs[i - 2]);
    layers[i].params.output = outputs[i].mutable_data_ptr();
    if (i > 0) layers[i].layer.input = outputs[i - 1].const_data_ptr();
  }
  cpu::layers_forward(layers, stages, threads);
  return {outputs[L - 1], h_n, c_n};
}

// What a module's list of keys means, by the position in it; -1 where there is none.
struct Positions {
  Py_ssize_t bias_ih, bias_hh, hr, params;
  Positions(Py_ssize_t count, const CellInfo& cell) {
    params = cell.params > 0 ? count - 1 : -1;
    const Py_ssize_t others = count - (cell.params > 0);
    hr = others % 2 ? others - 1 : -1;
    bias_ih = others >= 4 ? 2 : -1;
    bias_hh = others >= 4 ? 3 : -1;
  }
};

// A module's own weights, of input's dtype.
bool find_weights(PyObject* tensors, PyObject* names, int64_t size, ModuleCall& call, HeldWeights& out) {
  const CellInfo& cell = kCells[call.cell];
  const Py_ssize_t count = PyList_GET_SIZE(names);
  if (count < 2 || count > 5 + (cell.params > 0)) return false;
  std::array<const Tensor*, 6> found{};
  for (Py_ssize_t k = 0; k < count; ++k) {
    found[k] = plain(PyDict_GetItem(tensors, PyList_GET_ITEM(names, k)), call.dtype, call.differentiable);
    if (!found[k]) return false;
  }
  const Positions at(count, cell);
  const auto one = [&](Py_ssize_t k) { return k < 0 ? nullptr : found[k]; };
  const Tensor *ih = found[0], *hh = found[1], *bias_ih = one(at.bias_ih), *bias_hh = one(at.bias_hh);
  const Tensor *hr = one(at.hr), *params = one(at.params);
  const int64_t G = cell.gates, N = call.heads;
  if (ih->dim() != 2 || hh->dim() != (N > 1 ? 3 : 2)) return false;
  const int64_t R = N * hh->size(-1), H = N * (hh->size(-2) / G), rows = G * H;
  const bool good = R > 0 && H > 0 && has_sizes(*ih, {rows, size}) &&
                    (N > 1 ? !hr && has_sizes(*hh, {N, rows / N, R / N}) : has_sizes(*hh, {rows, R})) &&
                    (!bias_ih || (has_sizes(*bias_ih, {rows}) && has_sizes(*bias_hh, {rows}))) &&
                    (hr ? has_sizes(*hr, {R, H}) && cell.states > 1 : R == H) &&
                    (!params || has_sizes(*params, {cell.params, H}));
  if (!good) return false;
  const auto held = [](const Tensor* t) { return t ? Held(*t) : Held(); };
  out = {size, R, H, dtype_of(call), held(ih), held(hh), held(bias_ih), held(bias_hh), held(hr), held(params),
         {},   {}, {}, {}};
  return true;
}

// A quantized module's, see prepare_quantized.
bool find_narrow_weights(PyObject* tensors, PyObject* names, int64_t size, ModuleCall& call, HeldWeights& out) {
  PyObject* first = PyDict_GetItem(tensors, PyList_GET_ITEM(names, 0));
  const bool int8 = plain(first, at::kChar, call.differentiable) != nullptr;
  if (kCells[call.cell].params > 0 || call.heads > 1) return false;
  const int64_t R = PyLong_AsLongLong(PyList_GET_ITEM(names, kNarrowFields));
  const int64_t h = PyLong_AsLongLong(PyList_GET_ITEM(names, kNarrowFields + 1));
  if (R <= 0 || h <= 0 || call.dtype != at::kFloat) return false;
  if (PyLong_AsLongLong(PyList_GET_ITEM(names, kNarrowFields + 2)) != size) return false;
  const int64_t G = kCells[call.cell].gates, blocks = (h + 15) / 16;
  const auto hold = [&](int k, Held& held, at::ScalarType dtype, std::initializer_list<int64_t> sizes) {
    PyObject* name = PyList_GET_ITEM(names, k);
    if (name == Py_None) return true;
    const Tensor* t = plain(PyDict_GetItem(tensors, name), dtype, call.differentiable);
    const bool good = t && has_sizes(*t, sizes);
    if (good) held = Held(*t);
    return good;
  };
  const auto weight = [&](int k, Held& held, int64_t n) {
    return int8 ? hold(k, held, at::kChar, {1, blocks, (n + 3) / 4, G, 16, 4})
                : hold(k, held, at::kBFloat16, {1, G * h, n});
  };
  out.size = size;
  out.width = R;
  out.hidden = h;
  out.dtype = int8 ? DType::kInt8 : DType::kBFloat16;
  const bool good = weight(0, out.ih, size) && weight(1, out.hh, R) && hold(2, out.bias_ih, at::kFloat, {1, G * h}) &&
                    hold(3, out.bias_hh, at::kFloat, {1, G * h}) &&
                    hold(4, out.hr, int8 ? at::kFloat : at::kBFloat16, {1, R, h}) &&
                    hold(5, out.scale_ih, at::kFloat, {1, blocks, G, 16}) &&
                    hold(6, out.sum_ih, at::kInt, {1, blocks, G, 16}) &&
                    hold(7, out.scale_hh, at::kFloat, {1, blocks, G, 16}) &&
                    hold(8, out.sum_hh, at::kInt, {1, blocks, G, 16});
  const bool scaled = out.scale_ih.data && out.sum_ih.data && out.scale_hh.data && out.sum_hh.data;
  return good && out.ih.data && out.hh.data && scaled == int8 && (out.hr.data || R == h);
}

bool find_layers(PyObject* tensors, PyObject* names, int64_t size, ModuleCall& call) {
  const int64_t D = call.directions, count = PyList_GET_SIZE(names);
  if (count % D) return false;
  for (int64_t i = 0; i < count; ++i) {
    PyObject* keys = PyList_GET_ITEM(names, i);
    if (!PyList_Check(keys)) return false;
    HeldWeights found{};
    const bool narrow = PyList_GET_SIZE(keys) == kNarrowFields + 3;
    if (narrow ? D > 1 || !find_narrow_weights(tensors, keys, size, call, found)
               : !find_weights(tensors, keys, size, call, found))
      return false;
    const HeldWeights& first = i > 0 ? call.weights[0] : found;
    if (found.width != first.width || found.hidden != first.hidden) return false;
    if ((i + 1) % D == 0) size = D * found.width;
    call.weights.push_back(std::move(found));
  }
  return count > 0;
}

bool find_states(PyObject* hx, ModuleCall& call) {
  if (hx == Py_None) return true;
  const bool second = kCells[call.cell].states > 1;
  const HeldWeights& w = call.weights[0];
  const int64_t count = call.weights.size();
  const auto hold = [&](PyObject* x, int64_t width, Held& held) {
    const Tensor* t = plain(x, call.dtype, call.differentiable);
    const bool good = t && (call.step ? has_sizes(*t, {call.B, width}) : has_sizes(*t, {count, call.B, width}));
    if (good) held = Held(*t);
    return good;
  };
  if (!second) return hold(hx, w.width, call.h_0);
  if (!PyTuple_CheckExact(hx) || PyTuple_GET_SIZE(hx) != 2) return false;
  return hold(PyTuple_GET_ITEM(hx, 0), w.width, call.h_0) && hold(PyTuple_GET_ITEM(hx, 1), w.hidden, call.c_0);
}

// bool [T, B], or [B, T] like the input.
bool find_resets(PyObject* resets, int time, ModuleCall& call) {
  if (resets == Py_None) return true;
  const Tensor* t = plain(resets, at::kBool, call.differentiable);
  if (!t || call.step || t->dim() != 2 || t->size(time) != call.T || t->size(1 - time) != call.B || !has_memory(*t))
    return false;
  call.resets = Held(*t);
  call.resets_stride_t = t->stride(time);
  call.resets_stride_b = t->stride(1 - time);
  return true;
}

const char* text_of(PyObject* x) {
  const char* text = PyUnicode_AsUTF8(x);
  if (!text) throw python_error();  // goes on as Python's own
  return text;
}

double number_of(PyObject* x) {
  const double number = PyFloat_AsDouble(x);
  if (number == -1 && PyErr_Occurred()) throw python_error();
  return number;
}

// A view as a tensor of its own, on the same memory: what autograd counts as a view cannot be detached in place. It keeps
// the view's history, and its version, so that a write to it is seen wherever the memory was saved for a backward.
Tensor unviewed(const Tensor& view) {
  if (!view.is_view()) return view;
  namespace impl = torch::autograd::impl;
  const Tensor own(view.unsafeGetTensorImpl()->shallow_copy_and_detach(impl::version_counter(view), true));
  if (view.requires_grad()) impl::set_gradient_edge(own, impl::gradient_edge(view));
  return own;
}

PyObject* tuple_of(std::initializer_list<Tensor> tensors) {
  PyObject* result = PyTuple_New(tensors.size());
  if (!result) return nullptr;
  Py_ssize_t i = 0;
  for (const Tensor& t : tensors) PyTuple_SET_ITEM(result, i++, THPVariable_Wrap(t));
  return result;
}

// Heads as groups of a layer's call, and back: what fastrnn/heads.py says, of ordinary tensors.
Group group_of(const std::vector<Tensor>& x) { return Group(x.begin(), x.end()); }
Group rows_by_head(const Tensor& x, int64_t N, int64_t h) {  // of every gate those of a head's units
  std::vector<int64_t> split{x.size(0) / (N * h), N, h}, joined{N, x.size(0) / N};
  for (const int64_t features : x.sizes().slice(1)) split.push_back(features), joined.push_back(features);
  return group_of(x.view(split).transpose(0, 1).reshape(joined).unbind());
}
Tensor states_by_head(const Tensor& x, int64_t N) {  // [D, B, H] -> [D*N, B, h]
  const int64_t D = x.size(0), B = x.size(1), h = x.size(2) / N;
  return x.view({D, B, N, h}).transpose(1, 2).reshape({D * N, B, h});
}
Tensor states_of_heads(const Tensor& x, int64_t N) {  // and back
  const int64_t D = x.size(0) / N, B = x.size(1), h = x.size(2);
  return x.view({D, N, B, h}).transpose(1, 2).reshape({D, B, N * h});
}

// The weights of every layer, as groups.
std::vector<Weights> weights_of(const ModuleCall& call, PyObject* tensors, PyObject* names) {
  const CellInfo& cell = kCells[call.cell];
  const int64_t D = call.directions, N = call.heads, h = call.weights[0].hidden / N;
  std::vector<Weights> all(call.layers());
  for (size_t i = 0; i < call.weights.size(); ++i) {
    PyObject* keys = PyList_GET_ITEM(names, i);
    const Positions at(PyList_GET_SIZE(keys), cell);
    const auto given = [&](Py_ssize_t k) { return THPVariable_Unpack(PyDict_GetItem(tensors, PyList_GET_ITEM(keys, k))); };
    const auto put = [&](Group& group, Py_ssize_t k, auto split) {
      if (k < 0) return;
      const Group more = N == 1 ? Group{given(k)} : split(given(k));
      group.append(more.begin(), more.end());
    };
    const auto rows = [&](const Tensor& x) { return rows_by_head(x, N, h); };
    const auto blocks = [&](const Tensor& x) { return group_of(x.unbind()); };
    const auto units = [&](const Tensor& x) { return group_of(x.view({x.size(0), N, h}).unbind(1)); };
    Weights& w = all[i / D];
    put(w.weight_ih, 0, rows);
    put(w.weight_hh, 1, blocks);
    put(w.bias_ih, at.bias_ih, rows);
    put(w.bias_hh, at.bias_hh, rows);
    put(w.weight_hr, at.hr, blocks);
    put(w.params, at.params, units);
  }
  return all;
}

// What regularises a layer, of its own.
void draw_masks(PyObject* masks, const ModuleCall& found, States& states) {
  const THPObjectPtr drawn(PyObject_CallFunction(masks, "LL", (long long)found.T, (long long)found.B));
  if (!drawn) throw python_error();
  TORCH_CHECK_TYPE(PyTuple_Check(drawn.get()) && PyTuple_GET_SIZE(drawn.get()) == 3, "masks: expected three of them");
  const auto take = [&](Py_ssize_t k) -> OptionalTensor {
    PyObject* x = PyTuple_GET_ITEM(drawn.get(), k);
    return THPVariable_Check(x) ? OptionalTensor(THPVariable_Unpack(x)) : std::nullopt;
  };
  states.mask_h = take(0);
  states.keep_h = take(1);
  states.keep_c = take(2);
  if (states.mask_h && found.heads > 1) states.mask_h = states_by_head(*states.mask_h, found.heads);
}

// A call that has been found to be good, layer by layer; where a derivative is asked for, as nodes of autograd: output
// [T, B, D*R], h_n [L*D, B, R], c_n [L*D, B, H]; of a cell's step h_n [B, R], c_n [B, H].
std::array<Tensor, 3> run_layers(const ModuleCall& found, PyObject* tensors, PyObject* names, bool batch_first,
                                 PyObject* input, PyObject* hx, PyObject* resets, double grad_clip, PyObject* masks) {
  const bool second = kCells[found.cell].states > 1;
  const int64_t L = found.layers(), D = found.directions, N = found.heads;
  const auto given = [&](PyObject* x) { return x == Py_None ? Tensor() : THPVariable_Unpack(x); };
  const bool pair = second && hx != Py_None;
  const Tensor h_0 = given(pair ? PyTuple_GET_ITEM(hx, 0) : hx), c_0 = pair ? given(PyTuple_GET_ITEM(hx, 1)) : Tensor();
  const auto of_layer = [&](const Tensor& x, int64_t i) -> OptionalTensor {
    if (!x.defined()) return std::nullopt;
    if (found.step) return x;
    const Tensor own = L == 1 ? x : x.narrow(0, i * D, D);
    return N == 1 ? own : states_by_head(own, N);
  };
  // All layers' weights, before the first of them runs: another thread may have the lock then, and take some away.
  std::vector<Weights> weights = weights_of(found, tensors, names);
  LayerCall call;
  call.cell = kCells[found.cell].name;
  for (int64_t k = 0; k < D * N; ++k) call.reverse.push_back(k >= N);
  call.grad_clip = grad_clip;
  call.input = given(input);
  if (batch_first) call.input = call.input.transpose(0, 1);
  if (resets != Py_None) call.states.resets = batch_first ? given(resets).transpose(0, 1) : given(resets);
  std::vector<Tensor> h_n, c_n;
  for (int64_t i = 0; i < L; ++i) {
    call.weights = std::move(weights[i]);
    call.states.h_0 = of_layer(h_0, i);
    call.states.c_0 = of_layer(c_0, i);
    if (masks != Py_None) draw_masks(masks, found, call.states);
    const LayerResults out = differentiable_layer(call, found.step);
    call.input = out.output;
    h_n.push_back(N == 1 ? out.h_n : states_of_heads(out.h_n, N));
    if (second) c_n.push_back(N == 1 ? out.c_n : states_of_heads(out.c_n, N));
  }
  const auto joined = [&](const std::vector<Tensor>& x) {
    if (x.empty()) return Tensor();
    return L == 1 ? unviewed(x[0]) : at::cat(x);
  };
  return {call.input, joined(h_n), joined(c_n)};
}

}  // namespace

PyObject* module_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12 && PyDict_Check(args[0]) && PyList_Check(args[1]) && PyUnicode_Check(args[2]),
                   "module_forward: expected (dict, list, str, int, int, bool or None, input, hx, resets, grad_clip, "
                   "recompute, masks)");
  if (!is_plain_thread()) Py_RETURN_NONE;
  const bool batch_first = args[5] != Py_None && PyObject_IsTrue(args[5]) == 1;
  PyObject *const given = args[6], *const hx = args[7], *const resets = args[8], *const masks = args[11];
  ModuleCall call{};
  const Tensor* input = plain(given, std::nullopt, call.differentiable);
  call.directions = PyLong_AsLongLong(args[3]);
  call.heads = PyLong_AsLongLong(args[4]);
  if (PyErr_Occurred()) throw python_error();
  call.step = args[5] == Py_None;
  if (call.directions < 1 || call.heads < 1 || (call.step && call.heads > 1)) Py_RETURN_NONE;
  call.cell = find_cell(text_of(args[2]));
  if (!input || call.cell < 0 || kCells[call.cell].states > 2) Py_RETURN_NONE;
  if (input->dim() != (call.step ? 2 : 3) || (input->stride(-1) != 1 && input->size(-1) != 1)) Py_RETURN_NONE;
  call.dtype = input->scalar_type();
  call.input = Held(*input);
  const int time = batch_first ? 1 : 0, batch = call.step || batch_first ? 0 : 1;
  call.T = call.step ? 1 : input->size(time);
  call.stride_t = call.step ? 0 : input->stride(time);
  call.B = input->size(batch);
  call.stride_b = input->stride(batch);
  if (call.T < 1 || call.B < 1 || !has_memory(*input) || !find_layers(args[0], args[1], input->size(-1), call) ||
      !find_states(hx, call) || !find_resets(resets, time, call))
    Py_RETURN_NONE;
  const bool quantized = call.weights[0].dtype != dtype_of(call);
  if ((call.differentiable && (quantized || number_of(args[10]) > 0)) || (quantized && masks != Py_None)) Py_RETURN_NONE;
  std::array<Tensor, 3> results;
  if (call.differentiable || call.directions > 1 || call.heads > 1 || masks != Py_None) {
    const double grad_clip = args[9] == Py_None ? 0 : number_of(args[9]);
    results = run_layers(call, args[0], args[1], batch_first, given, hx, resets, grad_clip, masks);
  } else {
    RECORD_FUNCTION("fastrnn::layer_forward", {});
    results = run(call);
  }
  auto& [output, h_n, c_n] = results;
  if (batch_first) output = unviewed(output.transpose(0, 1));
  return c_n.defined() ? tuple_of({output, h_n, c_n}) : tuple_of({output, h_n});
  END_HANDLE_TH_ERRORS
}

// without_view(x) -> x, or where it is an ordinary view of any device, and nobody records what becomes of it, the tensor
// of its own that unviewed makes.
PyObject* without_view(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  using c10::DispatchKey;
  static const c10::DispatchKeySet usual({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView});
  static const c10::DispatchKeySet special =
      c10::python_ks | c10::DispatchKeySet({DispatchKey::FuncTorchBatched, DispatchKey::FuncTorchGradWrapper,
                                            DispatchKey::Batched, DispatchKey::Functionalize});
  TORCH_CHECK_TYPE(count == 1, "without_view: expected one argument, got ", count);
  PyObject* x = args[0];
  if (!THPVariable_CheckExact(x) || !(c10::impl::tls_local_dispatch_key_set().included_ - usual).empty())
    return Py_NewRef(x);
  const Tensor& t = THPVariable_Unpack(x);
  if (!t.is_view() || t.key_set().has_any(special) || t._fw_grad(/*level=*/0).defined()) return Py_NewRef(x);
  return THPVariable_Wrap(unviewed(t));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastrnn
