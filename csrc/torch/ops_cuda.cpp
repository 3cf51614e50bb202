// What CUDA supplies to the ops: the recurrence (the checks of prepare.h, then one launch on the current stream, or the
// per-step tier's loop) and the matrix products around it. Nothing here waits for the device, and all of it can be
// captured in a CUDA graph.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

#include "../cells/registry.h"
#include "../cuda/launch.h"
#include "check.h"
#include "ops.h"
#include "precision.h"
#include "tf32_product.h"

namespace fastrnn {
namespace {

cuda::Device current_device() {
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> clusters{};  // asked of each device once
  const cudaDeviceProp* d = at::cuda::getCurrentDeviceProperties();
  std::atomic<int>& largest = clusters[c10::cuda::current_device()];
  if (largest == 0) largest = d->major >= 9 ? cuda::largest_cluster() : 1;
  return {d->multiProcessorCount, d->major * 10 + d->minor, static_cast<int64_t>(d->sharedMemPerBlockOptin), largest};
}

std::string described(const ForwardParams& p) {
  return message("cell '", kCells[p.cell].name, "' with ", p.steps, " steps, batch ", p.batch, ", ", p.groups,
                 " groups, hidden size ", p.hidden, ", width ", p.width);
}

void raise_if(int error, const char* op, const ForwardParams& p, const char* kernel) {
  RNN_CHECK(error == 0, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)), " in '", kernel, "' for ",
            described(p));
}

// The table's choice, or the tier that the environment variable FASTRNN_CUDA_TIER names: for tests and measurements.
cuda::Choice choose(const char* op, const ForwardParams& p, bool backward) {
  const char* name = std::getenv("FASTRNN_CUDA_TIER");
  const bool tf32 = allow_tf32(p.steps);
  if (!name || !*name) return cuda::choose(p, backward, current_device(), tf32);
  const cuda::Tier tier = cuda::find_tier(name);
  RNN_CHECK_VALUE(tier != cuda::Tier::kUnknown,
                  "FASTRNN_CUDA_TIER: expected step, resident, grid or cluster, got '", name, "'");
  cuda::Choice choice{};
  RNN_CHECK_NOT_IMPLEMENTED(cuda::choose_from(tier, p, backward, current_device(), tf32, &choice), op,
                            ": FASTRNN_CUDA_TIER=", name, " cannot run ", described(p), " on this device");
  return choice;
}

// Scratch tensors of one call, shapes as in launch.h.
struct Scratch {
  at::TensorOptions narrow, wide;
  explicit Scratch(const Tensor& like)
      : narrow(like.options()),
        wide(like.options().dtype(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)) {}
  Tensor in_dtype(at::IntArrayRef sizes) const { return at::empty(sizes, narrow); }
  Tensor in_wide(at::IntArrayRef sizes) const { return at::empty(sizes, wide); }
};

// out [P, B, m] = x [P, B, n] @ weight [P, n, m], or what is there and that; the rows of out are contiguous. cuBLAS
// accumulates half types in float32 and here may give that. Of float32 the guard keeps out what
// torch.backends.cuda.matmul may allow: ATen's products obey that alone.
void product(Tensor out, const Tensor& x, const Tensor& weight, bool tf32, bool add = false) {
  if (out.scalar_type() != x.scalar_type()) {
    at::bmm_out(out, x, weight, out.scalar_type());
  } else if (!(tf32 && tf32_product(out, x, weight, add))) {
    const at::NoTF32Guard exact;
    if (add)
      at::baddbmm_out(out, out, x, weight);
    else
      at::bmm_out(out, x, weight);
  }
}

// Of a row, what StepBuffers::carried holds.
int64_t carried_values(const ForwardParams& p) { return std::max(1, kCells[p.cell].in_c()) * p.hidden; }

