// The backward time loop, forward's mirror: the product runs over the gate gradients of the step before (in this
// loop's order), the cell's backward is applied to its sums. Included once per instruction set, after forward-inl.h.
//
// A row starts where its forward ended, with grad_h_n and grad_c_n, and finishes one step after it has passed its
// first one: there the last product gives grad_h_0. Resets send what would cross them to grad_reset instead.

template <class Cell, class T>
struct BackwardBuffers {
  static constexpr int L = Vec<T>::kLanes;
  int64_t unit_vectors, width_vectors, stride, gates_padded, gates_stride;
  T *panels_hh, *panels_hr;
  T* grad_gates[2];  // [B, gates_stride]: grad_gates_hh of a step, each gate padded to whole vectors
  T *carry_h, *carry_c;  // [B, stride]: the pointwise part of grad_state_prev
  T* grad_h;  // [B, stride]: gradient of the projection's output

  BackwardBuffers(const BackwardParams& p, Arena& arena)
      : unit_vectors(ceil_div(p.hidden, L)), width_vectors(ceil_div(p.width, L)) {
    stride = ((unit_vectors > width_vectors ? unit_vectors : width_vectors) + kMaxVectors) * L;
    gates_padded = unit_vectors * L;
    gates_stride = gates_padded * Cell::kGates + L;
    panels_hh = arena.take<T>(width_vectors * L * gates_padded * Cell::kGates);
    panels_hr = p.weight_hr ? arena.take<T>(unit_vectors * L * p.width) : nullptr;
    for (T*& x : grad_gates) x = arena.take<T>(p.batch * gates_stride);
    carry_h = arena.take<T>(p.batch * stride);
    carry_c = arena.take<T>(p.batch * stride);
    grad_h = p.weight_hr ? arena.take<T>(p.batch * stride) : nullptr;
  }
};

template <class Cell, class S>
class BackwardWorker {
  using T = typename Compute<S>::type;
  using V = Vec<T>;
  static constexpr int L = V::kLanes, G = Cell::kGates;
  static constexpr bool kHasC = Cell::kStates > 1;
  static constexpr int kSaved = Cell::kSaved + Cell::kStates - 1;

 public:
  BackwardWorker(const BackwardParams& params, const Plan& plan, Barrier& barrier, char* workspace, int thread)
      : p(params), plan(plan), barrier(barrier), team(thread / plan.team_size), member(thread % plan.team_size),
        arena(workspace), b(params, arena) {
    const bool all = plan.split_rows;
    units = all ? Range{0, b.unit_vectors} : share(b.unit_vectors, member, plan.team_size);
    widths = all ? Range{0, b.width_vectors} : share(b.width_vectors, member, plan.team_size);
    // Rows of the weights serve as panels where whole vectors of them, of the right type, can be read.
    packed = plan.pack_hh || sizeof(S) != sizeof(T) || p.hidden % L != 0 || p.width % L != 0;
  }

  void run() {
    for (group = team; group < p.groups; group += plan.teams) {
      rows = &plan.rows(group, member);
      reverse = p.reverse[group];
      pack();
      start();
      barrier.wait();
      running = 0;
      // The step after the last one is there for the initial state's gradient, or a reset's at the first step.
      const int64_t steps = p.grad_h_0 || p.resets ? p.steps + 1 : p.steps;
      for (int64_t s = 0; s < steps; ++s) {
        step(s);
        if (!plan.split_rows) barrier.wait();
      }
      if (plan.split_rows) barrier.wait();
    }
  }

 private:
  template <class Body>
  void for_each_packed_panel(Range range, Body body) {
    int64_t index = 0;
    for_each_panel(range, kMaxVectors, [&](int64_t v, int vectors) {
      if (!plan.split_rows || index++ % plan.team_size == member) body(v, vectors);
    });
  }

