// A float32 product in TF32, whatever torch.backends.cuda.matmul says: at::bmm has no such argument, and to turn the
// switch for the time of a call would turn it for other threads.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/cuda/CUDAContext.h>

#include <algorithm>
#include <climits>

#include "check.h"

namespace fastrnn {

using at::Tensor;

// A batch of matrices [P, rows, columns] as cuBLAS takes one, column by column: rows of ours are its columns.
struct Operand {
  Tensor x;
  cublasOperation_t operation = CUBLAS_OP_N;  // T: the columns lie in one piece each
  int64_t leading = 0;

  explicit Operand(const Tensor& given) : x(given) {
    if (lies(1, 2)) return;
    if (lies(2, 1)) {
      operation = CUBLAS_OP_T;
      return;
    }
    x = x.contiguous();
    lies(1, 2);
  }

 private:
  // Are the elements along dimension `inner` neighbours, and these vectors apart along `outer`?
  bool lies(int64_t outer, int64_t inner) {
    const int64_t length = std::max<int64_t>(x.size(inner), 1);
    if ((x.stride(inner) != 1 && length > 1) || (x.stride(outer) < length && x.size(outer) > 1)) return false;
    leading = std::max(x.stride(outer), length);
    return true;
  }
};

// out [P, m, n], whose rows lie in one piece each, = a [P, m, k] @ b [P, k, n], any strides, or what is there and that.
// False, and nothing done, where that is for at::bmm: sizes beyond what cuBLAS takes, arguments that it refuses.
inline bool tf32_product(Tensor& out, const Tensor& a, const Tensor& b, bool add = false) {
  const int64_t m = out.size(1), n = out.size(2), k = a.size(2);
  const bool fits = a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat && a.device() == b.device();
  if (!fits || out.numel() == 0 || k == 0) return false;
  const Operand left(a), right(b);
  const Operand result(out);
  if (result.operation != CUBLAS_OP_N || !result.x.is_same(out)) return false;
  if (std::max({out.size(0), m, n, k, left.leading, right.leading, result.leading}) > INT_MAX) return false;
  const float one = 1, there = add ? 1 : 0;
  // Its matrices are ours transposed, so it makes out^T = b^T a^T.
  const cublasStatus_t status = cublasGemmStridedBatchedEx(
      at::cuda::getCurrentCUDABlasHandle(), right.operation, left.operation, n, m, k, &one, right.x.const_data_ptr(),
      CUDA_R_32F, right.leading, right.x.stride(0), left.x.const_data_ptr(), CUDA_R_32F, left.leading,
      left.x.stride(0), &there, out.mutable_data_ptr(), CUDA_R_32F, result.leading, out.stride(0), out.size(0),
      CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT);
  RNN_CHECK(status == CUBLAS_STATUS_SUCCESS, "a product in TF32: cuBLAS error ", static_cast<int>(status), " for [",
            m, ", ", k, "] @ [", k, ", ", n, "], ", out.size(0), " groups");
  return true;
}

}  // namespace fastrnn