void forward_per_step(const ForwardParams& p, const Tensor& weight_hh, const OptionalTensor& weight_hr,
                      void* stream, const cuda::Choice& choice) {
  constexpr const char* kOp = "recurrent_forward";
  const char* kernel = choice.description;
  const int64_t P = p.groups, B = p.batch, h = p.hidden, R = p.width, late = kCells[p.cell].late_gates;
  const int64_t early = kCells[p.cell].gates - late;
  const Scratch scratch(weight_hh);
  const Tensor weight = weight_hh.transpose(1, 2).narrow(2, 0, early * h);
  Tensor state = scratch.in_dtype({P, B, R}), gates_hh = scratch.in_wide({P, B, early * h}),
         carried = scratch.in_wide({P, B, carried_values(p)});
  Tensor hidden, projected, projection, work, late_input, late_product, late_weight;
  cuda::StepBuffers b{};
  if (kCells[p.cell].whole_rows) {
    work = scratch.in_wide({P, B, kCells[p.cell].forward_work * h});
    b.work = work.mutable_data_ptr();
  }
  if (late > 0) {
    late_weight = weight_hh.transpose(1, 2).narrow(2, early * h, late * h);
    late_input = scratch.in_dtype({P, B, h});
    late_product = scratch.in_wide({P, B, late * h});
    b.late = late_input.mutable_data_ptr();
    b.late_product = late_product.const_data_ptr();
  }
  b.h = state.mutable_data_ptr();
  b.gates_hh = gates_hh.const_data_ptr();
  b.carried = carried.mutable_data_ptr();
  if (weight_hr) {
    projection = weight_hr->transpose(1, 2);
    hidden = scratch.in_dtype({P, B, h});
    projected = scratch.in_wide({P, B, R});
    b.hidden = hidden.mutable_data_ptr();
    b.projected = projected.const_data_ptr();
  }
  raise_if(cuda::start_forward(p, b, stream), kOp, p, kernel);
  for (int64_t k = 0; k < p.steps; ++k) {
    product(gates_hh, state, weight, choice.tf32);
    if (late > 0) {
      raise_if(cuda::step_forward_late(p, k, b, stream), kOp, p, kernel);
      product(late_product, late_input, late_weight, choice.tf32);
    }
    raise_if(cuda::step_forward(p, k, b, stream), kOp, p, kernel);
    if (!weight_hr) continue;
    product(projected, hidden, projection, choice.tf32);
    raise_if(cuda::step_forward_projected(p, k, b, stream), kOp, p, kernel);
  }
}

void backward_per_step(const BackwardParams& p, const Tensor& weight_hh, const OptionalTensor& weight_hr,
                       void* stream, const cuda::Choice& choice) {
  constexpr const char* kOp = "recurrent_backward";
  const char* kernel = choice.description;
  const int64_t P = p.groups, B = p.batch, h = p.hidden, R = p.width, late = kCells[p.cell].late_gates;
  const int64_t early = kCells[p.cell].gates - late;
  const bool finish = p.grad_h_0 || p.resets;
  const Scratch scratch(weight_hh);
  const Tensor early_weight = weight_hh.narrow(1, 0, early * h);
  Tensor grad_gates = scratch.in_dtype({P, B, early * h}), recurrent = scratch.in_wide({P, B, R}),
         carried = scratch.in_wide({P, B, carried_values(p)});
  Tensor grad_h, grad_hidden;
  cuda::StepBuffers b{};
  b.grad_gates = grad_gates.mutable_data_ptr();
  b.recurrent = recurrent.const_data_ptr();
  b.carried = carried.mutable_data_ptr();
  Tensor work, late_grads, late_product, late_weight;
  if (late > 0) {
    late_weight = weight_hh.narrow(1, early * h, late * h);
    late_grads = scratch.in_dtype({P, B, late * h});
    late_product = scratch.in_wide({P, B, h});
    b.late = late_grads.mutable_data_ptr();
    b.late_product = late_product.const_data_ptr();
  }
  if (kCells[p.cell].whole_rows || late > 0) {
    work = scratch.in_wide({P, B, (kCells[p.cell].states + kCells[p.cell].backward_work) * h});
    b.work = work.mutable_data_ptr();
  }
  if (weight_hr) {
    grad_h = scratch.in_dtype({P, B, R});
    grad_hidden = scratch.in_wide({P, B, h});
    b.grad_h = grad_h.mutable_data_ptr();
    b.grad_hidden = grad_hidden.const_data_ptr();
  }
  for (int64_t k = p.steps - 1; k >= 0; --k) {
    if (weight_hr) {
      raise_if(cuda::step_backward_projected(p, k, b, stream), kOp, p, kernel);
      product(grad_hidden, grad_h, *weight_hr, choice.tf32);
    }
    if (late > 0) {
      raise_if(cuda::step_backward_late(p, k, b, stream), kOp, p, kernel);
      product(late_product, late_grads, late_weight, choice.tf32);
    }
    raise_if(cuda::step_backward(p, k, b, stream), kOp, p, kernel);
    if (k > 0 || finish) product(recurrent, grad_gates, early_weight, choice.tf32);
  }
  if (finish) raise_if(cuda::finish_backward(p, b, stream), kOp, p, kernel);
}

Tensor workspace(const ForwardParams& p, const cuda::Choice& choice, bool backward, const Tensor& like) {
  return at::empty({cuda::workspace_bytes(p, choice, backward)}, like.options().dtype(at::kByte));
}

Tensor three_dimensions(const Tensor& weight) {  // of a layer of one group: [G*h, R]
  return (weight.dim() == 2 ? weight.unsqueeze(0) : weight).contiguous();
}
OptionalTensor three_dimensions(const OptionalTensor& weight) {
  return weight ? OptionalTensor(three_dimensions(*weight)) : weight;
}

