// What a call of an op is made of: records with named fields, one order, and with it the text of the ops' schemas.
//
// A field stands in its list below and nowhere else as a position. Schemas are put together from the lists, calls are read
// from a stack in the same order, and fastrnn/ops.py asks the schemas for the names. So a new argument is a new entry
// here, and then whatever the kernels do with it (docs/architecture.md tells the way).
//
//   T steps, B batch, P groups (directions), G gates, h hidden units a group, I input features, S saved values
//   (cell_info), K parameters a unit (cell_info), R width of state 0: h, or the projected size. C states of a unit besides
//   state 0: one, or in a cell with more several side by side, [C, h] of a group.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/stack.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "check.h"

namespace fastrnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A layer's weights: of each field one tensor for every group, or none at all.
#define FASTRNN_FOR_EACH_WEIGHT(X)                      \
  X(weight_ih) /* [G*h, I] */                           \
  X(weight_hh) /* [G*h, R] */                           \
  X(bias_ih)   /* [G*h] */                              \
  X(bias_hh)   /* [G*h] */                              \
  X(weight_hr) /* [R, h]: h' = weight_hr (o tanh(c)) */ \
  X(params)    /* [K, h]: numbers of a unit that its cell reads beside the gates, as peepholes are */

// What a recurrence starts from, how long its rows are, where it starts anew, and what regularises it. h_0, reset_h and
// mask_h are [B, P*R], c_0 and reset_c [B, P*C*h] for the recurrence's ops, [P, B, R] and [P, B, C*h] for a layer's. An
// absent state stands for zeros; the recurrence's ops want h_0 and c_0. The last three are constants: they have no gradient.
#define FASTRNN_FOR_EACH_STATE(X)                                        \
  X(h_0)                                                                 \
  X(c_0)     /* of cells with two states or more */                      \
  X(lengths) /* [B] or [B, P], any integer dtype: the steps of a row */  \
  X(resets)  /* bool [T, B] or [T, B, P]: nothing is carried into step t from the one before it, in either direction */ \
  X(reset_h) /* what the state is there instead */                       \
  X(reset_c)                                                             \
  X(mask_h)  /* recurrent dropout: h is multiplied with it where it enters the recurrent product, in every step */ \
  X(keep_h)  /* zoneout, [T, B, P*R]: what part of h a step keeps of the one before; of the new one it takes the rest */ \
  X(keep_c)  /* the same of c, [T, B, P*h] */

// What a layer's gradients are of, in the order of layer_backward's results.
#define FASTRNN_FOR_EACH_GRADIENT(X) X(input) FASTRNN_FOR_EACH_WEIGHT(X) X(h_0) X(c_0) X(reset_h) X(reset_c)

// Of the weights, what the recurrence's ops may be given beside weight_hh, forward and backward: of all groups, [P, ...].
#define FASTRNN_FOR_EACH_RECURRENT_WEIGHT(X) X(weight_hr) X(params)

// What the recurrence's backward returns: the gradients of gates_ih [T, B, P*G*h], of gates_hh where they are others, of
// weight_hr's product [T, B, P*R], of the states, and of params, where each row [B, P*K*h] has its own; these are float32
// where the rest is of a half type.
#define FASTRNN_FOR_EACH_RECURRENT_GRADIENT(X) \
  X(gates_ih) X(gates_hh) X(projected) X(h_0) X(c_0) X(reset_h) X(reset_c) X(params)

// Of the recurrence's ops, what may have a tangent (a derivative in one direction), in the order in which those ops with
// tangents take them.
#define FASTRNN_FOR_EACH_FORWARD_TANGENT(X) \
  X(gates_ih) X(weight_hh) X(bias_hh) FASTRNN_FOR_EACH_RECURRENT_WEIGHT(X) X(h_0) X(c_0) X(reset_h) X(reset_c)
#define FASTRNN_FOR_EACH_BACKWARD_TANGENT(X)                                                                        \
  X(grad_output) X(grad_h_n) X(grad_c_n) X(weight_hh) FASTRNN_FOR_EACH_RECURRENT_WEIGHT(X) X(h_0) X(c_0) X(reset_h) \
  X(reset_c) X(output) X(saved)

using Group = c10::SmallVector<Tensor, 2>;  // of one field, a tensor for every group; empty: there is none

struct Weights {
#define FASTRNN_FIELD(name) Group name;
  FASTRNN_FOR_EACH_WEIGHT(FASTRNN_FIELD)
#undef FASTRNN_FIELD
};

struct States {
#define FASTRNN_FIELD(name) OptionalTensor name;
  FASTRNN_FOR_EACH_STATE(FASTRNN_FIELD)
#undef FASTRNN_FIELD
};

// How a recurrence runs.
struct Run {
  std::string cell;
  std::vector<bool> reverse;  // a flag for every group: does it run from the last step to the first?
  double grad_clip = 0;       // 0: none; else what backward clamps the states' gradient to
  bool dual = false;          // are the tensors complex ones that stand for dual numbers (second_derivative.h)?
  bool constant_weights = false;  // have the slopes of all matrices in it no value but zero?
};

// One call of a layer: input [T, B, I], or tokens [T, B] of an integer dtype, which stand for one-hot rows. batch_sizes
// int64 [T], on the CPU, of a packed sequence: tensors [T, B, ..] are [N, ..] then. So they are with offsets, [B + 1] of an
// integer dtype on the CPU, where rows stand one behind the other: row b has the values offsets[b] .. offsets[b + 1] - 1.
struct LayerCall : Run {
  Tensor input;
  Weights weights;
  States states;
  OptionalTensor batch_sizes, offsets;
  int64_t groups() const { return static_cast<int64_t>(reverse.size()); }
};

