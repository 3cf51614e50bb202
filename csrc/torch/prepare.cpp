#include "prepare.h"

#include <ATen/EmptyTensor.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <initializer_list>
#include <string>

#include "../cells/registry.h"
#include "../launch.h"
#include "check.h"

namespace fastrnn {
namespace {

struct Dims {
  int64_t T, B, P, G, h, R, S, C;
  bool ragged;   // are there tensors [N, ..] in place of [T, B, ..]?
  int64_t rows;  // T * B, or N
};

Layout packed_layout(const char* op, const Tensor& x, int64_t rows) {
  check_storage(op, "batch_sizes", x);
  RNN_CHECK(x.scalar_type() == at::kLong && x.is_cpu() && x.dim() == 1 && x.size(0) > 0 && x.is_contiguous(), op,
            ": batch_sizes: expected a contiguous vector of int64 on the CPU, got ", x.scalar_type(), " ",
            x.sizes(), " on ", x.device());
  const int64_t* sizes = x.const_data_ptr<int64_t>();
  int64_t sum = 0;
  for (int64_t t = 0; t < x.size(0); ++t) {
    RNN_CHECK_VALUE(sizes[t] >= 0 && (t == 0 || sizes[t] <= sizes[t - 1]), op,
                    ": batch_sizes: expected sizes that do not grow, got ", sizes[t], " at index ", t);
    RNN_CHECK_VALUE(!__builtin_add_overflow(sum, sizes[t], &sum), op, ": batch_sizes: expected a sum of ", rows,
                    " (rows of data), got one past 64 bits");
  }
  RNN_CHECK_VALUE(sum == rows, op, ": batch_sizes: expected a sum of ", rows, " (rows of data), got ", sum);
  Layout layout{x.size(0), sizes[0], std::vector<int64_t>(sizes[0]), {}, {}};
  int64_t row = 0;
  for (int64_t t = 0; t < layout.T; ++t) {
    layout.step_rows.push_back(row);
    row += sizes[t];
    const int64_t ending = sizes[t] - (t + 1 < layout.T ? sizes[t + 1] : 0);
    for (int64_t i = 1; i <= ending; ++i) layout.lengths[sizes[t] - i] = t + 1;
  }
  return layout;
}

Layout nested_layout(const char* op, const Tensor& x, int64_t rows) {
  check_storage(op, "offsets", x);
  RNN_CHECK(at::isIntegralType(x.scalar_type(), /*includeBool=*/false) && x.is_cpu() && x.dim() == 1 && x.size(0) > 1, op,
            ": offsets: expected [B + 1] of an integer dtype on the CPU, got ", x.scalar_type(), " ", x.sizes(), " on ",
            x.device());
  const Tensor own = x.to(at::kLong).contiguous();
  const int64_t* starts = own.const_data_ptr<int64_t>();
  Layout layout{0, x.size(0) - 1, {}, {}, {}};
  RNN_CHECK_VALUE(starts[0] == 0 && starts[layout.B] == rows, op, ": offsets: expected them from 0 to ", rows,
                  " (rows of data), got ", starts[0], " to ", starts[layout.B]);
  for (int64_t b = 0; b < layout.B; ++b) {
    RNN_CHECK_VALUE(starts[b] <= starts[b + 1] && starts[b + 1] <= rows, op,
                    ": offsets: expected them to rise, got ", starts[b + 1], " behind ", starts[b]);
    layout.row_starts.push_back(starts[b]);
    layout.lengths.push_back(starts[b + 1] - starts[b]);
    layout.T = std::max(layout.T, layout.lengths.back());
  }
  return layout;
}

// Does the product, in bytes, fit an offset? Sizes of 0 hide no others: what has no elements may have any size besides.
bool is_addressable(std::initializer_list<int64_t> sizes) {
  int64_t bytes = 16;  // of the widest element, a dual number in float64
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes)) return false;
  return true;
}

}  // namespace

void check_storage(const char* op, const char* name, const Tensor& x) {
  if (!x.defined() || !x.numel() || !x.has_storage()) return;
  RNN_CHECK(at::detail::computeStorageNbytes(x.sizes(), x.strides(), x.itemsize(), x.storage_offset()) <=
                x.storage().nbytes(),
            op, ": ", name, ": ", x.sizes(), " is out of bounds for storage of size ",
            static_cast<int64_t>(x.storage().nbytes()));
}

Layout layout_of(const char* op, const OptionalTensor& batch_sizes, const OptionalTensor& offsets, const States& states,
                 int64_t rows) {
  RNN_CHECK(!batch_sizes || !offsets, op, ": offsets: expected none with batch_sizes, got a tensor");
  RNN_CHECK(!states.lengths && !states.resets, op, ": ", states.lengths ? "lengths" : "resets", ": expected none with ",
            offsets ? "offsets" : "batch_sizes", ", got a tensor");
  return batch_sizes ? packed_layout(op, *batch_sizes, rows) : nested_layout(op, *offsets, rows);
}

