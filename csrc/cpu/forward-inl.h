// The forward time loop: recurrent product, cell and state of every step in one call. Included once per
// instruction set.

struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int member, int size) { return {n * member / size, n * (member + 1) / size}; }

// What a worker's run() returns: its coroutine, which pauses before the first line and at every co_yield kMeet, and lives
// until it is destroyed. Errors do not leave it: there are none.
enum Meet { kMeet };
struct Paused {
  struct Always {
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<>) const noexcept {}
    void await_resume() const noexcept {}
  };
  struct promise_type {
    Paused get_return_object() noexcept { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
    Always initial_suspend() const noexcept { return {}; }
    Always final_suspend() const noexcept { return {}; }
    Always yield_value(Meet) const noexcept { return {}; }
    void return_void() const noexcept {}
    void unhandled_exception() const noexcept { __builtin_abort(); }
  };
  Part part;
};

// Panels of at most `step` vectors that cover `range`: body(first vector, vectors). There and back in turn: what a cache
// still holds of the last time is then met first.
template <class Body>
FASTRNN_HD void for_each_panel_zigzag(Range range, int step, int64_t time, Body body) {
  const int64_t panels = ceil_div(range.end - range.begin, step);
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t v = range.begin + (time & 1 ? panels - 1 - i : i) * step;
    body(v, int(range.end - v < step ? range.end - v : step));
  }
}
template <class Body>
FASTRNN_HD void for_each_panel(Range range, int step, Body body) {
  for_each_panel_zigzag(range, step, 0, body);
}

// Where a row of step t starts in a tensor with strides.
inline int64_t row_at(const ForwardParams& p, int64_t t, int64_t row, int64_t stride_t, int64_t stride_b) {
  return (p.step_rows ? p.step_rows[t] * stride_b : t * stride_t) + row * stride_b;
}

template <class T, class S>
FASTRNN_HD Vec<T> load_or_zero(const S* p, int64_t offset, int valid) {
  return p ? Vec<T>(load(p + offset, valid)) : Vec<T>(0);
}

// A team's workspace. Rows of h and c are padded so that whole vectors can be stored, and by one vector more, which
// keeps power-of-two sizes from sharing a cache set.
template <class Cell, class T>
struct ForwardBuffers {
  static constexpr int L = Vec<T>::kLanes;
  int64_t unit_vectors, width_vectors, stride;
  T *panels_hh, *bias, *panels_hr;
  T *h[2], *c;  // [B, stride]
  T* hidden;    // [B, stride]: o tanh(c) before the projection
  // Of a chunk of steps, where gates_ih are made here. A step's rows follow the step's before it.
  int64_t chunk_rows, input_stride;
  T *panels_ih, *bias_ih;
  T* input;     // [chunk_rows, input_stride]
  T* gates_ih;  // [panels][chunk_rows][a panel's vectors]
  int64_t* chunk_row;  // [team_size, chunk]: where each step's rows start in the chunk
  // With int8 weights: the chunk's input instead of `input`, and each member's copy of the rows of h; see int8-inl.h.
  int64_t quads_ih, quads_hh;
  uint8_t *quantized_input, *quantized_h;  // [chunk_rows, 4 quads_ih], [team_size, B, 4 quads_hh]
  float *input_scale, *h_scale;            // [chunk_rows], [team_size, B]

