// The backward time loop, forward's mirror: the product runs over the gate gradients of the step before (in this
// loop's order), the cell's backward is applied to its sums. Included once per instruction set, after gemm-inl.h.
//
// In a layer's call the gate gradients of a chunk of steps lie in the workspace, without a gap for rows that have no such
// step. The products with them follow each chunk, shared by the team: rows of the weights' gradients, and rows of the
// input's.
//
// A row starts where its forward ended, with grad_h_n and grad_c_n, and finishes one step after it has passed its
// first one: there the last product gives grad_h_0. Resets send what would cross them to grad_reset instead.

template <class Cell, class T>
struct BackwardBuffers {
  static constexpr int L = Vec<T>::kLanes;
  int64_t unit_vectors, width_vectors, stride, gates_padded, gates_stride;
  T *panels_hh, *panels_hr;
  // [(slots + 1) B, gates_stride]: grad_gates_hh, each gate padded to whole vectors. A member's rows lie together: first
  // those of the step before, then those of the steps since.
  int64_t slots;
  T* grad_gates;
  T *carry_h, *carry_c;  // [B, stride]: the pointwise part of grad_state_prev
  T* grad_h;  // [B, stride]: gradient of the projection's output
  T* sums;    // [team_size][max(B, kBlockM)][kMaxVectors * L]: of deep products
  int64_t sums_size;
  // Of a layer's call. A chunk's rows as in grad_gates, without its first B:
  int64_t input_vectors;
  T* panels_ih;       // of the input's gradient
  T* grad_gates_ih;   // [slots * B, gates_stride], or null where grad_gates serves
  const T **input, **before;  // [slots * B]: the step's input; the state before it, null for zeros
  int64_t* place;             // [slots * B]: the row in tensors [T, B, ..]
  T* bias;            // [2][gates_stride]: sums of grad_gates_ih and grad_gates_hh
  GemmBuffers<T> products;  // the member's own

  BackwardBuffers(const BackwardParams& p, const LayerBackwardParams* layer, const Plan& plan, Arena& arena,
                  int member = 0)
      : unit_vectors(ceil_div(p.hidden, L)), width_vectors(ceil_div(p.width, L)), slots(layer ? plan.chunk : 1) {
    stride = ((unit_vectors > width_vectors ? unit_vectors : width_vectors) + kMaxVectors) * L;
    gates_padded = unit_vectors * L;
    gates_stride = gates_padded * Cell::kGates + L;
    panels_hh = arena.take<T>(width_vectors * L * gates_padded * Cell::kGates);
    panels_hr = p.weight_hr ? arena.take<T>(unit_vectors * L * p.width) : nullptr;
    grad_gates = arena.take<T>((slots + 1) * p.batch * gates_stride);
    carry_h = arena.take<T>(p.batch * stride);
    carry_c = arena.take<T>(p.batch * stride);
    grad_h = p.weight_hr ? arena.take<T>(p.batch * stride) : nullptr;
    sums_size = (p.batch > kBlockM ? p.batch : kBlockM) * kMaxVectors * L;
    sums = arena.take<T>(plan.team_size * sums_size);
    if (!layer) return;
    input_vectors = ceil_div(layer->size, L);
    panels_ih = layer->grad_input ? arena.take<T>(input_vectors * L * gates_padded * Cell::kGates) : nullptr;
    grad_gates_ih = layer->separate_gates_hh ? arena.take<T>(slots * p.batch * gates_stride) : nullptr;
    input = arena.take<const T*>(slots * p.batch);
    before = arena.take<const T*>(slots * p.batch);
    place = arena.take<int64_t>(slots * p.batch);
    bias = arena.take<T>(2 * gates_stride);
    const int64_t columns = layer->size > p.width ? layer->size : p.width;
    products = {columns, slots * p.batch, /*transpose_a=*/true, arena, plan.team_size, member};
  }
};