namespace {

// Of a tensor that nothing has been written to. malloc asks for new pages for 32 MiB and more at every call, and a fault
// for each small one would cost more than what is written there.
void use_huge_pages(const Tensor& x) {
  constexpr size_t kMapped = 32 << 20;
  if (x.nbytes() >= kMapped) cpu::use_huge_pages(x.mutable_data_ptr(), x.nbytes());
}

// Checks an op's tensors one by one against the sizes, dtype and device of the first of them, `reference`.
class Checker {
 public:
  // weight: the sizes of weight_hh [P, G*h, R]
  Checker(const char* op, const Recurrence& args, const Tensor& reference, const char* reference_name,
          at::IntArrayRef weight)
      : op_(op), reference_(reference), reference_name_(reference_name), cell_(known_cell(args.cell)),
        info_(kCells[cell_]), of_layer_(args.of_layer) {
    const auto known = kernel_dtype(reference.scalar_type());
    RNN_CHECK_TYPE(known || args.dual, op_, ": ", reference_name,
                   ": expected float32, float64, bfloat16 or float16, got ", reference.scalar_type());
    if (known) dtype_ = *known;
    else dtype_ = reference.scalar_type() == at::kComplexDouble ? DType::kDualFloat64 : DType::kDualFloat32;
    const bool ragged = args.batch_sizes || args.offsets;
    const int64_t dims = ragged ? 2 : 3;
    RNN_CHECK(reference.dim() == dims, op_, ": ", reference_name, ": expected ", dims, " dimensions, got ",
              reference.sizes());
    RNN_CHECK(weight.size() == 3, op_, ": weight_hh: expected 3 dimensions (groups, gates * hidden, width), got ",
              weight);
    dims_ = {reference.size(0), reference.size(1), weight[0], info_.gates, weight[1] / info_.gates, weight[2],
             saved_values(info_, args.states.keep_h.has_value(), args.states.keep_c.has_value()), info_.in_c(),
             ragged, 0};
    // From here on, in the kernels too, sizes are multiplied without a look: so this is the one at their products.
    RNN_CHECK(is_addressable({dims_.T, dims_.B, dims_.P, dims_.G + dims_.S + dims_.C, dims_.h}) &&
                  is_addressable({dims_.T, dims_.B, dims_.P, dims_.R}) && is_addressable({dims_.P, weight[1], dims_.R}),
              op_, ": ", reference_name, ": expected sizes whose products fit 64 bits, got ", reference.sizes(),
              " with weight_hh ", weight);
    dims_.rows = ragged ? reference.size(0) : dims_.T * dims_.B;
    if (ragged) {
      layout_ = layout_of(op, args.batch_sizes, args.offsets, args.states, dims_.rows);
      dims_.T = layout_.T;
      dims_.B = layout_.B;
    }
    RNN_CHECK(dims_.P > 0 && dims_.h > 0 && dims_.R > 0 && weight[1] == info_.gates * dims_.h, op_,
              ": weight_hh: expected (groups, ", info_.gates, " * hidden, width) with every size above 0, got ",
              weight);
    RNN_CHECK(args.params.has_value() == (info_.params > 0), op_, ": params: expected ",
              info_.params > 0 ? "a tensor" : "none", " for cell '", info_.name, "', got ",
              args.params ? "a tensor" : "none");
    RNN_CHECK(info_.states == 2 || !args.weight_hr, op_, ": weight_hr: expected none for cell '", info_.name,
              "', got a tensor");
    RNN_CHECK(args.weight_hr || dims_.R == dims_.h, op_, ": weight_hh: expected [", dims_.P, ", ", weight[1], ", ",
              dims_.h, "] without weight_hr, got ", weight);
    RNN_CHECK(static_cast<int64_t>(args.reverse.size()) == dims_.P, op_, ": reverse: expected ", dims_.P,
              " values (groups), got ", args.reverse.size());
    // A layer's absent states are zeros.
    const auto state = [&](const char* name, const OptionalTensor& x, bool there) {
      RNN_CHECK(x.has_value() == there || (there && of_layer_), op_, ": ", name, ": expected ",
                there ? "a tensor" : "none", " for cell '", info_.name, "', got ", x ? "a tensor" : "none");
    };
    state("h_0", args.states.h_0, true);
    state("c_0", args.states.c_0, info_.states > 1);
  }

  const Dims& dims() const { return dims_; }
  const CellInfo& info() const { return info_; }
  DType dtype() const { return dtype_; }
  std::vector<Tensor> keep;

  // Checked against a dtype of its own, contiguous, kept alive; null for an absent tensor.
  const void* read_as(const char* name, const OptionalTensor& x, at::ScalarType dtype, at::IntArrayRef expected) {
    if (!x) return nullptr;
    RNN_CHECK(x->sizes() == expected, op_, ": ", name, ": expected ", expected, ", got ", x->sizes());
    RNN_CHECK(x->scalar_type() == dtype, op_, ": ", name, ": expected dtype ", dtype, ", got ", x->scalar_type());
    device(name, *x);
    keep.push_back(x->contiguous());
    return keep.back().const_data_ptr();
  }

  void floating(const char* name, const Tensor& x, at::IntArrayRef expected) const {
    RNN_CHECK(x.sizes() == expected, op_, ": ", name, ": expected ", expected, ", got ", x.sizes());
    RNN_CHECK(x.scalar_type() == reference_.scalar_type(), op_, ": ", name, ": expected dtype ",
              reference_.scalar_type(), " (that of ", reference_name_, "), got ", x.scalar_type());
    device(name, x);
  }

  // The sizes of a tensor [T, B, n], or [N, n] of a packed sequence.
  std::vector<int64_t> sequence(int64_t n) const {
    return dims_.ragged ? std::vector<int64_t>{dims_.rows, n} : std::vector<int64_t>{dims_.T, dims_.B, n};
  }

  // Checked, contiguous, kept alive; null for an absent tensor.
  const void* read(const char* name, const OptionalTensor& x, at::IntArrayRef expected) {
    if (!x) return nullptr;
    floating(name, *x, expected);
    keep.push_back(x->contiguous());
    return keep.back().const_data_ptr();
  }

