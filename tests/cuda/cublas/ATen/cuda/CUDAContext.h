// A cuBLAS of our own, for tests/cuda/cublas/products.cpp: one function, on the CPU, as NVIDIA's documentation defines it.
#pragma once
#include <cstdint>

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_INVALID_VALUE = 7 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cudaDataType { CUDA_R_32F };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F_FAST_TF32 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT };
using cublasHandle_t = void*;

namespace at::cuda {
inline cublasHandle_t getCurrentCUDABlasHandle() { return nullptr; }
}  // namespace at::cuda

// C = alpha op(A) op(B) + beta C for each matrix of the batch, all column by column: op(A) is m by k, op(B) k by n.
inline cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                                                 int n, int k, const void* alpha, const void* A, cudaDataType, int lda,
                                                 long long stride_a, const void* B, cudaDataType, int ldb,
                                                 long long stride_b, const void* beta, void* C, cudaDataType, int ldc,
                                                 long long stride_c, int count, cublasComputeType_t,
                                                 cublasGemmAlgo_t) {
  if (lda < (op_a == CUBLAS_OP_N ? m : k) || ldb < (op_b == CUBLAS_OP_N ? k : n) || ldc < m)
    return CUBLAS_STATUS_INVALID_VALUE;
  for (int64_t p = 0; p < count; ++p) {
    const float* a = static_cast<const float*>(A) + p * stride_a;
    const float* b = static_cast<const float*>(B) + p * stride_b;
    float* c = static_cast<float*>(C) + p * stride_c;
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < m; ++i) {
        double sum = 0;
        for (int64_t l = 0; l < k; ++l)
          sum += a[op_a == CUBLAS_OP_N ? l * lda + i : i * lda + l] * b[op_b == CUBLAS_OP_N ? j * ldb + l : l * ldb + j];
        float& to = c[j * ldc + i];
        to = *static_cast<const float*>(alpha) * sum + (*static_cast<const float*>(beta) ? to : 0);
      }
  }
  return CUBLAS_STATUS_SUCCESS;
}