template <class Cell, class S>
class BackwardWorker {
  using T = typename Compute<S>::type;
  using V = Vec<T>;
  static constexpr int L = V::kLanes, G = Cell::kGates;
  static constexpr bool kHasC = Cell::kStates > 1;
  static constexpr int kSaved = Cell::kSaved + Cell::kStates - 1;
  static constexpr bool kLayers = std::is_same_v<S, T>;

 public:
  BackwardWorker(const BackwardParams& params, const LayerBackwardParams* layer, const Plan& plan, char* workspace,
                 int member)
      : p(params), layer(layer), plan(plan), team(member / plan.team_size), member(member % plan.team_size),
        arena(workspace), b(params, layer, plan, arena, this->member) {
    const bool all = plan.split_rows;
    units = all ? Range{0, b.unit_vectors} : share(b.unit_vectors, this->member, plan.team_size);
    widths = all ? Range{0, b.width_vectors} : share(b.width_vectors, this->member, plan.team_size);
    // Rows of the weights serve as panels where whole vectors of them, of the right type, can be read.
    packed = plan.pack_hh || sizeof(S) != sizeof(T) || p.hidden % L != 0 || p.width % L != 0;
    packed_ih = packed || (layer && layer->size % L != 0);
    sums = b.sums + this->member * b.sums_size;
  }

  // The worker lives in the coroutine's frame.
  static Paused run(BackwardWorker w) {
    const BackwardParams& p = w.p;
    const Plan& plan = w.plan;
    const bool units_split = !plan.split_rows;
    // The step after the last one is there for the initial state's gradient, or a reset's at the first step.
    const int64_t steps = p.grad_h_0 || p.resets ? p.steps + 1 : p.steps;
    for (int64_t group = w.team; group < p.groups; group += plan.teams) {
      w.begin(group);
      co_yield kMeet;
      for (int64_t s = 0; s < steps; ++s) {
        w.step(s);
        if (p.weight_hr) {
          if (units_split) co_yield kMeet;
          w.project_gradients();
        }
        if (units_split) co_yield kMeet;
        if constexpr (kLayers)
          if (w.layer && s < p.steps && (s + 1 == p.steps || s + 1 == w.chunk_begin + plan.chunk)) {
            w.gather(s + 1);
            co_yield kMeet;
            w.add_products(s + 1);
            co_yield kMeet;
          }
      }
      if constexpr (kLayers)
        if (w.layer) w.finish();
      if (group + plan.teams < p.groups) co_yield kMeet;
    }
  }

 private:
  void begin(int64_t group_index) {
    group = group_index;
    rows = &plan.rows(group, member);
    reverse = p.reverse[group];
    pack();
    start();
    running = chunk_rows = chunk_begin = 0;
    first_product = true;
    from = grad_gates(*rows);
  }

  template <class Body>
  void for_each_packed_panel(Range range, Body body) {
    int64_t index = 0;
    for_each_panel(range, kMaxVectors, [&](int64_t v, int vectors) {
      if (!plan.split_rows || index++ % plan.team_size == member) body(v, vectors);
    });
  }

  void pack() {
    if constexpr (kLayers)
      if (packed_ih && layer && layer->grad_input) pack_ih();
    if (!packed) return;
    const int64_t h = p.hidden, R = p.width;
    const S* weight = static_cast<const S*>(p.weight_hh) + group * G * h * R;
    for_each_packed_panel(widths, [&](int64_t v, int vectors) {
      pack_columns(weight + v * L, R, vectors, R - v * L, G, h, b.gates_padded,
                   b.panels_hh + v * L * b.gates_padded * G);
    });
    if (!p.weight_hr) return;
    const S* projection = static_cast<const S*>(p.weight_hr) + group * R * h;
    for_each_packed_panel(units, [&](int64_t v, int vectors) {
      pack_columns(projection + v * L, h, vectors, h - v * L, 1, R, R, b.panels_hr + v * L * R);
    });
  }

