// The Python module fastrnn._C: importing it registers the ops; its own functions tell how it was built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "../launch.h"

PYBIND11_MODULE(_C, m) {
  m.def("instruction_set", &fastrnn::cpu::instruction_set);
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = __VERSION__;
#if defined(FASTRNN_CUDA_ARCHS)
    info["cuda_archs"] = FASTRNN_CUDA_ARCHS;
#else
    info["cuda_archs"] = pybind11::none();
#endif
    return info;
  });
}