  ForwardBuffers(const ForwardParams& p, const LayerParams* layer, const Plan& plan, Arena& arena)
      : unit_vectors(ceil_div(p.hidden, L)), width_vectors(ceil_div(p.width, L)) {
    stride = ((unit_vectors > width_vectors ? unit_vectors : width_vectors) + kMaxVectors) * L;
    panels_hh = plan.pack_hh ? arena.take<T>(unit_vectors * Cell::kGates * L * p.width) : nullptr;
    bias = arena.take<T>(unit_vectors * Cell::kGates * L);
    panels_hr = p.weight_hr && plan.pack_hh ? arena.take<T>(width_vectors * L * p.hidden) : nullptr;
    for (T*& x : h) x = arena.take<T>(p.batch * stride);
    c = arena.take<T>(p.batch * stride);
    hidden = p.weight_hr ? arena.take<T>(p.batch * stride) : nullptr;
    if (!layer) return;
    chunk_rows = plan.chunk * p.batch;
    input_stride = round_up(layer->size, L) + L;
    panels_ih = plan.pack_ih ? arena.take<T>(unit_vectors * Cell::kGates * L * layer->size) : nullptr;
    bias_ih = arena.take<T>(unit_vectors * Cell::kGates * L);
    if (layer->weight_dtype == DType::kInt8) {
      quads_ih = ceil_div(layer->size, kInt8Depth);
      quads_hh = ceil_div(p.width, kInt8Depth);
      quantized_input = arena.take<uint8_t>(chunk_rows * quads_ih * kInt8Depth);
      input_scale = arena.take<float>(chunk_rows);
      quantized_h = arena.take<uint8_t>(plan.team_size * p.batch * quads_hh * kInt8Depth);
      h_scale = arena.take<float>(plan.team_size * p.batch);
    } else
      input = arena.take<T>(chunk_rows * input_stride);
    gates_ih = arena.take<T>(chunk_rows * unit_vectors * Cell::kGates * L);
    chunk_row = arena.take<int64_t>(plan.team_size * plan.chunk);
  }
};

// S: what tensors are stored in, W: what weights are.
template <class Cell, class S, class W = S>
class ForwardWorker {
  static constexpr bool kInt8 = std::is_same_v<W, int8_t>;
  using WeightHr = std::conditional_t<kInt8, S, W>;
  using T = typename Compute<S>::type;
  using V = Vec<T>;
  static constexpr int L = V::kLanes, G = Cell::kGates, kUnits = kMaxVectors / G;
  static constexpr bool kHasC = Cell::kStates > 1;
  static constexpr int kSaved = Cell::kSaved + Cell::kStates - 1;

 public:
  ForwardWorker(const ForwardParams& params, const LayerParams* layer, const Plan& plan, char* workspace, int member)
      : p(params), layer(layer), plan(plan), team(member / plan.team_size), member(member % plan.team_size),
        arena(workspace), b(params, layer, plan, arena) {
    const bool all = plan.split_rows;
    units = all ? Range{0, b.unit_vectors} : share(b.unit_vectors, this->member, plan.team_size);
    widths = all ? Range{0, b.width_vectors} : share(b.width_vectors, this->member, plan.team_size);
  }

