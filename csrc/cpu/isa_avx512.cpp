// x86-64 with AVX-512 F, DQ, BW, VL (Skylake-X, Zen 4 and later).
// Standard headers come before the target pragma: nothing of theirs may be compiled for a newer CPU.
#include <cmath>
#include <coroutine>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "plan.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_ISA avx512
#define FASTRNN_KERNELS avx512_kernels
#include "recurrent-inl.h"
#else
namespace fastrnn::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace fastrnn::cpu
#endif
