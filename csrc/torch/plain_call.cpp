// A module's call from Python without the way through dispatcher, checks and composition, for the common case: ordinary
// CPU tensors, one direction. That way takes about 25 us, as much as a step of 512 units itself.
//
// plain_forward(tensors, names, cell, batch_first, input, hx, resets) -> (output, h_n[, c_n]), or None where the call
// is any other: it has to go the long way then, which also knows what is wrong with it. batch_first is None for a
// cell's single step, whose input is [B, I] and whose states are [B, n]. Where a derivative is asked for, nothing is
// computed and a list comes back: for every layer weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, of which some may
// be None.
//
// names[layer] are the keys of its weights in the dict `tensors`: weight_ih, weight_hh[, bias_ih, bias_hh][,
// weight_hr], as torch.nn lists them. Quantized modules list all of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,
// scale_ih, sum_ih, scale_hh and sum_hh, None for what there is not, and then the numbers R, h and I, which blocks of int8
// do not tell; their tensors are [1, ..].
#include "plain_call.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <strings.h>

#include <array>
#include <optional>
#include <vector>

#include "../cells/registry.h"
#include "../launch.h"
#include "../params.h"
#include "ops.h"

namespace fastrnn {
namespace {

using at::Tensor;

// plain_layer_forward and plain_layer_backward are one layer's ops for such calls, of one direction and without the
// dispatcher; what they take is what the node of fastrnn/layer.py holds. None where they do not apply.

// An ordinary CPU tensor's keys, with and without autograd's: views of conjugates, functorch's wrappers, fake tensors and
// so on have others.
c10::DispatchKeySet ordinary_keys(bool inference) {
  const c10::InferenceMode mode(inference);
  return at::detail::empty_cpu({1}, at::kFloat).key_set();
}

// Nothing in force that wants to see more of a call than its kernel: functorch, modes, tracing, autocast.
bool is_plain_thread() {
  static const c10::DispatchKeySet usual({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  return (c10::impl::tls_local_dispatch_key_set().included_ - usual).empty() &&
         !at::autocast::is_autocast_enabled(at::kCPU) && at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

// The tensor, where it is an ordinary one; else null.
const Tensor* ordinary(PyObject* x) {
  static const c10::DispatchKeySet keys = ordinary_keys(false), inference_keys = ordinary_keys(true);
  if (!x || !THPVariable_CheckExact(x)) return nullptr;
  const Tensor& t = THPVariable_Unpack(x);
  const c10::DispatchKeySet own = t.key_set();
  if (own != keys && own != inference_keys) return nullptr;
  return t._fw_grad(/*level=*/0).defined() ? nullptr : &t;
}

// The same of this dtype, float32 or float64 if none is given. `differentiable` becomes true where a derivative by it
// is asked for.
const Tensor* plain(PyObject* x, std::optional<at::ScalarType> dtype, bool& differentiable) {
  const Tensor* t = ordinary(x);
  if (!t) return nullptr;
  const auto type = t->scalar_type();
  if (dtype ? type != *dtype : type != at::kFloat && type != at::kDouble) return nullptr;
  differentiable |= at::GradMode::is_enabled() && t->requires_grad();
  return t;
}

// Contiguous, and with its memory: somebody may have resized the storage.
bool has_sizes(const Tensor& t, std::initializer_list<int64_t> sizes) {
  return t.sizes() == at::IntArrayRef(sizes) && t.is_contiguous() &&
         (t.storage_offset() + t.numel()) * t.itemsize() <= t.storage().nbytes();
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

struct LayerWeights {
  int64_t size, width, hidden;  // I, R, h
  DType dtype;                  // of ih and hh
  Held ih, hh, bias_ih, bias_hh, hr, scale_ih, sum_ih, scale_hh, sum_hh;
};

int cell_of(const char* name) {
  for (int i = 0; i < kNumCells; ++i)
    if (strcasecmp(name, kCells[i].name) == 0) return i;
  return -1;
}

class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ~ReleasedGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

struct Call {
  int cell;
  bool step;            // a cell's
  bool differentiable;  // somebody asks for a derivative
  at::ScalarType dtype;
  int64_t T, B, stride_t, stride_b;  // of input
  Held input, h_0, c_0;              // states without data for zeros
  Held resets;
  int64_t resets_stride_t, resets_stride_b;
  std::vector<LayerWeights> layers;
};

DType dtype_of(const Call& call) { return call.dtype == at::kDouble ? DType::kFloat64 : DType::kFloat32; }

// output [T, B, R], h_n [L, B, R], c_n [L, B, H].
std::array<Tensor, 3> run(const Call& call) {
  const int64_t T = call.T, B = call.B, L = call.layers.size();
  const bool second = kCells[call.cell].states > 1;
  const int64_t R = call.layers[0].width, h = call.layers[0].hidden, element = c10::elementSize(call.dtype);
  const auto empty = [&](at::IntArrayRef sizes) { return at::detail::empty_cpu(sizes, call.dtype); };
  const auto state = [&](int64_t n) { return call.step ? empty({B, n}) : empty({L, B, n}); };
  Tensor h_n = state(R), c_n = second ? state(h) : Tensor(), output, zeros;
  if (!call.h_0.data) {
    zeros = empty({B, std::max(R, h)});
    std::memset(zeros.mutable_data_ptr(), 0, zeros.nbytes());
  }
  const ReleasedGil released;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const uint8_t reverse = 0;
  for (int64_t i = 0; i < L; ++i) {
    const LayerWeights& w = call.layers[i];
    const Tensor below = output;
    output = empty({T, B, R});
    LayerParams layer{};
    layer.size = w.size;
    layer.input = i == 0 ? call.input.data : below.const_data_ptr();
    layer.input_stride_t = i == 0 ? call.stride_t : B * R;
    layer.input_stride_b = i == 0 ? call.stride_b : R;
    layer.weight = w.ih.data;
    layer.bias = w.bias_ih.data;
    layer.weight_dtype = w.dtype;
    layer.scale_ih = static_cast<const float*>(w.scale_ih.data);
    layer.scale_hh = static_cast<const float*>(w.scale_hh.data);
    layer.sum_ih = static_cast<const int32_t*>(w.sum_ih.data);
    layer.sum_hh = static_cast<const int32_t*>(w.sum_hh.data);
    ForwardParams p{};
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
    p.h_0 = call.h_0.data ? call.h_0.at(i * B * R * element) : zeros.const_data_ptr();
    if (second) p.c_0 = call.c_0.data ? call.c_0.at(i * B * h * element) : zeros.const_data_ptr();
    p.resets = static_cast<const uint8_t*>(call.resets.data);
    p.resets_stride_t = call.resets_stride_t;
    p.resets_stride_b = call.resets_stride_b;
    p.reverse = &reverse;
    p.output = output.mutable_data_ptr();
    p.h_n = static_cast<char*>(h_n.mutable_data_ptr()) + i * B * R * element;
    if (second) p.c_n = static_cast<char*>(c_n.mutable_data_ptr()) + i * B * h * element;
    cpu::layer_forward(p, layer, threads);
  }
  return {output, h_n, c_n};
}

// A module's own weights, of input's dtype.
bool find_weights(PyObject* tensors, PyObject* names, int64_t size, Call& call, LayerWeights& out) {
  const Py_ssize_t count = PyList_GET_SIZE(names);
  if (count < 2 || count > 5) return false;
  std::array<const Tensor*, 5> found{};
  for (Py_ssize_t k = 0; k < count; ++k) {
    found[k] = plain(PyDict_GetItem(tensors, PyList_GET_ITEM(names, k)), call.dtype, call.differentiable);
    if (!found[k]) return false;
  }
  const Tensor *ih = found[0], *hh = found[1], *hr = count % 2 ? found[count - 1] : nullptr;
  const Tensor *bias_ih = count >= 4 ? found[2] : nullptr, *bias_hh = count >= 4 ? found[3] : nullptr;
  if (ih->dim() != 2 || hh->dim() != 2) return false;
  const int64_t G = kCells[call.cell].gates, R = hh->size(1), h = hh->size(0) / G;
  const bool good = R > 0 && h > 0 && has_sizes(*ih, {G * h, size}) && has_sizes(*hh, {G * h, R}) &&
                    (!bias_ih || (has_sizes(*bias_ih, {G * h}) && has_sizes(*bias_hh, {G * h}))) &&
                    (hr ? has_sizes(*hr, {R, h}) && kCells[call.cell].states > 1 : R == h);
  if (!good) return false;
  const auto held = [](const Tensor* t) { return t ? Held(*t) : Held(); };
  out = {size, R, h, dtype_of(call), held(ih), held(hh), held(bias_ih), held(bias_hh), held(hr), {}, {}, {}, {}};
  return true;
}

// A quantized module's, see prepare_quantized.
bool find_narrow_weights(PyObject* tensors, PyObject* names, int64_t size, Call& call, LayerWeights& out) {
  PyObject* first = PyDict_GetItem(tensors, PyList_GET_ITEM(names, 0));
  const bool int8 = plain(first, at::kChar, call.differentiable) != nullptr;
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

bool find_layers(PyObject* tensors, PyObject* names, int64_t size, Call& call) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names); ++i) {
    PyObject* of_layer = PyList_GET_ITEM(names, i);
    if (!PyList_Check(of_layer)) return false;
    LayerWeights found{};
    const bool good = PyList_GET_SIZE(of_layer) == kNarrowFields + 3
                          ? find_narrow_weights(tensors, of_layer, size, call, found)
                          : find_weights(tensors, of_layer, size, call, found);
    if (!good || (i > 0 && (found.width != size || found.hidden != call.layers[0].hidden))) return false;
    size = found.width;
    call.layers.push_back(std::move(found));
  }
  return !call.layers.empty();
}

bool find_states(PyObject* hx, Call& call) {
  if (hx == Py_None) return true;
  const bool second = kCells[call.cell].states > 1;
  const LayerWeights& w = call.layers[0];
  const int64_t L = call.layers.size();
  const auto hold = [&](PyObject* x, int64_t width, Held& held) {
    const Tensor* t = plain(x, call.dtype, call.differentiable);
    const bool good = t && (call.step ? has_sizes(*t, {call.B, width}) : has_sizes(*t, {L, call.B, width}));
    if (good) held = Held(*t);
    return good;
  };
  if (!second) return hold(hx, w.width, call.h_0);
  if (!PyTuple_CheckExact(hx) || PyTuple_GET_SIZE(hx) != 2) return false;
  return hold(PyTuple_GET_ITEM(hx, 0), w.width, call.h_0) && hold(PyTuple_GET_ITEM(hx, 1), w.hidden, call.c_0);
}

// bool [T, B], or [B, T] like the input.
bool find_resets(PyObject* resets, int time, Call& call) {
  if (resets == Py_None) return true;
  const Tensor* t = plain(resets, at::kBool, call.differentiable);
  if (!t || call.step || t->dim() != 2 || t->size(time) != call.T || t->size(1 - time) != call.B) return false;
  call.resets = Held(*t);
  call.resets_stride_t = t->stride(time);
  call.resets_stride_b = t->stride(1 - time);
  return true;
}

// Where a derivative is asked for: what the node takes.
PyObject* weights_of_layers(PyObject* tensors, PyObject* names) {
  const Py_ssize_t layers = PyList_GET_SIZE(names);
  PyObject* result = PyList_New(layers);
  for (Py_ssize_t i = 0; result && i < layers; ++i) {
    PyObject *of_layer = PyList_GET_ITEM(names, i), *weights = PyTuple_New(5);
    if (!weights) {
      Py_CLEAR(result);
      break;
    }
    const Py_ssize_t count = PyList_GET_SIZE(of_layer);
    for (Py_ssize_t k = 0; k < 5; ++k) {
      const Py_ssize_t at = k == 4 ? (count % 2 ? count - 1 : -1) : k < 2 || count >= 4 ? k : -1;
      PyObject* x = at < 0 ? Py_None : PyDict_GetItem(tensors, PyList_GET_ITEM(of_layer, at));
      PyTuple_SET_ITEM(weights, k, Py_NewRef(x));
    }
    PyList_SET_ITEM(result, i, weights);
  }
  return result;
}

// Ordinary tensors, or None in their places.
template <size_t kCount>
struct Tensors {
  std::array<OptionalTensor, kCount> all;

  bool take(PyObject* const* from) {
    for (size_t i = 0; i < kCount; ++i)
      if (from[i] != Py_None && !take(i, from[i])) return false;
    return true;
  }
  // The same of a list that says which there are not, and a tuple of those that there are.
  bool take(PyObject* absent, PyObject* present) {
    Py_ssize_t next = 0;
    for (size_t i = 0; i < kCount; ++i) {
      if (PyList_GET_ITEM(absent, i) == Py_True) continue;
      if (next == PyTuple_GET_SIZE(present) || !take(i, PyTuple_GET_ITEM(present, next++))) return false;
    }
    return true;
  }

 private:
  bool take(size_t i, PyObject* x) {
    const Tensor* t = ordinary(x);
    if (t) all[i] = *t;
    return t;
  }
};

// Python's errors go on as its own.
const char* text_of(PyObject* x) {
  const char* text = PyUnicode_AsUTF8(x);
  if (!text) throw python_error();
  return text;
}

PyObject* const* items(PyObject* tuple) { return reinterpret_cast<PyTupleObject*>(tuple)->ob_item; }

// One direction's, as the ops take them. A view holds the memory if another thread exchanges the parameter's; it has to
// be made under the GIL, which that thread holds then.
OptionalTensor one(const OptionalTensor& x) { return x ? OptionalTensor(x->unsqueeze(0)) : std::nullopt; }

// A view as a tensor of its own, on the same memory: what autograd counts as a view cannot be detached in place. It keeps
// the view's history, and its version, so that a write to it is seen wherever the memory was saved for a backward.
Tensor unviewed(const Tensor& view) {
  if (!view.is_view()) return view;
  namespace impl = torch::autograd::impl;
  const Tensor own(view.unsafeGetTensorImpl()->shallow_copy_and_detach(impl::version_counter(view), true));
  if (view.requires_grad()) impl::set_gradient_edge(own, impl::gradient_edge(view));
  return own;
}

// Undefined tensors become None.
PyObject* tuple_of(std::initializer_list<Tensor> tensors) {
  PyObject* result = PyTuple_New(tensors.size());
  if (!result) return nullptr;
  Py_ssize_t i = 0;
  for (const Tensor& t : tensors) PyTuple_SET_ITEM(result, i++, THPVariable_Wrap(t));
  return result;
}

}  // namespace

PyObject* plain_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7 && PyDict_Check(args[0]) && PyList_Check(args[1]) && PyUnicode_Check(args[2]),
                   "plain_forward: expected (dict, list, str, bool or None, input, hx, resets)");
  if (!is_plain_thread()) Py_RETURN_NONE;
  const bool batch_first = args[3] == Py_True;
  Call call{};
  const Tensor* input = plain(args[4], std::nullopt, call.differentiable);
  call.cell = cell_of(text_of(args[2]));
  if (!input || call.cell < 0) Py_RETURN_NONE;
  call.step = args[3] == Py_None;
  if (input->dim() != (call.step ? 2 : 3) || (input->stride(-1) != 1 && input->size(-1) != 1)) Py_RETURN_NONE;
  call.dtype = input->scalar_type();
  call.input = Held(*input);
  const int time = batch_first ? 1 : 0, batch = call.step || batch_first ? 0 : 1;
  call.T = call.step ? 1 : input->size(time);
  call.stride_t = call.step ? 0 : input->stride(time);
  call.B = input->size(batch);
  call.stride_b = input->stride(batch);
  if (call.T < 1 || call.B < 1 || !find_layers(args[0], args[1], input->size(-1), call) ||
      !find_states(args[5], call) || !find_resets(args[6], time, call))
    Py_RETURN_NONE;
  if (call.differentiable) {
    const DType own = call.layers[0].dtype;
    const bool narrow = own == DType::kInt8 || own == DType::kBFloat16;
    return narrow || call.resets.data ? Py_NewRef(Py_None) : weights_of_layers(args[0], args[1]);
  }
  RECORD_FUNCTION("fastrnn::layer_forward", {});
  auto [output, h_n, c_n] = run(call);
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

// plain_layer_forward(cell, batch_sizes, input, h_0, c_0, lengths, resets, reset_h, reset_c, weight_ih, weight_hh,
// bias_ih, bias_hh, weight_hr) -> layer_forward's results with save. Weights are those of the one direction.
PyObject* plain_layer_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Tensors<13> given;
  if (count != 14 || !is_plain_thread() || !given.take(args + 1)) Py_RETURN_NONE;
  const auto& [batch_sizes, input, h_0, c_0, lengths, resets, reset_h, reset_c, ih, hh, bias_ih, bias_hh, hr] =
      given.all;
  if (!input || !h_0 || !ih || !hh) Py_RETURN_NONE;
  const c10::string_view cell = text_of(args[0]);
  RECORD_FUNCTION("fastrnn::layer_forward", {});
  const OptionalTensor w_ih = one(ih), w_hh = one(hh), b_ih = one(bias_ih), b_hh = one(bias_hh), w_hr = one(hr);
  std::tuple<Tensor, Tensor, Tensor, Tensor> results;
  {
    const ReleasedGil released;
    results = layer_forward_cpu(cell, *input, *w_ih, b_ih, *w_hh, b_hh, w_hr, *h_0, c_0, lengths, resets, reset_h,
                                reset_c, {false}, /*save=*/true, batch_sizes);
  }
  const auto& [output, h_n, c_n, saved] = results;
  return tuple_of({output, h_n, c_n, saved});
  END_HANDLE_TH_ERRORS
}

// plain_layer_backward(cell, grad_clip, needs, grads, saved, absent) -> the gradients of input, h_0, c_0, lengths, resets,
// reset_h, reset_c, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, or None in their places.
// needs: a bool for each of them; grads: of output, h_n, c_n, saved and every c; saved: what there is of batch_sizes,
// plain_layer_forward's arguments from input on, output and saved; absent: a list that says which there are not.
PyObject* plain_layer_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr int kNeeds = 12;
  const bool good = count == 6 && PyTuple_Check(args[2]) && PyTuple_GET_SIZE(args[2]) == kNeeds &&
                    PyTuple_Check(args[3]) && PyTuple_GET_SIZE(args[3]) == 5 && PyTuple_Check(args[4]) &&
                    PyList_Check(args[5]) && PyList_GET_SIZE(args[5]) == 15;
  Tensors<5> grads;
  Tensors<15> given;
  if (!good || !is_plain_thread() || at::GradMode::is_enabled() || !grads.take(items(args[3])) ||
      !given.take(args[5], args[4]))
    Py_RETURN_NONE;
  const auto& [batch_sizes, input, h_0, c_0, lengths, resets, reset_h, reset_c, ih, hh, bias_ih, bias_hh, hr, output,
               saved] = given.all;
  const auto& [grad_output, grad_h_n, grad_c_n, grad_saved, grad_cells] = grads.all;
  if (!h_0 || !hh || hr || grad_saved || !output || !saved) Py_RETURN_NONE;
  const c10::string_view cell = text_of(args[0]);
  const double grad_clip = PyFloat_AsDouble(args[1]);
  if (grad_clip == -1 && PyErr_Occurred()) throw python_error();
  std::array<bool, kNeeds> needs;
  for (int i = 0; i < kNeeds; ++i) needs[i] = PyTuple_GET_ITEM(args[2], i) == Py_True;
  RECORD_FUNCTION("fastrnn::layer_backward", {});
  const OptionalTensor w_ih = one(ih), w_hh = one(hh);
  Gradients found;
  {
    const ReleasedGil released;
    found = layer_backward_cpu(cell, grad_output, grad_h_n, c_0 ? grad_c_n : std::nullopt, input, w_ih, *w_hh,
                               *h_0, c_0, lengths, resets, reset_h, reset_c, {false}, *output, *saved,
                               {needs[0], needs[7], needs[8], needs[9], needs[10], needs[1] || needs[2]}, batch_sizes,
                               grad_clip, grad_cells);
  }
  const auto& [grad_input, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_h_0, grad_c_0, grad_reset_h,
               grad_reset_c] = found;
  const auto first = [](const Tensor& x, bool need) { return need ? x.squeeze(0) : Tensor(); };
  const auto wanted = [](const Tensor& x, bool need) { return need ? x : Tensor(); };
  return tuple_of({wanted(grad_input, needs[0]), wanted(grad_h_0, needs[1]), wanted(grad_c_0, needs[2]), Tensor(),
                   Tensor(), wanted(grad_reset_h, needs[5]), wanted(grad_reset_c, needs[6]), first(grad_ih, needs[7]),
                   first(grad_hh, needs[8]), first(grad_bias_ih, needs[9]), first(grad_bias_hh, needs[10]), Tensor()});
  END_HANDLE_TH_ERRORS
}

}  // namespace fastrnn
