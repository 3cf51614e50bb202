// The layer ops' CPU kernels, for who calls them past the dispatcher. Schemas and meaning: ops.cpp.
#pragma once
#include <tuple>

#include "prepare.h"

namespace fastrnn {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_forward_cpu(
    c10::string_view cell, const Tensor& input, const Tensor& weight_ih, const OptionalTensor& bias_ih,
    const Tensor& weight_hh, const OptionalTensor& bias_hh, const OptionalTensor& weight_hr, const Tensor& h_0,
    const OptionalTensor& c_0, const OptionalTensor& lengths, const OptionalTensor& resets,
    const OptionalTensor& reset_h, const OptionalTensor& reset_c, const c10::List<bool>& reverse, bool save,
    const OptionalTensor& batch_sizes);

// Of input, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, reset_h, reset_c.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients layer_backward_cpu(c10::string_view cell, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                             const OptionalTensor& grad_c_n, const OptionalTensor& input,
                             const OptionalTensor& weight_ih, const Tensor& weight_hh, const Tensor& h_0,
                             const OptionalTensor& c_0, const OptionalTensor& lengths, const OptionalTensor& resets,
                             const OptionalTensor& reset_h, const OptionalTensor& reset_c,
                             const c10::List<bool>& reverse, const Tensor& output, const Tensor& saved,
                             const c10::List<bool>& wanted, const OptionalTensor& batch_sizes, double grad_clip,
                             const OptionalTensor& grad_cells);

}  // namespace fastrnn