  void pack_ih() {
    const int64_t I = layer->size;
    const S* weight = static_cast<const S*>(layer->weight) + group * G * p.hidden * I;
    // All rows of the input's gradient need all of them: ranges begin where panels do.
    int64_t index = 0;
    for_each_panel({0, b.input_vectors}, kMaxVectors, [&](int64_t v, int vectors) {
      if (index++ % plan.team_size == member)
        pack_columns(weight + v * L, I, vectors, I - v * L, G, p.hidden, b.gates_padded,
                     b.panels_ih + v * L * b.gates_padded * G);
    });
  }

  struct Panel {
    const T* weights;
    int64_t stride;
  };
  // Vectors v .. of the columns of a [P, rows, columns] weight: packed, or where they lie.
  Panel panel_of(const void* weight, int64_t rows, int64_t columns, const T* packs, int64_t depth, int64_t v,
                 int vectors, bool packed) const {
    if (packed) return {packs + v * L * depth, vectors * L};
    return {static_cast<const T*>(weight) + group * rows * columns + v * L, columns};
  }

  // Rows without a step pass their gradients through.
  void start() {
    if (!p.grad_h_0) return;
    for (int64_t i = rows->active(0); i < rows->size(); ++i) {
      for (int64_t v = widths.begin; v < widths.end; ++v) {
        const int64_t j = v * L, at = (rows->row[i] * p.groups + group) * p.width + j;
        const int n = valid(p.width, j);
        store(static_cast<S*>(p.grad_h_0) + at, load_or_zero<T>(static_cast<const S*>(p.grad_h_n), at, n), n);
      }
      if constexpr (kHasC)
        for (int64_t v = units.begin; v < units.end; ++v) {
          const int64_t j = v * L, at = (rows->row[i] * p.groups + group) * p.hidden + j;
          const int n = valid(p.hidden, j);
          store(static_cast<S*>(p.grad_c_0) + at, load_or_zero<T>(static_cast<const S*>(p.grad_c_n), at, n), n);
        }
    }
  }

  // Step s < T computes the gradients of time t; step T finishes the rows still running.
  void step(int64_t s) {
    t = time_of(s);
    t_from = reverse ? t - 1 : t + 1;
    was_running = running;
    running = s < p.steps ? rows->active(t) : 0;
    to = grad_gates(*rows) + (layer ? rows->size() + chunk_rows : s & 1 ? 0 : rows->size()) * b.gates_stride;
    to_ih = layer && b.grad_gates_ih ? b.grad_gates_ih + (first_row(*rows) + chunk_rows) * b.gates_stride : nullptr;
    const int64_t count = running > was_running ? running : was_running;

    for_each_panel(widths, kMaxVectors, [&](int64_t v, int vectors) {
      // Rows that only start here have no gate gradients to multiply.
      const auto body = [&](int64_t first, int rows_in_tile, const T* sums) {
        for (int m = 0; m < rows_in_tile; ++m)
          for (int n = 0; n < vectors; ++n)
            state_gradient(first + m, (v + n) * L, V(sums ? load(sums + (m * vectors + n) * L) : V(0)));
      };
      const Panel panel = panel_of(p.weight_hh, G * p.hidden, p.width, b.panels_hh, b.gates_padded * G, v, vectors,
                                   packed);
      for_each_deep_tile(was_running, static_cast<const T*>(from), b.gates_stride, panel.weights, panel.stride,
                         b.gates_padded * G, vectors, sums, body);
      for (int64_t i = was_running; i < count; ++i) body(i, 1, nullptr);
    });
    from = to;
    chunk_rows += running;
  }