  // The worker lives in the coroutine's frame.
  static Paused run(ForwardWorker w) {
    const ForwardParams& p = w.p;
    const Plan& plan = w.plan;
    const bool units_split = !plan.split_rows;
    for (int64_t group = w.team; group < p.groups; group += plan.teams) {
      w.begin(group);
      co_yield kMeet;
      for (int64_t s = 0; s < p.steps; ++s) {
        if (w.layer && s % plan.chunk == 0) {
          w.gather_input(s);
          if (units_split) co_yield kMeet;
          w.project();
        }
        w.step(s);
        if (w.weight_hr) {
          if (units_split) co_yield kMeet;
          w.project_hidden(s);
        }
        if (units_split && s + 1 < p.steps) co_yield kMeet;
      }
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
  }

  // Panels are shared by the team where rows are split, so each member packs some; else each needs its own alone.
  template <class Body>
  void for_each_packed_panel(Range range, int step, Body body) {
    int64_t index = 0;
    for_each_panel(range, step, [&](int64_t v, int vectors) {
      if (!plan.split_rows || index++ % plan.team_size == member) body(v, vectors);
    });
  }

  void pack() {
    const int64_t h = p.hidden, R = p.width;
    bias_hh = p.bias_hh ? static_cast<const S*>(p.bias_hh) + group * G * h : nullptr;
    weight_hr = p.weight_hr ? static_cast<const WeightHr*>(p.weight_hr) + group * R * h : nullptr;
    bias_ih = layer && layer->bias ? static_cast<const S*>(layer->bias) + group * G * h : nullptr;
    if constexpr (kInt8) {
      const int64_t blocks = ceil_div(h, kInt8Units), rows = blocks * G * kInt8Units;
      const auto weights = [&](const void* all, const float* scale, const int32_t* sum, int64_t quads) {
        return Int8Weights{static_cast<const int8_t*>(all) + group * rows * quads * kInt8Depth, scale + group * rows,
                           sum + group * rows, quads};
      };
      int8_ih = weights(layer->weight, layer->scale_ih, layer->sum_ih, b.quads_ih);
      int8_hh = weights(p.weight_hh, layer->scale_hh, layer->sum_hh, b.quads_hh);
    } else
      pack_panels();
  }

  void pack_panels() {
    const int64_t h = p.hidden, R = p.width, I = layer ? layer->size : 0;
    weight_hh = static_cast<const W*>(p.weight_hh) + group * G * h * R;
    weight_ih = layer ? static_cast<const W*>(layer->weight) + group * G * h * I : nullptr;
    for_each_packed_panel(units, kUnits, [&](int64_t v, int vectors) {
      if (plan.pack_hh) {
        pack_rows(weight_hh + v * L * R, R, h, G, vectors, h - v * L, R, b.panels_hh + v * G * L * R);
        if (bias_hh) pack_rows(bias_hh + v * L, 1, h, G, vectors, h - v * L, 1, b.bias + v * G * L);
      }
      if (plan.pack_ih) {
        if (!plan.pack_late) pack_ih(v, vectors, b.panels_ih + v * G * L * I);
        if (bias_ih) pack_rows(bias_ih + v * L, 1, h, G, vectors, h - v * L, 1, b.bias_ih + v * G * L);
      }
    });
    if (!plan.pack_hh || !weight_hr) return;
    for_each_packed_panel(widths, kMaxVectors, [&](int64_t v, int vectors) {
      pack_rows(weight_hr + v * L * h, h, 0, 1, vectors, R - v * L, h, b.panels_hr + v * L * h);
    });
  }

  void pack_ih(int64_t v, int vectors, T* panel) {
    const int64_t I = layer->size;
    pack_rows(weight_ih + v * L * I, I, p.hidden, G, vectors, p.hidden - v * L, I, panel);
  }

  // h_0, c_0 into the workspace; rows without a step end where they start.
  void start() {
    const int64_t P = p.groups;
    for (int64_t i = 0; i < rows->size(); ++i) {
      const int64_t row = rows->row[i], length = rows->length[i];
      const bool empty = length == 0;
      const bool reset = !empty && reset_before(p, group, row, length, reverse ? length - 1 : 0);
      for (int64_t v = widths.begin; v < widths.end; ++v) {
        const int64_t j = v * L, at = (row * P + group) * p.width + j;
        const V h_0 = load_or_zero<T>(static_cast<const S*>(p.h_0), at, valid(p.width, j));
        if (empty) store(static_cast<S*>(p.h_n) + at, h_0, valid(p.width, j));
        const V h = reset ? load_or_zero<T>(static_cast<const S*>(p.reset_h), at, valid(p.width, j)) : h_0;
        for (T* x : b.h) store(x + (rows->first + i) * b.stride + j, h);
      }
      if constexpr (kHasC)
        for (int64_t v = units.begin; v < units.end; ++v) {
          const int64_t j = v * L, at = (row * P + group) * p.hidden + j;
          const V c_0 = load_or_zero<T>(static_cast<const S*>(p.c_0), at, valid(p.hidden, j));
          if (empty) store(static_cast<S*>(p.c_n) + at, c_0, valid(p.hidden, j));
          const V c = reset ? load_or_zero<T>(static_cast<const S*>(p.reset_c), at, valid(p.hidden, j)) : c_0;
          store(b.c + (rows->first + i) * b.stride + j, c);
        }
    }
  }

  int64_t time_of(int64_t s) const { return reverse ? p.steps - 1 - s : s; }

  // The input of the chunk of steps from `begin` on. Where units are split the team shares it: each member brings a
  // part of each step's rows.
  void gather_input(int64_t begin) {
    const int64_t I = layer->size, mine = plan.chunk * rows->first;
    const int64_t end = begin + plan.chunk < p.steps ? begin + plan.chunk : p.steps;
    T* input = kInt8 ? nullptr : b.input + mine * b.input_stride;
    int64_t count = 0;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t t = time_of(s), active = rows->active(t);
      chunk_row(s) = count;
      const Range part = plan.split_rows ? Range{0, active} : share(active, member, plan.team_size);
      for (int64_t i = part.begin; i < part.end; ++i) {
        const S* from = static_cast<const S*>(layer->input) +
                        row_at(p, t, rows->row[i], layer->input_stride_t, layer->input_stride_b);
        if constexpr (kInt8) {
          const int64_t at = mine + count + i;
          b.input_scale[at] = quantize_row(from, I, b.quantized_input + at * b.quads_ih * kInt8Depth);
        } else {
          T* to = input + (count + i) * b.input_stride;
          for (int64_t k = 0; k < I; k += L) store(to + k, V(load(from + k, valid(I, k))));
        }
      }
      count += active;
    }
    chunk_count = count;
  }

