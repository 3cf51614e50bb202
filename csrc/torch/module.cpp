// The Python module fastrnn._C: importing it registers the ops; its own functions tell how it was built and which
// kernel a call would take (fastrnn/info.py prints that).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cells/registry.h"
#include "../cpu/plan.h"
#include "../cpu/processors.h"
#include "../launch.h"
#include "autograd.h"
#include "layer.h"
#include "module_call.h"
#include "precision.h"
#if defined(FASTRNN_CUDA_ARCHS)
#include "../cuda/launch.h"
#endif

// libstdc++'s shared_ptr, which torch's headers use, asks the C library by this name whether the process has one thread,
// and so for glibc 2.32. A module that has the name itself and says no, which is right for any process, asks for none.
extern "C" {
char __libc_single_threaded = false;
}

namespace {

#if !defined(FASTRNN_TORCH_CUDA)
#define FASTRNN_TORCH_CUDA "none"
#endif
// fastrnn/binary.py looks for these bytes in the file and compares them before it loads the module: under another torch,
// loading alone may end the process.
[[gnu::used]] const char built_with[] = "fastrnn built with torch " FASTRNN_TORCH ", CUDA " FASTRNN_TORCH_CUDA ";";

namespace py = pybind11;
using fastrnn::DType;

// A call without its data. Planners look at sizes, and at which pointers are there, never behind one.
struct Sizes {
  fastrnn::BackwardParams params{};
  std::vector<uint8_t> reverse;

  Sizes(int cell, const std::string& dtype, int64_t T, int64_t B, int64_t P, int64_t h, int64_t R, bool projected,
       bool lengths, bool resets) {
    static constexpr std::pair<const char*, DType> kNames[] = {{"float32", DType::kFloat32},
                                                               {"float64", DType::kFloat64},
                                                               {"bfloat16", DType::kBFloat16},
                                                               {"float16", DType::kFloat16}};
    if (cell < 0 || cell >= fastrnn::kNumCells) throw std::invalid_argument("cell: no such id");
    if (T < 1 || B < 1 || P < 1 || h < 1 || R < 1) throw std::invalid_argument("sizes: expected all above 0");
    params.steps = T;
    params.batch = B;
    params.groups = P;
    params.hidden = h;
    params.width = R;
    params.cell = cell;
    bool known = false;
    for (const auto& [name, value] : kNames)
      if (dtype == name) params.dtype = value, known = true;
    if (!known) throw std::invalid_argument("dtype: expected float32, float64, bfloat16 or float16, got " + dtype);
    static const int64_t present[1] = {0};
    params.gates_ih = params.weight_hh = params.bias_hh = params.h_0 = present;
    params.gates_ih_stride_p = fastrnn::kCells[cell].gates * h;
    params.gates_ih_stride_b = P * fastrnn::kCells[cell].gates * h;
    params.gates_ih_stride_t = B * params.gates_ih_stride_b;
    if (fastrnn::kCells[cell].states > 1) params.c_0 = present;
    if (projected) params.weight_hr = present;
    if (lengths) params.lengths = present, params.lengths_stride_b = 1;
    if (resets) params.resets = reinterpret_cast<const uint8_t*>(present);
    reverse.assign(P, 0);
    params.reverse = reverse.data();
  }
};

// input: the features of a layer that projects them itself; 0 for a recurrence that is given its gates.
py::dict cpu_plan(int cell, const std::string& dtype, int64_t T, int64_t B, int64_t P, int64_t h, int64_t R,
                  bool projected, int64_t input, int threads, bool backward) {
  const Sizes call(cell, dtype, T, B, P, h, R, projected, /*lengths=*/false, /*resets=*/false);
  if (input < 0) throw std::invalid_argument("features: expected 0 or more");
  fastrnn::LayerParams projection{};
  projection.weight_dtype = call.params.dtype;
  projection.size = input;
  fastrnn::LayerBackwardParams products{};
  products.size = input;
  namespace cpu = fastrnn::cpu;
  const cpu::Plan plan =
      backward ? cpu::make_backward_plan(call.params, input > 0 ? &products : nullptr, threads)
               : cpu::make_plan(call.params, input > 0 ? &projection : nullptr, threads);
  py::dict out;
  out["threads"] = plan.members();
  out["teams"] = plan.teams;
  out["team_size"] = plan.team_size;
  out["split"] = plan.team_size == 1 ? "none" : plan.split_rows ? "rows" : "units";
  if (input > 0) out["steps_at_a_time"] = plan.chunk;
  return out;
}

#if defined(FASTRNN_CUDA_ARCHS)
py::dict cuda_plan(int cell, const std::string& dtype, int64_t T, int64_t B, int64_t P, int64_t h, int64_t R,
                   bool projected, bool lengths, bool resets, bool backward, bool tf32, int multiprocessors,
                   int compute_capability, int64_t shared_per_block, const std::string& tier) {
  const Sizes call(cell, dtype, T, B, P, h, R, projected, lengths, resets);
  const fastrnn::cuda::Device device{multiprocessors, compute_capability, shared_per_block};
  fastrnn::cuda::Choice choice{};
  if (tier.empty()) {
    choice = fastrnn::cuda::choose(call.params, backward, device, tf32);
  } else if (!fastrnn::cuda::choose_from(fastrnn::cuda::find_tier(tier.c_str()), call.params, backward, device, tf32,
                                         &choice)) {
    throw std::invalid_argument("tier: '" + tier + "' is none, or cannot run this call");
  }
  py::dict out;
  out["tier"] = fastrnn::cuda::kTierNames[static_cast<int>(choice.tier)];
  out["description"] = choice.description ? choice.description : "";
  out["rows"] = choice.rows;
  out["units"] = choice.units;
  out["variant"] = choice.variant;
  out["tf32"] = choice.tf32;
  out["blocks"] = choice.blocks;
  out["threads"] = choice.threads;
  out["shared_bytes"] = choice.shared;
  out["workspace_bytes"] = fastrnn::cuda::workspace_bytes(call.params, choice, backward);
  return out;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto fast = [](const char* name, auto* function) {
    return PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
                       nullptr};
  };
  static PyMethodDef functions[] = {fast("module_forward", fastrnn::module_forward),
                                    fast("without_view", fastrnn::without_view),
                                    {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
  m.def("set_composed", &fastrnn::set_composed);
  m.def("instruction_set", &fastrnn::cpu::instruction_set);
  m.def("cpu_plan", &cpu_plan);
  m.def("usable_processors", &fastrnn::cpu::usable_processors);
  m.def("cpu_quota", &fastrnn::cpu::cpu_quota);
  m.def("set_uniform", &fastrnn::cpu::set_uniform);
  m.def("set_layers_by_products", &fastrnn::set_layers_by_products);
  m.def("allow_tf32", &fastrnn::allow_tf32);
#if defined(FASTRNN_CUDA_ARCHS)
  m.def("cuda_plan", &cuda_plan);
#endif
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = FASTRNN_TORCH;
    info["compiler"] = __VERSION__;
#if defined(FASTRNN_CUDA_ARCHS)
    info["cuda_archs"] = FASTRNN_CUDA_ARCHS;
#else
    info["cuda_archs"] = py::none();
#endif
    return info;
  });
}
