// What happens to one row in one step, forward and backward: the states it starts from, the cell, what is stored and what
// is carried on. The products, and who computes which rows and units when, are in {forward,backward}-inl.h.
// csrc/cuda/unit_{forward,backward}.cuh are the twin.
//
// All of it is for one row i of a member's, and for a vector of units: units j .. j + L - 1, of which those beyond the
// last are computed too, but never stored. Nothing here crosses from one vector of units to another, but for the passes
// over a whole row that a cell may ask for (Cell::Row, cells/cell.h).
#pragma once
#include "isa-inl.h"

#include "../cells/registry.h"
#include "rows-inl.h"
#include "simd-inl.h"
#include "workspace-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Of a product with a call's weights.
inline Terms terms_of_weights(const ForwardParams& p) {
  return p.constant_weights ? Terms::kConstantWeights : Terms::kAll;
}

template <class T, class S>
FASTRNN_HD Vec<T> load_or_zero(const S* p, int64_t offset, int valid) {
  return p ? Vec<T>(load(p + offset, valid)) : Vec<T>(0);
}

// The parameters of units j .. of one group, from [P, kParams, h].
template <class Cell, class S>
FASTRNN_HD auto load_params(const ForwardParams& p, int64_t group, int64_t j, int valid) {
  Pack<Vec<typename Compute<S>::type>, Cell::kParams> params;
  if constexpr (Cell::kParams > 0)
    FASTRNN_UNROLL for (int k = 0; k < Cell::kParams; ++k)
      params[k] = load(static_cast<const S*>(p.params) + (group * Cell::kParams + k) * p.hidden + group * p.gaps.params + j,
                       valid);
  return params;
}

// Is the cell's h projected?
template <class Cell>
FASTRNN_HD bool projects(const ForwardParams& p) {
  return kTakesProjection<Cell> && p.weight_hr;
}

// Of a unit and step in ForwardParams::saved: where the states after the step are, and how many values there are.
template <class Cell>
FASTRNN_HD int64_t saved_states(const ForwardParams& p) {
  if constexpr (kKeepsMade<Cell>) return Cell::kSaved + ((kInC<Cell> > 0 ? p.keep_c : p.keep_h) != nullptr);
  else return Cell::kSaved;
}
template <class Cell>
FASTRNN_HD int64_t saved_values(const ForwardParams& p) {
  return saved_states<Cell>(p) + kInC<Cell>;
}

// What a state keeps of the one before, under zoneout: n units from the at-th on of keep_h or keep_c.
template <class S>
FASTRNN_HD Vec<typename Compute<S>::type> load_keep(const ForwardParams& p, const void* keep, int64_t at, int n) {
  using T = typename Compute<S>::type;
  if constexpr (std::is_floating_point_v<T>)  // no bytes of dual numbers
    if (p.keep_is_bool) return load_bools<T>(static_cast<const uint8_t*>(keep) + at, n);
  return load(static_cast<const S*>(keep) + at, n);
}
template <class S>
void fetch_keep(const ForwardParams& p, const void* keep, int64_t at) {
  __builtin_prefetch(static_cast<const char*>(keep) + at * int64_t(p.keep_is_bool ? 1 : sizeof(S)));
}

// ---- forward ----

// How a forward pass meets time.
struct ForwardWalk : Walk<ForwardParams> {
  int64_t t = 0;  // the step's time

  using Walk::Walk;
  int64_t time_of(int64_t s) const { return reverse ? p.steps - 1 - s : s; }
};

// The states before the first step of a group's rows, of these vectors of c's columns (units) and of h's (widths). A row
// without a step ends where it starts.
template <class S>
FASTRNN_ONE_COPY void start_rows(const ForwardWalk& walk, const ForwardBuffers<S>& b, Range units, Range widths) {
  using T = typename Compute<S>::type;
  using A = typename Operand<S>::type;
  using V = Vec<T>;
  constexpr int L = V::kLanes;
  const ForwardParams& p = walk.p;
  const int in_c = cell_info(p).in_c();
  for (int64_t i = 0; i < walk.rows->size(); ++i) {
    const int64_t row = (walk.rows->first + i) * b.stride, length = walk.rows->length[i];
    const bool reset = length > 0 && walk.reset_before(i, walk.reverse ? length - 1 : 0);
    const auto start = [&](int64_t at, const void* initial, void* last, const void* restart, int n) {
      if (length == 0) store(static_cast<S*>(last) + at, load_or_zero<T>(static_cast<const S*>(initial), at, n), n);
      return load_or_zero<T>(static_cast<const S*>(reset ? restart : initial), at, n);
    };
    for (int64_t j = widths.begin * L; j < widths.end * L; j += L) {
      const V h = start(walk.place(i) * p.width + j, p.h_0, p.h_n, p.reset_h, valid_lanes<T>(p.width, j));
      store(b.h[0] + row + j, h);
      if (p.steps > 1) store(b.h[1] + row + j, h);  // of rows that begin later
      if (b.multiplied[0])
        for (A* x : b.multiplied) store(x + row + j, p.mask_h ? walk.masked<S>(i, j, h) : h);
    }
    for (int k = 0; k < in_c; ++k)
      for (int64_t j = units.begin * L; j < units.end * L; j += L)
        store(b.c + k * p.batch * b.stride + row + j,
              start(walk.in_c(i, in_c, k, j), p.c_0, p.c_n, p.reset_c, valid_lanes<T>(p.hidden, j)));
  }
}