  // The same of a weight [P, ..], which a layer of one group has without its first dimension.
  const void* read_weight(const char* name, const OptionalTensor& x, at::IntArrayRef expected) {
    return read(name, x, of_layer_ && dims_.P == 1 ? expected.slice(1) : expected);
  }

  // The same of a layer's groups, which are read where they are if they are equally far apart, as any two are. gap: see
  // Gaps.
  const void* read_groups(const char* name, const Group& group, at::IntArrayRef expected, int64_t& gap) {
    if (group.empty()) return nullptr;
    const size_t first = keep.size();
    for (const Tensor& x : group) read(name, x, expected.slice(1));
    // Each address is asked for once: another thread may give a parameter other memory meanwhile.
    const void* const base = keep[first].const_data_ptr();
    const int64_t element = group[0].element_size();
    intptr_t last = reinterpret_cast<intptr_t>(base), apart = 0;
    bool equally = true;
    for (size_t p = 1; p < group.size(); ++p) {
      const intptr_t address = reinterpret_cast<intptr_t>(keep[first + p].const_data_ptr());
      if (p == 1) apart = address - last;
      equally &= address - last == apart && apart % element == 0;
      last = address;
    }
    if (!equally) {
      keep.push_back(at::stack(at::TensorList(group)));
      return keep.back().const_data_ptr();
    }
    gap = group.size() > 1 ? apart / element - keep[first].numel() : 0;
    return base;
  }

  // The same of a state of n values a group, as [B, P*n]; a layer has it as [P, B, n].
  const void* read_state(const char* name, const OptionalTensor& x, int64_t n) {
    if (!of_layer_ || dims_.P == 1 || !x) return read(name, x, state_sizes(n));
    floating(name, *x, {dims_.P, dims_.B, n});
    keep.push_back(x->transpose(0, 1).contiguous());
    return keep.back().const_data_ptr();
  }
  // Of a state as a kernel writes it. What a layer of several groups returns is turned afterwards (by_group).
  std::vector<int64_t> state_sizes(int64_t n) const {
    if (!of_layer_) return {dims_.B, dims_.P * n};
    return dims_.P == 1 ? std::vector<int64_t>{1, dims_.B, n} : std::vector<int64_t>{dims_.B, dims_.P, n};
  }

  // The same for a sequence of n features, of which only the last dimension must be contiguous.
  const void* read_strided(const char* name, const OptionalTensor& x, int64_t n, int64_t& stride_t, int64_t& stride_b,
                           bool checked = false) {
    if (!x) return nullptr;
    if (!checked) floating(name, *x, sequence(n));
    keep.push_back(x->stride(-1) == 1 || x->size(-1) == 1 ? *x : x->contiguous());
    stride_t = keep.back().stride(0);  // not read where there are N
    stride_b = keep.back().stride(-2);
    return keep.back().const_data_ptr();
  }

  // keep_h and keep_c, which may be bool: so the CPU's kernels read them, if both are.
  void keeps(const States& states, ForwardParams& p) {
    const auto [T, B, P, G, h, R, S, C, ragged, rows] = dims_;
    OptionalTensor keep_h = states.keep_h, keep_c = states.keep_c;
    const auto is_bool = [](const OptionalTensor& x) { return x && x->scalar_type() == at::kBool; };
    const bool others = (keep_h && !is_bool(keep_h)) || (keep_c && !is_bool(keep_c)) || !reference_.is_cpu();
    p.keep_is_bool = !others && (keep_h || keep_c);
    const auto read = [&](const char* name, OptionalTensor& x, int64_t n, int64_t& stride_t, int64_t& stride_b) {
      if (!is_bool(x)) return read_strided(name, x, n, stride_t, stride_b);
      const std::vector<int64_t> expected = sequence(n);
      RNN_CHECK(x->sizes() == expected, op_, ": ", name, ": expected ", expected, ", got ", x->sizes());
      device(name, *x);
      return read_strided(name, others ? x->to(reference_.scalar_type()) : *x, n, stride_t, stride_b, /*checked=*/true);
    };
    p.keep_h = read("keep_h", keep_h, P * R, p.keep_h_stride_t, p.keep_h_stride_b);
    p.keep_c = read("keep_c", keep_c, P * h, p.keep_c_stride_t, p.keep_c_stride_b);
  }

  void weights(const Recurrence& args, ForwardParams& p) {
    const auto [T, B, P, G, h, R, S, C, ragged, rows] = dims_;
    p.weight_hh = read_weight("weight_hh", args.weight_hh, {P, G * h, R});
    p.bias_hh = read_weight("bias_hh", args.bias_hh, {P, G * h});
    p.weight_hr = read_weight("weight_hr", args.weight_hr, {P, R, h});
    p.params = read_weight("params", args.params, {P, info_.params, h});
  }

  void weights(const Weights& of, ForwardParams& p) {
    const auto [T, B, P, G, h, R, S, C, ragged, rows] = dims_;
    p.weight_hh = read_groups("weight_hh", of.weight_hh, {P, G * h, R}, p.gaps.weight_hh);
    p.bias_hh = read_groups("bias_hh", of.bias_hh, {P, G * h}, p.gaps.bias_hh);
    p.weight_hr = read_groups("weight_hr", of.weight_hr, {P, R, h}, p.gaps.weight_hr);
    p.params = read_groups("params", of.params, {P, info_.params, h}, p.gaps.params);
  }

