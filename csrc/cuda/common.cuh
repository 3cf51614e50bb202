// What every tier of the CUDA recurrences shares: number formats, what a launch is given, which row meets which step
// when. All that happens to one unit of one row in one step is in unit_forward.cuh and unit_backward.cuh. A tier adds
// its product, its exchange and its schedule.
//
// The walk. Each row of each group counts its own steps k = 0 .. length - 1 in the order in which it runs: step k
// is time k, or length - 1 - k where the group runs in reverse. So all rows start at k = 0, where backward ends
// for all of them, no code below knows a direction, and a row without a step k is idle there. length < 0: no such
// row.
//
// One unit's state. State 0 (h) goes through the product and so belongs to the tier. Besides it a unit carries one
// value from step to step, the last of its states in float32 or wider: c, or h itself where that is the only one; and of
// a cell with more states, which the per-step tier alone runs, all but h (Carried). Backward carries the pointwise
// gradients of those states likewise. (No cell of two states or more reads h; see carried_state.)
//
// Who may read and write what: each (row, unit) belongs to one thread for the whole launch, so nothing here
// needs a barrier and sums into grad_reset_* and grad_params are in a fixed order. Offsets are 64-bit; sizes fit
// 31 bits (check_sizes).
#pragma once
#include <cstdint>
#include <type_traits>

#include "../cells/registry.h"
#include "../params.h"
#include "device.cuh"
#include "launch.h"

#define FASTRNN_INLINE __device__ __forceinline__

namespace fastrnn::cuda {

// ---- number formats: S in memory, Wide<S> in registers ----

template <class S>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class S>
using Wide = typename WideOf<S>::type;

template <class S>
FASTRNN_INLINE Wide<S> widen(S x) {
  return dev::to_float(x);
}
template <>
FASTRNN_INLINE double widen<double>(double x) {
  return x;
}
template <class S>
FASTRNN_INLINE S narrow(Wide<S> x) {
  return dev::from_float<S>(x);
}
template <>
FASTRNN_INLINE double narrow<double>(double x) {
  return x;
}
template <class S>
FASTRNN_INLINE S zero() {
  return narrow<S>(Wide<S>(0));
}

template <class S>
FASTRNN_INLINE Wide<S> load(const void* p, int64_t at) {
  return widen(static_cast<const S*>(p)[at]);
}
template <class S>
FASTRNN_INLINE Wide<S> load_or_zero(const void* p, int64_t at) {
  return p ? load<S>(p, at) : Wide<S>(0);
}
template <class S>
FASTRNN_INLINE void store(void* p, int64_t at, Wide<S> x) {
  static_cast<S*>(p)[at] = narrow<S>(x);
}

// ---- launches ----

constexpr int kGroupsPerLaunch = 1024;

// What a kernel gets, by value: the call's params, which groups of them this launch runs, and their directions as bits
// (`reverse` is the host's memory, and null here).
template <class Params>
struct LaunchParams : Params {
  int32_t first_group, groups_here;
  uint32_t reverse_bits[kGroupsPerLaunch / 32];
};

inline bool check_sizes(const ForwardParams& p) {
  constexpr int64_t kMax = INT32_MAX / 8;  // leaves room for gates * hidden and rounding up
  return p.steps <= kMax && p.batch <= kMax && p.groups <= kMax && p.hidden <= kMax && p.width <= kMax &&
         p.cell >= 0 && p.cell < kNumCells;
}

// launch(const LaunchParams<Params>&) -> int, once for every kGroupsPerLaunch groups, until one fails.
template <class Params, class F>
int for_each_launch(const Params& p, F launch) {
  if (!check_sizes(p)) return int(dev::kInvalidValue);
  if (p.batch == 0) return int(dev::kSuccess);
  for (int64_t first = 0; first < p.groups; first += kGroupsPerLaunch) {
    LaunchParams<Params> part{};
    static_cast<Params&>(part) = p;
    part.reverse = nullptr;
    part.first_group = int32_t(first);
    part.groups_here = int32_t(p.groups - first < kGroupsPerLaunch ? p.groups - first : kGroupsPerLaunch);
    for (int i = 0; i < part.groups_here; ++i)
      part.reverse_bits[i / 32] |= uint32_t(p.reverse[first + i] != 0) << (i % 32);
    const int error = launch(part);
    if (error != int(dev::kSuccess)) return error;
  }
  return int(dev::kSuccess);
}

// What a unit carries from step to step: kCarried values V, one of which is no Pack.
template <class Cell>
constexpr int kCarried = Cell::kStates > 2 ? Cell::kStates - 1 : 1;
template <class Cell, class V>
using Carried = std::conditional_t<kCarried<Cell> == 1, V, Pack<V, kCarried<Cell>>>;
template <class V>
FASTRNN_INLINE V& carried_at(V& one, int) {
  return one;
}
template <class V, int N>
FASTRNN_INLINE V& carried_at(Pack<V, N>& all, int c) {
  return all[c];
}
template <class V, int N>
FASTRNN_INLINE const V& carried_at(const Pack<V, N>& all, int c) {
  return all[c];
}

// The one dispatch from run time to compile time: f(Type<Cell>{}) and f(Type<S>{}), each -> int.
template <class T>
struct Type {
  using type = T;
};
template <class F>
int with_cell(int32_t cell, F f) {
  int32_t id = 0;
#define FASTRNN_DISPATCH(name, Cell, separate) \
  if (cell == id++) return f(Type<Cell>{});
  FASTRNN_FOR_EACH_CELL(FASTRNN_DISPATCH)
#undef FASTRNN_DISPATCH
  return int(dev::kInvalidValue);
}
// The same for cells of one or two states whose units do not look at each other, after one product. The others are the
// per-step tier's alone: in the other tiers a thread carries one value a unit from step to step, and no block sees a whole
// row between the product and the cells.
template <class F>
int with_pointwise_cell(int32_t cell, F f) {
  return with_cell(cell, [&](auto type) {
    using Cell = typename decltype(type)::type;
    if constexpr (kWholeRows<Cell> || kHasLate<Cell> || kCarried<Cell> > 1) return int(dev::kInvalidValue);
    else return f(type);
  });
}
inline bool is_pointwise(int32_t cell) {
  return !kCells[cell].whole_rows && kCells[cell].late_gates == 0 && kCells[cell].states <= 2;
}
template <class F>
int with_half(DType dtype, F f) {
  switch (dtype) {
    case DType::kBFloat16: return f(Type<dev::bf16>{});
    case DType::kFloat16: return f(Type<dev::f16>{});
    default: return int(dev::kInvalidValue);
  }
}
template <class F>
int with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(Type<float>{});
    case DType::kFloat64: return f(Type<double>{});
    default: return with_half(dtype, f);
  }
}

