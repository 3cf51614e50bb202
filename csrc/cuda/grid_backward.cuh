// A whole backward pass of the grid and cluster tiers: see grid.cuh. A block owns columns of weight_hh, its units'
// gradient of state 0, and multiplies the gate gradients of all units by them. The gate gradients of step k travel with
// tag `steps` - k, which counts up, in buffer k & 1.
#pragma once
#include "grid_product.cuh"
#include "unit_backward.cuh"

namespace fastrnn::cuda {

// What a thread reads of its word's units in step k.
template <class Cell, class S, int N>
struct BackwardWords {
  static constexpr bool kIsH = Cell::kStates == 1;                   // is h the state that is carried?
  static constexpr int kValues = Cell::kSaved + Cell::kStates - 1;  // in `saved`

  uint32_t saved[Cell::kSaved > 0 ? Cell::kSaved : 1];
  uint32_t state, state_prev, grad_output;

  // Loads of one unit, as the cell takes them.
  FASTRNN_INLINE BackwardLoads<Cell, S> unit(int n) const {
    BackwardLoads<Cell, S> loads;
    if constexpr (Cell::kSaved > 0) {
#pragma unroll
      for (int i = 0; i < Cell::kSaved; ++i) loads.saved[i] = element<S, N>(saved[i], n);
    }
    loads.state = element<S, N>(state, n);
    loads.state_prev = element<S, N>(state_prev, n);
    loads.grad_output = element<S, N>(grad_output, n);
    return loads;
  }
};

// Where they are, from step k down.
template <class Cell, class S, int N>
struct BackwardArrays {
  using Words = BackwardWords<Cell, S, N>;
  Steps<const S> saved, output, grad_output;
  Steps<S> grads_ih, grads_hh;

  FASTRNN_INLINE BackwardArrays(const BackwardParams& p, const RowWalk& r, int k, int unit)
      : BackwardArrays(p, r, k, unit, r.place(p), p.batch * p.groups) {}

  FASTRNN_INLINE void step_back() {
    saved.at -= saved.step, grad_output.at -= grad_output.step, grads_ih.at -= grads_ih.step;
    if constexpr (Words::kIsH) output.at -= output.step;
    if constexpr (kSeparateGates<Cell>) grads_hh.at -= grads_hh.step;
  }

  static FASTRNN_INLINE bool are_pairs(const BackwardParams& p) {
    return in_pairs<N>(
        p.hidden | p.grad_output_stride_t | p.grad_output_stride_b | p.grad_gates_stride,
        static_cast<const S*>(p.saved), static_cast<const S*>(p.output), static_cast<const S*>(p.grad_output),
        static_cast<const S*>(p.grad_gates_ih), static_cast<const S*>(p.grad_gates_hh));
  }

  // Zeros where the row has no step k. reset: reset_before(k).
  FASTRNN_INLINE Words load(const BackwardParams& p, const RowWalk& r, int k, int unit, int units, bool reset,
                            bool pairs) const {
    Words words{};
    if (!r.running(k) || k < 0 || !units) return words;
    if constexpr (Cell::kSaved > 0) load_words<S, N>(saved.at, int(p.hidden), units, pairs, words.saved);
    // The carried state after every step is in `output`, or the last of the values in `saved`.
    const S* state = Words::kIsH ? output.at : saved.at + Cell::kSaved * p.hidden;
    words.state = load_word<S, N>(state, units, pairs);
    if (reset || k == 0) {  // a state that no step made
      const void* given = Words::kIsH ? (reset ? p.reset_h : p.h_0) : reset ? p.reset_c : p.c_0;
      const int64_t at = r.in_c<Cell>(p, unit);
      float value[N];
#pragma unroll
      for (int n = 0; n < N; ++n) value[n] = n < units ? load_or_zero<S>(given, at + n) : 0.f;
      words.state_prev = hold<S>(value);
    } else {
      words.state_prev = load_word<S, N>(state - (Words::kIsH ? output.step : saved.step), units, pairs);
    }
    if (p.grad_output) words.grad_output = load_word<S, N>(grad_output.at, units, pairs);
    return words;
  }

