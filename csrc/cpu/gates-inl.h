// gates_ih of a layer's call: the products of its input with weight_ih, of a chunk of steps at a time. The twin of
// gradients-inl.h.
#pragma once
#include "isa-inl.h"

#include "../cells/registry.h"
#include "dot-inl.h"
#include "int8-inl.h"
#include "panels-inl.h"
#include "product-inl.h"
#include "step-inl.h"
#include "workspace-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// One member's part. S: what tensors are stored in, W: what weights are. Of the cell nothing but its number of gates
// matters here, so all cells share this code.
template <class S, class W>
class LayerGates {
  static constexpr bool kInt8 = std::is_same_v<W, int8_t>;
  using T = typename Compute<S>::type;
  using A = typename Operand<S>::type;
  using V = Vec<T>;
  static constexpr int L = V::kLanes;

 public:
  // units: the vectors of them that this member computes, panel_units of them to a panel.
  LayerGates(const ForwardParams& params, const LayerParams* layer, const Plan& plan, int member,
             const ForwardBuffers<S>& buffers, const ForwardWalk& walk, Range units, int panel_units)
      : p(params), layer(layer), plan(plan), member(member), b(buffers), walk(walk), units(units),
        panel_units(panel_units), G(cell_info(p).gates) {}

  // Of a group; `walk` has entered it.
  void begin() {
    const int64_t h = p.hidden, I = layer->size, group = walk.group;
    bias_ih = layer->bias ? static_cast<const S*>(layer->bias) + group * (G * h + p.gaps.bias_ih) : nullptr;
    if constexpr (kInt8)
      int8_ih = int8_weights(layer->weight, layer->scale_ih, layer->sum_ih, G, h, b.quads_ih, group);
    else
      weight_ih = static_cast<const W*>(layer->weight) + group * (G * h * I + p.gaps.weight_ih);
  }

  // Packs the weights and biases of the panel that begins with the v-th vector.
  void pack(int64_t v, int vectors) {
    if (!plan.pack_ih) return;
    const int64_t h = p.hidden;
    if (!plan.ih_late) pack_weight(v, vectors, panel_ih(v));
    if (bias_ih) pack_bias(bias_ih + v * L, h, G, vectors, h - v * L, b.bias_ih + v * G * L);
  }

  // The input of the chunk of steps from `begin` on. Where units are split the team shares it: each member brings a
  // part of each step's rows.
  void gather(int64_t begin) {
    const Rows& rows = *walk.rows;
    const int64_t I = layer->size, mine = plan.chunk * rows.first;
    const int64_t end = begin + plan.chunk < p.steps ? begin + plan.chunk : p.steps;
    A* input = kInt8 ? nullptr : b.input + mine * b.input_stride;
    chunk_count = 0;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t t = walk.time_of(s), active = rows.active(t);
      row_of(s) = chunk_count;
      const Range part = own_part(plan, active, member);
      for (int64_t i = part.begin; i < part.end; ++i) {
        const S* from = static_cast<const S*>(layer->input) +
                        walk.offset(i, t, layer->input_stride_t, layer->input_stride_b);
        if constexpr (kInt8) {
          const int64_t at = mine + chunk_count + i;
          b.input_scale[at] = quantize_row(from, I, b.quantized_input + at * b.quads_ih * kInt8Depth);
        } else {
          A* to = input + (chunk_count + i) * b.input_stride;
          for_each_vector<T>(I, [&](int64_t k, int n) FASTRNN_INLINE_BODY { store(to + k, V(load(from + k, n))); });
        }
      }
      chunk_count += active;
    }
  }

  // The gathered chunk's rows as a panel, where weights are read as they are stored.
  void turn() {
    if constexpr (kTurns<A, W>)
      turned = turned_rows<A>(chunk_count, b.input + plan.chunk * walk.rows->first * b.input_stride, b.input_stride,
                              layer->size, b.turned_input ? b.turned_input + member * b.turned_input_size : nullptr);
  }

  // gates_ih of the gathered and turned steps, of this member's rows and of `units`. No step may be under way that still
  // reads the last chunk's gates.
  void project(Range units) {
    const int64_t I = layer->size, mine = plan.chunk * walk.rows->first, count = chunk_count;
    const A* input = kInt8 ? nullptr : b.input + mine * b.input_stride;
    for_each_panel(units, panel_units, [&](int64_t v, int vectors) {
      const int N = vectors * G;
      T* out = panel(v, N);
      const auto keep = [&](int64_t first, int rows_in_tile, const T* sums) {
        for (int m = 0; m < rows_in_tile * N; ++m) store(out + (first * N + m) * L, load(sums + m * L));
      };
      if constexpr (kInt8) {
        const int64_t stride = b.quads_ih * kInt8Depth;
        for_each_int8_tile(count, b.quantized_input + mine * stride, stride, b.input_scale + mine, int8_ih, G, v,
                           vectors, bias_ih, p.hidden, keep);
      } else if (plan.pack_ih) {
        A* weights = plan.ih_late ? b.panels_ih + member * b.late_panel(I, G) : panel_ih(v);
        if (plan.ih_late) pack_weight(v, vectors, weights);
        multiply_rows(count, input, b.input_stride, static_cast<const A*>(weights), N * L, I, N,
                      bias_ih ? b.bias_ih + v * G * L : nullptr, out, plan.uniform, terms_of_weights(p));
      } else
        for_each_dot_tile(count, input, b.input_stride, turned, weight_ih + v * L * I, I, p.hidden, G, vectors,
                          p.hidden - v * L, I, bias_ih ? bias_ih + v * L : nullptr, keep);
    });
  }

  // Where the s-th step's rows start among the chunk's.
  int64_t& row_of(int64_t s) const { return b.chunk_row[member * plan.chunk + s % plan.chunk]; }
  // Where a panel's gates of the chunk begin; N vectors a row.
  T* panel(int64_t v, int N) const {
    return b.gates_ih + v * G * L * b.chunk_rows + plan.chunk * walk.rows->first * N * L;
  }

 private:
  A* panel_ih(int64_t v) const { return b.panels_ih + v * G * L * padded_depth<A>(layer->size); }
  void pack_weight(int64_t v, int vectors, A* panel) const {
    const int64_t I = layer->size;
    pack_rows(weight_ih + v * L * I, I, p.hidden, G, vectors, p.hidden - v * L, I, panel);
  }

  const ForwardParams& p;
  const LayerParams* const layer;
  const Plan& plan;
  const int member;
  const ForwardBuffers<S>& b;
  const ForwardWalk& walk;
  const Range units;
  const int panel_units, G;

  int64_t chunk_count;  // rows of the gathered chunk
  Turned<A> turned;     // those rows
  const W* weight_ih;   // the group's, like the rest
  Int8Weights int8_ih;
  const S* bias_ih;
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
