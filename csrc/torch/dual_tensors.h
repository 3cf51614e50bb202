// Tensors of dual numbers (csrc/cpu/dual-inl.h), which torch has as complex ones.
#pragma once
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/imag.h>
#include <ATen/ops/real.h>
#include <ATen/ops/zeros_like.h>

namespace fastrnn {

// slope undefined: 0. Half types' are float32's.
inline at::Tensor dual(const at::Tensor& value, const at::Tensor& slope = {}) {
  const auto wide = at::toOpMathType(value.scalar_type());
  const at::Tensor real = value.to(wide);
  return at::complex(real, slope.defined() ? slope.to(wide) : at::zeros_like(real));
}

// Tensors of their own, for a view would hold both.
inline at::Tensor values_of(const at::Tensor& x) { return at::real(x).clone(at::MemoryFormat::Contiguous); }
inline at::Tensor slopes_of(const at::Tensor& x) { return at::imag(x).clone(at::MemoryFormat::Contiguous); }

}  // namespace fastrnn
