// The forward time loop: the products of every step, and who computes which rows and units of it when. What happens to
// a row's units is in step-inl.h.
#pragma once
#include "isa-inl.h"

#include "../cells/registry.h"
#include "coroutine-inl.h"
#include "dot-inl.h"
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
          w.gather_input(s);
          if (units_split) co_yield kMeet;
          if (!w.in_one_pass()) w.project(w.units);
        }
        w.enter_step(s);
        if (w.in_one_pass()) w.project_and_multiply();
        else w.multiply(s, w.units);
        if constexpr (kHasLate<Cell>) {
          if (units_split) co_yield kMeet;
          w.multiply_late(s);
        }
        if constexpr (kWholeRows<Cell>) {
          if (units_split) co_yield kMeet;
          w.compute_cells();
        }
        if (p.weight_hr) {
          if (units_split) co_yield kMeet;
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
        arena(workspace), b(params, layer, plan, arena), step(params, b) {
    const bool all = plan.split_rows;
    units = all ? Range{0, b.unit_vectors} : share(b.unit_vectors, this->member, plan.team_size);
    widths = all ? Range{0, b.width_vectors} : share(b.width_vectors, this->member, plan.team_size);
  }
  ForwardWorker(const ForwardWorker&) = delete;

  void begin(int64_t group) {
    step.enter(plan, group, member);
    find_weights(group);
    if constexpr (!kInt8) pack();
    for (int64_t i = 0; i < step.rows->size(); ++i) {
      for (int64_t v = widths.begin; v < widths.end; ++v) step.start_h(i, v * L);
      if constexpr (Cell::kStates > 1)
        for (int64_t v = units.begin; v < units.end; ++v) step.start_c(i, v * L);
    }
  }

  // ---- the group's weights ----

  void find_weights(int64_t group) {
    const int64_t h = p.hidden, R = p.width, I = layer ? layer->size : 0;
    const Gaps& gaps = p.gaps;
    bias_hh = p.bias_hh ? static_cast<const S*>(p.bias_hh) + group * (G * h + gaps.bias_hh) : nullptr;
    weight_hr = p.weight_hr ? static_cast<const WeightHr*>(p.weight_hr) + group * (R * h + gaps.weight_hr) : nullptr;
    bias_ih = layer && layer->bias ? static_cast<const S*>(layer->bias) + group * (G * h + gaps.bias_ih) : nullptr;
    if constexpr (kInt8) {
      const int64_t blocks = ceil_div(h, kInt8Units), rows = blocks * G * kInt8Units;
      const auto weights = [&](const void* all, const float* scale, const int32_t* sum, int64_t quads) {
        return Int8Weights{static_cast<const int8_t*>(all) + group * rows * quads * kInt8Depth, scale + group * rows,
                           sum + group * rows, quads};
      };
      int8_ih = weights(layer->weight, layer->scale_ih, layer->sum_ih, b.quads_ih);
      int8_hh = weights(p.weight_hh, layer->scale_hh, layer->sum_hh, b.quads_hh);
    } else {
      weight_hh = static_cast<const W*>(p.weight_hh) + group * (G * h * R + gaps.weight_hh);
      weight_ih = layer ? static_cast<const W*>(layer->weight) + group * (G * h * I + gaps.weight_ih) : nullptr;
    }
  }

  // A team that splits its rows shares all panels; a member that has units of its own packs those.
  void pack() {
    const int64_t h = p.hidden, R = p.width;
    for_each_packed_panel(units, kUnits, plan.split_rows, member, plan.team_size, [&](int64_t v, int vectors) {
      if (plan.pack_hh) {
        pack_gates<0, kEarly>(v, vectors);
        if constexpr (kHasLate<Cell>) pack_gates<kEarly, kLate>(v, vectors);
      }
      if (plan.pack_ih) {
        if (!plan.pack_late) pack_ih(v, vectors, panel_ih(v));
        if (bias_ih) pack_rows(bias_ih + v * L, 1, h, G, vectors, h - v * L, 1, b.bias_ih + v * G * L);
      }
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
    pack_rows(weight_hh + row * R, R, h, count, vectors, h - v * L, R, panel_hh<first, count>(v));
    if (bias_hh) pack_rows(bias_hh + row, 1, h, count, vectors, h - v * L, 1, panel_bias<first, count>(v));
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
  A* panel_ih(int64_t v) const { return b.panels_ih + v * G * L * padded_depth<A>(layer->size); }
  void pack_ih(int64_t v, int vectors, A* panel) {
    const int64_t I = layer->size;
    pack_rows(weight_ih + v * L * I, I, p.hidden, G, vectors, p.hidden - v * L, I, panel);
  }

  // ---- a layer's call: gates_ih of a chunk of steps ----

  // The input of the chunk of steps from `begin` on. Where units are split the team shares it: each member brings a
  // part of each step's rows.
  void gather_input(int64_t begin) {
    const Rows& rows = *step.rows;
    const int64_t I = layer->size, mine = plan.chunk * rows.first;
    const int64_t end = begin + plan.chunk < p.steps ? begin + plan.chunk : p.steps;
    A* input = kInt8 ? nullptr : b.input + mine * b.input_stride;
    int64_t count = 0;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t t = step.time_of(s), active = rows.active(t);
      chunk_row(s) = count;
      const Range part = plan.split_rows ? Range{0, active} : share(active, member, plan.team_size);
      for (int64_t i = part.begin; i < part.end; ++i) {
        const S* from = static_cast<const S*>(layer->input) +
                        step.offset(i, t, layer->input_stride_t, layer->input_stride_b);
        if constexpr (kInt8) {
          const int64_t at = mine + count + i;
          b.input_scale[at] = quantize_row(from, I, b.quantized_input + at * b.quads_ih * kInt8Depth);
        } else {
          A* to = input + (count + i) * b.input_stride;
          for (int64_t k = 0; k < I; k += L) store(to + k, V(load(from + k, valid_lanes<T>(I, k))));
        }
      }
      count += active;
    }
    chunk_count = count;
  }

  // gates_ih of the gathered steps, of this member's rows and of `units`. No step may be under way that still reads the
  // last chunk's gates.
  void project(Range units) {
    const int64_t I = layer->size, mine = plan.chunk * step.rows->first, count = chunk_count;
    const A* input = kInt8 ? nullptr : b.input + mine * b.input_stride;
    for_each_panel(units, kUnits, [&](int64_t v, int vectors) {
      const int N = vectors * G;
      T* out = chunk_panel(v, N);
      const auto keep = [&](int64_t first, int rows_in_tile, const T* sums) {
        for (int m = 0; m < rows_in_tile * N; ++m) store(out + (first * N + m) * L, load(sums + m * L));
      };
      if constexpr (kInt8) {
        const int64_t stride = b.quads_ih * kInt8Depth;
        for_each_int8_tile<G>(count, b.quantized_input + mine * stride, stride, b.input_scale + mine, int8_ih, v,
                              vectors, bias_ih, p.hidden, keep);
      } else if (plan.pack_ih) {
        A* panel = panel_ih(plan.pack_late ? this->units.begin : v);
        if (plan.pack_late) pack_ih(v, vectors, panel);
        for_each_tile(count, input, b.input_stride, static_cast<const A*>(panel), N * L, I, N,
                      bias_ih ? b.bias_ih + v * G * L : nullptr, keep, plan.uniform, terms_of_weights(p));
      } else
        for_each_dot_tile(count, input, b.input_stride, weight_ih + v * L * I, I, p.hidden, G,
                          vectors, p.hidden - v * L, I, bias_ih ? bias_ih + v * L : nullptr, keep);
    });
  }

  int64_t& chunk_row(int64_t s) { return b.chunk_row[member * plan.chunk + s % plan.chunk]; }
  // Where a panel's gates of the chunk begin; N vectors a row.
  T* chunk_panel(int64_t v, int N) {
    return b.gates_ih + v * G * L * b.chunk_rows + plan.chunk * step.rows->first * N * L;
  }

  // ---- the steps ----

  void enter_step(int64_t s) {
    step.enter_step(s);
    if (layer) chunk_at = chunk_row(s);
  }

  // A single step meets all weights once, those of a panel of units together. So the whole call is one pass over them, and
  // where calls take turns at its direction (Plan::from_the_end) each begins with what the one before left in the caches.
  // (Rows of int8 are made once for all panels of a pass.)
  bool in_one_pass() const { return !kInt8 && layer && p.steps == 1; }
  void project_and_multiply() {
    for_each_panel_zigzag(units, kUnits, plan.from_the_end, [&](int64_t v, int vectors) {
      project({v, v + vectors});
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
      const T* gates_ih = layer ? chunk_panel(v, vectors * G) + chunk_at * vectors * G * L : nullptr;
      constexpr int kMade = kInt8 ? G : count, kSkip = kInt8 ? first : 0;  // int8 tiles have all gates
      const auto cells = [&](int64_t first_of_tile, int rows_in_tile, const T* product) {
        for (int m = 0; m < rows_in_tile; ++m)
          for (int n = 0; n < vectors; ++n) {
            const int64_t i = first_of_tile + m;
            body(i, v + n, product + ((m * vectors + n) * kMade + kSkip) * L,
                 gates_ih ? gates_ih + (i * vectors + n) * G * L : nullptr);
          }
      };
      if constexpr (kInt8)
        for_each_int8_tile<G>(active, quantized, b.quads_hh * kInt8Depth, scale, int8_hh, v, vectors, bias_hh, p.hidden,
                              cells);
      else if (plan.pack_hh)
        for_each_tile(active, x, b.stride, static_cast<const A*>(panel_hh<first, count>(v)), vectors * count * L,
                      p.width, vectors * count, bias_hh ? panel_bias<first, count>(v) : nullptr, cells, plan.uniform,
                      terms_of_weights(p));
      else
        for_each_dot_tile(active, x, b.stride, weight_hh + (row + v * L) * p.width, p.width, p.hidden, count, vectors,
                          p.hidden - v * L, p.width, bias_hh ? bias_hh + row + v * L : nullptr, cells);
    });
  }

  // The cells that multiply() left, of rows whose product is known of all units. Where the team has split the units, it
  // splits the rows here. (kUnits is 1 then, so a panel's place does not depend on whose it is.)
  void compute_cells() {
    const int64_t active = step.rows->active(step.t);
    const Range mine = plan.split_rows ? Range{0, active} : share(active, member, plan.team_size);
    const auto gates_ih = [&](int64_t i) {
      return [this, i](int64_t j) { return layer ? chunk_panel(j / L, G) + (chunk_at + i) * G * L : nullptr; };
    };
    for (int64_t i = mine.begin; i < mine.end; ++i)
      step.whole_row(i, product_of(i), gates_ih(i), b.row_scratch + member * b.row_scratch_size);
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
        for_each_dot_tile(active, hidden, b.stride, weight_hr + v * L * p.hidden, p.hidden, 0, 1, vectors,
                          p.width - v * L, p.hidden, static_cast<const S*>(nullptr), states);
    });
  }

  const ForwardParams& p;
  const LayerParams* const layer;
  const Plan& plan;
  const int team, member;
  Arena arena;
  ForwardBuffers<Cell, S> b;
  ForwardStep<Cell, S> step;
  Range units, widths;  // vectors that this member computes

  int64_t chunk_count;  // rows of the gathered chunk
  int64_t chunk_at;     // where the step's rows start in it
  const W *weight_hh, *weight_ih;  // the group's, like the rest
  Int8Weights int8_hh, int8_ih;
  const WeightHr* weight_hr;
  const S *bias_hh, *bias_ih;
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