  // gates_ih of the gathered steps, of this member's rows and units. No step may be under way that still reads the last
  // chunk's gates.
  void project() {
    const int64_t I = layer->size, mine = plan.chunk * rows->first, count = chunk_count;
    const T* input = kInt8 ? nullptr : b.input + mine * b.input_stride;
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
        T* panel = b.panels_ih + (plan.pack_late ? units.begin : v) * G * L * I;
        if (plan.pack_late) pack_ih(v, vectors, panel);
        for_each_tile(count, input, b.input_stride, static_cast<const T*>(panel), N * L, I, N,
                      bias_ih ? b.bias_ih + v * G * L : nullptr, keep, plan.uniform);
      } else
        for_each_dot_tile(count, input, b.input_stride, weight_ih + v * L * I, I, p.hidden, G,
                          vectors, p.hidden - v * L, I, bias_ih ? bias_ih + v * L : nullptr, keep);
    });
  }

  int64_t& chunk_row(int64_t s) { return b.chunk_row[member * plan.chunk + s % plan.chunk]; }
  // Where a panel's gates of the chunk begin; N vectors a row.
  T* chunk_panel(int64_t v, int N) {
    return b.gates_ih + v * G * L * b.chunk_rows + plan.chunk * rows->first * N * L;
  }

  void step(int64_t s) {
    t = time_of(s);
    h_prev = b.h[s & 1] + rows->first * b.stride;
    h_next = b.h[(s + 1) & 1] + rows->first * b.stride;
    const int64_t active = rows->active(t);
    // Every member quantises all rows that it multiplies: less work than to wait for another's.
    uint8_t* quantized = nullptr;
    float* scale = nullptr;
    if constexpr (kInt8) {
      const int64_t mine = member * p.batch + rows->first;
      quantized = b.quantized_h + mine * b.quads_hh * kInt8Depth;
      scale = b.h_scale + mine;
      for (int64_t i = 0; i < active; ++i)
        scale[i] = quantize_row(h_prev + i * b.stride, p.width, quantized + i * b.quads_hh * kInt8Depth);
    }
    for_each_panel_zigzag(units, kUnits, s, [&](int64_t v, int vectors) {
      const T* gates_ih =
          layer ? chunk_panel(v, vectors * G) + chunk_row(s) * vectors * G * L : nullptr;
      const auto cells = [&](int64_t first, int count, const T* gates_hh) {
        for (int m = 0; m < count; ++m)
          for (int n = 0; n < vectors; ++n)
            cell(first + m, (v + n) * L, gates_hh + (m * vectors + n) * G * L,
                 gates_ih ? gates_ih + ((first + m) * vectors + n) * G * L : nullptr);
      };
      if constexpr (kInt8)
        for_each_int8_tile<G>(active, quantized, b.quads_hh * kInt8Depth, scale, int8_hh, v, vectors, bias_hh, p.hidden,
                              cells);
      else if (plan.pack_hh)
        for_each_tile(active, h_prev, b.stride, b.panels_hh + v * G * L * p.width, vectors * G * L, p.width,
                      vectors * G, bias_hh ? b.bias + v * G * L : nullptr, cells, plan.uniform);
      else
        for_each_dot_tile(active, h_prev, b.stride, weight_hh + v * L * p.width, p.width, p.hidden, G, vectors,
                          p.hidden - v * L, p.width, bias_hh ? bias_hh + v * L : nullptr, cells);
    });
  }

  // h of the step, from o tanh(c) of all its units.
  void project_hidden(int64_t s) {
    const int64_t active = rows->active(t);
    const T* hidden = b.hidden + rows->first * b.stride;
    for_each_panel_zigzag(widths, kMaxVectors, s, [&](int64_t v, int vectors) {
      const auto states = [&](int64_t first, int count, const T* h) {
        for (int m = 0; m < count; ++m)
          for (int n = 0; n < vectors; ++n) store_h(first + m, (v + n) * L, load(h + (m * vectors + n) * L));
      };
      if (plan.pack_hh)
        for_each_tile(active, hidden, b.stride, b.panels_hr + v * L * p.hidden, vectors * L, p.hidden, vectors,
                      static_cast<const T*>(nullptr), states, plan.uniform);
      else
        for_each_dot_tile(active, hidden, b.stride, weight_hr + v * L * p.hidden, p.hidden, 0, 1, vectors,
                          p.width - v * L, p.hidden, static_cast<const S*>(nullptr), states);
    });
  }

  // One row, units j .. j + L. made: its gates_ih, [G][L], or null where they were given.
  void cell(int64_t i, int64_t j, const T* gates_hh, const T* made) {
    const int64_t row = rows->row[i], h = p.hidden;
    const int n = valid(h, j);
    ForwardIn<Cell, V> in;
    ForwardOut<Cell, V> out;
    if (made)
      for (int k = 0; k < G; ++k) in.gates_ih[k] = load(made + k * L);
    else {
      const S* gates_ih =
          static_cast<const S*>(p.gates_ih) + row_at(p, t, row, p.gates_ih_stride_t, p.gates_ih_stride_b) + group * G * h + j;
      for (int k = 0; k < G; ++k) in.gates_ih[k] = load(gates_ih + k * h, n);
    }
    for (int k = 0; k < G; ++k) in.gates_hh[k] = load(gates_hh + k * L);
    in.state[0] = load(h_prev + i * b.stride + j);
    T* c = b.c + (rows->first + i) * b.stride + j;
    if constexpr (kHasC) in.state[1] = load(c);
    Cell::forward(in, out);

    if (p.saved) {
      S* saved = static_cast<S*>(p.saved) + ((p.first_row(t) + row) * p.groups + group) * kSaved * h + j;
      if constexpr (Cell::kSaved > 0)
        for (int k = 0; k < Cell::kSaved; ++k) store(saved + k * h, out.saved[k], n);
      if constexpr (kHasC) store(saved + Cell::kSaved * h, out.state[1], n);
    }
    if constexpr (kHasC) {
      const int64_t at = (row * p.groups + group) * h + j;
      if (is_last(i)) store(static_cast<S*>(p.c_n) + at, out.state[1], n);
      store(c, reset_next(i) ? load_or_zero<T>(static_cast<const S*>(p.reset_c), at, n) : out.state[1]);
    }
    if (weight_hr)
      store(b.hidden + (rows->first + i) * b.stride + j, out.state[0]);
    else
      store_h(i, j, out.state[0]);
  }

  void store_h(int64_t i, int64_t j, V h) {
    const int64_t row = rows->row[i], at = (row * p.groups + group) * p.width + j;
    const int n = valid(p.width, j);
    store(static_cast<S*>(p.output) + p.first_row(t) * p.groups * p.width + at, h, n);
    if (is_last(i)) store(static_cast<S*>(p.h_n) + at, h, n);
    store(h_next + i * b.stride + j,
          reset_next(i) ? load_or_zero<T>(static_cast<const S*>(p.reset_h), at, n) : h);
  }

  bool is_last(int64_t i) const { return t == (reverse ? 0 : rows->length[i] - 1); }
  bool reset_next(int64_t i) const {
    return p.resets && !is_last(i) &&
           reset_before(p, group, rows->row[i], rows->length[i], reverse ? t - 1 : t + 1);
  }
  static int valid(int64_t size, int64_t j) { return int(size - j < L ? size - j : L); }

  const ForwardParams& p;
  const LayerParams* const layer;
  const Plan& plan;
  const int team, member;
  Arena arena;
  ForwardBuffers<Cell, T> b;
  Range units, widths;  // vectors that this member computes

  int64_t group, t;
  int64_t chunk_count;  // rows of the gathered chunk
  bool reverse;
  const Rows* rows;
  const W *weight_hh, *weight_ih;  // the group's, like the rest
  Int8Weights int8_hh, int8_ih;
  const WeightHr* weight_hr;
  const S *bias_hh, *bias_ih;
  const T* h_prev;
  T* h_next;
};