template <class Cell, class S>
struct ForwardStep : ForwardWalk {
  using T = typename Compute<S>::type;
  using A = typename Operand<S>::type;
  using V = Vec<T>;
  using Place = typename ForwardBuffers<S>::Place;
  static constexpr int L = V::kLanes, G = Cell::kGates;
  static constexpr int C = kInC<Cell>;

  const ForwardBuffers<S>& b;
  Place* const places;   // of this member's rows in the step
  const int64_t stride;  // the buffers'
  const T* h_prev = nullptr;      // state 0 before the step
  const A* multiplied = nullptr;  // as the product reads it
  // Of this member's rows, like h_prev; multiplied_next is null where the product reads h itself.
  T *h_next = nullptr, *c = nullptr;
  A *multiplied_next = nullptr, *hidden = nullptr, *late = nullptr;

  ForwardStep(const ForwardParams& params, const ForwardBuffers<S>& buffers, int member)
      : ForwardWalk(params), b(buffers), places(b.places + member * params.batch), stride(b.stride) {}

  // The group's s-th step.
  void enter_step(int64_t s) {
    t = time_of(s);
    h_prev = b.h[s & 1] + rows->first * stride;
    h_next = b.h[(s + 1) & 1] + rows->first * stride;
    multiplied_next = nullptr;
    if constexpr (std::is_same_v<A, T>) multiplied = h_prev;
    if (b.multiplied[0]) {
      multiplied = b.multiplied[s & 1] + rows->first * stride;
      multiplied_next = b.multiplied[(s + 1) & 1] + rows->first * stride;
    }
    c = b.c + rows->first * stride;
    hidden = b.hidden ? b.hidden + rows->first * stride : nullptr;
    if constexpr (kHasLate<Cell>) late = b.late + rows->first * stride;
    for (int64_t i = 0; i < rows->active(t); ++i) places[i] = place_of(i);
  }

  // The cell of units j .., given their recurrent product with its bias, [G][L]. gates_ih: likewise, or null where the
  // call's are read.
  FASTRNN_HD void cell(int64_t i, int64_t j, const T* gates_hh, const T* gates_ih) {
    ForwardIn<Cell, V> in;
    ForwardOut<Cell, V> out;
    in.gates_ih = gates_ih_of(i, j, gates_ih);
    const int n = valid_lanes<T>(p.hidden, j);
    load_unit(i, j, n, gates_hh, in);
    cell_forward<Cell>(in, out);
    finish(i, j, n, out);
  }

  // The same of rows first .. of a cell that begins and ends; from row to row their products are hh_stride and ih_stride
  // apart.
  FASTRNN_HD void cells(int64_t first, int rows, int64_t j, const T* gates_hh, int64_t hh_stride, const T* gates_ih,
                        int64_t ih_stride) {
    constexpr int kAtOnce = 6;
    const int n = valid_lanes<T>(p.hidden, j);
    const auto load_row = [&](int i) FASTRNN_INLINE_BODY {
      ForwardIn<Cell, V> in;
      in.gates_ih = gates_ih_of(first + i, j, gates_ih ? gates_ih + i * ih_stride : nullptr);
      load_unit(first + i, j, n, gates_hh + i * hh_stride, in);
      return in;
    };
    for (int begin = 0; begin < rows; begin += kAtOnce) {
      const int end = rows - begin < kAtOnce ? rows : begin + kAtOnce;
      ForwardOut<Cell, V> out[kAtOnce];
      for (int i = begin; i < end; ++i) Cell::begin(load_row(i), out[i - begin]);
      for (int i = begin; i < end; ++i) {
        Cell::end(load_row(i), out[i - begin]);
        finish(first + i, j, n, out[i - begin]);
      }
    }
  }

