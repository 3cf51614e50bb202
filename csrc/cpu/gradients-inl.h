// The gradients of a layer's weights, biases and input: the products with the gate gradients of a chunk of steps, which
// are in the workspace (BackwardBuffers), without a gap for rows that have no such step. They follow each chunk, and
// the team shares them: rows of the weights' gradients, and rows of the input's. Of dual numbers the slopes alone are made.
#pragma once
#include "isa-inl.h"

#include "../cells/registry.h"
#include "gemm-inl.h"
#include "panels-inl.h"
#include "product-inl.h"
#include "step-inl.h"
#include "workspace-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// The gradient of a group's weight while products are added up to it. Where there are several, sums of a half type stay
// in float32, half of each where the gradient will be and the other half in the workspace (load_split): so they take no
// more memory than float32's. The sums of a single product are rounded as they are stored.
template <class S>
struct WeightSums {
  using T = typename Compute<S>::type;
  using V = Vec<T>;
  S *grad = nullptr, *lower = nullptr;
  int64_t size = 0;

  WeightSums() = default;
  WeightSums(void* all, int64_t group, int64_t size, S* lower)
      : grad(all ? static_cast<S*>(all) + group * size : nullptr), lower(lower), size(size) {}

  // The i-th sum and those behind it, n in all.
  V load(int64_t i, int n) const {
    if constexpr (std::is_same_v<S, T>) return FASTRNN_ISA::load(grad + i, n);
    else return load_split(grad + i, lower + i, n);
  }
  void store(int64_t i, V sum, int n) const {
    if constexpr (!std::is_same_v<S, T>)
      if (lower) return store_split(grad + i, lower + i, sum, n);
    FASTRNN_ISA::store(grad + i, sum, n);
  }
  // Of those in `own`: what is left to do when the last product has been added (nothing, where there are no lower halves),
  // or when there was none.
  void finish(Range own, bool none) const {
    if (!grad || !(none || lower)) return;
    for (int64_t i = own.begin; i < own.end; i += V::kLanes) {
      const int n = valid_lanes<T>(own.end, i);
      FASTRNN_ISA::store(grad + i, none ? V(0) : load(i, n), n);
    }
  }
};

// One member's part. Of the cell nothing but its number of gates matters here, so all cells share this code.
template <class S>
class LayerGradients {
  using T = typename Compute<S>::type;
  using A = typename Operand<S>::type;
  using V = Vec<T>;
  using Sums = WeightSums<S>;
  static constexpr int L = V::kLanes;

 public:
  LayerGradients(const BackwardParams& params, const LayerBackwardParams* layer, const Plan& plan, int member,
                 const BackwardBuffers<S>& buffers, const BackwardWalk& walk)
      : p(params), layer(layer), plan(plan), member(member), b(buffers), walk(walk),
        G(cell_info(p).gates), late_gates(cell_info(p).late_gates) {}

  // Of a group; `walk` has entered it.
  void begin() {
    chunk_begin = chunk_rows = 0;
    first_product = true;
    const int64_t rows = G * p.hidden;
    of_ih = Sums(layer->grad_weight_ih, walk.group, rows * layer->size, b.lower_ih);
    of_hh = Sums(layer->grad_weight_hh, walk.group, rows * p.width, b.lower_hh);
    of_hr = Sums(layer->grad_weight_hr, walk.group, p.width * p.hidden, b.lower_hr);
    if (!b.panels_ih || plan.ih_late) return;
    // All rows of the input's gradient need all panels.
    for_each_packed_panel({0, b.input_vectors}, kMaxVectors, true, member, plan.team_size,
                          [&](int64_t v, int vectors) { pack(v, vectors, b.panels_ih + v * L * b.gates_padded * G); });
  }

  // Where a step puts its gate gradients, whose rows are the chunk's next; `running` of them.
  A* next_gates() const { return grad_gates(*walk.rows) + (walk.rows->size() + chunk_rows) * b.gates_stride; }
  A* next_gates_ih() const {
    return b.grad_gates_ih ? b.grad_gates_ih + (first_row(*walk.rows) + chunk_rows) * b.gates_stride : nullptr;
  }
  S* next_inner() const { return b.inner ? b.inner + (first_row(*walk.rows) + chunk_rows) * b.stride : nullptr; }
  A* next_grad_h() const { return b.grad_h + (first_row(*walk.rows) + chunk_rows) * b.stride; }
  void made(int64_t running) { chunk_rows += running; }
  // Is the chunk complete with step s?
  bool complete(int64_t s) const { return s + 1 == p.steps || s + 1 == chunk_begin + plan.chunk; }

