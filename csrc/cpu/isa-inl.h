// The instruction set that a translation unit compiles its kernels for: isa_avx512.cpp defines FASTRNN_AVX512,
// isa_avx512bf16.cpp FASTRNN_AVX512BF16, isa_avx2.cpp FASTRNN_AVX2. Without any it is the baseline of any CPU: 16-byte
// vectors, with whatever the compiler's default target has (SSE2 on x86-64, NEON on AArch64).
//
// Every *-inl.h includes this first, then what else it uses, so each of them compiles by itself. There is one
// instruction set in a translation unit, so `#pragma once` guards them. Their code is in the namespace
// fastrnn::cpu::FASTRNN_ISA: two instruction sets then share no instance of a template, whose copies the linker would
// otherwise merge into one.
#pragma once

// Nothing of these may be compiled for a newer CPU, for the same reason: they come before the target pragma.
#include <cmath>
#include <coroutine>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "plan.h"

// For all functions from here on; clang has to be told where that ends, which isa_*.cpp does.
#define FASTRNN_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTRNN_TARGET(of) FASTRNN_PRAGMA(clang attribute push(__attribute__((target(of))), apply_to = function))
#define FASTRNN_TARGET_END _Pragma("clang attribute pop")
#else
#define FASTRNN_TARGET(of) FASTRNN_PRAGMA(GCC target(of))
#define FASTRNN_TARGET_END
#endif

#if defined(FASTRNN_AVX512BF16)  // and BF16, of tensors of bfloat16 alone: Cooper Lake, Zen 4 and later; see matrix-inl.h
#include <immintrin.h>
FASTRNN_TARGET("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FASTRNN_ISA avx512bf16
#define FASTRNN_VECTOR_BYTES 64
#elif defined(FASTRNN_AVX512)  // F, DQ, BW, VL: Skylake-X, Zen 4 and later
#include <immintrin.h>
FASTRNN_TARGET("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FASTRNN_ISA avx512
#define FASTRNN_VECTOR_BYTES 64
#elif defined(FASTRNN_AVX2)  // with FMA and F16C: Haswell, Zen and later
#include <immintrin.h>
FASTRNN_TARGET("avx2,fma,f16c")
#define FASTRNN_ISA avx2
#define FASTRNN_VECTOR_BYTES 32
#else
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#define FASTRNN_ISA baseline
#define FASTRNN_VECTOR_BYTES 16
#endif

// Of a lambda that several loops call: they take it in, and leave out what they do not read.
#define FASTRNN_INLINE_BODY __attribute__((always_inline))

// Of a function that is worth its call: compiled once for its types, where compilers would copy it into its callers or for
// their constants, which has been a tenth of the module.
#if defined(__clang__)
#define FASTRNN_ONE_COPY __attribute__((noinline))
#else
#define FASTRNN_ONE_COPY __attribute__((noinline, noclone))
#endif