  void pack() {
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

  struct Panel {
    const T* weights;
    int64_t stride;
  };
  // Vectors v .. of the columns of a [P, rows, columns] weight: packed, or where they lie.
  Panel panel_of(const void* weight, int64_t rows, int64_t columns, const T* packs, int64_t depth, int64_t v,
                 int vectors) const {
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
    t = reverse ? s : p.steps - 1 - s;
    t_from = reverse ? t - 1 : t + 1;
    from = b.grad_gates[s & 1] + rows->first * b.gates_stride;
    to = b.grad_gates[(s + 1) & 1] + rows->first * b.gates_stride;
    was_running = running;
    running = s < p.steps ? rows->active(t) : 0;
    const int64_t count = running > was_running ? running : was_running;

    for_each_panel(widths, kMaxVectors, [&](int64_t v, int vectors) {
      // Rows that only start here have no gate gradients to multiply.
      const auto body = [&](int64_t first, int rows_in_tile, const T* sums) {
        for (int m = 0; m < rows_in_tile; ++m)
          for (int n = 0; n < vectors; ++n)
            state_gradient(first + m, (v + n) * L, V(sums ? load(sums + (m * vectors + n) * L) : V(0)));
      };
      const Panel panel = panel_of(p.weight_hh, G * p.hidden, p.width, b.panels_hh, b.gates_padded * G, v, vectors);
      for_each_tile(was_running, static_cast<const T*>(from), b.gates_stride, panel.weights, panel.stride,
                    b.gates_padded * G, vectors, static_cast<const T*>(nullptr), body);
      for (int64_t i = was_running; i < count; ++i) body(i, 1, nullptr);
    });
    if (!p.weight_hr) return;
    if (!plan.split_rows) barrier.wait();
    for_each_panel(units, kMaxVectors, [&](int64_t v, int vectors) {
      const Panel panel = panel_of(p.weight_hr, p.width, p.hidden, b.panels_hr, p.width, v, vectors);
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
      grad = p.weight_hr ? recurrent : recurrent + load(b.carry_h + (rows->first + i) * b.stride + j);
      if (reset_crossed(i)) {
        if (p.grad_reset_h) add(static_cast<T*>(p.grad_reset_h) + at, grad, n);
        grad = V(0);
      }
    }
    if (i >= running) {
      if (p.grad_h_0) store(static_cast<S*>(p.grad_h_0) + at, grad, n);
    } else if (p.grad_output)
      grad = grad + load(static_cast<const S*>(p.grad_output) + t * p.grad_output_stride_t +
                             row * p.grad_output_stride_b + group * p.width + j,
                         n);
    if (!p.weight_hr) return cell(i, j, grad);
    store(b.grad_h + (rows->first + i) * b.stride + j, grad);
    if (i < running)
      store(static_cast<S*>(p.grad_projected) + t * p.batch * p.groups * p.width + at, grad, n);
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
        grad_c = load(carry_c);
        if (reset_crossed(i)) {
          if (p.grad_reset_c) add(static_cast<T*>(p.grad_reset_c) + at, grad_c, n);
          grad_c = V(0);
        }
      }
      if (i >= running && p.grad_c_0) store(static_cast<S*>(p.grad_c_0) + at, grad_c, n);
      in.grad_state[1] = grad_c;
    }
    if (i >= running) return;

    const int64_t cell_at = (t * p.batch + row) * p.groups + group;
    const S* saved = static_cast<const S*>(p.saved) + cell_at * kSaved * h + j;
    if constexpr (Cell::kSaved > 0)
      for (int k = 0; k < Cell::kSaved; ++k) in.saved[k] = load(saved + k * h, n);
    const int64_t step = p.batch * p.groups, t_prev = reverse ? t + 1 : t - 1;
    const bool reset = reset_before(p, group, row, rows->length[i], t);
    const bool first = t == (reverse ? rows->length[i] - 1 : 0);
    // The state at the same place of `sequence` one step before, or what stood there instead.
    const auto previous = [&](const void* sequence, int64_t stride, int64_t offset, const void* start,
                              const void* restart) {
      if (reset) return load_or_zero<T>(static_cast<const S*>(restart), at, n);
      if (first) return V(load(static_cast<const S*>(start) + at, n));
      return V(load(static_cast<const S*>(sequence) + (cell_at + (t_prev - t) * step) * stride + offset + j, n));
    };
    if constexpr (Cell::kStates == 1) {  // width == hidden
      in.state[0] = load(static_cast<const S*>(p.output) + cell_at * h + j, n);
      in.state_prev[0] = previous(p.output, h, 0, p.h_0, p.reset_h);
    } else {  // no cell with a second state reads h
      in.state[0] = in.state_prev[0] = V(0);
      in.state[1] = load(saved + Cell::kSaved * h, n);
      in.state_prev[1] = previous(p.saved, kSaved * h, Cell::kSaved * h, p.c_0, p.reset_c);
    }
    Cell::backward(in, out);

    store(carry_h, out.grad_state_prev[0]);
    if constexpr (kHasC) store(carry_c, out.grad_state_prev[1]);
    S* grad_ih = static_cast<S*>(p.grad_gates_ih) + cell_at * G * h + j;
    S* grad_hh = p.grad_gates_hh ? static_cast<S*>(p.grad_gates_hh) + cell_at * G * h + j : nullptr;
    for (int k = 0; k < G; ++k) {
      store(grad_ih + k * h, out.grad_gates_ih[k], n);
      if (grad_hh) store(grad_hh + k * h, out.grad_gates_hh[k], n);
      store(to + i * b.gates_stride + k * b.gates_padded + j, out.grad_gates_hh[k]);
    }
  }

  static void add(T* p, V x, int n) { store(p, load(p, n) + x, n); }
  bool reset_crossed(int64_t i) const {
    return p.resets && reset_before(p, group, rows->row[i], rows->length[i], t_from);
  }
  static int valid(int64_t size, int64_t j) { return int(size - j < L ? size - j : L); }

  const BackwardParams& p;
  const Plan& plan;
  Barrier& barrier;
  const int team, member;
  Arena arena;
  BackwardBuffers<Cell, T> b;
  Range units, widths;

  int64_t group, t, t_from;       // t_from: the time whose gate gradients are multiplied
  int64_t running, was_running;   // rows with a step at t, at t_from
  bool reverse, packed;
  const Rows* rows;
  const T* from;
  T* to;
};
