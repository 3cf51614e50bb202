// The order in which packed data hold the rows of sequences that lie one behind the other.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace fastrnn {

// Of sequences that take the values offsets[b] to offsets[b + 1], [B + 1] integers of the CPU that rise from 0:
//   batch_sizes    [T] how many of them have a step t
//   order          [B] the longest first, of equal ones the first
//   rank           [B] where each is in that order
//   places         [N] where each value stands in packed data: by step, and within a step in that order
//   sources        [N] which value stands at each place there
// All int64. Nothing where a sequence is empty, which packed data cannot hold.
std::vector<at::Tensor> packing_order(const at::Tensor& offsets);

}  // namespace fastrnn