  // All but the weights.
  void fill(const Recurrence& args, ForwardParams& p, Owned& own) {
    const auto [T, B, P, G, h, R, S, C, ragged, rows] = dims_;
    p.steps = T;
    p.batch = B;
    p.groups = P;
    p.hidden = h;
    p.width = R;
    p.cell = cell_;
    p.dtype = dtype_;
    p.constant_weights = args.constant_weights;
    p.h_0 = read_state("h_0", args.states.h_0, R);
    p.c_0 = read_state("c_0", args.states.c_0, C * h);
    for (const bool r : args.reverse) own.reverse.push_back(r);
    p.reverse = own.reverse.data();
    if (ragged) {
      own.layout = std::move(layout_);
      p.lengths = own.layout.lengths.data();
      p.lengths_stride_b = 1;
      (own.layout.row_starts.empty() ? p.step_rows : p.row_starts) =
          own.layout.row_starts.empty() ? own.layout.step_rows.data() : own.layout.row_starts.data();
    } else {
      lengths(args.states, p);
    }
    resets(args.states, p);
    p.mask_h = read_state("mask_h", args.states.mask_h, R);
    RNN_CHECK(takes_zoneout(info_) || !args.states.keep_h, op_, ": keep_h: expected none for cell '", info_.name,
              "', got a tensor");
    RNN_CHECK((takes_zoneout(info_) && info_.states > 1) || !args.states.keep_c, op_,
              ": keep_c: expected none for cell '", info_.name, "', got a tensor");
    keeps(args.states, p);
  }

  Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, reference_.options()); }
  Tensor absent() const { return empty({0}); }
  // Zero where a kernel with lengths will not write: a CPU's, for CUDA's write the padding.
  Tensor result(at::IntArrayRef sizes, bool padded) const {
    Tensor x = empty(sizes);
    if (reference_.is_cpu()) use_huge_pages(x);
    return padded && !reference_.is_cuda() ? x.zero_() : x;
  }
  // float32 for half types
  at::TensorOptions wide() const {
    const bool half = dtype_ == DType::kBFloat16 || dtype_ == DType::kFloat16;
    return half ? reference_.options().dtype(at::kFloat) : reference_.options();
  }
  Tensor accumulator(at::IntArrayRef sizes) const {
    const auto options = wide();
    // CUDA's kernels clear it themselves, where they run.
    const bool cleared = reference_.is_cuda() && dims_.T > 0 && dims_.B > 0;
    return cleared ? at::empty(sizes, options) : at::zeros(sizes, options);
  }

 private:
  void device(const char* name, const Tensor& x) const {
    check_storage(op_, name, x);
    RNN_CHECK(x.device() == reference_.device(), op_, ": ", name, ": expected device ", reference_.device(),
              " (that of ", reference_name_, "), got ", x.device());
  }

  void lengths(const States& args, ForwardParams& p) {
    if (!args.lengths) return;
    const Tensor& x = *args.lengths;
    RNN_CHECK_TYPE(at::isIntegralType(x.scalar_type(), /*includeBool=*/false), op_,
                   ": lengths: expected an integer dtype, got ", x.scalar_type());
    check_storage(op_, "lengths", x);
    RNN_CHECK(x.dim() >= 1 && x.dim() <= 2 && x.size(0) == dims_.B && (x.dim() == 1 || x.size(1) == dims_.P), op_,
              ": lengths: expected [", dims_.B, "] or [", dims_.B, ", ", dims_.P, "] (batch, groups), got ",
              x.sizes());
    keep.push_back(x.to(reference_.device(), at::kLong, /*non_blocking=*/x.is_cpu()).contiguous());
    p.lengths = keep.back().const_data_ptr<int64_t>();
    p.lengths_stride_b = x.dim() == 1 ? 1 : dims_.P;
    p.lengths_stride_p = x.dim() == 1 ? 0 : 1;
    if (!reference_.is_cpu()) return;  // a look at the values would wait for the device; kernels clamp them
    for (int64_t i = 0; i < x.numel(); ++i)
      // Modules, too, have lengths of this name: callers of one hear of no op.
      RNN_CHECK_VALUE(p.lengths[i] >= 0 && p.lengths[i] <= dims_.T, "lengths: expected values in [0, ", dims_.T,
                      "], got ", p.lengths[i], " at index ", i);
  }

  void resets(const States& args, ForwardParams& p) {
    const auto [T, B, P, G, h, R, S, C, ragged, rows] = dims_;
    RNN_CHECK(args.resets || !(args.reset_h || args.reset_c), op_, ": ", args.reset_h ? "reset_h" : "reset_c",
              ": expected none without resets, got a tensor");
    RNN_CHECK(info_.states > 1 || !args.reset_c, op_, ": reset_c: expected none for cell '", info_.name,
              "', got a tensor");
    if (!args.resets) return;
    const Tensor& x = *args.resets;
    RNN_CHECK_TYPE(x.scalar_type() == at::kBool, op_, ": resets: expected dtype bool, got ", x.scalar_type());
    RNN_CHECK(x.dim() >= 2 && x.dim() <= 3 && x.size(0) == T && x.size(1) == B && (x.dim() == 2 || x.size(2) == P),
              op_, ": resets: expected [", T, ", ", B, "] or [", T, ", ", B, ", ", P, "], got ", x.sizes());
    device("resets", x);
    keep.push_back(x);
    p.resets = static_cast<const uint8_t*>(x.const_data_ptr());
    p.resets_stride_t = x.stride(0);
    p.resets_stride_b = x.stride(1);
    p.resets_stride_p = x.dim() == 2 ? 0 : x.stride(2);
    p.reset_h = read_state("reset_h", args.reset_h, R);
    p.reset_c = read_state("reset_c", args.reset_c, C * h);
  }

  const char* op_;
  const Tensor& reference_;
  const char* reference_name_;
  const int cell_;
  const CellInfo& info_;
  DType dtype_;
  Dims dims_;
  const bool of_layer_;
  Layout layout_;
};