// What forward hands on: output [T, B, P*R], h_n [P, B, R], c_n [P, B, C*h], cells [T, B, P*C*h] (c after every step,
// where all_states), saved [T, B, P*S*h] (where backward may follow; S: saved_values, registry.h). Results that do not apply
// have size 0.
struct LayerResults {
  Tensor output, h_n, c_n, cells, saved;
};

// What a layer's backward has beside the call. An absent gradient stands for zeros.
struct LayerGiven {
  OptionalTensor grad_output, grad_h_n, grad_c_n, grad_cells;
  Tensor output, saved;
  bool may_overwrite = false;  // is nobody going to look at saved again?
};

enum Gradient {
#define FASTRNN_FIELD(name) kOf_##name,
  FASTRNN_FOR_EACH_GRADIENT(FASTRNN_FIELD)
#undef FASTRNN_FIELD
  kGradients
};
inline constexpr bool is_weight(int of) { return of > kOf_input && of < kOf_h_0; }
using Needed = std::array<bool, kGradients>;
// Of the weights [P, ...]; those that are not needed are undefined.
using LayerGradients = std::array<Tensor, kGradients>;

// ---- the same as text ----

#define FASTRNN_TEXT(name) "Tensor? " #name ", "
inline constexpr char kStatesText[] = FASTRNN_FOR_EACH_STATE(FASTRNN_TEXT);
inline constexpr char kRecurrentWeightsText[] = FASTRNN_FOR_EACH_RECURRENT_WEIGHT(FASTRNN_TEXT);
#undef FASTRNN_TEXT
#define FASTRNN_TEXT(name) ", Tensor? tangent_" #name
inline constexpr char kForwardTangentsText[] = FASTRNN_FOR_EACH_FORWARD_TANGENT(FASTRNN_TEXT);
inline constexpr char kBackwardTangentsText[] = FASTRNN_FOR_EACH_BACKWARD_TANGENT(FASTRNN_TEXT);
#undef FASTRNN_TEXT
#define FASTRNN_TEXT(name) "Tensor[] " #name ", "
inline constexpr char kWeightsText[] = FASTRNN_FOR_EACH_WEIGHT(FASTRNN_TEXT);
#undef FASTRNN_TEXT
#define FASTRNN_TEXT(name) ", Tensor grad_" #name
inline constexpr char kGradientsText[] = FASTRNN_FOR_EACH_GRADIENT(FASTRNN_TEXT);
inline constexpr char kRecurrentGradientsText[] = FASTRNN_FOR_EACH_RECURRENT_GRADIENT(FASTRNN_TEXT);
#undef FASTRNN_TEXT
#define FASTRNN_TEXT(name) ", Tensor tangent_grad_" #name
inline constexpr char kTangentGradientsText[] = FASTRNN_FOR_EACH_RECURRENT_GRADIENT(FASTRNN_TEXT);
#undef FASTRNN_TEXT

// ---- and on a stack ----

// The arguments of a boxed call of an op, one after the other.
class Reader {
 public:
  Reader(const c10::FunctionSchema& op, const torch::jit::Stack& stack)
      : op_(op), arguments_(torch::jit::last(stack, op.arguments().size())) {}
  const c10::IValue& value() { return arguments_[next_++]; }
  Tensor tensor() {
    const Tensor& x = value().toTensor();  // None, too, passes for one on the way here
    RNN_CHECK_TYPE(x.defined(), op_.name().substr(op_.name().find("::") + 2), ": ", op_.arguments()[next_ - 1].name(),
                   ": expected a tensor, got None");
    return x;
  }
  OptionalTensor optional() {
    const c10::IValue& x = value();
    return x.isTensor() && x.toTensor().defined() ? OptionalTensor(x.toTensor()) : std::nullopt;
  }
  Group group() {
    Group group;
    const c10::IValue& x = value();
    if (x.isNone()) return group;  // AOTInductor's word for an empty list
    for (const c10::IValue& item : x.toListRef()) group.push_back(item.toTensor());
    return group;
  }
  std::string text() { return std::string(value().toStringView()); }
  std::vector<bool> flags() {
    std::vector<bool> flags;
    for (const bool flag : value().toBoolList()) flags.push_back(flag);
    return flags;
  }
  void read(Weights& weights) {
#define FASTRNN_FIELD(name) weights.name = group();
    FASTRNN_FOR_EACH_WEIGHT(FASTRNN_FIELD)
#undef FASTRNN_FIELD
  }
  void read(States& states) {
#define FASTRNN_FIELD(name) states.name = optional();
    FASTRNN_FOR_EACH_STATE(FASTRNN_FIELD)
#undef FASTRNN_FIELD
  }

 private:
  const c10::FunctionSchema& op_;
  c10::ArrayRef<c10::IValue> arguments_;
  size_t next_ = 0;
};

inline c10::IValue value_of(const OptionalTensor& x) { return x ? c10::IValue(*x) : c10::IValue(); }
inline c10::List<bool> list_of(const std::vector<bool>& flags) {
  c10::List<bool> list;
  for (const bool flag : flags) list.push_back(flag);
  return list;
}

inline void push(torch::jit::Stack& stack, const Weights& weights) {
#define FASTRNN_FIELD(name) stack.emplace_back(at::TensorList(weights.name));
  FASTRNN_FOR_EACH_WEIGHT(FASTRNN_FIELD)
#undef FASTRNN_FIELD
}
inline void push(torch::jit::Stack& stack, const States& states) {
#define FASTRNN_FIELD(name) stack.push_back(value_of(states.name));
  FASTRNN_FOR_EACH_STATE(FASTRNN_FIELD)
#undef FASTRNN_FIELD
}

}  // namespace fastrnn