// ---- rows ----

// How one row of one group walks through its steps.
struct RowWalk {
  int32_t group, row, length;  // length clamped to [0, T]; -1: no such row
  bool reverse;

  FASTRNN_INLINE bool present() const { return length >= 0; }
  FASTRNN_INLINE bool running(int k) const { return k < length; }
  FASTRNN_INLINE bool last(int k) const { return k + 1 == length; }
  FASTRNN_INLINE int64_t time(int k) const { return reverse ? length - 1 - k : k; }
  // of (row, group) in arrays [B, P*..] and of (time, row, group) in [T, B, P*..]
  FASTRNN_INLINE int64_t place(const ForwardParams& p) const { return row * p.groups + group; }
  FASTRNN_INLINE int64_t place(const ForwardParams& p, int k) const {
    return (time(k) * p.batch + row) * p.groups + group;
  }
  // Unit j of the first of the states besides h, in arrays [B, P*C*h]; the others follow, h elements apart.
  template <class Cell>
  FASTRNN_INLINE int64_t in_c(const ForwardParams& p, int j) const {
    return place(p) * kCarried<Cell> * p.hidden + j;
  }
  // Behind the row's end, k >= length, where time is counted from the first step in either direction.
  FASTRNN_INLINE int64_t padding(const ForwardParams& p, int64_t k) const {
    return (k * p.batch + row) * p.groups + group;
  }
};

// The binding never looks at the values of lengths on a device, so they are clamped here.
FASTRNN_INLINE int length_of(const ForwardParams& p, int group, int row) {
  if (row >= p.batch) return -1;
  if (!p.lengths) return int(p.steps);
  const int64_t n = p.lengths[row * p.lengths_stride_b + group * p.lengths_stride_p];
  return int(n < 0 ? 0 : n > p.steps ? p.steps : n);
}