  // The step's second half where h is projected: the gradients of o tanh(c), from those of h of all the width.
  void project_gradients() {
    const int64_t count = running > was_running ? running : was_running;
    for_each_panel(units, kMaxVectors, [&](int64_t v, int vectors) {
      const Panel panel = panel_of(p.weight_hr, p.width, p.hidden, b.panels_hr, p.width, v, vectors, packed);
      for_each_tile(count, static_cast<const T*>(b.grad_h + rows->first * b.stride), b.stride, panel.weights,
                    panel.stride, p.width, vectors, static_cast<const T*>(nullptr),
                    [&](int64_t first, int rows_in_tile, const T* sums) {
                      for (int m = 0; m < rows_in_tile; ++m)
                        for (int n = 0; n < vectors; ++n)
                          cell(first + m, (v + n) * L, load(sums + (m * vectors + n) * L));
                    });
    });
  }

  // The whole gradient of state 0 after step t, columns j .. j + L. `recurrent`: what came through weight_hh.
  void state_gradient(int64_t i, int64_t j, V recurrent) {
    const int64_t row = rows->row[i], at = (row * p.groups + group) * p.width + j;
    const int n = valid(p.width, j);
    V grad;
    if (i >= was_running)
      grad = load_or_zero<T>(static_cast<const S*>(p.grad_h_n), at, n);
    else {
      grad = clipped(p.weight_hr ? recurrent : recurrent + load(b.carry_h + (rows->first + i) * b.stride + j));
      if (reset_crossed(i)) {
        if (p.grad_reset_h) add(static_cast<T*>(p.grad_reset_h) + at, grad, n);
        grad = V(0);
      }
    }
    if (i >= running) {
      if (p.grad_h_0) store(static_cast<S*>(p.grad_h_0) + at, grad, n);
    } else if (p.grad_output)
      grad = grad + load(static_cast<const S*>(p.grad_output) +
                             row_at(p, t, row, p.grad_output_stride_t, p.grad_output_stride_b) + group * p.width + j,
                         n);
    if (!p.weight_hr) return cell(i, j, grad);
    store(b.grad_h + (rows->first + i) * b.stride + j, grad);
    if (i < running)
      store(static_cast<S*>(p.grad_projected) + p.first_row(t) * p.groups * p.width + at, grad, n);
  }

  // One row, units j .. j + L; grad_hidden: gradient of o tanh(c), or of the state where nothing is projected.
  void cell(int64_t i, int64_t j, V grad_hidden) {
    const int64_t row = rows->row[i], h = p.hidden, at = (row * p.groups + group) * h + j;
    const int n = valid(h, j);
    T* carry_h = b.carry_h + (rows->first + i) * b.stride + j;
    T* carry_c = b.carry_c + (rows->first + i) * b.stride + j;
    BackwardIn<Cell, V> in;
    BackwardOut<Cell, V> out;
    in.grad_state[0] = grad_hidden;
    if constexpr (kHasC) {
      V grad_c;
      if (i >= was_running)
        grad_c = load_or_zero<T>(static_cast<const S*>(p.grad_c_n), at, n);
      else {
        grad_c = clipped(load(carry_c));
        if (reset_crossed(i)) {
          if (p.grad_reset_c) add(static_cast<T*>(p.grad_reset_c) + at, grad_c, n);
          grad_c = V(0);
        }
      }
      if (i >= running && p.grad_c_0) store(static_cast<S*>(p.grad_c_0) + at, grad_c, n);
      in.grad_state[1] = grad_c;
    }
    if (i >= running) return;
    if constexpr (kHasC)
      if (layer && layer->grad_cells)
        in.grad_state[1] = in.grad_state[1] + load(static_cast<const S*>(layer->grad_cells) +
                                                       row_at(p, t, row, layer->grad_cells_stride_t,
                                                              layer->grad_cells_stride_b) + group * h + j, n);

    const int64_t cell_at = (p.first_row(t) + row) * p.groups + group;
    const S* saved = static_cast<const S*>(p.saved) + cell_at * kSaved * h + j;
    if constexpr (Cell::kSaved > 0)
      for (int k = 0; k < Cell::kSaved; ++k) in.saved[k] = load(saved + k * h, n);
    if constexpr (Cell::kStates == 1) {  // width == hidden
      in.state[0] = load(static_cast<const S*>(p.output) + cell_at * h + j, n);
      in.state_prev[0] = load_or_zero<T>(h_before(t, i), j, n);
    } else {  // no cell with a second state reads h
      in.state[0] = in.state_prev[0] = V(0);
      in.state[1] = load(saved + Cell::kSaved * h, n);
      in.state_prev[1] =
          load_or_zero<T>(before(t, i, h, p.saved, kSaved * h, Cell::kSaved * h, p.c_0, p.reset_c), j, n);
    }
    Cell::backward(in, out);

    store(carry_h, out.grad_state_prev[0]);
    if constexpr (kHasC) store(carry_c, out.grad_state_prev[1]);
    for (int k = 0; k < G; ++k) {
      const int64_t mine = i * b.gates_stride + k * b.gates_padded + j;
      store(to + mine, out.grad_gates_hh[k]);
      if (to_ih) store(to_ih + mine, out.grad_gates_ih[k]);
    }
    if (layer) return;
    S* grad_ih = static_cast<S*>(p.grad_gates_ih) + cell_at * G * h + j;
    S* grad_hh = p.grad_gates_hh ? static_cast<S*>(p.grad_gates_hh) + cell_at * G * h + j : nullptr;
    for (int k = 0; k < G; ++k) {
      store(grad_ih + k * h, out.grad_gates_ih[k], n);
      if (grad_hh) store(grad_hh + k * h, out.grad_gates_hh[k], n);
    }
  }

