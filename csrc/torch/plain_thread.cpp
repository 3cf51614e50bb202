#include "plain_thread.h"

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace fastrnn {
namespace {

// An ordinary CPU tensor's keys, with and without autograd's: views of conjugates, functorch's wrappers, fake tensors and
// so on have others.
c10::DispatchKeySet ordinary_keys(bool inference) {
  const c10::InferenceMode mode(inference);
  return at::detail::empty_cpu({1}, at::kFloat).key_set();
}

}  // namespace

bool is_plain_thread() {
  static const c10::DispatchKeySet usual({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  return (c10::impl::tls_local_dispatch_key_set().included_ - usual).empty() &&
         !at::autocast::is_autocast_enabled(at::kCPU) && at::impl::PythonTorchFunctionTLS::stack_len() == 0;
}

bool is_ordinary(const at::Tensor& x) {
  static const c10::DispatchKeySet keys = ordinary_keys(false), inference_keys = ordinary_keys(true);
  const c10::DispatchKeySet own = x.key_set();
  return (own == keys || own == inference_keys) && !x._fw_grad(/*level=*/0).defined();
}

at::Tensor held(const at::Tensor& x) {
  return at::Tensor(x.unsafeGetTensorImpl()->shallow_copy_and_detach(c10::VariableVersion(0), true));
}

}  // namespace fastrnn
