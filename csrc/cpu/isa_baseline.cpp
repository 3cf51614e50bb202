// Any CPU: 16-byte vectors, with whatever the compiler's default target has (SSE2 on x86-64, NEON on AArch64).
#include <cmath>
#include <coroutine>
#include <cstdint>
#include <type_traits>
#include <vector>

#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_ISA baseline
#define FASTRNN_KERNELS baseline_kernels
#include "recurrent-inl.h"