  int64_t time_of(int64_t s) const { return reverse ? s : p.steps - 1 - s; }

  // A row's state before its step, of `size` values; null for zeros. It stands at `offset` in the `stride` values that
  // `sequence` has for the step before, or there was none.
  const S* before(int64_t time, int64_t i, int64_t size, const void* sequence, int64_t stride, int64_t offset,
                  const void* start, const void* restart) const {
    const int64_t row = rows->row[i], at = (row * p.groups + group) * size;
    const bool reset = reset_before(p, group, row, rows->length[i], time);
    if (reset || time == (reverse ? rows->length[i] - 1 : 0)) {
      const S* state = static_cast<const S*>(reset ? restart : start);
      return state ? state + at : nullptr;
    }
    const int64_t cell_before = (p.first_row(reverse ? time + 1 : time - 1) + row) * p.groups + group;
    return static_cast<const S*>(sequence) + cell_before * stride + offset;
  }
  const S* h_before(int64_t time, int64_t i) const {
    return before(time, i, p.width, p.output, p.width, 0, p.h_0, p.reset_h);
  }

  // ---- a layer's call: the products with a chunk's gate gradients ----

  // Where a member's rows start: in the chunk, and in grad_gates.
  int64_t first_row(const Rows& x) const { return b.slots * x.first; }
  T* grad_gates(const Rows& x) const { return b.grad_gates + (b.slots + 1) * x.first * b.gates_stride; }

  // Steps chunk_begin .. end have been made. Finds what weight gradients multiply with, and where the input's gradient
  // goes. The team shares all rows where units are split.
  void gather(int64_t end) {
    // The last step's gates stay for the next one's product: every member keeps the units and rows that it makes.
    const int64_t width = (units.end - units.begin) * L;
    for (int64_t i = 0; i < running; ++i)
      for (int k = 0; k < G; ++k) {
        const int64_t at = i * b.gates_stride + k * b.gates_padded + units.begin * L;
        for (int64_t j = 0; j < width; j += L) store(grad_gates(*rows) + at + j, load(from + at + j));
      }
    from = grad_gates(*rows);
    const S* input = static_cast<const S*>(layer->input);
    int64_t at = first_row(*rows);
    for (int64_t s = chunk_begin; s < end; ++s) {
      const int64_t time = time_of(s), active = rows->active(time);
      const Range part = plan.split_rows ? Range{0, active} : share(active, member, plan.team_size);
      for (int64_t i = part.begin; i < part.end; ++i) {
        const int64_t row = rows->row[i];
        b.place[at + i] = p.first_row(time) + row;
        b.input[at + i] = input + row_at(p, time, row, layer->input_stride_t, layer->input_stride_b);
        b.before[at + i] = h_before(time, i);
      }
      at += active;
    }
  }