void* data_or_null(const Tensor& x) { return x.numel() ? x.mutable_data_ptr() : nullptr; }

// Of ASCII, which cells' names are of; the process' locale plays no part.
bool same_letter(char a, char b) {
  const auto lower = [](char c) { return 'A' <= c && c <= 'Z' ? c - 'A' + 'a' : c; };
  return lower(a) == lower(b);
}

}  // namespace

std::optional<DType> kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return std::nullopt;
  }
}

int find_cell(std::string_view name) {
  for (int i = 0; i < kNumCells; ++i) {
    const std::string_view known = kCells[i].name;
    if (std::equal(name.begin(), name.end(), known.begin(), known.end(), same_letter)) return i;
  }
  return -1;
}

int known_cell(std::string_view name) {
  int found = find_cell(name);
  if (found >= 0 && name != kCells[found].name) found = -1;
  std::string names;
  for (int i = 0; found < 0 && i < kNumCells; ++i) names += (i ? ", " : "") + std::string(kCells[i].name);
  RNN_CHECK_VALUE(found >= 0, "cell: expected one of ", names, ", got '", std::string(name), "'");
  return found;
}

OptionalTensor stacked(const Group& group) {
  if (group.empty()) return std::nullopt;
  return group.size() == 1 ? group[0] : at::stack(at::TensorList(group));
}

Recurrence recurrence_of(const LayerCall& call, bool stack) {
  const Weights& w = call.weights;
  const int64_t P = call.groups();
  RNN_CHECK(P > 0, "layer_forward: reverse: expected a value for every group, got none");
  const auto check = [&](const char* name, const Group& group, bool wanted) {
    const int64_t count = group.size();
    RNN_CHECK(count == P || (count == 0 && !wanted), "layer_forward: ", name, ": expected ", P, " tensors (groups), got ",
              count);
    for (const Tensor& x : group) check_storage("layer_forward", name, x);  // before they are put together
  };
#define FASTRNN_CHECK(name) check(#name, w.name, &w.name == &w.weight_hh);
  FASTRNN_FOR_EACH_WEIGHT(FASTRNN_CHECK)
#undef FASTRNN_CHECK
  Recurrence args;
  static_cast<Run&>(args) = call;
  args.stacked = stack || P == 1;
  const auto taken = [&](const Group& group) {
    return args.stacked ? stacked(group) : group.empty() ? OptionalTensor() : OptionalTensor(group[0]);
  };
  args.weight_hh = *taken(w.weight_hh);
  args.bias_hh = taken(w.bias_hh);
#define FASTRNN_STACK(name) args.name = taken(w.name);
  FASTRNN_FOR_EACH_RECURRENT_WEIGHT(FASTRNN_STACK)
#undef FASTRNN_STACK
  args.states = call.states;
  args.batch_sizes = call.batch_sizes;
  args.offsets = call.offsets;
  args.of_layer = true;
  return args;
}

void check_grad_clip(const char* op, double grad_clip) {
  RNN_CHECK_VALUE(grad_clip >= 0, op, ": grad_clip: expected 0 (none) or a number above, got ", grad_clip);
}

namespace {

// The same look at products with a layer's number of input features.
void check_features(const char* op, const Dims& dims, int64_t size) {
  RNN_CHECK(is_addressable({dims.T, dims.B, dims.P, size}) && is_addressable({dims.P, dims.G, dims.h, size}), op,
            ": input: expected sizes whose products fit 64 bits, got ", size, " features");
}

// What both forms of the forward call share, once the sequence has been checked.
void prepare_results(Checker& checker, const Recurrence& args, bool save, PreparedForward& out,
                     const Tensor& saved = {}) {
  const auto [T, B, P, G, h, R, S, C, ragged, rows] = checker.dims();
  ForwardParams& p = out.params;
  checker.fill(args, p, out.own);
  const bool padded = p.lengths && !ragged, c = checker.info().states > 1;
  out.output = checker.result(checker.sequence(P * R), padded);
  out.h_n = checker.empty(checker.state_sizes(R));
  out.c_n = c ? checker.empty(checker.state_sizes(C * h)) : checker.absent();
  out.saved = saved.defined() ? saved : save ? checker.result(checker.sequence(P * S * h), padded) : checker.absent();
  p.output = data_or_null(out.output);
  p.h_n = data_or_null(out.h_n);
  p.c_n = data_or_null(out.c_n);
  p.saved = data_or_null(out.saved);
  out.keep = std::move(checker.keep);
}

}  // namespace

// [B, P, n], as a kernel writes a layer's states of several groups, to [P, B, n].
static Tensor by_group(const Tensor& x) {
  return x.dim() == 3 && x.size(1) > 1 ? x.transpose(0, 1).contiguous() : x;
}

LayerResults PreparedForward::results() const {
  const bool turned = params.groups > 1;
  return {output, turned ? by_group(h_n) : h_n, turned ? by_group(c_n) : c_n, output.new_empty({0}), saved};
}

RecurrentGradients PreparedBackward::results() const {
  RecurrentGradients out = gradients;
  for (Tensor* x : {&out.reset_h, &out.reset_c}) *x = x->to(dtype);
  if (params.groups > 1)
    for (Tensor* x : {&out.h_0, &out.c_0, &out.reset_h, &out.reset_c}) *x = by_group(*x);
  return out;
}