  // What the product of the late gates is with, units j .. gates_hh and gates_ih: as of cell(), where those of the late
  // gates may hold anything.
  void late_input(int64_t i, int64_t j, const T* gates_hh, const T* gates_ih) {
    ForwardIn<Cell, V> in;
    in.gates_ih = gates_ih_of(i, j, gates_ih);
    load_unit(i, j, valid_lanes<T>(p.hidden, j), gates_hh, in);
    V x = Cell::late_input(in);
    if (p.mask_h) x = masked<S>(i, j, x);
    store(late + i * stride + j, x);
  }

  // The same for all units of row i, of a cell with a Row. gates_hh: [unit_vectors][G][L]; gates_ih: as of cell(), every
  // vector of units gates_ih_stride after the one before; scratch: [unit_vectors][G + kWork][L]. gates_ih are copied
  // there, since in a chunk of steps a row's are far apart, and every pass reads them.
  void whole_row(int64_t i, const T* gates_hh, const T* gates_ih, int64_t gates_ih_stride, T* scratch) {
    constexpr int W = ForwardPasses<Cell>::kWork;
    const int64_t h = p.hidden;
    const auto load_in = [&](int64_t j, int n, ForwardIn<Cell, V>& in, auto work) FASTRNN_INLINE_BODY {
      const T* own = scratch + j * (G + W);
      FASTRNN_UNROLL for (int k = 0; k < G; ++k) in.gates_ih[k] = load(own + k * L);
      load_unit(i, j, n, gates_hh + j * G, in);
      if constexpr (W > 0)  // by itself: where nothing depends on `work`, a compiler may look inside
        if constexpr (work)
          FASTRNN_UNROLL for (int k = 0; k < W; ++k) in.work[k] = load(own + (G + k) * L);
    };
    const auto keep = [&](int64_t j, const ForwardIn<Cell, V>& in) FASTRNN_INLINE_BODY {
      if constexpr (W > 0)
        FASTRNN_UNROLL for (int k = 0; k < W; ++k) store(scratch + (j * (G + W)) + (G + k) * L, in.work[k]);
    };
    for (int64_t j = 0; j < h; j += L) {
      const Pack<V, G> gates = gates_ih_of(i, j, gates_ih ? gates_ih + j / L * gates_ih_stride : nullptr);
      for (int k = 0; k < G; ++k) store(scratch + j * (G + W) + k * L, gates[k]);
    }
    ForwardIn<Cell, V> in;
    in.work = {};
    run_passes<T, ForwardPasses<Cell>>(h, in, load_in, keep);
    for_each_vector<T>(h, [&](int64_t j, int n) FASTRNN_INLINE_BODY {
      ForwardOut<Cell, V> out;
      load_in(j, n, in, std::bool_constant<(W > 0)>());
      cell_forward<Cell>(in, out);
      finish(i, j, n, out);
    });
  }

  // State 0 after the step, columns j .., as the cell or the projection made it.
  void store_h(int64_t i, int64_t j, V h) { store_h(Place(places[i]), i, j, valid_lanes<T>(p.width, j), h); }

 private:
  FASTRNN_HD Pack<V, G> gates_ih_of(int64_t i, int64_t j, const T* made) const {
    Pack<V, G> gates;
    if (made) {
      for (int k = 0; k < G; ++k) gates[k] = load(made + k * L);
      return gates;
    }
    const int n = valid_lanes<T>(p.hidden, j);
    for (int k = 0; k < G; ++k) gates[k] = load(places[i].gates_ih + k * p.hidden + j, n);
    return gates;
  }

  // n: how many of units j .. there are; likewise below.
  FASTRNN_HD void load_unit(int64_t i, int64_t j, int n, const T* gates_hh, ForwardIn<Cell, V>& in) const {
    for (int k = 0; k < G; ++k) in.gates_hh[k] = load(gates_hh + k * L);
    in.state[0] = C == 0 ? V(load(h_prev + i * stride + j)) : V(0);  // no cell with a second state reads h
    FASTRNN_UNROLL for (int k = 0; k < C; ++k) in.state[1 + k] = load(c + (k * p.batch + i) * stride + j);
    in.params = load_params<Cell, S>(p, group, j, n);
  }

