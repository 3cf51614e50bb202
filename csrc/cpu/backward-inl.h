// The backward time loop, forward's mirror: the product runs over the gate gradients of the step before (in this loop's
// order), and its sums are what the cell's backward needs. What happens to a row's units is in step-inl.h, what a
// layer's call makes of the gate gradients in gradients-inl.h.
#pragma once
#include "isa-inl.h"

#include "../cells/registry.h"
#include "coroutine-inl.h"
#include "gradients-inl.h"
#include "panels-inl.h"
#include "product-inl.h"
#include "step-inl.h"
#include "workspace-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

template <class Cell, class S>
class BackwardWorker {
  using T = typename Compute<S>::type;
  using A = typename Operand<S>::type;
  using V = Vec<T>;
  static constexpr int L = V::kLanes, G = Cell::kGates;

 public:
  static Paused run(const BackwardParams& p, const LayerBackwardParams* layer, const Plan& plan, char* workspace,
                    int member) {
    BackwardWorker w(p, layer, plan, workspace, member);
    const bool units_split = !plan.split_rows;
    const int64_t steps = backward_steps(p);
    for (int64_t group = w.team; group < p.groups; group += plan.teams) {
      w.begin(group);
      co_yield kMeet;
      for (int64_t s = 0; s < steps; ++s) {
        w.multiply(s);
        if constexpr (kTakesProjection<Cell>)
          if (p.weight_hr) {
            if (units_split) co_yield kMeet;
            w.project_gradients();
          }
        if constexpr (kHasLate<Cell>) {
          if (units_split) co_yield kMeet;
          w.multiply_late();
        }
        if constexpr (kWholeRows<Cell>) {
          if (units_split) co_yield kMeet;
          w.compute_cells();
        }
        if (units_split) co_yield kMeet;
        if (layer && s < p.steps && w.gradients.complete(s)) {
          w.from = w.gradients.gather(s + 1, w.from, w.step.running, w.units);
          co_yield kMeet;
          w.gradients.add_products(s + 1, w.sums);
          co_yield kMeet;
        }
      }
      if (layer) w.gradients.finish();
      if (group + plan.teams < p.groups) co_yield kMeet;
    }
  }

 private:
  BackwardWorker(const BackwardParams& params, const LayerBackwardParams* layer, const Plan& plan, char* workspace,
                 int member)
      : p(params), layer(layer), plan(plan), team(member / plan.team_size), member(member % plan.team_size),
        arena(workspace), b(params, layer, plan, arena, this->member), step(params, layer, b),
        gradients(params, layer, plan, this->member, b, step) {
    units = own_part(plan, b.unit_vectors, this->member);
    widths = own_part(plan, b.width_vectors, this->member);
    sums = b.sums + this->member * b.sums_size;
  }
  BackwardWorker(const BackwardWorker&) = delete;

  void begin(int64_t group) {
    step.enter(plan, group, member);
    step.begin();
    from = grad_gates();
    if (layer) gradients.begin();
    if (b.packed) pack(group);
    if (p.grad_h_0) pass_rows<S>(step, units, widths);
  }

  void pack(int64_t group) {
    const int64_t h = p.hidden, R = p.width;
    // The first step of this loop has no gate gradients of a step before to multiply.
    const Range packed = b.panels_hh && !plan.hh_late ? widths : Range{0, 0};
    for_each_packed_panel(packed, kMaxVectors, plan.split_rows, member, plan.team_size, [&](int64_t v, int vectors) {
      pack_hh(0, G, v, vectors, b.panels_hh + v * L * b.gates_padded * G);
    });
    if (!p.weight_hr) return;
    const S* projection = static_cast<const S*>(p.weight_hr) + group * (R * h + p.gaps.weight_hr);
    for_each_packed_panel(units, kMaxVectors, plan.split_rows, member, plan.team_size, [&](int64_t v, int vectors) {
      pack_columns(projection + v * L, h, vectors, h - v * L, 1, R, R, b.panels_hr + v * L * padded_depth<A>(R));
    });
  }

  // Vectors v .. of the columns of weight_hh, of the `gates` from the first one on.
  void pack_hh(int first, int gates, int64_t v, int vectors, A* panel) const {
    const int64_t h = p.hidden, R = p.width;
    const S* weight = static_cast<const S*>(p.weight_hh) + step.group * (G * h * R + p.gaps.weight_hh) + first * h * R;
    pack_columns(weight + v * L, R, vectors, R - v * L, gates, h, b.gates_padded, panel);
  }
  // The same, packed or as they are stored.
  Panel<A> panel_hh(int first, int gates, int64_t v, int vectors) const {
    if (b.packed && plan.hh_late) {
      A* panel = b.panels_hh + member * kMaxVectors * L * b.gates_padded * G;
      pack_hh(first, gates, v, vectors, panel);
      return {panel, vectors * L};
    }
    Panel<A> panel = panel_of_columns(p.weight_hh, step.group, G * p.hidden, p.width, p.gaps.weight_hh, b.panels_hh,
                                      b.gates_padded * G, v, vectors, b.packed);
    panel.weights += first * b.gates_padded * panel.stride;
    return panel;
  }

  A* grad_gates() const { return b.grad_gates + (b.slots + 1) * step.rows->first * b.gates_stride; }

