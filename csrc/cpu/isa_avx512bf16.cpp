// The kernels of bfloat16 for x86-64 with AVX-512 and its products of bfloat16.
#if defined(__x86_64__) && !defined(FASTRNN_BASELINE_ALONE)
#define FASTRNN_AVX512BF16
#include "recurrent-inl.h"

namespace fastrnn::cpu {
const Kernels* avx512bf16_kernels() { return &avx512bf16::kKernels; }
}  // namespace fastrnn::cpu
FASTRNN_TARGET_END
#else
#include "plan.h"

namespace fastrnn::cpu {
const Kernels* avx512bf16_kernels() { return nullptr; }
}  // namespace fastrnn::cpu
#endif