  Place place_of(int64_t i) const {
    const int64_t h = p.hidden, row = place(i), here = place(i, t);
    const auto at = []<class X>(X* tensor, int64_t offset) { return tensor ? tensor + offset : nullptr; };
    const auto given = [&](const void* tensor, int64_t offset) { return at(static_cast<const S*>(tensor), offset); };
    const auto made = [&](void* tensor, int64_t offset) { return at(static_cast<S*>(tensor), offset); };
    Place x{};
    x.last = is_last(i, t);
    x.restarts = !x.last && p.resets && reset_before(i, next_time(t));
    x.output = made(p.output, here * p.width);
    x.saved = made(p.saved, here * saved_values<Cell>(p) * h);
    x.h_n = made(p.h_n, row * p.width);
    x.c_n = made(p.c_n, row * C * h);
    x.reset_h = given(p.reset_h, row * p.width);
    x.reset_c = given(p.reset_c, row * C * h);
    x.mask_h = given(p.mask_h, row * p.width);
    x.gates_ih = given(p.gates_ih, offset(i, t, p.gates_ih_stride_t, p.gates_ih_stride_b) + group * p.gates_ih_stride_p);
    if (p.keep_h) x.keep_h = keep_h_at(i, t, 0);
    if (p.keep_c) x.keep_c = keep_c_at(i, t, 0);
    return x;
  }

  // Stores what a step gave units j ..
  FASTRNN_HD void finish(int64_t i, int64_t j, int n, const ForwardOut<Cell, V>& out) {
    const Place place = places[i];  // by itself: for all that the compiler knows, what is stored may change it there
    const int64_t h = p.hidden;
    V after[C + 1];
    FASTRNN_UNROLL for (int k = 0; k < C; ++k) after[k] = out.state[1 + k];
    if constexpr (C == 1)
      if (p.keep_c)
        after[0] = zoned_out(load_keep<S>(p, p.keep_c, place.keep_c + j, n), V(load(c + i * stride + j)), after[0]);
    if (place.saved) {
      S* saved = place.saved + j;
      if constexpr (Cell::kSaved > 0)
        FASTRNN_UNROLL for (int k = 0; k < Cell::kSaved; ++k) store(saved + k * h, out.saved[k], n);
      const int64_t states = saved_states<Cell>(p);
      if constexpr (kKeepsMade<Cell>)
        if (states > Cell::kSaved) store(saved + Cell::kSaved * h, out.state[C], n);
      FASTRNN_UNROLL for (int k = 0; k < C; ++k) store(saved + (states + k) * h, after[k], n);
    }
    for (int k = 0; k < C; ++k)
      store(c + (k * p.batch + i) * stride + j, carry(place, place.c_n, place.reset_c, k * h + j, after[k], n));
    if (projects<Cell>(p))
      store(hidden + i * stride + j, out.state[0]);
    else
      store_h(place, i, j, n, out.state[0]);
  }
  FASTRNN_HD void store_h(const Place& place, int64_t i, int64_t j, int n, V h) {
    if (p.keep_h)
      h = zoned_out(load_keep<S>(p, p.keep_h, place.keep_h + j, n), V(load(h_prev + i * stride + j)), h);
    store(place.output + j, h, n);
    const V next = carry(place, place.h_n, place.reset_h, j, h, n);
    // What reads h itself: cells without a second state, products that have no copy of their own, and zoneout.
    if (C == 0 || !multiplied_next || p.keep_h) store(h_next + i * stride + j, next);
    if (multiplied_next)
      store(multiplied_next + i * stride + j, place.mask_h ? next * V(load(place.mask_h + j, n)) : next);
  }

  // What the next step starts from, where this one ended in `state`; a row's last state is its result.
  FASTRNN_HD static V carry(const Place& place, S* last, const S* restart, int64_t at, V state, int n) {
    if (place.last) store(last + at, state, n);
    else if (place.restarts) return load_or_zero<T>(restart, at, n);
    return state;
  }
};

// ---- backward ----
//
// A row begins after its last step with grad_h_n and grad_c_n, and finishes one step after it has passed its first one:
// there the last product gives grad_h_0. Resets send what would cross them to grad_reset_h and grad_reset_c instead.

// How a backward pass meets time, and where it finds the states of the forward pass.
struct BackwardWalk : Walk<BackwardParams> {
  int64_t t = 0;                         // the step's time; that of the step met before it is next_time(t)
  int64_t running = 0, was_running = 0;  // rows that have a step at t, and at next_time(t)

  using Walk::Walk;
  int64_t time_of(int64_t s) const { return reverse ? s : p.steps - 1 - s; }

  // The group's s-th step of this loop: that of time t or, at s = T, what is left to do for the initial states.
  void enter_step(int64_t s) {
    t = time_of(s);
    was_running = running;
    running = s < p.steps ? rows->active(t) : 0;
  }

