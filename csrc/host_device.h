// What host and device code share below everything else: how a function is marked that both may call, how a loop over a
// few values is, and rounding of sizes.
#pragma once

#if defined(__CUDACC__)
#define FASTRNN_HD __host__ __device__ __forceinline__
#else
#define FASTRNN_HD inline __attribute__((always_inline))
#endif

// Before a loop over a Pack: its values can be in registers only where no index is left to run time.
#if defined(__CUDACC__)
#define FASTRNN_UNROLL _Pragma("unroll")
#else
#define FASTRNN_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fastrnn {

// How many b hold a, for a >= 0 and b > 0.
template <class A, class B>
constexpr FASTRNN_HD auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
// The smallest multiple of b that is no less than a.
template <class A, class B>
constexpr FASTRNN_HD auto round_up(A a, B b) {
  return ceil_div(a, b) * b;
}

}  // namespace fastrnn