  // Steps chunk_begin .. end - 1 have been made. Finds what weight gradients multiply with, and where the input's
  // gradient goes; where units are split, the team shares all rows. `from`: the last step's gates, whose `running` rows
  // the next step's product needs, so they move to where they stay; every member moves the units and rows that it
  // makes. Returns where that is.
  const A* gather(int64_t end, const A* from, int64_t running, Range units) {
    const Rows& rows = *walk.rows;
    const int64_t width = (units.end - units.begin) * L;
    for (int64_t i = 0; i < running; ++i)
      for (int k = 0; k < G; ++k) {
        const int64_t at = i * b.gates_stride + k * b.gates_padded + units.begin * L;
        for (int64_t j = 0; j < width; j += L) store(grad_gates(rows) + at + j, load(from + at + j));
      }
    const S* input = static_cast<const S*>(layer->input);
    int64_t at = first_row(rows);
    for (int64_t s = chunk_begin; s < end; ++s) {
      const int64_t time = walk.time_of(s), active = rows.active(time);
      const Range part = own_part(plan, active, member);
      for (int64_t i = part.begin; i < part.end; ++i) {
        b.place[at + i] = p.place(time, rows.row[i]);
        b.input[at + i] = input + walk.offset(i, time, layer->input_stride_t, layer->input_stride_b);
        b.before[at + i] = walk.h_before<S>(i, time);
        if (b.mask) b.mask[at + i] = static_cast<const S*>(p.mask_h) + walk.place(i) * p.width;
        if (b.inner) b.inner_row[at + i] = b.inner + (at + i) * b.stride;
      }
      at += active;
    }
    return grad_gates(rows);
  }

  // Adds the gathered chunk to the gradients, and begins the next one.
  void add_products(int64_t end, T* sums) {
    const int segments = plan.split_rows ? plan.team_size : 1;
    for (int segment = 0; segment < segments; ++segment) {
      const Rows& x = plan.rows(walk.group, segment);
      int64_t count = 0;
      for (int64_t s = chunk_begin; s < end; ++s) count += x.active(walk.time_of(s));
      if (count == 0) continue;
      const int64_t first = first_row(x);
      const A* gates_hh = grad_gates(x) + x.size() * b.gates_stride;
      const A* gates_ih = b.grad_gates_ih ? b.grad_gates_ih + first * b.gates_stride : gates_hh;
      const int64_t all = G * b.gates_padded, late = (G - late_gates) * b.gates_padded;
      const S* const* mask = b.mask ? b.mask + first : nullptr;
      const auto of_gates = [&](const A* gates, int64_t begin, int64_t end) {
        return Arrived{gates, b.gates_stride, {begin, end}, G, p.hidden, b.gates_padded};
      };
      add_weight_gradient(of_ih, of_gates(gates_ih, 0, all), {b.input + first, nullptr, layer->size}, count);
      add_weight_gradient(of_hh, of_gates(gates_hh, 0, late), {b.before + first, mask, p.width}, count);
      if (late_gates)
        add_weight_gradient(of_hh, of_gates(gates_hh, late, all), {b.inner_row + first, nullptr, p.width}, count);
      if (of_hr.grad)
        add_weight_gradient(of_hr, {b.grad_h + first * b.stride, b.stride, {0, p.width}, 1, p.width, p.width},
                            {b.inner_row + first, nullptr, p.hidden}, count);
      add_bias_gradient(gates_ih, gates_hh, count);
      first_product = false;
      const Range mine = !plan.split_rows  ? share(count, member, plan.team_size)
                         : segment == member ? Range{0, count}
                                             : Range{0, 0};
      input_gradient(gates_ih + mine.begin * b.gates_stride, b.place + first + mine.begin, mine.end - mine.begin, sums);
    }
    chunk_begin = end;
    chunk_rows = 0;
  }