  // State 0 before row i's step at `time`, [R]; null for zeros.
  template <class S>
  const S* h_before(int64_t i, int64_t time) const {
    return before<S>(i, time, p.width, p.output, p.width, 0, p.h_0, p.reset_h);
  }

 protected:
  // A row's state before its step at `time`, of `size` values; null for zeros. It is at `offset` in the `stride` values
  // that `sequence` has of the step before, or there was none.
  template <class S>
  const S* before(int64_t i, int64_t time, int64_t size, const void* sequence, int64_t stride, int64_t offset,
                  const void* initial, const void* restart) const {
    const bool reset = reset_before(i, time);
    if (reset || is_first(i, time)) {
      const S* state = static_cast<const S*>(reset ? restart : initial);
      return state ? state + place(i) * size : nullptr;
    }
    return static_cast<const S*>(sequence) + place(i, previous_time(time)) * stride + offset;
  }
};

// Rows of a group without a step pass their gradients through, of these vectors of c's columns and of h's.
template <class S>
FASTRNN_ONE_COPY void pass_rows(const BackwardWalk& walk, Range units, Range widths) {
  using T = typename Compute<S>::type;
  constexpr int L = Vec<T>::kLanes;
  const BackwardParams& p = walk.p;
  const auto pass = [&](int64_t at, const void* grad_last, void* grad_initial, int n) {
    store(static_cast<S*>(grad_initial) + at, load_or_zero<T>(static_cast<const S*>(grad_last), at, n), n);
  };
  const int in_c = cell_info(p).in_c();
  for (int64_t i = walk.rows->active(0); i < walk.rows->size(); ++i) {
    for (int64_t j = widths.begin * L; j < widths.end * L; j += L)
      pass(walk.place(i) * p.width + j, p.grad_h_n, p.grad_h_0, valid_lanes<T>(p.width, j));
    for (int k = 0; k < in_c; ++k)
      for (int64_t j = units.begin * L; j < units.end * L; j += L)
        pass(walk.in_c(i, in_c, k, j), p.grad_c_n, p.grad_c_0, valid_lanes<T>(p.hidden, j));
  }
}

template <class Cell, class S>
struct BackwardStep : BackwardWalk {
  using T = typename Compute<S>::type;
  using A = typename Operand<S>::type;
  using V = Vec<T>;
  static constexpr int L = V::kLanes, G = Cell::kGates;
  static constexpr int C = kInC<Cell>;

  const LayerBackwardParams* const layer;  // null where gate gradients are asked for
  const BackwardBuffers<S>& b;
  // The buffers' strides, and where this member's rows start in them.
  const int64_t stride, gates_stride, gates_padded;
  T *carry_h = nullptr, *carry_c = nullptr;
  A* grad_h = nullptr;
  // Where the step's grad_gates_hh go, grad_gates_ih or null, and what the product of late gates, or the projection, was
  // with, or null.
  A *to = nullptr, *to_ih = nullptr;
  S* to_inner = nullptr;

  BackwardStep(const BackwardParams& params, const LayerBackwardParams* layer, const BackwardBuffers<S>& buffers)
      : BackwardWalk(params), layer(layer), b(buffers), stride(b.stride), gates_stride(b.gates_stride),
        gates_padded(b.gates_padded) {}

  // Once the group has been entered.
  void begin() {
    running = 0;
    carry_h = b.carry_h + rows->first * stride;
    carry_c = b.carry_c + rows->first * stride;
    grad_h = b.grad_h ? b.grad_h + rows->first * stride : nullptr;
  }

  // Lets the processor fetch what the cell of units j .. is going to read of the forward pass. That was written long ago,
  // in another order, so that no cache has it and no prefetcher expects it; a product's time hides the way.
  FASTRNN_ONE_COPY void fetch(int64_t i, int64_t j) const {
    if (i >= running || j >= p.hidden) return;
    const int64_t h = p.hidden, values = saved_values<Cell>(p);
    const S* saved = static_cast<const S*>(p.saved) + place(i, t) * values * h + j;
    for (int64_t k = 0; k < values; ++k) __builtin_prefetch(saved + k * h);
    if constexpr (Cell::kStates == 1) {
      if (const S* h_prev = h_before<S>(i, t)) __builtin_prefetch(h_prev + j);
    } else {
      if (const S* c_prev = c_before(i)) __builtin_prefetch(c_prev + j);
    }
    if (p.keep_h) fetch_keep<S>(p, p.keep_h, keep_h_at(i, t, j));
    if (p.keep_c) fetch_keep<S>(p, p.keep_c, keep_c_at(i, t, j));
  }

