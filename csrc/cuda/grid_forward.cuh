// A whole forward pass of the grid and cluster tiers: see grid.cuh. All gates of a unit belong to one block, and what a
// (row, unit) carries stays in a register of its owner. The state before step k travels with tag k + 1 in buffer k & 1;
// the initial one too.
#pragma once
#include "grid_product.cuh"
#include "unit_forward.cuh"

namespace fastrnn::cuda {

// kRagged: may rows differ, by lengths or resets?
template <class Cell, class S, class Product, bool kRagged = true>
FASTRNN_INLINE void run_forward(const LaunchParams<ForwardParams>& p, const GridShape& shape, void* workspace) {
  constexpr int G = Cell::kGates, N = Product::kValues;
  const GridShape s = shape_for<Product>(shape, G, false);
  const int group = p.first_group + int(blockIdx.z), first_unit = int(blockIdx.x) * s.units;
  const GridShared shared(dev::dynamic_shared(), s);
  sort_rows(p, s, group, shared);

  Product product(s, shared);
  product.load(grid_packed(workspace, s));
  dev::sync_block();

  const GridOwner o = grid_owner(p, s, shared);
  typename Product::Exchange exchange(workspace, s, shared, s.word_of(o.position, 0, o.unit));
  const PushedSums pushed = pushed_sums<Product>(s, o.position, o.unit - first_unit);
  const auto reset_at = [&](int k) -> uint8_t { return kRagged ? reset_before(p, o.row, k) : 0; };
  // A word's units are computed side by side, the second one also where there is none: as a copy of the first that no
  // product, array or other unit ever sees.
  const auto unit = [&](int n) { return o.unit + (n < o.units ? n : 0); };
  float carried[N], start[N];
  Pack<float, G> of_unit[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    carried[n] = start[n] = 0.f;
    load_bias<Cell, S>(p, group, n < o.units ? o.unit + n : s.hidden, of_unit[n]);
    if (n >= o.units) continue;
    const bool reset = reset_at(0);
    start[n] = start_h<S>(p, o.row, o.unit + n, reset);
    carried[n] = start_carried<Cell, S>(p, o.row, o.unit + n, reset, start[n]);
  }
  uint32_t bias[G], gates[G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    float of_gate[N];
#pragma unroll
    for (int n = 0; n < N; ++n) of_gate[n] = of_unit[n][g];
    bias[g] = hold<S>(of_gate);
  }

  const S *const all_gates = static_cast<const S*>(p.gates_ih);
  S *const all_saved = static_cast<S*>(p.saved), *const all_output = static_cast<S*>(p.output);
  constexpr int kValues = Cell::kSaved + Cell::kStates - 1;  // in `saved`
  const bool pairs = in_pairs<N>(s.hidden | p.gates_ih_stride_t | p.gates_ih_stride_b | p.gates_ih_stride_p, all_gates,
                                 all_saved, all_output);
  const int64_t places = p.batch * p.groups, place = o.row.place(p);
  Steps<const S> gates_of(all_gates + o.row.row * p.gates_ih_stride_b + o.row.group * p.gates_ih_stride_p + o.unit,
                          o.row, 0, p.gates_ih_stride_t);
  Steps<S> saved(all_saved + place * kValues * s.hidden + o.unit, o.row, 0, places * kValues * s.hidden);
  Steps<S> output(all_output + place * s.hidden + o.unit, o.row, 0, places * s.hidden);
  const auto load_step = [&](int k) {  // the gates of step k, to which gates_of points
    load_words<S, N>(gates_of.at, s.hidden, o.row.running(k) ? o.units : 0, pairs, gates);
  };
  load_step(0);

  if (o.units && o.row.running(0)) exchange.store(0, 1, 0, Product::encode(start));
  const int gate_columns = Product::gate_columns(s), steps = shared.length[0];
  exchange.publish(0, 1, steps > 0);

  int running = s.rows;
  for (int k = 0; k < steps; ++k) {
    if (kRagged || k == 0)
      while (shared.length[running - 1] <= k) --running;
    const uint8_t reset_next = reset_at(k + 1);
    float* sums = k & 1 ? shared.sums_odd : shared.sums_even;
    product.multiply(exchange, k, uint32_t(k) + 1, running, sums);
    dev::sync_block();
    const bool own = o.units && (!kRagged || o.row.running(k));
    ForwardOut<Cell, float> out[N];
    if (own) {
      float z[G][N], next[N];
      grid_sums<Product>(sums, s, pushed, o.position, o.unit - first_unit, gate_columns, z);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        Pack<S, G> gates_ih;
        Pack<float, G> gates_hh;
#pragma unroll
        for (int g = 0; g < G; ++g) {
          gates_ih[g] = element<S, N>(gates[g], n);
          gates_hh[g] = z[g][n] + held<S, N>(bias[g], n);
        }
        run_cell<Cell, S>(p, o.row, unit(n), gates_ih, gates_hh, carried[n], out[n]);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        next[n] = n < o.units ? next_h<S>(p, o.row, unit(n), out[n].state[0], reset_next) : 0.f;
        if constexpr (Cell::kStates == 1) carried[n] = next[n];
      }
      if (o.row.running(k + 1)) exchange.store(k + 1, uint32_t(k) + 2, 0, Product::encode(next));
    }
    // The others wait for this, and for nothing else that follows.
    exchange.publish(k + 1, uint32_t(k) + 2, k + 1 < steps);
    gates_of.at += gates_of.step;
    load_step(k + 1);
    if (own) {
      const auto word = [&](auto value_of) {
        float value[N];
#pragma unroll
        for (int n = 0; n < N; ++n) value[n] = value_of(out[n]);
        return hold<S>(value);
      };
      uint32_t of_output[1] = {word([](const auto& out) { return out.state[0]; })};
      if constexpr (kValues > 0) {
        uint32_t of_saved[kValues];
        if constexpr (Cell::kSaved > 0) {
#pragma unroll
          for (int i = 0; i < Cell::kSaved; ++i) of_saved[i] = word([&](const auto& out) { return out.saved[i]; });
        }
        if constexpr (Cell::kStates > 1) of_saved[Cell::kSaved] = word([](const auto& out) { return out.state[1]; });
        if (p.saved) store_words<S, N>(saved.at, s.hidden, o.units, pairs, of_saved);
      }
      store_words<S, N>(output.at, 0, o.units, pairs, of_output);
      if constexpr (Cell::kStates > 1) {
#pragma unroll
        for (int n = 0; n < N; ++n)
          carried[n] = reset_next ? load_or_zero<S>(p.reset_c, o.row.template in_c<Cell>(p, unit(n))) : out[n].state[1];
      }
      if (o.row.last(k)) {
#pragma unroll
        for (int n = 0; n < N; ++n)
          if (n < o.units) store_last<Cell, S>(p, o.row, o.unit + n, out[n]);
      }
    }
    saved.at += saved.step;
    output.at += output.step;
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (n < o.units) pad_forward<Cell, S>(p, o.row, o.unit + n);
}

}  // namespace fastrnn::cuda
