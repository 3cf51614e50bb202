// The kernels for any CPU.
#include "recurrent-inl.h"

namespace fastrnn::cpu {
const Kernels* baseline_kernels() { return &baseline::kKernels; }
}  // namespace fastrnn::cpu