  // The whole gradient of state 0 after the step, columns j .. `recurrent` is what came through weight_hh.
  void state(int64_t i, int64_t j, V recurrent) {
    const int64_t at = place(i) * p.width + j;
    const int n = valid_lanes<T>(p.width, j);
    if (p.mask_h) recurrent = masked<S>(i, j, recurrent);
    const bool carried = !projects<Cell>(p) || p.keep_h;
    const V later = carried ? recurrent + load(carry_h + i * stride + j) : recurrent;
    V grad = arriving(i, at, later, p.grad_h_n, p.grad_reset_h, n);
    if (i >= running) {
      if (p.grad_h_0) store(static_cast<S*>(p.grad_h_0) + at, grad, n);
    } else if (p.grad_output)
      grad = grad + load(static_cast<const S*>(p.grad_output) +
                             offset(i, t, p.grad_output_stride_t, p.grad_output_stride_b) + group * p.width + j,
                         n);
    V kept(0);  // what goes past the step to the state before it
    if (p.keep_h && i < running) {
      const V keep = load_keep<S>(p, p.keep_h, keep_h_at(i, t, j), n);
      kept = keep * grad;
      grad = (V(1) - keep) * grad;
    }
    if (!projects<Cell>(p)) return cell(i, j, grad, kept);
    if (p.keep_h) store(carry_h + i * stride + j, kept);
    store(grad_h + i * stride + j, grad);
    if (!layer && i < running) store(static_cast<S*>(p.grad_projected) + place(i, t) * p.width + j, grad, n);
  }

  // The cell of units j .. grad_hidden: the gradient of o tanh(c), or of state 0 where nothing is projected; `kept` goes
  // past the cell then. That of a cell with a Row waits for whole_row(), and one with late gates gives their gradients and
  // waits for late_cell().
  FASTRNN_HD void cell(int64_t i, int64_t j, V grad_hidden, V kept = V(0)) {
    if constexpr (kWholeRows<Cell> || kHasLate<Cell>) {
      store(b.grad_hidden + (rows->first + i) * stride + j, grad_hidden);
      if (p.keep_h && !projects<Cell>(p)) store(carry_h + i * stride + j, kept);  // until finish()
    }
    if constexpr (kHasLate<Cell>) {
      if (i >= running) return;
      BackwardIn<Cell, V> in;
      in.grad_state[0] = grad_hidden;
      load_unit(i, j, valid_lanes<T>(p.hidden, j), in);
      const auto grads = Cell::late_grad(in);
      for (int k = 0; k < kLateGates<Cell>; ++k) store(to + gate(i, kEarlyGates<Cell> + k, j), grads[k]);
    } else if constexpr (!kWholeRows<Cell>) {
      BackwardIn<Cell, V> in;
      BackwardOut<Cell, V> out;
      in.grad_state[0] = grad_hidden;
      for (int k = 0; k < C; ++k) in.grad_state[1 + k] = grad_c(i, k, j);
      if (i >= running) return;
      const int n = valid_lanes<T>(p.hidden, j);
      load_unit(i, j, n, in);
      [[maybe_unused]] V kept_c(0);
      if constexpr (C == 1)
        if (p.keep_c) kept_c = past_cell(i, j, n, in.grad_state[1]);
      Cell::backward(in, out);
      keep_hidden(i, j, in);
      if (p.keep_h) out.grad_state_prev[0] = out.grad_state_prev[0] + kept;
      if constexpr (C == 1)
        if (p.keep_c) out.grad_state_prev[1] = out.grad_state_prev[1] + kept_c;
      finish(i, j, n, out);
    }
  }

  // The cell of units j .. of a running row, given the gradient of what the product of the late gates was with.
  FASTRNN_HD void late_cell(int64_t i, int64_t j, V late_grad) {
    BackwardIn<Cell, V> in;
    BackwardOut<Cell, V> out;
    in.grad_state[0] = load(b.grad_hidden + (rows->first + i) * stride + j);
    in.late_grad = {{p.mask_h ? masked<S>(i, j, late_grad) : late_grad}};
    const int n = valid_lanes<T>(p.hidden, j);
    load_unit(i, j, n, in);
    Cell::backward(in, out);
    if (p.keep_h) out.grad_state_prev[0] = out.grad_state_prev[0] + load(carry_h + i * stride + j);
    finish(i, j, n, out);
    if (!to_inner) return;
    const V x = in.saved[0] * in.state_prev[0];
    store(to_inner + i * stride + j, p.mask_h ? masked<S>(i, j, x) : x);
  }