  void add_products(int64_t end) {
    const int segments = plan.split_rows ? plan.team_size : 1;
    for (int segment = 0; segment < segments; ++segment) {
      const Rows& x = plan.rows(group, segment);
      int64_t count = 0;
      for (int64_t s = chunk_begin; s < end; ++s) count += x.active(time_of(s));
      if (count == 0) continue;
      const int64_t first = first_row(x);
      const T* gates_hh = grad_gates(x) + x.size() * b.gates_stride;
      const T* gates_ih = b.grad_gates_ih ? b.grad_gates_ih + first * b.gates_stride : gates_hh;
      add_weight_gradient(layer->grad_weight_ih, gates_ih, b.input + first, layer->size, count);
      add_weight_gradient(layer->grad_weight_hh, gates_hh, b.before + first, p.width, count);
      add_bias_gradient(gates_ih, gates_hh, count);
      first_product = false;
      const Range mine = !plan.split_rows  ? share(count, member, plan.team_size)
                         : segment == member ? Range{0, count}
                                             : Range{0, 0};
      input_gradient(gates_ih + mine.begin * b.gates_stride, b.place + first + mine.begin, mine.end - mine.begin);
    }
    chunk_begin = end;
    chunk_rows = 0;
  }

  // grad_weight [P, G*h, size] += gates^T x, x's rows anywhere: this member's rows of it, the gates' padding left out.
  void add_weight_gradient(void* grad_weight, const T* gates, const T* const* x, int64_t size, int64_t count) {
    if (!grad_weight) return;
    T* out = static_cast<T*>(grad_weight) + group * G * p.hidden * size;
    if (count <= kFewRows) return add_few_rows(out, gates, x, size, count);
    const auto pack = [&](int64_t k0, int64_t depth, int64_t v, int n, T* panel) {
      for (int64_t k = k0; k < k0 + depth; ++k)
        for (int q = 0; q < n; ++q, panel += L)
          store(panel, load_or_zero<T>(x[k], (v + q) * L, valid(size, (v + q) * L)));
    };
    const auto keep = [&](int64_t row, int64_t v, int64_t k0, V sum) {
      const int64_t weight_row = row_of_weight(row);
      if (weight_row < 0) return;
      const int n = valid(size, v * L);
      T* to = out + weight_row * size + v * L;
      if (k0 > 0 || !first_product) sum = sum + load(to, n);
      store(to, sum, n);
    };
    multiply<T, true>(b.products, own_gates(), {0, ceil_div(size, L)}, count, gates, b.gates_stride, pack, keep);
  }
  // Which row of a weight has this place among a row's gate gradients; -1: it is padding.
  int64_t row_of_weight(int64_t i) const {
    if (b.gates_padded == p.hidden) return i;
    const int64_t unit = i % b.gates_padded;
    return unit < p.hidden ? i / b.gates_padded * p.hidden + unit : -1;
  }

  static constexpr int64_t kFewRows = 4;  // of which packing would cost more than the product
  void add_few_rows(T* out, const T* gates, const T* const* x, int64_t size, int64_t count) {
    const Range own = own_gates();
    for (int64_t row = own.begin; row < own.end; ++row) {
      const int64_t weight_row = row_of_weight(row);
      if (weight_row < 0) continue;
      for (int64_t j = 0; j < size; j += L) {
        const int n = valid(size, j);
        T* to = out + weight_row * size + j;
        V sum = first_product ? V(0) : V(load(to, n));
        for (int64_t i = 0; i < count; ++i)
          sum = sum + V(gates[i * b.gates_stride + row]) * load_or_zero<T>(x[i], j, n);
        store(to, sum, n);
      }
    }
  }
  Range own_gates() const { return share(G * b.gates_padded, member, plan.team_size); }