  // The gradient of state 0 after the s-th step and, where nothing is projected, the cell's.
  void multiply(int64_t s) {
    step.enter_step(s);
    step.to = grad_gates() + (s & 1 ? 0 : step.rows->size()) * b.gates_stride;
    if (layer) {
      step.to = gradients.next_gates();
      step.to_ih = gradients.next_gates_ih();
      step.to_inner = gradients.next_inner();
      if (p.weight_hr) step.grad_h = gradients.next_grad_h();
    }
    const int64_t was_running = step.was_running, count = step.running > was_running ? step.running : was_running;
    for_each_panel(was_running > 0 ? widths : Range{0, 0}, kMaxVectors, [&](int64_t v, int vectors) {
      const auto body = [&](int64_t first, int rows_in_tile, const T* sums) {
        fetch(first + rows_in_tile, rows_in_tile + 1, v, vectors);  // of the next tile
        for (int m = 0; m < rows_in_tile; ++m)
          for (int n = 0; n < vectors; ++n)
            step.state(first + m, (v + n) * L, load(sums + (m * vectors + n) * L));
      };
      const Panel<A> panel = panel_hh(0, kEarlyGates<Cell>, v, vectors);
      fetch(0, max_rows<A>(vectors), v, vectors);
      for_each_deep_tile(was_running, from, b.gates_stride, panel.weights, panel.stride,
                         b.gates_padded * kEarlyGates<Cell>, vectors, sums, body, terms_of_weights(p));
    });
    // Rows that only start here have no gate gradients to multiply, and are taken as they lie in memory.
    for (int64_t i = was_running; i < count; ++i) {
      fetch(i + 1, 1, widths.begin, int(widths.end - widths.begin));
      for (int64_t v = widths.begin; v < widths.end; ++v) step.state(i, v * L, V(0));
    }
    from = step.to;
    if (layer) gradients.made(step.running);
  }

  // What the cells read of rows first .. and of vectors v .., while products run. A row that is whole is fetched as one.
  void fetch(int64_t first, int64_t count, int64_t v, int vectors) const {
    if constexpr (!kWholeRows<Cell>)
      for (int64_t i = first; i < first + count; ++i)
        for (int n = 0; n < vectors; ++n) step.fetch(i, (v + n) * L);
  }

  // The rest of a step of a cell with late gates: the gradient of what their product was with, and the cells.
  void multiply_late() {
    const int64_t late = kEarlyGates<Cell> * b.gates_padded;  // where they start
    for_each_panel(step.running > 0 ? units : Range{0, 0}, kMaxVectors, [&](int64_t v, int vectors) {
      const Panel<A> panel = panel_hh(kEarlyGates<Cell>, kLateGates<Cell>, v, vectors);
      for_each_deep_tile(step.running, static_cast<const A*>(step.to + late), b.gates_stride, panel.weights,
                         panel.stride, b.gates_padded * kLateGates<Cell>, vectors,
                         sums, [&](int64_t first, int rows_in_tile, const T* product) {
                           for (int m = 0; m < rows_in_tile; ++m)
                             for (int n = 0; n < vectors; ++n)
                               step.late_cell(first + m, (v + n) * L, load(product + (m * vectors + n) * L));
                         },
                         terms_of_weights(p));
    });
  }

  // The step's second half where h is projected: the gradients of o tanh(c), from those of h of all the width.
  void project_gradients() {
    const int64_t count = step.running > step.was_running ? step.running : step.was_running;
    for_each_panel(units, kMaxVectors, [&](int64_t v, int vectors) {
      const Panel<A> panel = panel_of_columns(p.weight_hr, step.group, p.width, p.hidden, p.gaps.weight_hr,
                                              b.panels_hr, p.width, v, vectors, b.packed);
      for_each_tile(count, static_cast<const A*>(step.grad_h), b.stride, panel.weights, panel.stride, p.width, vectors,
                    nullptr,
                    [&](int64_t first, int rows_in_tile, const T* sums) {
                      for (int m = 0; m < rows_in_tile; ++m)
                        for (int n = 0; n < vectors; ++n)
                          step.cell(first + m, (v + n) * L, load(sums + (m * vectors + n) * L));
                    },
                    false, terms_of_weights(p));
    });
  }

  // The cells that wait for whole rows: as forward, the team splits the rows.
  void compute_cells() {
    const int64_t count = step.running > step.was_running ? step.running : step.was_running;
    const Range mine = own_part(plan, count, member);
    const auto fetch_row = [&](int64_t i) {
      for (int64_t v = 0; i < mine.end && v < b.unit_vectors; ++v) step.fetch(i, v * L);
    };
    fetch_row(mine.begin);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      fetch_row(i + 1);
      step.whole_row(i, b.row_scratch + member * b.row_scratch_size);
    }
  }

  const BackwardParams& p;
  const LayerBackwardParams* const layer;  // null where gate gradients are asked for
  const Plan& plan;
  const int team, member;
  Arena arena;
  BackwardBuffers<S> b;
  BackwardStep<Cell, S> step;
  LayerGradients<S> gradients;        // of a layer's call
  Range units, widths;                // vectors that this member computes

  const A* from;  // the gate gradients of the step before
  T* sums;
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
