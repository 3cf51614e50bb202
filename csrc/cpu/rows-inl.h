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
  int64_t place(int64_t i, int64_t t) const { return (p.first_row(t) + rows->row[i]) * p.groups + group; }
  // Where row i of time t starts in a tensor with these strides.
  int64_t offset(int64_t i, int64_t t, int64_t stride_t, int64_t stride_b) const {
    return (p.step_rows ? p.step_rows[t] * stride_b : t * stride_t) + rows->row[i] * stride_b;
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

// How many lanes of a vector that starts at j are among `size`.
template <class T>
FASTRNN_HD int valid_lanes(int64_t size, int64_t j) {
  return int(size - j < Vec<T>::kLanes ? size - j : Vec<T>::kLanes);
}

// terms(j) gives N terms for each of units j .. j + L - 1; returns their N sums over all units, which depend on nothing
// but the terms: the same member adds up all of a row, in the same order.
template <class T, int N, class Terms>
Pack<T, N> sum_over_units(int64_t units, Terms terms) {
  constexpr int L = Vec<T>::kLanes;
  alignas(64) T sums[N][L] = {};
  for (int64_t j = 0; j < units; j += L) {
    const Pack<Vec<T>, N> some = terms(j);
    for (int k = 0; k < N; ++k) {
      alignas(64) T lanes[L];
      store(lanes, some[k]);  // what the lanes beyond the last unit hold is no term
      store(sums[k], load(sums[k]) + load(lanes, valid_lanes<T>(units, j)));
    }
  }
  Pack<T, N> total;
  for (int k = 0; k < N; ++k) {
    total[k] = 0;
    for (int lane = 0; lane < L; ++lane) total[k] = total[k] + sums[k][lane];
  }
  return total;
}
template <class T, int N>
FASTRNN_HD Pack<Vec<T>, N> in_every_lane(const Pack<T, N>& x) {
  Pack<Vec<T>, N> all;
  for (int k = 0; k < N; ++k) all[k] = Vec<T>(x[k]);
  return all;
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
