// The forward time loop: the products of every step, and who computes which rows and units of it when. What happens to
// a row's units is in step-inl.h.
#pragma once
#include "isa-inl.h"

#include "../cells/registry.h"
#include "coroutine-inl.h"
#include "dot-inl.h"
#include "gates-inl.h"
#include "int8-inl.h"
#include "panels-inl.h"
#include "product-inl.h"
#include "step-inl.h"
#include "workspace-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// S: what tensors are stored in, W: what weights are.
template <class Cell, class S, class W = S>
class ForwardWorker {
  static constexpr bool kInt8 = std::is_same_v<W, int8_t>;
  using WeightHr = std::conditional_t<kInt8, S, W>;
  using T = typename Compute<S>::type;
  using A = typename Operand<S>::type;
  using V = Vec<T>;
  static constexpr int L = V::kLanes, G = Cell::kGates, kUnits = kWholeRows<Cell> ? 1 : kMaxVectors / G;
  static constexpr int kEarly = kEarlyGates<Cell>, kLate = kLateGates<Cell>;

 public:
  static Paused run(const ForwardParams& p, const LayerParams* layer, const Plan& plan, char* workspace, int member) {
    ForwardWorker w(p, layer, plan, workspace, member);
    const bool units_split = !plan.split_rows;
    const int64_t groups = ceil_div(p.groups - w.team, plan.teams);  // this team's
    for (int64_t i = 0; i < groups; ++i) {
      w.begin(w.team + (plan.from_the_end ? groups - 1 - i : i) * plan.teams);
      co_yield kMeet;
      for (int64_t s = 0; s < p.steps; ++s) {
        if (layer && s % plan.chunk == 0) {
          if (plan.follows) co_yield kInput;
          w.gates.gather(s);
          if (units_split) co_yield kMeet;
          w.gates.turn();
          if (!w.in_one_pass()) w.gates.project(w.units);
        }
        w.enter_step(s);
        w.turn(w.step.multiplied, p.width);
        if (w.in_one_pass()) w.project_and_multiply();
        else w.multiply(s, w.units);
        if constexpr (kHasLate<Cell>) {
          if (units_split) co_yield kMeet;
          w.turn(w.step.late, p.width);
          w.multiply_late(s);
        }
        if constexpr (kWholeRows<Cell>) {
          if (units_split) co_yield kMeet;
          w.compute_cells();
        }
        if constexpr (kTakesProjection<Cell>)
          if (p.weight_hr) {
            if (units_split) co_yield kMeet;
            w.turn(w.step.hidden, p.hidden);
            w.project_hidden(s);
          }
        if (units_split && s + 1 < p.steps) co_yield kMeet;
      }
      if (i + 1 < groups) co_yield kMeet;
    }
  }

 private:
  ForwardWorker(const ForwardParams& params, const LayerParams* layer, const Plan& plan, char* workspace, int member)
      : p(params), layer(layer), plan(plan), team(member / plan.team_size), member(member % plan.team_size),
        arena(workspace), b(params, layer, plan, arena), step(params, b, this->member),
        units(own_part(plan, b.unit_vectors, this->member)), widths(own_part(plan, b.width_vectors, this->member)),
        gates(params, layer, plan, this->member, b, step, units, kUnits) {}
  ForwardWorker(const ForwardWorker&) = delete;

  void begin(int64_t group) {
    step.enter(plan, group, member);
    find_weights(group);
    if (layer) gates.begin();
    if constexpr (!kInt8) pack();
    start_rows(step, b, units, widths);
  }

  // ---- the group's weights ----

  void find_weights(int64_t group) {
    const int64_t h = p.hidden, R = p.width;
    bias_hh = p.bias_hh ? static_cast<const S*>(p.bias_hh) + group * (G * h + p.gaps.bias_hh) : nullptr;
    weight_hr = p.weight_hr ? static_cast<const WeightHr*>(p.weight_hr) + group * (R * h + p.gaps.weight_hr) : nullptr;
    if constexpr (kInt8)
      int8_hh = int8_weights(p.weight_hh, layer->scale_hh, layer->sum_hh, G, h, b.quads_hh, group);
    else
      weight_hh = static_cast<const W*>(p.weight_hh) + group * (G * h * R + p.gaps.weight_hh);
  }

