// The tensors of a layer's call one after the other, as nodes of autograd are given and save them.
#pragma once
#include <torch/csrc/autograd/variable.h>

#include "arguments.h"
#include "plain_thread.h"

namespace fastrnn {

// visit(gradient, tensor): whatever may have a gradient and is there, in the order of the gradients.
template <class Visit>
void for_each_differentiable(const LayerCall& call, Visit visit) {
  if (call.input.defined()) visit(kOf_input, call.input);
#define FASTRNN_VISIT(name) \
  for (const Tensor& x : call.weights.name) visit(kOf_##name, x);
  FASTRNN_FOR_EACH_WEIGHT(FASTRNN_VISIT)
#undef FASTRNN_VISIT
  const States& s = call.states;
  if (s.h_0) visit(kOf_h_0, *s.h_0);
  if (s.c_0) visit(kOf_c_0, *s.c_0);
  if (s.reset_h) visit(kOf_reset_h, *s.reset_h);
  if (s.reset_c) visit(kOf_reset_c, *s.reset_c);
}

inline torch::autograd::variable_list differentiables(const LayerCall& call) {
  torch::autograd::variable_list tensors;
  tensors.reserve(16);
  for_each_differentiable(call, [&](Gradient, const Tensor& x) { tensors.push_back(x); });
  return tensors;
}

// The same call with what change(tensor) makes of each tensor but batch_sizes and offsets.
template <class Change>
LayerCall changed(const LayerCall& call, Change change) {
  LayerCall own = call;
  if (own.input.defined()) own.input = change(own.input);
#define FASTRNN_CHANGE(name) \
  for (Tensor& x : own.weights.name) x = change(x);
  FASTRNN_FOR_EACH_WEIGHT(FASTRNN_CHANGE)
#undef FASTRNN_CHANGE
#define FASTRNN_CHANGE(name) \
  if (own.states.name) own.states.name = change(*own.states.name);
  FASTRNN_FOR_EACH_STATE(FASTRNN_CHANGE)
#undef FASTRNN_CHANGE
  return own;
}

// The same call on tensors of its own.
inline LayerCall held_call(const LayerCall& call) { return changed(call, held); }

inline Tensor or_undefined(const OptionalTensor& x) { return x ? *x : Tensor(); }
inline OptionalTensor or_none(const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; }

// All of a call's tensors, undefined where there is none: of each weight one for every group.
inline torch::autograd::variable_list tensors_of(const LayerCall& call) {
  torch::autograd::variable_list all{or_undefined(call.batch_sizes), or_undefined(call.offsets), call.input};
  const size_t groups = call.groups();
#define FASTRNN_PUT(name) \
  for (size_t p = 0; p < groups; ++p) all.push_back(p < call.weights.name.size() ? call.weights.name[p] : Tensor());
  FASTRNN_FOR_EACH_WEIGHT(FASTRNN_PUT)
#undef FASTRNN_PUT
#define FASTRNN_PUT(name) all.push_back(or_undefined(call.states.name));
  FASTRNN_FOR_EACH_STATE(FASTRNN_PUT)
#undef FASTRNN_PUT
  return all;
}

// The way back, for a call that knows its `reverse`. Moves `next` behind its tensors.
inline void take_tensors(torch::autograd::variable_list::const_iterator& next, LayerCall& call) {
  call.batch_sizes = or_none(*next++);
  call.offsets = or_none(*next++);
  call.input = *next++;
  const auto take = [&](Group& group) {
    group.clear();
    for (int64_t p = 0; p < call.groups(); ++p, ++next)
      if (next->defined()) group.push_back(*next);
  };
#define FASTRNN_TAKE(name) take(call.weights.name);
  FASTRNN_FOR_EACH_WEIGHT(FASTRNN_TAKE)
#undef FASTRNN_TAKE
#define FASTRNN_TAKE(name) call.states.name = or_none(*next++);
  FASTRNN_FOR_EACH_STATE(FASTRNN_TAKE)
#undef FASTRNN_TAKE
}

}  // namespace fastrnn
