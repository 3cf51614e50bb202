// Which calls may go past the dispatcher: nothing is in force that wants to see more of them than their kernel.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastrnn {

// Neither functorch, modes, tracing nor autocast is in force.
bool is_plain_thread();

// An ordinary dense tensor, of the CPU or of CUDA: no view of a conjugate, no wrapper, no tangent.
bool is_ordinary(const at::Tensor& x);
bool is_ordinary_on_cuda(const at::Tensor& x);

// A tensor of its own on the same memory, outside of autograd. It holds the memory if another thread exchanges that of
// a parameter; to be made under the GIL, which that thread holds then.
at::Tensor held(const at::Tensor& x);

}  // namespace fastrnn