  // All units of row i, of a cell with a Row, once cell() has been called for each. scratch: [unit_vectors][kWork][L], and
  // under zoneout of c as many vectors more.
  void whole_row(int64_t i, T* scratch) {
    constexpr int W = BackwardPasses<Cell>::kWork;
    const int64_t h = p.hidden;
    [[maybe_unused]] T* const kept_c = scratch + b.unit_vectors * W * L;
    for (int k = 0; k < C; ++k)
      for (int64_t j = 0; j < h; j += L) {
        V grad = grad_c(i, k, j);
        if constexpr (C == 1)
          if (p.keep_c && i < running) store(kept_c + j, past_cell(i, j, valid_lanes<T>(h, j), grad));
        store(carry_of(i, k) + j, grad);
      }
    if (i >= running) return;
    const T* grad_hidden = b.grad_hidden + (rows->first + i) * stride;
    const auto load_in = [&](int64_t j, int n, BackwardIn<Cell, V>& in, auto work) FASTRNN_INLINE_BODY {
      in.grad_state[0] = load(grad_hidden + j);
      FASTRNN_UNROLL for (int k = 0; k < C; ++k) in.grad_state[1 + k] = load(carry_of(i, k) + j);
      load_unit(i, j, n, in);
      if constexpr (work)
        FASTRNN_UNROLL for (int k = 0; k < W; ++k) in.work[k] = load(scratch + j * W + k * L);
    };
    const auto keep = [&](int64_t j, const BackwardIn<Cell, V>& in) FASTRNN_INLINE_BODY {
      if constexpr (W > 0)
        FASTRNN_UNROLL for (int k = 0; k < W; ++k) store(scratch + j * W + k * L, in.work[k]);
    };
    BackwardIn<Cell, V> in;
    in.work = {};
    run_passes<T, BackwardPasses<Cell>>(h, in, load_in, keep);
    for_each_vector<T>(h, [&](int64_t j, int n) FASTRNN_INLINE_BODY {
      BackwardOut<Cell, V> out;
      load_in(j, n, in, std::bool_constant<(W > 0)>());
      Cell::backward(in, out);
      keep_hidden(i, j, in);
      if (p.keep_h && !projects<Cell>(p)) out.grad_state_prev[0] = out.grad_state_prev[0] + load(carry_h + i * stride + j);
      if constexpr (C == 1)
        if (p.keep_c) out.grad_state_prev[1] = out.grad_state_prev[1] + load(kept_c + j);
      finish(i, j, n, out);
    });
  }

 private:
  // The states besides h before row i's step, [C][h]; null for zeros.
  const S* c_before(int64_t i) const {
    const int64_t h = p.hidden;
    return before<S>(i, t, C * h, p.saved, saved_values<Cell>(p) * h, saved_states<Cell>(p) * h, p.c_0, p.reset_c);
  }

  T* carry_of(int64_t i, int k) const { return carry_c + (k * p.batch + i) * stride; }

  // Of the gradient of c after the step what zoneout hands past the cell; grad is left the rest.
  FASTRNN_HD V past_cell(int64_t i, int64_t j, int n, V& grad) const {
    const V keep = load_keep<S>(p, p.keep_c, keep_c_at(i, t, j), n), whole = grad;
    grad = (V(1) - keep) * whole;
    return keep * whole;
  }

  // The gradient of state 1 + k after the step. A row that has no step more ends here.
  FASTRNN_HD V grad_c(int64_t i, int k, int64_t j) const {
    const int64_t h = p.hidden, at = in_c(i, C, k, j);
    const int n = valid_lanes<T>(h, j);
    V grad = arriving(i, at, load(carry_of(i, k) + j), p.grad_c_n, p.grad_reset_c, n);
    if (i >= running) {
      if (p.grad_c_0) store(static_cast<S*>(p.grad_c_0) + at, grad, n);
    } else if (p.grad_cells) {
      const int64_t from = offset(i, t, p.grad_cells_stride_t, p.grad_cells_stride_b) + (group * C + k) * h + j;
      grad = grad + load(static_cast<const S*>(p.grad_cells) + from, n);
    }
    return grad;
  }