  static constexpr int64_t kBiasRows = 16;  // sums of sums, for less rounding
  void add_bias_gradient(const T* gates_ih, const T* gates_hh, int64_t count) {
    const Range own = share(G * b.unit_vectors, member, plan.team_size);
    const auto add_up = [&](const T* gates, T* sums) {
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
    if (layer->grad_bias_ih) add_up(gates_ih, b.bias);
    if (layer->grad_bias_hh) add_up(gates_hh, b.bias + b.gates_stride);
  }

  void input_gradient(const T* gates, const int64_t* place, int64_t count) {
    if (!layer->grad_input) return;
    T* out = static_cast<T*>(layer->grad_input) + group * layer->rows * layer->size;
    for (int64_t begin = 0; begin < count; begin += kBlockM) {
      const int64_t end = begin + kBlockM < count ? begin + kBlockM : count;
      for_each_panel({0, b.input_vectors}, kMaxVectors, [&](int64_t v, int vectors) {
        const Panel panel = panel_of(layer->weight, G * p.hidden, layer->size, b.panels_ih, b.gates_padded * G, v,
                                     vectors, packed_ih);
        const auto keep = [&](int64_t first, int rows_in_tile, const T* sums) {
          for (int m = 0; m < rows_in_tile; ++m)
            for (int n = 0; n < vectors; ++n) {
              const int64_t j = (v + n) * L;
              store(out + place[begin + first + m] * layer->size + j, load(sums + (m * vectors + n) * L),
                    valid(layer->size, j));
            }
        };
        for_each_deep_tile(end - begin, gates + begin * b.gates_stride, b.gates_stride, panel.weights, panel.stride,
                           b.gates_padded * G, vectors, sums, keep);
      });
    }
  }

  // Biases, from their sums; and sums of nothing, where no row had a step.
  void finish() {
    const Range own = own_gates();
    const auto each_row = [&](auto body) {
      for (int64_t i = own.begin; i < own.end; ++i)
        if (row_of_weight(i) >= 0) body(i, group * G * p.hidden + row_of_weight(i));
    };
    const auto weight = [&](void* grad, int64_t size) {
      if (!grad || !first_product) return;
      each_row([&](int64_t, int64_t row) {
        for (int64_t j = 0; j < size; ++j) static_cast<T*>(grad)[row * size + j] = 0;
      });
    };
    const auto bias = [&](void* grad, const T* sums) {
      if (grad) each_row([&](int64_t i, int64_t row) { static_cast<T*>(grad)[row] = first_product ? T(0) : sums[i]; });
    };
    weight(layer->grad_weight_ih, layer->size);
    weight(layer->grad_weight_hh, p.width);
    bias(layer->grad_bias_ih, b.bias);
    bias(layer->grad_bias_hh, b.bias + b.gates_stride);
  }

  V clipped(V x) const { return p.grad_clip > 0 ? clamp(x, T(p.grad_clip)) : x; }
  static void add(T* p, V x, int n) { store(p, load(p, n) + x, n); }
  bool reset_crossed(int64_t i) const {
    return p.resets && reset_before(p, group, rows->row[i], rows->length[i], t_from);
  }
  static int valid(int64_t size, int64_t j) { return int(size - j < L ? size - j : L); }

  const BackwardParams& p;
  const LayerBackwardParams* layer;  // null where gate gradients are asked for
  const Plan& plan;
  const int team, member;
  Arena arena;
  BackwardBuffers<Cell, T> b;
  Range units, widths;

  int64_t group, t, t_from;       // t_from: the time whose gate gradients are multiplied
  int64_t running, was_running;   // rows with a step at t, at t_from
  bool reverse, packed, packed_ih;
  const Rows* rows;
  const T* from;
  T *to, *to_ih, *sums;
  int64_t chunk_begin, chunk_rows;  // the chunk's first step, its rows so far
  bool first_product;               // of a group's weight gradients: nothing to add to yet
};
