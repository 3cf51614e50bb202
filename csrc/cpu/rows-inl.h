// A row of a batch: how it meets time, and how what its units have in common is added up.
#pragma once
#include "isa-inl.h"

#include "../cells/cell.h"
#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// The rows of one group that a member computes, longest first, and how they meet time: i counts them, t is a time of
// the sequence, which groups that run in reverse meet from their last to the first.
template <class Params>
struct Walk {
  const Params& p;
  int64_t group = 0;
  bool reverse = false;
  const Rows* rows = nullptr;

  explicit Walk(const Params& params) : p(params) {}
  void enter(const Plan& plan, int64_t to_group, int member) {
    group = to_group;
    reverse = p.reverse[group];
    rows = &plan.rows(group, member);
  }

  // Of (row, group) in tensors [B, P * ..], and of (t, row, group) in tensors [T, B, P * ..].
  int64_t place(int64_t i) const { return rows->row[i] * p.groups + group; }
  int64_t place(int64_t i, int64_t t) const { return p.place(t, rows->row[i]) * p.groups + group; }
  // Of unit j of state 1 + k, in tensors [B, P * C * h].
  int64_t in_c(int64_t i, int C, int k, int64_t j) const { return (place(i) * C + k) * p.hidden + j; }
  // Where row i of time t starts in a tensor with these strides.
  int64_t offset(int64_t i, int64_t t, int64_t stride_t, int64_t stride_b) const {
    const int64_t row = rows->row[i];
    return p.ragged() ? p.place(t, row) * stride_b : t * stride_t + row * stride_b;
  }
  // Of units j .. in keep_h and keep_c.
  int64_t keep_h_at(int64_t i, int64_t t, int64_t j) const {
    return offset(i, t, p.keep_h_stride_t, p.keep_h_stride_b) + group * p.width + j;
  }
  int64_t keep_c_at(int64_t i, int64_t t, int64_t j) const {
    return offset(i, t, p.keep_c_stride_t, p.keep_c_stride_b) + group * p.hidden + j;
  }

  // What a product reads, columns j .., or its gradient: mask_h times what it would be without.
  template <class S, class V>
  FASTRNN_HD V masked(int64_t i, int64_t j, V x) const {
    const int64_t at = place(i) * p.width + j;
    return x * V(load(static_cast<const S*>(p.mask_h) + at, valid_lanes<typename Compute<S>::type>(p.width, j)));
  }

  int64_t next_time(int64_t t) const { return reverse ? t - 1 : t + 1; }
  int64_t previous_time(int64_t t) const { return reverse ? t + 1 : t - 1; }
  bool is_first(int64_t i, int64_t t) const { return t == (reverse ? rows->length[i] - 1 : 0); }
  bool is_last(int64_t i, int64_t t) const { return t == (reverse ? 0 : rows->length[i] - 1); }
  // Does the boundary that row i crosses to enter step t carry a reset?
  bool reset_before(int64_t i, int64_t t) const {
    return cpu::reset_before(p, group, rows->row[i], rows->length[i], t);
  }
};

// terms(j, n) gives N terms for each of units j .. j + n - 1; returns their N sums over all units, which depend on nothing
// but the terms: one member adds up all of a row, in the order of its units.
template <class T, int N, class Terms>
FASTRNN_HD Pack<T, N> sum_over_units(int64_t units, Terms terms) {
  constexpr int L = Vec<T>::kLanes;
  Pack<Vec<T>, N> sums;
  FASTRNN_UNROLL for (int k = 0; k < N; ++k) sums[k] = Vec<T>(0);
  for_each_vector<T>(units, [&](int64_t j, int n) FASTRNN_INLINE_BODY {
    Pack<Vec<T>, N> some = terms(j, n);
    if (n < L)
      for (int k = 0; k < N; ++k) {
        alignas(64) T lanes[L];
        store(lanes, some[k]);  // what the lanes beyond the last unit hold is no term
        some[k] = load(lanes, n);
      }
    FASTRNN_UNROLL for (int k = 0; k < N; ++k) sums[k] = sums[k] + some[k];
  });
  Pack<T, N> total;
  sum_lanes(sums.v, total.v);
  return total;
}
template <class T, int N>
FASTRNN_HD Pack<Vec<T>, N> in_every_lane(const Pack<T, N>& x) {
  Pack<Vec<T>, N> all;
  FASTRNN_UNROLL for (int k = 0; k < N; ++k) all[k] = Vec<T>(x[k]);
  return all;
}

// The passes of a cell's Row over the units of one row. load(j, n, in, work) gives `in` what units j .. j + n - 1 know
// (ForwardIn, BackwardIn); work, a std::bool_constant, says whether in.work was kept. keep(j, in) keeps it. in.row has the
// row's numbers at the end, which stand once for all units.
template <class T, class Passes, class In, class Load, class Keep>
FASTRNN_HD void run_passes(int64_t units, In& in, Load load, Keep keep) {
  Pack<T, Passes::kNumbers> numbers{};
  const T each = T(1) / T(units);
  for_each_pass<Passes>([&](auto pass) FASTRNN_INLINE_BODY {
    constexpr int k = decltype(pass)::value;
    auto means = sum_over_units<T, Passes::kMeans[k]>(units, [&](int64_t j, int n) FASTRNN_INLINE_BODY {
      load(j, n, in, std::bool_constant<finds_work<Passes, k>()>());
      const auto terms = Passes::template terms<k>(in);
      if constexpr (leaves_work<Passes, k>()) keep(j, in);
      return terms;
    });
    for (int m = 0; m < Passes::kMeans[k]; ++m) means[m] = means[m] * each;
    Passes::template numbers<k>(means, numbers);
    in.row = in_every_lane(numbers);
  });
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
