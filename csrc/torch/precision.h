// Which switch of torch's float32 products on CUDA obey.
#pragma once
#include <ATen/Context.h>

#include <cstdint>

namespace fastrnn {

// May they be rounded to TF32? That is for torch.backends.cudnn.rnn.fp32_precision to say (cudnn.allow_tf32), which
// torch.nn's recurrent networks obey. torch.nn's cells obey torch.backends.cuda.matmul, so a call of one step, which
// may be a cell's, asks both. (Context's own allowTF32...() throw where a program has set one switch in two ways.)
inline constexpr int64_t kSequence = 2;  // any number of steps above one
inline bool allow_tf32(int64_t steps) {
  const auto allows = [](at::Float32Op op) {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, op) == at::Float32Precision::TF32;
  };
  return allows(at::Float32Op::RNN) && (steps > 1 || allows(at::Float32Op::MATMUL));
}

}  // namespace fastrnn