  // What backward of units j .. reads, but for the gradients that arrive. n: how many of them there are.
  FASTRNN_HD void load_unit(int64_t i, int64_t j, int n, BackwardIn<Cell, V>& in) const {
    const int64_t h = p.hidden, here = place(i, t), values = saved_values<Cell>(p);
    const S* saved = static_cast<const S*>(p.saved) + here * values * h + j;
    if constexpr (Cell::kSaved > 0)
      FASTRNN_UNROLL for (int k = 0; k < Cell::kSaved; ++k) in.saved[k] = load(saved + k * h, n);
    if constexpr (Cell::kStates == 1) {  // width == hidden
      in.state_prev[0] = load_or_zero<T>(h_before<S>(i, t), j, n);
      if constexpr (!kReadsState<Cell>) in.state[0] = V(0);
      else if (!p.keep_h) in.state[0] = load(static_cast<const S*>(p.output) + here * h + j, n);
      else if constexpr (kRemakes<Cell>) in.state[0] = Cell::remake(in.saved, in.state_prev);
      else in.state[0] = load(saved + Cell::kSaved * h, n);
    } else {  // no cell with a second state reads h
      in.state[0] = in.state_prev[0] = V(0);
      const S* c_prev = c_before(i);
      for (int k = 0; k < C; ++k) {
        in.state_prev[1 + k] = load_or_zero<T>(c_prev, k * h + j, n);
        in.state[1 + k] = load(saved + (Cell::kSaved + k) * h, n);  // as the cell made it, where that is kept
      }
      if constexpr (kRemakes<Cell>)
        if (p.keep_c) in.state[1] = Cell::remake(in.saved, in.state_prev);
    }
    in.params = load_params<Cell, S>(p, group, j, n);
  }

  // Makes what was projected of units j .. once more, for weight_hr's gradient.
  FASTRNN_HD void keep_hidden(int64_t i, int64_t j, const BackwardIn<Cell, V>& in) const {
    if constexpr (C == 1)
      if (to_inner) {
        V hidden = in.saved[Cell::kSaved - 1];
        if constexpr (!kSavesHidden<Cell>) hidden = hidden * tanh(in.state[1]);
        store(to_inner + i * stride + j, hidden);
      }
  }

  // Stores what a step's backward gave units j ..
  FASTRNN_HD void finish(int64_t i, int64_t j, int n, const BackwardOut<Cell, V>& out) const {
    const int64_t h = p.hidden, here = place(i, t);
    if (!projects<Cell>(p)) store(carry_h + i * stride + j, out.grad_state_prev[0]);
    for (int k = 0; k < C; ++k) store(carry_of(i, k) + j, out.grad_state_prev[1 + k]);
    if constexpr (Cell::kParams > 0)
      if (p.grad_params) {
        T* grad_params = static_cast<T*>(p.grad_params) + place(i) * Cell::kParams * h + j;
        FASTRNN_UNROLL for (int k = 0; k < Cell::kParams; ++k) add(grad_params + k * h, out.grad_params[k], n);
      }
    for (int k = 0; k < kEarlyGates<Cell>; ++k) store(to + gate(i, k, j), out.grad_gates_hh[k]);  // late ones are there
    if (to_ih)
      for (int k = 0; k < G; ++k) store(to_ih + gate(i, k, j), out.grad_gates_ih[k]);
    if (layer) return;
    S* grad_ih = static_cast<S*>(p.grad_gates_ih) + here * p.grad_gates_stride + j;
    for (int k = 0; k < G; ++k) store(grad_ih + k * h, out.grad_gates_ih[k], n);
    if (!p.grad_gates_hh) return;
    S* grad_hh = static_cast<S*>(p.grad_gates_hh) + here * G * h + j;
    for (int k = 0; k < G; ++k) store(grad_hh + k * h, out.grad_gates_hh[k], n);
  }

  // The gradient of a state after the step by what comes after it: `later` from the next step, unless the row has none,
  // or a reset lies between. `at`: of the state in tensors [B, ..].
  FASTRNN_HD V arriving(int64_t i, int64_t at, V later, const void* grad_last, void* grad_reset, int n) const {
    if (i >= was_running) return load_or_zero<T>(static_cast<const S*>(grad_last), at, n);
    if (p.grad_clip > 0) later = clamp(later, T(p.grad_clip));
    if (!p.resets || !reset_before(i, next_time(t))) return later;
    if (grad_reset) add(static_cast<T*>(grad_reset) + at, later, n);
    return V(0);
  }
  static FASTRNN_HD void add(T* to, V x, int n) { store(to, load(to, n) + x, n); }

  FASTRNN_HD int64_t gate(int64_t i, int k, int64_t j) const { return i * gates_stride + k * gates_padded + j; }
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
