// The kernels of one instruction set: from the cell and dtype that a call names to the code that is compiled for them.
#pragma once
#include "isa-inl.h"

#include "../cells/registry.h"
#include "backward-inl.h"
#include "dual-inl.h"
#include "forward-inl.h"
#include "gemm-inl.h"
#include "random-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// Calls f.operator()<S>() for the storage type of a dtype.
template <class F>
auto with_dtype([[maybe_unused]] DType dtype, F f) {
#if defined(FASTRNN_AVX512BF16)
  return f.template operator()<BFloat16>();
#else
  switch (dtype) {
    case DType::kFloat64:
      return f.template operator()<double>();
    case DType::kBFloat16:
      return f.template operator()<BFloat16>();
    case DType::kFloat16:
      return f.template operator()<Half>();
    case DType::kDualFloat32:
      return f.template operator()<Dual<float>>();
    case DType::kDualFloat64:
      return f.template operator()<Dual<double>>();
    case DType::kFloat32:
    case DType::kInt8:  // of weights only
    case DType::kBool:  // of masks only
      break;
  }
  return f.template operator()<float>();
#endif
}

// Calls f.operator()<Cell, S>() for the cell and the storage type that p names.
template <class F>
auto with_cell(const ForwardParams& p, F f) {
  return with_dtype(p.dtype, [&]<class S>() {
    int id = 0;
#define FASTRNN_DISPATCH(name, Cell, separate) \
  if (p.cell == id++) return f.template operator()<Cell, S>();
    FASTRNN_FOR_EACH_CELL(FASTRNN_DISPATCH)
#undef FASTRNN_DISPATCH
    __builtin_unreachable();  // the binding checks the cell
  });
}

inline int64_t forward_workspace(const ForwardParams& p, const LayerParams* layer, const Plan& plan) {
  return with_dtype(p.dtype, [&]<class S>() {
    Arena arena;
    ForwardBuffers<S>(p, layer, plan, arena);
    return arena.used();
  });
}
inline int64_t backward_workspace(const BackwardParams& p, const LayerBackwardParams* layer, const Plan& plan) {
  return with_dtype(p.dtype, [&]<class S>() {
    Arena arena;
    BackwardBuffers<S>(p, layer, plan, arena);
    return arena.used();
  });
}
inline Part forward(const ForwardParams& p, const LayerParams* layer, const Plan& plan, char* workspace, int member) {
  return with_cell(p, [&]<class Cell, class S>() -> Part {
    if constexpr (std::is_same_v<S, float>) {
      if (layer && layer->weight_dtype == DType::kBFloat16)
        return ForwardWorker<Cell, float, BFloat16>::run(p, layer, plan, workspace, member).part;
      if (layer && layer->weight_dtype == DType::kInt8)
        return ForwardWorker<Cell, float, int8_t>::run(p, layer, plan, workspace, member).part;
    }
    return ForwardWorker<Cell, S>::run(p, layer, plan, workspace, member).part;
  });
}
inline Part backward(const BackwardParams& p, const LayerBackwardParams* layer, const Plan& plan, char* workspace,
                     int member) {
  return with_cell(p, [&]<class Cell, class S>() {
    return BackwardWorker<Cell, S>::run(p, layer, plan, workspace, member).part;
  });
}

#if !defined(FASTRNN_AVX512BF16)
inline int64_t gemm_workspace(const GemmParams& p) {
  Arena arena;
  p.dtype == DType::kFloat64 ? void(GemmBuffers<double>(p.n, p.k, p.transpose_a, arena))
                             : void(GemmBuffers<float>(p.n, p.k, p.transpose_a, arena));
  return arena.used();
}
inline void gemm(const GemmParams& p, char* workspace, int member, int members) {
  p.dtype == DType::kFloat64 ? gemm_worker<double>(p, workspace, member, members)
                             : gemm_worker<float>(p, workspace, member, members);
}
#endif

#define FASTRNN_STRING(x) #x
#define FASTRNN_NAME(x) FASTRNN_STRING(x)
constexpr Kernels kKernels{FASTRNN_NAME(FASTRNN_ISA), forward_workspace, backward_workspace, forward, backward,
#if !defined(FASTRNN_AVX512BF16)
                           gemm_workspace, gemm, bernoulli
#endif
};
#undef FASTRNN_NAME
#undef FASTRNN_STRING

}  // namespace fastrnn::cpu::FASTRNN_ISA