// group_here counts from the launch's first group; row may be past the batch.
template <class Params>
FASTRNN_INLINE RowWalk row_of(const LaunchParams<Params>& call, int group_here, int row) {
  const int group = call.first_group + group_here;
  const bool reverse = call.reverse_bits[group_here / 32] >> (group_here % 32) & 1u;
  return {group, row, length_of(call, group, row), reverse};
}

// The most steps of rows first .. first + count, at least 0: the same in every thread that asks.
FASTRNN_INLINE int longest(const ForwardParams& p, int group, int first, int count) {
  if (!p.lengths) return int(p.steps);
  int most = 0;
  for (int i = 0; i < count; ++i) {
    const int n = length_of(p, group, first + i);
    most = n > most ? n : most;
  }
  return most;
}

// Nonzero where the boundary that the row crosses to enter step k carries a reset. 0 past its end. Raw, so that
// the load may stay in flight until somebody asks.
FASTRNN_INLINE uint8_t reset_before(const ForwardParams& p, const RowWalk& r, int k) {
  if (!p.resets || !r.running(k) || k < 0) return 0;
  if (r.reverse && k == 0) return 0;  // what a reset at time t + 1 cuts there is padding or nothing
  const int64_t t = r.time(k) + (r.reverse ? 1 : 0);
  return p.resets[t * p.resets_stride_t + r.row * p.resets_stride_b + r.group * p.resets_stride_p];
}

// ---- recurrent dropout and zoneout ----
//
// The per-step tier's alone (kMasks): in the others' loops, whose registers are full of weights, even to ask whether there
// are masks took registers and instructions from calls without any.

inline bool has_masks(const ForwardParams& p) { return p.mask_h || p.keep_h || p.keep_c; }

// State 0, or what late gates' product is with instead, on its way into a recurrent product, column j < R; or its gradient
// on the way back.
template <class S>
FASTRNN_INLINE Wide<S> through_mask(const ForwardParams& p, const RowWalk& r, int j, Wide<S> x) {
  return p.mask_h ? x * load<S>(p.mask_h, r.place(p) * p.width + j) : x;
}

// Zoneout's part of step k that is the state before it: of column j < R of h, of unit j < h of c. Where there is one.
template <class S>
FASTRNN_INLINE Wide<S> load_keep_h(const ForwardParams& p, const RowWalk& r, int k, int j) {
  return load<S>(p.keep_h, r.time(k) * p.keep_h_stride_t + r.row * p.keep_h_stride_b + r.group * p.width + j);
}
template <class S>
FASTRNN_INLINE Wide<S> load_keep_c(const ForwardParams& p, const RowWalk& r, int k, int j) {
  return load<S>(p.keep_c, r.time(k) * p.keep_c_stride_t + r.row * p.keep_c_stride_b + r.group * p.hidden + j);
}

// ---- cells ----

// Of a unit and step in `saved`: where the states after the step are, and how many values there are.
template <class Cell, bool kMasks>
FASTRNN_INLINE int saved_states(const ForwardParams& p) {
  if constexpr (kKeepsMade<Cell> && kMasks) return Cell::kSaved + ((Cell::kStates > 1 ? p.keep_c : p.keep_h) != nullptr);
  else return Cell::kSaved;
}
template <class Cell, bool kMasks>
FASTRNN_INLINE int saved_values(const ForwardParams& p) {
  return saved_states<Cell, kMasks>(p) + Cell::kStates - 1;
}
// The first of the states that a unit carries, and the others follow.
template <class Cell>
constexpr int carried_state = Cell::kStates - kCarried<Cell>;

// Is grad_gates_hh another tensor than grad_gates_ih (registry.h)?
template <class Cell>
constexpr bool kSeparateGates = false
#define FASTRNN_SEPARATE(name, C, separate) || (std::is_same<Cell, C>::value && separate)
    FASTRNN_FOR_EACH_CELL(FASTRNN_SEPARATE)
#undef FASTRNN_SEPARATE
    ;

// The parameters of unit j < h. They are read anew in every step: that is a hit in the first cache, and costs no
// register between steps.
template <class Cell, class S>
FASTRNN_INLINE void load_params(const ForwardParams& p, int group, int j, Pack<Wide<S>, Cell::kParams>& out) {
  if constexpr (Cell::kParams > 0) {
#pragma unroll
    for (int i = 0; i < Cell::kParams; ++i)
      out[i] = load<S>(p.params, (int64_t(group) * Cell::kParams + i) * p.hidden + j);
  }
}

}  // namespace fastrnn::cuda
