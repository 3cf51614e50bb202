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

// Calls f.operator()<Cell, S>() for the cell and storage type that p names.
template <class Cell, class F>
auto with_dtype([[maybe_unused]] DType dtype, F f) {
#if defined(FASTRNN_AVX512BF16)
  return f.template operator()<Cell, BFloat16>();
#else
  switch (dtype) {
    case DType::kFloat64:
      return f.template operator()<Cell, double>();
    case DType::kBFloat16:
      return f.template operator()<Cell, BFloat16>();
    case DType::kFloat16:
      return f.template operator()<Cell, Half>();
    case DType::kDualFloat32:
      return f.template operator()<Cell, Dual<float>>();
    case DType::kDualFloat64:
      return f.template operator()<Cell, Dual<double>>();
    case DType::kFloat32:
    case DType::kInt8:  // of weights only
    case DType::kBool:  // of masks only
      break;
  }
  return f.template operator()<Cell, float>();
#endif
}

template <class F>
auto with_cell(const ForwardParams& p, F f) {
  int id = 0;
#define FASTRNN_DISPATCH(name, Cell, separate) \
  if (p.cell == id++) return with_dtype<Cell>(p.dtype, f);
  FASTRNN_FOR_EACH_CELL(FASTRNN_DISPATCH)
#undef FASTRNN_DISPATCH
  __builtin_unreachable();  // the binding checks the cell
}

struct Forward {
  const ForwardParams& p;
  const LayerParams* layer;
  const Plan& plan;
  char* workspace;
  int member;
  template <class Cell, class S>
  Part operator()() const {
    if constexpr (std::is_same_v<S, float>) {
      if (layer && layer->weight_dtype == DType::kBFloat16) return run<ForwardWorker<Cell, float, BFloat16>>();
      if (layer && layer->weight_dtype == DType::kInt8) return run<ForwardWorker<Cell, float, int8_t>>();
    }
    return run<ForwardWorker<Cell, S>>();
  }
  template <class Worker>
  Part run() const {
    return Worker::run(p, layer, plan, workspace, member).part;
  }
};

struct Backward {
  const BackwardParams& p;
  const LayerBackwardParams* layer;
  const Plan& plan;
  char* workspace;
  int member;
  template <class Cell, class S>
  Part operator()() const {
    return BackwardWorker<Cell, S>::run(p, layer, plan, workspace, member).part;
  }
};

struct ForwardWorkspace {
  const ForwardParams& p;
  const LayerParams* layer;
  const Plan& plan;
  template <class Cell, class S>
  int64_t operator()() const {
    Arena arena;
    ForwardBuffers<Cell, S>(p, layer, plan, arena);
    return arena.used();
  }
};

struct BackwardWorkspace {
  const BackwardParams& p;
  const LayerBackwardParams* layer;
  const Plan& plan;
  template <class Cell, class S>
  int64_t operator()() const {
    Arena arena;
    BackwardBuffers<Cell, S>(p, layer, plan, arena);
    return arena.used();
  }
};

inline int64_t forward_workspace(const ForwardParams& p, const LayerParams* layer, const Plan& plan) {
  return with_cell(p, ForwardWorkspace{p, layer, plan});
}
inline int64_t backward_workspace(const BackwardParams& p, const LayerBackwardParams* layer, const Plan& plan) {
  return with_cell(p, BackwardWorkspace{p, layer, plan});
}
inline Part forward(const ForwardParams& p, const LayerParams* layer, const Plan& plan, char* workspace, int member) {
  return with_cell(p, Forward{p, layer, plan, workspace, member});
}
inline Part backward(const BackwardParams& p, const LayerBackwardParams* layer, const Plan& plan, char* workspace,
                     int member) {
  return with_cell(p, Backward{p, layer, plan, workspace, member});
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