 private:
  FASTRNN_INLINE BackwardArrays(const BackwardParams& p, const RowWalk& r, int k, int unit, int64_t place,
                                int64_t places)
      : saved(static_cast<const S*>(p.saved) + place * Words::kValues * p.hidden + unit, r, k,
              places * Words::kValues * p.hidden),
        output(static_cast<const S*>(p.output) + place * p.hidden + unit, r, k, places * p.hidden),
        grad_output(static_cast<const S*>(p.grad_output) + r.row * p.grad_output_stride_b + r.group * p.width + unit,
                    r, k, p.grad_output_stride_t),
        grads_ih(static_cast<S*>(p.grad_gates_ih) + place * p.grad_gates_stride + unit, r, k,
                 places * p.grad_gates_stride),
        grads_hh(static_cast<S*>(p.grad_gates_hh) + place * Cell::kGates * p.hidden + unit, r, k,
                 places * Cell::kGates * p.hidden) {}
};

// kRagged: may rows differ, by lengths or resets?
template <class Cell, class S, class Product, bool kRagged = true>
FASTRNN_INLINE void run_backward(const LaunchParams<BackwardParams>& p, const GridShape& shape, void* workspace) {
  constexpr int G = Cell::kGates, N = Product::kValues;
  const GridShape s = shape_for<Product>(shape, G, true);
  const int group = p.first_group + int(blockIdx.z), first_unit = int(blockIdx.x) * s.units;
  const GridShared shared(dev::dynamic_shared(), s);
  sort_rows(p, s, group, shared);

  Product product(s, shared);
  product.load(grid_packed(workspace, s));
  dev::sync_block();

  const GridOwner o = grid_owner(p, s, shared);
  float carried[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    carried[n] = 0.f;
    if (n < o.units) clear_sums<Cell, S>(p, o.row, o.unit + n);
  }

  typename Product::Exchange exchange(workspace, s, shared, s.word_of(o.position, 0, o.unit));
  const PushedSums pushed = pushed_sums<Product>(s, o.position, o.unit - first_unit);

  const auto reset_at = [&](int k) -> uint8_t { return kRagged ? reset_before(p, o.row, k) : 0; };
  // As forward, a word's second unit is a copy of the first where there is none.
  const auto unit = [&](int n) { return o.unit + (n < o.units ? n : 0); };
  const float limit = clip_limit<S>(p);
  using Arrays = BackwardArrays<Cell, S, N>;
  const bool pairs = Arrays::are_pairs(p);

  // Step -1 finishes: its product, over the gate gradients of step 0, goes to grad_h_0.
  const int steps = shared.length[0], end = finish_wanted(p) ? -1 : 0;
  Arrays arrays(p, o.row, steps - 1, o.unit);
  int running = 0;  // rows with a step k + 1, then with a step k
  uint8_t crossed = 0, reset = reset_at(steps - 1);  // on entering steps k + 1 and k
  for (int k = steps - 1; k >= end; --k) {
    const int before = running;
    if (kRagged || k == steps - 1)
      while (running < s.rows && shared.length[running] > k) ++running;
    const BackwardWords<Cell, S, N> words = arrays.load(p, o.row, k, o.unit, o.units, reset, pairs);
    float* sums = k & 1 ? shared.sums_odd : shared.sums_even;
    const uint8_t reset_ahead = reset_at(k - 1);
    if (before > 0) product.multiply(exchange, k + 1, uint32_t(steps - k) - 1, before, sums);
    dev::sync_block();
    const bool own = o.units && (!kRagged || k < 0 || o.row.running(k));
    float recurrent[1][N];
#pragma unroll
    for (int n = 0; n < N; ++n) recurrent[0][n] = 0.f;
    if (own && o.position < before)
      grid_sums<Product>(sums, s, pushed, o.position, o.unit - first_unit, 0, recurrent);
    if (k < 0) {
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (n < o.units)
          finish_backward_unit<Cell, S>(p, o.row, o.unit + n, recurrent[0][n], carried[n], crossed);
      break;
    }
    uint32_t of_ih[G], of_hh[G];
    if (own) {
      BackwardOut<Cell, float> out[N];
#pragma unroll
      for (int n = 0; n < N; ++n)
        run_backward_step<Cell, S>(p, o.row, k, unit(n), words.unit(n), recurrent[0][n], limit, crossed && n < o.units,
                                   carried[n], out[n]);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n < o.units) add_grad_params<Cell, S>(p, o.row, o.unit + n, out[n]);
        carried[n] = out[n].grad_state_prev[carried_state<Cell>];
      }
#pragma unroll
      for (int g = 0; g < G; ++g) {
        float ih[N], hh[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          ih[n] = out[n].grad_gates_ih[g];
          hh[n] = n < o.units ? out[n].grad_gates_hh[g] : 0.f;
        }
        of_ih[g] = hold<S>(ih), of_hh[g] = hold<S>(hh);
        exchange.store(k, uint32_t(steps - k), g, Product::encode(hh));
      }
    }
    // The others wait for this, and for nothing else that follows.
    exchange.publish(k, uint32_t(steps - k), k > end);
    if (own) {
      store_words<S, N>(arrays.grads_ih.at, s.hidden, o.units, pairs, of_ih);
      if constexpr (kSeparateGates<Cell>) store_words<S, N>(arrays.grads_hh.at, s.hidden, o.units, pairs, of_hh);
    }
    arrays.step_back();
    crossed = reset;
    reset = reset_ahead;
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (n < o.units) pad_backward<Cell, S>(p, o.row, o.unit + n);
}

}  // namespace fastrnn::cuda