static std::vector<int64_t> weight_sizes(const Recurrence& args) {
  std::vector<int64_t> sizes = args.weight_hh.sizes().vec();
  if (args.of_layer && (args.reverse.size() == 1 || !args.stacked)) sizes.insert(sizes.begin(), args.reverse.size());
  return sizes;
}

PreparedForward prepare_forward(const Recurrence& args, const Tensor& gates_ih, bool save, bool in_place) {
  Checker checker("recurrent_forward", args, gates_ih, "gates_ih", weight_sizes(args));
  const auto [T, B, P, G, h, R, S, C, ragged, rows] = checker.dims();
  PreparedForward out;
  ForwardParams& p = out.params;
  p.gates_ih_stride_p = (in_place ? S : G) * h;
  p.gates_ih = checker.read_strided("gates_ih", gates_ih, P * p.gates_ih_stride_p, p.gates_ih_stride_t,
                                    p.gates_ih_stride_b);
  checker.weights(args, out.params);
  prepare_results(checker, args, save, out, in_place ? gates_ih : Tensor());
  return out;
}

PreparedForward prepare_layer(const LayerCall& call, bool save) {
  const Recurrence args = recurrence_of(call, /*stack=*/false);
  Checker checker("layer_forward", args, call.input, "input", weight_sizes(args));
  const auto [T, B, P, G, h, R, S, C, ragged, rows] = checker.dims();
  PreparedForward out;
  LayerParams& p = out.layer;
  p.size = call.input.size(-1);
  check_features("layer_forward", checker.dims(), p.size);
  p.input = checker.read_strided("input", call.input, p.size, p.input_stride_t, p.input_stride_b);
  RNN_CHECK(!call.weights.weight_ih.empty(), "layer_forward: weight_ih: expected ", P, " tensors (groups), got 0");
  p.weight = checker.read_groups("weight_ih", call.weights.weight_ih, {P, G * h, p.size}, out.params.gaps.weight_ih);
  p.bias = checker.read_groups("bias_ih", call.weights.bias_ih, {P, G * h}, out.params.gaps.bias_ih);
  p.weight_dtype = checker.dtype();
  checker.weights(call.weights, out.params);
  prepare_results(checker, args, save, out);
  return out;
}

PreparedForward prepare_quantized(const Recurrence& args, const Tensor& input, const Narrow& narrow,
                                  const OptionalTensor& bias_ih) {
  const char* op = "quantized_forward";
  RNN_CHECK_TYPE(input.scalar_type() == at::kFloat, op, ": input: expected dtype Float, got ", input.scalar_type());
  const auto dtype = narrow.weight_ih.scalar_type();
  const bool int8 = dtype == at::kChar;
  RNN_CHECK_TYPE(int8 || dtype == at::kBFloat16, op, ": weight_ih: expected dtype BFloat16 or Char, got ", dtype);
  // Blocks do not tell how many units there are: the states do.
  const auto width = [&](const char* name, const Tensor& x) {
    const int64_t groups = args.reverse.size();
    RNN_CHECK(groups > 0 && x.dim() == 2 && x.size(1) % groups == 0 && is_addressable({x.size(1), 64}), op, ": ", name, ": expected [batch, ", groups,
              " * width], got ", x.sizes());
    return x.size(1) / groups;
  };
  RNN_CHECK(args.states.h_0, op, ": h_0: expected a tensor, got none");
  const int64_t groups = args.reverse.size(), gates = kCells[known_cell(args.cell)].gates;
  const int64_t R0 = width("h_0", *args.states.h_0), in_c = kCells[known_cell(args.cell)].in_c();
  const int64_t h0 = args.states.c_0 && in_c > 0 ? width("c_0", *args.states.c_0) / in_c : R0;
  Checker checker(op, args, input, "input", std::vector<int64_t>{groups, gates * h0, R0});
  const auto [T, B, P, G, h, R, S, C, ragged, rows] = checker.dims();
  PreparedForward out;
  LayerParams& p = out.layer;
  p.size = input.size(2);
  check_features(op, checker.dims(), p.size);
  p.weight_dtype = int8 ? DType::kInt8 : DType::kBFloat16;
  p.input = checker.read_strided("input", input, p.size, p.input_stride_t, p.input_stride_b);
  p.bias = checker.read("bias_ih", bias_ih, {P, G * h});
  const int64_t blocks = (h + 15) / 16;
  const auto weight = [&](const char* name, const Tensor& x, int64_t n) {
    return int8 ? checker.read_as(name, x, at::kChar, {P, blocks, (n + 3) / 4, G, 16, 4})
                : checker.read_as(name, x, at::kBFloat16, {P, G * h, n});
  };
  const auto of_rows = [&](const char* name, const OptionalTensor& x, at::ScalarType type) {
    RNN_CHECK(x.has_value() == int8, op, ": ", name, ": expected ", int8 ? "a tensor" : "none", " with weights of ",
              dtype, ", got ", x ? "a tensor" : "none");
    return checker.read_as(name, x, type, {P, blocks, G, 16});
  };
  p.weight = weight("weight_ih", narrow.weight_ih, p.size);
  out.params.weight_hh = weight("weight_hh", args.weight_hh, R);
  p.scale_ih = static_cast<const float*>(of_rows("scale_ih", narrow.scale_ih, at::kFloat));
  p.scale_hh = static_cast<const float*>(of_rows("scale_hh", narrow.scale_hh, at::kFloat));
  p.sum_ih = static_cast<const int32_t*>(of_rows("sum_ih", narrow.sum_ih, at::kInt));
  p.sum_hh = static_cast<const int32_t*>(of_rows("sum_hh", narrow.sum_hh, at::kInt));
  out.params.weight_hr = checker.read_as("weight_hr", args.weight_hr, int8 ? at::kFloat : at::kBFloat16, {P, R, h});
  out.params.bias_hh = checker.read("bias_hh", args.bias_hh, {P, G * h});
  out.params.params = checker.read("params", args.params, {P, checker.info().params, h});
  prepare_results(checker, args, /*save=*/false, out);
  return out;
}