  // A team that splits its rows shares all panels; a member that has units of its own packs those.
  void pack() {
    const int64_t h = p.hidden, R = p.width;
    for_each_packed_panel(units, kUnits, plan.split_rows, member, plan.team_size, [&](int64_t v, int vectors) {
      if (plan.pack_hh) {
        pack_gates<0, kEarly>(v, vectors);
        if constexpr (kHasLate<Cell>) pack_gates<kEarly, kLate>(v, vectors);
      }
      if (layer) gates.pack(v, vectors);
    });
    if (!plan.pack_hh || !weight_hr) return;
    for_each_packed_panel(widths, kMaxVectors, plan.split_rows, member, plan.team_size, [&](int64_t v, int vectors) {
      pack_rows(weight_hr + v * L * h, h, 0, 1, vectors, R - v * L, h, panel_hr(v));
    });
  }
  // weight_hh and bias_hh of `count` gates, `first` being the first. All panels of the early gates stand before those of
  // the late ones.
  template <int first, int count>
  void pack_gates(int64_t v, int vectors) {
    const int64_t h = p.hidden, R = p.width, row = first * h + v * L;
    if (!plan.hh_late) pack_rows(weight_hh + row * R, R, h, count, vectors, h - v * L, R, panel_hh<first, count>(v));
    if (bias_hh) pack_bias(bias_hh + row, h, count, vectors, h - v * L, panel_bias<first, count>(v));
  }
  template <int first, int count>
  A* panel_hh(int64_t v) const {
    return b.panels_hh + (first * b.unit_vectors + count * v) * L * padded_depth<A>(p.width);
  }
  template <int first, int count>
  T* panel_bias(int64_t v) const {
    return b.bias + (first * b.unit_vectors + count * v) * L;
  }
  A* panel_hr(int64_t v) const { return b.panels_hr + v * L * padded_depth<A>(p.hidden); }

  // ---- the steps ----

  void enter_step(int64_t s) {
    step.enter_step(s);
    if (layer) chunk_at = gates.row_of(s);
  }

  // The rows of the next product, [.., stride], as a panel, where weights are read as they are stored.
  void turn(const A* rows, int64_t depth) {
    if constexpr (kTurns<A, W>)
      turned = turned_rows<A>(step.rows->active(step.t), rows, b.stride, depth,
                              b.turned_h ? b.turned_h + member * b.turned_h_size : nullptr);
  }

  // A single step meets all weights once, those of a panel of units together. So the whole call is one pass over them, and
  // where calls take turns at its direction (Plan::from_the_end) each begins with what the one before left in the caches.
  // (Rows of int8 are made once for all panels of a pass.)
  bool in_one_pass() const { return !kInt8 && layer && p.steps == 1; }
  void project_and_multiply() {
    for_each_panel_zigzag(units, kUnits, plan.from_the_end, [&](int64_t v, int vectors) {
      gates.project({v, v + vectors});
      multiply(0, {v, v + vectors});
    });
  }

  // The recurrent product of the s-th step, and the cells of `units`. Of a cell that needs whole rows the product is
  // kept, and of one with late gates that of the others, with what they make.
  void multiply(int64_t s, Range units) {
    multiply_gates<0, kEarly>(s, units, step.multiplied, [&](int64_t i, int64_t v, const T* product, const T* gates_ih) {
      if constexpr (kWholeRows<Cell> || kHasLate<Cell>)
        for (int k = 0; k < kEarly; ++k) store(product_of(i) + (v * G + k) * L, load(product + k * L));
      if constexpr (kHasLate<Cell>) step.late_input(i, v * L, product_of(i) + v * G * L, gates_ih);
      if constexpr (!kWholeRows<Cell> && !kHasLate<Cell>) step.cell(i, v * L, product, gates_ih);
    });
  }
  // The product of the late gates, and the cells.
  void multiply_late(int64_t s) {
    multiply_gates<kEarly, kLate>(s, units, step.late, [&](int64_t i, int64_t v, const T* product, const T* gates_ih) {
      for (int k = 0; k < kLate; ++k) store(product_of(i) + (v * G + kEarly + k) * L, load(product + k * L));
      step.cell(i, v * L, product_of(i) + v * G * L, gates_ih);
    });
  }
  T* product_of(int64_t i) { return b.gates_hh + (step.rows->first + i) * b.unit_vectors * G * L; }

