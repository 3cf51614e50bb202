#include "plain_thread.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace fastrnn {
namespace {

// An ordinary tensor's keys, with and without autograd's: views of conjugates, functorch's wrappers, fake tensors and so
// on have others.
c10::DispatchKeySet ordinary_keys(c10::DispatchKey backend, c10::Device device, bool inference) {
  const c10::InferenceMode mode(inference);
  return c10::make_intrusive<c10::TensorImpl>(c10::DispatchKeySet(backend), caffe2::TypeMeta::Make<float>(), device)
      ->key_set();
}

bool has_keys(const at::Tensor& x, c10::DispatchKeySet keys, c10::DispatchKeySet inference_keys) {
  const c10::DispatchKeySet own = x.key_set();
  return (own == keys || own == inference_keys) && !x._fw_grad(/*level=*/0).defined();
}

}  // namespace

bool is_plain_thread() {
  static const c10::DispatchKeySet usual({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  return (c10::impl::tls_local_dispatch_key_set().included_ - usual).empty() &&
         !at::autocast::is_autocast_enabled(at::kCPU) && !at::autocast::is_autocast_enabled(at::kCUDA) &&
         at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

bool is_ordinary(const at::Tensor& x) {
  const c10::Device device(c10::DeviceType::CPU);
  static const c10::DispatchKeySet keys = ordinary_keys(c10::DispatchKey::CPU, device, false),
                                   inference_keys = ordinary_keys(c10::DispatchKey::CPU, device, true);
  return has_keys(x, keys, inference_keys);
}

bool is_ordinary_on_cuda(const at::Tensor& x) {
  const c10::Device device(c10::DeviceType::CUDA, 0);
  static const c10::DispatchKeySet keys = ordinary_keys(c10::DispatchKey::CUDA, device, false),
                                   inference_keys = ordinary_keys(c10::DispatchKey::CUDA, device, true);
  return has_keys(x, keys, inference_keys);
}

at::Tensor held(const at::Tensor& x) {
  return at::Tensor(x.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), true));
}

}  // namespace fastrnn