namespace {

// What both forms of the backward call share.
void prepare_gradients(const char* op, Checker& checker, const Recurrence& args, const Given& given, bool initial,
                       PreparedBackward& out) {
  const auto [T, B, P, G, h, R, S, C, ragged, rows] = checker.dims();
  BackwardParams& p = out.params;
  check_grad_clip(op, args.grad_clip);
  p.grad_clip = args.grad_clip;
  checker.fill(args, p, out.own);
  const bool c = checker.info().states > 1;
  RNN_CHECK(c || !given.grad_c_n, op, ": grad_c_n: expected none for cell '", checker.info().name, "', got a tensor");
  p.grad_output =
      checker.read_strided("grad_output", given.grad_output, P * R, p.grad_output_stride_t, p.grad_output_stride_b);
  p.grad_h_n = checker.read_state("grad_h_n", given.grad_h_n, R);
  p.grad_c_n = checker.read_state("grad_c_n", given.grad_c_n, C * h);
  RNN_CHECK(c || !given.grad_cells, op, ": grad_cells: expected none for cell '", checker.info().name,
            "', got a tensor");
  p.grad_cells =
      checker.read_strided("grad_cells", given.grad_cells, P * C * h, p.grad_cells_stride_t, p.grad_cells_stride_b);
  p.output = const_cast<void*>(checker.read("output", given.output, checker.sequence(P * R)));
  p.saved = const_cast<void*>(checker.read("saved", given.saved, checker.sequence(P * S * h)));
  RecurrentGradients& grad = out.gradients;
  grad.h_0 = initial ? checker.empty(checker.state_sizes(R)) : checker.absent();
  grad.c_0 = initial && c ? checker.empty(checker.state_sizes(C * h)) : checker.absent();
  grad.reset_h = args.states.reset_h ? checker.accumulator(checker.state_sizes(R)) : checker.absent();
  grad.reset_c = args.states.reset_c ? checker.accumulator(checker.state_sizes(C * h)) : checker.absent();
  grad.params = args.params ? checker.accumulator({B, P * checker.info().params * h}) : checker.absent();
  if (args.states.keep_h && given.output.is_cuda()) {
    checker.keep.push_back(at::empty({B, P * R}, checker.wide()));
    p.kept_h = data_or_null(checker.keep.back());
  }
  p.grad_h_0 = data_or_null(grad.h_0);
  p.grad_c_0 = data_or_null(grad.c_0);
  p.grad_reset_h = data_or_null(grad.reset_h);
  p.grad_reset_c = data_or_null(grad.reset_c);
  p.grad_params = data_or_null(grad.params);
  out.dtype = given.output.scalar_type();
}

}  // namespace

PreparedBackward prepare_backward(const Recurrence& args, const Given& given, bool initial) {
  const char* op = "recurrent_backward";
  Checker checker(op, args, given.output, "output", weight_sizes(args));
  const auto [T, B, P, G, h, R, S, C, ragged, rows] = checker.dims();
  PreparedBackward out;
  BackwardParams& p = out.params;
  checker.weights(args, p);
  prepare_gradients(op, checker, args, given, initial, out);
  const bool padded = p.lengths != nullptr;
  RecurrentGradients& grad = out.gradients;
  const bool separate = checker.info().separate_gates_hh;
  p.grad_gates_stride = (given.in_place ? S : G) * h;
  grad.gates_ih = given.in_place ? given.saved : checker.result({T, B, P * G * h}, padded);
  grad.gates_hh = separate ? checker.result({T, B, P * G * h}, padded) : checker.absent();
  grad.projected = args.weight_hr ? checker.result({T, B, P * R}, padded) : checker.absent();
  p.grad_gates_ih = data_or_null(grad.gates_ih);
  p.grad_gates_hh = data_or_null(grad.gates_hh);
  p.grad_projected = data_or_null(grad.projected);
  out.keep = std::move(checker.keep);
  return out;
}