  // Gradients from their sums; and sums of nothing, where no row had a step.
  void finish() {
    const auto bias = [&](void* grad, const T* sums) {
      if (!grad) return;
      S* out = static_cast<S*>(grad) + walk.group * G * p.hidden;
      const Range own = share_of({0, G * b.unit_vectors});
      for (int64_t v = own.begin; v < own.end; ++v) {
        const int64_t unit = v % b.unit_vectors * L;
        store(out + v / b.unit_vectors * p.hidden + unit, first_product ? V(0) : load(sums + v * L),
              valid_lanes<T>(p.hidden, unit));
      }
    };
    for (const Sums* of : {&of_ih, &of_hh, &of_hr}) of->finish(share_of({0, of->size}), first_product);
    bias(layer->grad_bias_ih, b.bias);
    bias(layer->grad_bias_hh, b.grad_gates_ih ? b.bias + b.gates_stride : b.bias);
  }

  // Where a member's rows start, in arrays of a chunk's rows and in grad_gates.
  int64_t first_row(const Rows& x) const { return b.slots * x.first; }
  A* grad_gates(const Rows& x) const { return b.grad_gates + (b.slots + 1) * x.first * b.gates_stride; }

 private:
  // Vectors v .. of the columns of weight_ih.
  void pack(int64_t v, int vectors, A* panel) const {
    const int64_t I = layer->size;
    const S* weight = static_cast<const S*>(layer->weight) + walk.group * (G * p.hidden * I + p.gaps.weight_ih);
    pack_columns(weight + v * L, I, vectors, I - v * L, G, p.hidden, b.gates_padded, panel);
  }

  // Rows of `size` values, anywhere; a null one is zeros. Where there is a mask, each is multiplied with its row of that.
  struct Multiplied {
    const S *const *row, *const *mask;
    int64_t size;
    // Of row i those from j on, n of them.
    V operator()(int64_t i, int64_t j, int n) const {
      const V x = load_or_zero<T>(row[i], j, n);
      return mask ? x * V(load(mask[i] + j, n)) : x;
    }
  };

  // The gradients of a product's results: `blocks` times `size` values in each row of the chunk, every block padded. Those
  // in `range` are meant, which counts the padding.
  struct Arrived {
    const A* rows;
    int64_t stride;
    Range range;
    int64_t blocks, size, padded;
    // Which row of the weight the i-th value belongs to; -1: it is padding.
    int64_t row_of_weight(int64_t i) const {
      if (padded == size) return i;
      int64_t before = 0;  // rows of the blocks before i's; a division would take as long as to store the row
      for (; i >= padded; i -= padded) before += size;
      return i < size ? before + i : -1;
    }
  };

  // out [blocks * size, x.size] += grad^T x: this member's share of the rows that grad's range is of.
  void add_weight_gradient(Sums out, const Arrived& grad, const Multiplied& x, int64_t count) {
    if (!out.grad) return;
    const int64_t size = x.size;
    const Range own = share_of(grad.range);
    if (count <= kFewRows) return add_few_rows(out, grad, own, x, count);
    const auto pack = [&](int64_t k0, int64_t depth, int64_t v, int n, A* panel) {
      constexpr int D = kDepth<A>;
      for (int64_t k = k0; k < k0 + depth; k += D)
        for (int q = 0; q < n; ++q, panel += L * D) {
          V of_k[D];
          const int64_t j = (v + q) * L;
          for (int d = 0; d < D; ++d) of_k[d] = k + d < k0 + depth ? x(k + d, j, valid_lanes<T>(size, j)) : V(0);
          store_operands(panel, of_k);
        }
    };
    const auto keep = [&](int64_t row, int64_t v, int vectors, int64_t k0, const T* sums) {
      const int64_t weight_row = grad.row_of_weight(row);
      if (weight_row < 0) return;
      const bool add = k0 > 0 || !first_product;
      for_each_vector<T>(columns_of<T>(v, vectors, size), [&](int64_t j, int n) FASTRNN_INLINE_BODY {
        const int64_t at = weight_row * size + v * L + j;
        V sum = load(sums + j);
        if (add) sum = sum + out.load(at, n);
        out.store(at, sum, n);
      });
    };
    multiply<A, true>(b.products, own, {0, ceil_div(size, L)}, count, grad.rows, grad.stride, pack, keep, Terms::kSlope);
  }

