// The kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__) && !defined(FASTRNN_BASELINE_ALONE)
#define FASTRNN_AVX2
#include "recurrent-inl.h"

namespace fastrnn::cpu {
const Kernels* avx2_kernels() { return &avx2::kKernels; }
}  // namespace fastrnn::cpu
FASTRNN_TARGET_END
#else
#include "plan.h"

namespace fastrnn::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fastrnn::cpu
#endif