PreparedBackward prepare_layer_backward(const LayerCall& call, const LayerGiven& given, const Needed& needed) {
  const char* op = "layer_backward";
  const Weights& w = call.weights;
  const Recurrence args = recurrence_of(call, /*stack=*/false);
  Checker checker(op, args, given.output, "output", weight_sizes(args));
  const auto [T, B, P, G, h, R, S, C, ragged, rows] = checker.dims();
  PreparedBackward out;
  LayerBackwardParams& p = out.layer;
  checker.weights(w, out.params);
  prepare_gradients(op, checker, args, of_recurrence(given), needed[kOf_h_0] || needed[kOf_c_0], out);
  const OptionalTensor input = call.input.defined() ? OptionalTensor(call.input) : std::nullopt;
  p.size = input ? input->size(-1) : w.weight_ih.empty() ? 0 : w.weight_ih[0].size(-1);
  check_features(op, checker.dims(), p.size);
  p.rows = rows;
  p.separate_gates_hh = checker.info().separate_gates_hh;
  p.input = checker.read_strided("input", input, p.size, p.input_stride_t, p.input_stride_b);
  p.weight = checker.read_groups("weight_ih", w.weight_ih, {P, G * h, p.size}, out.params.gaps.weight_ih);
  auto parts = checker.sequence(p.size);
  parts.insert(parts.begin(), P);
  const bool padded = out.params.lengths && !ragged;
  out.grad_input = needed[kOf_input] ? checker.result(parts, padded) : checker.absent();
  const auto gradient = [&](Gradient of, at::IntArrayRef sizes) {
    return needed[of] ? checker.empty(sizes) : checker.absent();
  };
  out.grad_weight_ih = gradient(kOf_weight_ih, {P, G * h, p.size});
  out.grad_weight_hh = gradient(kOf_weight_hh, {P, G * h, R});
  out.grad_weight_hr = args.weight_hr ? gradient(kOf_weight_hr, {P, R, h}) : checker.absent();
  out.grad_bias_ih = gradient(kOf_bias_ih, {P, G * h});
  out.grad_bias_hh = gradient(kOf_bias_hh, {P, G * h});
  p.grad_input = data_or_null(out.grad_input);
  p.grad_weight_ih = data_or_null(out.grad_weight_ih);
  p.grad_weight_hh = data_or_null(out.grad_weight_hh);
  p.grad_weight_hr = data_or_null(out.grad_weight_hr);
  p.grad_bias_ih = data_or_null(out.grad_bias_ih);
  p.grad_bias_hh = data_or_null(out.grad_bias_hh);
  out.keep = std::move(checker.keep);
  return out;
}

namespace {

// None passes for a tensor on the way here.
void check_given(const char* op, std::initializer_list<std::pair<const char*, const Tensor&>> arguments) {
  for (const auto& [name, x] : arguments)
    RNN_CHECK_TYPE(x.defined(), op, ": ", name, ": expected a tensor, got None");
}

}  // namespace

PreparedGemm prepare_gemm(const Tensor& a, const Tensor& b, const OptionalTensor& bias, bool transpose_a,
                          bool transpose_b, const Tensor& out) {
  check_given("gemm", {{"a", a}, {"b", b}});
  RNN_CHECK(a.dim() == 2 && b.dim() == 2, "gemm: a and b: expected 2 dimensions each, got ", a.sizes(), " and ",
            b.sizes());
  const auto dtype = a.scalar_type();
  RNN_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "gemm: a: expected float32 or float64, got ", dtype);
  PreparedGemm call;
  GemmParams& p = call.params;
  p.dtype = dtype == at::kDouble ? DType::kFloat64 : DType::kFloat32;
  p.transpose_a = transpose_a;
  p.transpose_b = transpose_b;
  p.m = a.size(transpose_a ? 1 : 0);
  p.k = a.size(transpose_a ? 0 : 1);
  p.n = b.size(transpose_b ? 0 : 1);
  RNN_CHECK(b.size(transpose_b ? 1 : 0) == p.k, "gemm: b: expected ", p.k, " in dimension ", transpose_b ? 1 : 0,
            " (as a has), got ", b.sizes());
  RNN_CHECK(!bias || bias->sizes() == at::IntArrayRef{p.n}, "gemm: bias: expected [", p.n, "], got ",
            bias->sizes());
  const auto matrix = [&](const char* name, const Tensor& x) -> const Tensor& {
    RNN_CHECK(x.scalar_type() == dtype && x.device() == a.device(), "gemm: ", name, ": expected ", dtype, " on ",
              a.device(), " (as a is), got ", x.scalar_type(), " on ", x.device());
    // Rows may lie apart but must not overlap, and each must be contiguous.
    check_storage("gemm", name, x);
    const bool rows = x.dim() == 1 ? x.stride(0) == 1 : x.stride(1) == 1 && x.stride(0) >= x.size(1);
    call.keep.push_back(rows ? x : x.contiguous());
    return call.keep.back();
  };
  const Tensor kept_a = matrix("a", a), kept_b = matrix("b", b);
  p.a = kept_a.const_data_ptr();
  p.a_stride = kept_a.stride(0);
  p.b = kept_b.const_data_ptr();
  p.b_stride = kept_b.stride(0);
  p.bias = bias ? matrix("bias", *bias).const_data_ptr() : nullptr;
  call.out = out.defined() ? out : at::empty({p.m, p.n}, a.options());
  p.out = call.out.mutable_data_ptr();
  return call;
}

void check_grouped_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  check_given("grouped_linear", {{"input", input}, {"weight", weight}});
  check_storage("grouped_linear", "input", input);
  check_storage("grouped_linear", "weight", weight);
  if (bias) check_storage("grouped_linear", "bias", *bias);
  RNN_CHECK(input.dim() == 3 && weight.dim() == 3 && input.size(1) == weight.size(0) &&
                input.size(2) == weight.size(2) && (!bias || bias->sizes() == weight.sizes().slice(0, 2)),
            "grouped_linear: expected input [rows, P, n], weight [P, m, n] and bias [P, m], got ", input.sizes(), ", ",
            weight.sizes(), " and ", bias ? bias->sizes() : at::IntArrayRef{});
}

void check_grouped_outer(const Tensor& a, const Tensor& b) {
  check_given("grouped_outer", {{"a", a}, {"b", b}});
  check_storage("grouped_outer", "a", a);
  check_storage("grouped_outer", "b", b);
  RNN_CHECK(a.dim() == 3 && b.dim() == 3 && a.sizes().slice(0, 2) == b.sizes().slice(0, 2),
            "grouped_outer: expected a [rows, P, m] and b [rows, P, n], got ", a.sizes(), " and ", b.sizes());
}

}  // namespace fastrnn