  static constexpr int64_t kFewRows = 4;  // of which packing would cost more than the product
  void add_few_rows(const Sums out, const Arrived& grad, Range own, const Multiplied x, int64_t count) {
    const bool add = !first_product;
    for (int64_t row = own.begin; row < own.end; ++row) {
      const int64_t weight_row = grad.row_of_weight(row);
      if (weight_row < 0) continue;
      V of_row[kFewRows];
      for (int64_t i = 0; i < count; ++i) of_row[i] = V(widened(grad.rows[i * grad.stride + row]));
      for_each_vector<T>(x.size, [&](int64_t j, int n) FASTRNN_INLINE_BODY {
        const int64_t at = weight_row * x.size + j;
        V sum = add ? out.load(at, n) : V(0);
        for (int64_t i = 0; i < count; ++i) sum = sum + of_row[i] * x(i, j, n);
        out.store(at, sum, n);
      });
    }
  }
  Range share_of(Range all) const {
    const Range own = share(all.end - all.begin, member, plan.team_size);
    return {all.begin + own.begin, all.begin + own.end};
  }

  static constexpr int64_t kBiasRows = 16;  // sums of sums, for less rounding
  void add_bias_gradient(const A* gates_ih, const A* gates_hh, int64_t count) {
    const Range own = share(G * b.unit_vectors, member, plan.team_size);
    const auto add_up = [&](const A* gates, T* sums) {
      for_each_panel(own, kMaxVectors, [&](int64_t v, int n) {
        V total[kMaxVectors] = {V(0), V(0), V(0), V(0)};
        for (int64_t first = 0; first < count; first += kBiasRows) {
          V part[kMaxVectors] = {V(0), V(0), V(0), V(0)};
          const int64_t last = first + kBiasRows < count ? first + kBiasRows : count;
          for (int64_t i = first; i < last; ++i)
            for (int q = 0; q < n; ++q) part[q] = part[q] + load(gates + i * b.gates_stride + (v + q) * L);
          for (int q = 0; q < n; ++q) total[q] = total[q] + part[q];
        }
        for (int q = 0; q < n; ++q)
          store(sums + (v + q) * L, first_product ? total[q] : total[q] + load(sums + (v + q) * L));
      });
    };
    const bool same = !b.grad_gates_ih;  // then the sum of both biases is one
    if (layer->grad_bias_ih || (same && layer->grad_bias_hh)) add_up(gates_ih, b.bias);
    if (layer->grad_bias_hh && !same) add_up(gates_hh, b.bias + b.gates_stride);
  }

  void input_gradient(const A* gates, const int64_t* place, int64_t count, T* sums) {
    if (!layer->grad_input) return;
    S* out = static_cast<S*>(layer->grad_input) + walk.group * layer->rows * layer->size;
    const bool late = b.panels_ih && plan.ih_late;
    const int64_t block = late ? count : kBlockM;
    for (int64_t begin = 0; begin < count; begin += block) {
      const int64_t end = begin + block < count ? begin + block : count;
      for_each_panel({0, b.input_vectors}, kMaxVectors, [&](int64_t v, int vectors) {
        if (late) pack(v, vectors, b.panels_ih);
        const Panel<A> panel = late ? Panel<A>{b.panels_ih, vectors * L}
                                    : panel_of_columns(layer->weight, walk.group, G * p.hidden, layer->size,
                                                       p.gaps.weight_ih, b.panels_ih, b.gates_padded * G, v, vectors,
                                                       b.panels_ih != nullptr);
        const auto keep = [&](int64_t first, int rows_in_tile, const T* tile) {
          for (int m = 0; m < rows_in_tile; ++m)
            for (int n = 0; n < vectors; ++n) {
              const int64_t j = (v + n) * L;
              store(out + place[begin + first + m] * layer->size + j, load(tile + (m * vectors + n) * L),
                    valid_lanes<T>(layer->size, j));
            }
        };
        for_each_deep_tile(end - begin, gates + begin * b.gates_stride, b.gates_stride, panel.weights, panel.stride,
                           b.gates_padded * G, vectors, sums, keep,
                           p.constant_weights ? Terms::kSlopeOfConstant : Terms::kSlope);
      });
    }
  }

  const BackwardParams& p;
  const LayerBackwardParams* const layer;
  const Plan& plan;
  const int member;
  const BackwardBuffers<S>& b;
  const BackwardWalk& walk;
  const int G, late_gates;  // of the cell

  int64_t chunk_begin, chunk_rows;  // the chunk's first step, its rows so far
  bool first_product;               // of a group's weight gradients: nothing to add to yet
  Sums of_ih, of_hh, of_hr;         // of the group's weights
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
