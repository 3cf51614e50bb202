// x86-64 with AVX2 and FMA (Haswell, Zen and later).
// Standard headers come before the target pragma: nothing of theirs may be compiled for a newer CPU.
#include <cmath>
#include <coroutine>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "plan.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_ISA avx2
#define FASTRNN_KERNELS avx2_kernels
#include "recurrent-inl.h"
#else
namespace fastrnn::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fastrnn::cpu
#endif
