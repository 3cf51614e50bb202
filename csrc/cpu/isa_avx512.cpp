// The kernels for x86-64 with AVX-512.
#if defined(__x86_64__) && !defined(FASTRNN_BASELINE_ALONE)
#define FASTRNN_AVX512
#include "recurrent-inl.h"

namespace fastrnn::cpu {
const Kernels* avx512_kernels() { return &avx512::kKernels; }
}  // namespace fastrnn::cpu
FASTRNN_TARGET_END
#else
#include "plan.h"

namespace fastrnn::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace fastrnn::cpu
#endif