LayerResults forward_cuda(const Recurrence& args, const Tensor& gates_ih, bool save, bool in_place) {
  const at::AutoDispatchBelowADInplaceOrView below;  // the products' out= tensors meet no autograd
  const c10::cuda::CUDAGuard guard(gates_ih.device());
  PreparedForward run = prepare_forward(args, gates_ih, save, in_place);
  const ForwardParams& p = run.params;
  if (p.batch > 0) {
    const cuda::Choice choice = choose("recurrent_forward", p, false);
    void* stream = c10::cuda::getCurrentCUDAStream().stream();
    if (choice.tier == cuda::Tier::kStep) {
      forward_per_step(p, three_dimensions(args.weight_hh), three_dimensions(args.weight_hr), stream, choice);
    } else {
      const Tensor scratch = workspace(p, choice, false, gates_ih);
      raise_if(cuda::recurrent_forward(p, choice, scratch.data_ptr(), stream), "recurrent_forward", p,
               choice.description);
    }
  }
  return run.results();
}

RecurrentGradients backward_cuda(const Recurrence& args, const Given& given, bool initial) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::cuda::CUDAGuard guard(given.output.device());
  PreparedBackward run = prepare_backward(args, given, initial);
  const BackwardParams& p = run.params;
  if (p.batch > 0) {
    const cuda::Choice choice = choose("recurrent_backward", p, true);
    void* stream = c10::cuda::getCurrentCUDAStream().stream();
    if (choice.tier == cuda::Tier::kStep) {
      backward_per_step(p, three_dimensions(args.weight_hh), three_dimensions(args.weight_hr), stream, choice);
    } else {
      const Tensor scratch = workspace(p, choice, true, given.output);
      raise_if(cuda::recurrent_backward(p, choice, scratch.data_ptr(), stream), "recurrent_backward", p,
               choice.description);
    }
  }
  return run.results();
}

void product_cuda(const Tensor& out, const Tensor& a, const Tensor& b, bool add, int64_t steps) {
  const c10::cuda::CUDAGuard guard(out.device());  // cuBLAS' handle is the current device's
  product(out.unsqueeze(0), a.unsqueeze(0), b.unsqueeze(0), allow_tf32(steps), add);
}

Tensor linear_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t steps) {
  if (x.scalar_type() == at::kFloat && allow_tf32(steps)) {
    Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
    product_cuda(out, x, weight.t(), false, steps);
    return bias ? out.add_(*bias) : out;
  }
  const at::NoTF32Guard exact;
  return bias ? at::addmm(*bias, x, weight.t()) : at::mm(x, weight.t());
}

// Of many rows by products with ones: for their sum ATen takes a buffer of 128 MiB (H200, 8,192 rows of 2,048), more than
// all else that a training step of the layer needs. Of few it is one launch.
Tensor sum_rows_cuda(const Tensor& x) {
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() < (1 << 20)) return x.sum(at::IntArrayRef{0, 1});
  const bool half = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  const int64_t rows = x.size(0) * x.size(1), P = x.size(2), m = x.size(3);
  const Tensor out = at::empty({P, 1, m}, half ? x.options().dtype(at::kFloat) : x.options());
  const Tensor ones = at::ones({1, 1, rows}, x.options());
  for (int64_t p = 0; p < P; ++p)
    product(out.narrow(0, p, 1), ones, x.select(2, p).flatten(0, 1).unsqueeze(0), /*tf32=*/false);
  return out.view({P, m}).to(x.scalar_type());
}

constexpr RecurrentKernels kKernels{forward_cuda, backward_cuda, product_cuda, linear_cuda, sum_rows_cuda};
[[maybe_unused]] const bool known = (set_recurrent_kernels(at::kCUDA, kKernels), true);

Tensor grouped_linear_cuda(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const at::AutoDispatchBelowADInplaceOrView below;
  check_grouped_linear(input, weight, bias);
  const c10::cuda::CUDAGuard guard(input.device());
  Tensor out = at::empty({weight.size(0), input.size(0), weight.size(1)}, input.options());
  product(out, input.transpose(0, 1), weight.transpose(1, 2), allow_tf32(kSequence));
  if (bias) out += bias->unsqueeze(1);
  return out.transpose(0, 1);
}

Tensor grouped_outer_cuda(const Tensor& a, const Tensor& b) {
  const at::AutoDispatchBelowADInplaceOrView below;
  check_grouped_outer(a, b);
  const c10::cuda::CUDAGuard guard(a.device());
  Tensor out = at::empty({a.size(1), a.size(2), b.size(2)}, a.options());
  product(out, a.permute({1, 2, 0}), b.transpose(0, 1), allow_tf32(kSequence));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastrnn, CUDA, m) {
  register_kernels(m);
  m.impl("grouped_linear", grouped_linear_cuda);
  m.impl("grouped_outer", grouped_outer_cuda);
}

}  // namespace fastrnn