  // The product of `count` gates of `units`, `first` being the first, with the rows x [.., stride]: body(row i, vector of
  // units v, their product [count][L], their gates_ih [G][L] of a layer's call or null).
  template <int first, int count, class Body>
  FASTRNN_HD void multiply_gates(int64_t s, Range units, const A* x, Body body) {
    const int64_t first_row = step.rows->first, active = step.rows->active(step.t), row = first * p.hidden;
    // Every member quantises all rows that it multiplies: less work than to wait for another's.
    uint8_t* quantized = nullptr;
    float* scale = nullptr;
    if constexpr (kInt8) {
      const int64_t mine = member * p.batch + first_row;
      quantized = b.quantized_h + mine * b.quads_hh * kInt8Depth;
      scale = b.h_scale + mine;
      for (int64_t i = 0; i < active; ++i)
        scale[i] = quantize_row(x + i * b.stride, p.width, quantized + i * b.quads_hh * kInt8Depth);
    }
    for_each_panel_zigzag(units, kUnits, s, [&](int64_t v, int vectors) {
      const T* gates_ih = layer ? gates.panel(v, vectors * G) + chunk_at * vectors * G * L : nullptr;
      constexpr int kMade = kInt8 ? G : count, kSkip = kInt8 ? first : 0;  // int8 tiles have all gates
      const auto cells = [&](int64_t first_of_tile, int rows_in_tile, const T* product) {
        static_assert(!kHasEnd<Cell> || (kUnits == 1 && !kHasLate<Cell> && !kWholeRows<Cell>));
        if constexpr (kHasEnd<Cell>)
          return step.cells(first_of_tile, rows_in_tile, v * L, product, kMade * L,
                            gates_ih ? gates_ih + first_of_tile * G * L : nullptr, G * L);
        for (int m = 0; m < rows_in_tile; ++m)
          for (int n = 0; n < vectors; ++n) {
            const int64_t i = first_of_tile + m;
            body(i, v + n, product + ((m * vectors + n) * kMade + kSkip) * L,
                 gates_ih ? gates_ih + (i * vectors + n) * G * L : nullptr);
          }
      };
      if constexpr (kInt8)
        for_each_int8_tile(active, quantized, b.quads_hh * kInt8Depth, scale, int8_hh, G, v, vectors, bias_hh, p.hidden,
                           cells);
      else if (plan.pack_hh) {
        A* weights = plan.hh_late ? b.panels_hh + member * b.late_panel(p.width, G) : panel_hh<first, count>(v);
        if (plan.hh_late)
          pack_rows(weight_hh + (row + v * L) * p.width, p.width, p.hidden, count, vectors, p.hidden - v * L, p.width,
                    weights);
        for_each_tile(active, x, b.stride, static_cast<const A*>(weights), vectors * count * L, p.width,
                      vectors * count, bias_hh ? panel_bias<first, count>(v) : nullptr, cells, plan.uniform,
                      terms_of_weights(p));
      } else
        for_each_dot_tile(active, x, b.stride, turned, weight_hh + (row + v * L) * p.width, p.width, p.hidden, count, vectors,
                          p.hidden - v * L, p.width, bias_hh ? bias_hh + row + v * L : nullptr, cells);
    });
  }

  // The cells that multiply() left, of rows whose product is known of all units. Where the team has split the units, it
  // splits the rows here. (kUnits is 1 then, so a panel's place does not depend on whose it is.)
  void compute_cells() {
    const int64_t active = step.rows->active(step.t);
    const Range mine = own_part(plan, active, member);
    const T* gates_ih = layer ? gates.panel(0, G) + chunk_at * G * L : nullptr;
    for (int64_t i = mine.begin; i < mine.end; ++i)
      step.whole_row(i, product_of(i), layer ? gates_ih + i * G * L : nullptr, G * L * b.chunk_rows,
                     b.row_scratch + member * b.row_scratch_size);
  }

  // h of the step, from o tanh(c) of all its units.
  void project_hidden(int64_t s) {
    for_each_panel_zigzag(widths, kMaxVectors, s, [&](int64_t v, int vectors) {
      const auto states = [&](int64_t first, int count, const T* h) {
        for (int m = 0; m < count; ++m)
          for (int n = 0; n < vectors; ++n) step.store_h(first + m, (v + n) * L, load(h + (m * vectors + n) * L));
      };
      const A* hidden = step.hidden;
      const int64_t active = step.rows->active(step.t);
      if (plan.pack_hh)
        for_each_tile(active, hidden, b.stride, static_cast<const A*>(panel_hr(v)), vectors * L, p.hidden, vectors,
                      nullptr, states, plan.uniform, terms_of_weights(p));
      else
        for_each_dot_tile(active, hidden, b.stride, turned, weight_hr + v * L * p.hidden, p.hidden, 0, 1, vectors,
                          p.width - v * L, p.hidden, static_cast<const S*>(nullptr), states);
    });
  }

  const ForwardParams& p;
  const LayerParams* const layer;
  const Plan& plan;
  const int team, member;
  Arena arena;
  ForwardBuffers<S> b;
  ForwardStep<Cell, S> step;
  const Range units, widths;  // vectors that this member computes
  LayerGates<S, W> gates;     // of a layer's call

  int64_t chunk_at;    // where the step's rows start in its chunk
  Turned<A> turned;    // the rows of the next product
  const W* weight_hh;  // the group's, like the rest
  Int8Weights int8_hh;
  const WeightHr* weight_hr;
  const S* bias_hh;
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
