// What products multiply, as it is stored in panels and rows. It is what is computed with, but where an instruction set
// multiplies bfloat16 itself, two neighbours along the sum at once: there tensors of bfloat16 are operands as they are.
#pragma once
#include "isa-inl.h"

#include "dual-inl.h"
#include "scalar.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Of tensors stored as S. kDepth: how many neighbours along the sum are multiplied together.
template <class S>
struct Operand {
  using type = typename Compute<S>::type;
};
template <class A>
inline constexpr int kDepth = 1;
#if defined(FASTRNN_AVX512BF16)
template <>
struct Operand<BFloat16> {
  using type = BFloat16;
};
template <>
inline constexpr int kDepth<BFloat16> = 2;
#endif

// How deep a panel is in memory, for products of this depth.
template <class A>
constexpr int64_t padded_depth(int64_t depth) {
  return round_up(depth, kDepth<A>);
}

// A vector of operands, which is one of pairs where kDepth is 2.
template <class A>
struct Operands {
  Vec<A> v;
};
template <>
struct Operands<BFloat16> {
  Vec<float>::Bits v;  // a pair in each lane, the first one below
};

// As panels have them.
template <class A>
FASTRNN_HD Operands<A> load_operands(const A* p) {
  Operands<A> x;
  if constexpr (kDepth<A> == 1) x.v = load(p);
  else __builtin_memcpy(&x, p, sizeof x);
  return x;
}
// Lane after lane kDepth neighbours of a row, n values in all; the others are 0.
template <class A, class S>
FASTRNN_HD Operands<A> load_along(const S* p, int n) {
  if constexpr (kDepth<A> == 1) {
    return {Vec<A>(load(p, n))};
  } else {
    static_assert(std::is_same_v<A, S>);
    Operands<A> x{};
    if (n * sizeof *p >= sizeof x) __builtin_memcpy(&x, p, sizeof x);
    else __builtin_memcpy(&x, p, n * sizeof *p);
    return x;
  }
}
// The kDepth at p in every lane; n of them are there, and the others 0.
template <class A>
FASTRNN_HD Operands<A> operands_everywhere(const A* p, int n = kDepth<A>) {
  if constexpr (kDepth<A> == 1) {
    return {Vec<A>(*p)};
  } else {
    int32_t pair = 0;
    __builtin_memcpy(&pair, p, n == kDepth<A> ? sizeof pair : sizeof *p);
    return {Vec<float>::Bits{} + pair};
  }
}
// As vectors of what is computed with, to be moved as they are.
template <class A>
FASTRNN_HD Vec<typename Compute<A>::type> lanes_of(Operands<A> x) {
  if constexpr (kDepth<A> == 1) return x.v;
  else return (Vec<float>::Native)x.v;
}
template <class A>
FASTRNN_HD Operands<A> operands_in(Vec<typename Compute<A>::type> lanes) {
  if constexpr (kDepth<A> == 1) return {lanes};
  else return {(Vec<float>::Bits)lanes.v};
}
// The first n columns of kDepth rows that are `ld` apart, as panels have them; `there` of the rows are there, and what is
// not is 0.
template <class A, class S>
FASTRNN_HD Operands<A> load_across(const S* p, int64_t ld, int there, int n) {
  if constexpr (kDepth<A> == 1) {
    return {there > 0 ? Vec<A>(load(p, n)) : Vec<A>(0)};
  } else {
    static_assert(std::is_same_v<A, S>);
    const auto bits = [&](int k) {
      Half16 row{};
      if (k < there && n >= Vec<float>::kLanes) __builtin_memcpy(&row, p + k * ld, sizeof row);
      else if (k < there) __builtin_memcpy(&row, p + k * ld, n * sizeof *p);
      return __builtin_convertvector(row, Vec<float>::Bits);
    };
    return {bits(0) | bits(1) << 16};
  }
}
template <class A>
FASTRNN_HD void store_operands(A* p, Operands<A> x) {
  if constexpr (kDepth<A> == 1) store(p, x.v);
  else __builtin_memcpy(p, &x, sizeof x);
}
// The vectors of kDepth rows, for a panel.
template <class A>
FASTRNN_HD void store_operands(A* p, const Vec<typename Compute<A>::type> (&rows)[kDepth<A>]) {
  if constexpr (kDepth<A> == 1) {
    store(p, rows[0]);
  } else {
    using Bits = Vec<float>::Bits;
    const auto bits = [&](int k) { return __builtin_convertvector(to_storage(rows[k], p), Bits); };
    const Bits pairs = bits(0) | bits(1) << 16;
    __builtin_memcpy(p, &pairs, sizeof pairs);
  }
}
// One of them as a number to compute with.
template <class A>
FASTRNN_HD typename Compute<A>::type widened(A x) {
  return x;
}
FASTRNN_HD float widened(BFloat16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }

// sum + x w, of pairs both products.
template <Terms terms, class A, class T>
FASTRNN_HD Vec<T> add_products(Vec<T> sum, Operands<A> x, Operands<A> w) {
#if defined(FASTRNN_AVX512BF16)
  if constexpr (std::is_same_v<A, BFloat16>)
    return (typename Vec<T>::Native)_mm512_dpbf16_ps((__m512)sum.v, (__m512bh)x.v, (__m512bh)w.v);
  else
#endif
    return add_product<terms>(sum, x.v, w.v);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
