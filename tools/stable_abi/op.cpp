// One op of the arguments and results of fastrnn::layer_forward that computes nothing, for tools/stable_abi.py: by torch's
// usual C++ interface, whose binaries hold for one version of torch, and with FASTRNN_STABLE by its stable ABI. Below the
// aliases the text is the same for both, so that their times differ by the interface alone. The tool names the namespace,
// FASTRNN_NAMESPACE, since it has the libraries in one process.
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#ifdef FASTRNN_STABLE
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define LIBRARY STABLE_TORCH_LIBRARY
#define LIBRARY_IMPL STABLE_TORCH_LIBRARY_IMPL
#define KERNEL TORCH_BOX
#define EXPECT STD_TORCH_CHECK

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Text = const std::string&;
using Tensors = const std::vector<Tensor>&;
using Flags = const std::vector<bool>&;

static int64_t storage_bytes(const Tensor& x) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  return bytes;
}

#ifdef FASTRNN_BY_NAME
// As torch's header has it: through the dispatcher, by the name of the op at every call.
static Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()});
}
#else
static Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int32_t dtype, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes.begin()[i], 1)) strides[i] = stride;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(), dtype, device, index, &made));
  return Tensor(made);
}
#endif
#else
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#define LIBRARY TORCH_LIBRARY
#define LIBRARY_IMPL TORCH_LIBRARY_IMPL
#define KERNEL(function) function
#define EXPECT TORCH_CHECK

using at::ScalarType;
using at::Tensor;
using Text = std::string_view;
using Tensors = at::TensorList;
using Flags = const c10::List<bool>&;

static int64_t storage_bytes(const Tensor& x) { return x.storage().nbytes(); }

static Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return at::empty(at::IntArrayRef(sizes), like.options());
}
#endif

namespace {

using OptionalTensor = std::optional<Tensor>;

// What csrc/torch/prepare.cpp asks of every tensor.
struct Checker {
  const Tensor& reference;

  void operator()(const char* name, const Tensor& x, std::initializer_list<int64_t> expected, ScalarType dtype) const {
    const auto sizes = x.sizes();
    EXPECT(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, ": other sizes");
    EXPECT(x.scalar_type() == dtype, name, ": another dtype");
    EXPECT(x.device() == reference.device(), name, ": another device");
    EXPECT(x.is_contiguous(), name, ": not contiguous");
    EXPECT((x.storage_offset() + x.numel()) * static_cast<int64_t>(x.element_size()) <= storage_bytes(x), name,
          ": out of bounds for its storage");
  }
  void operator()(const char* name, const Tensor& x, std::initializer_list<int64_t> expected) const {
    (*this)(name, x, expected, reference.scalar_type());
  }
  template <class... More>
  void operator()(const char* name, const OptionalTensor& x, std::initializer_list<int64_t> expected,
                  More... more) const {
    if (x) (*this)(name, *x, expected, more...);
  }
  void operator()(const char* name, Tensors group, size_t groups, std::initializer_list<int64_t> expected) const {
    EXPECT(group.size() == groups, name, ": another number of groups");
    for (const Tensor& x : group) (*this)(name, x, expected);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_forward(
    Text cell, const Tensor& input, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh,
    Tensors weight_hr, Tensors params, const OptionalTensor& h_0, const OptionalTensor& c_0,
    const OptionalTensor& lengths, const OptionalTensor& resets, const OptionalTensor& reset_h,
    const OptionalTensor& reset_c, const OptionalTensor& mask_h, const OptionalTensor& keep_h,
    const OptionalTensor& keep_c, const OptionalTensor& batch_sizes, Flags reverse, bool save, double grad_clip,
    bool all_states, const OptionalTensor& offsets) {
  EXPECT(cell == "lstm" && grad_clip >= 0, "cell: expected 'lstm', and a grad_clip of 0 or more");
  EXPECT(weight_hr.empty() && params.empty() && !batch_sizes && !offsets, "expected none of what this op leaves out");
  EXPECT(input.dim() == 3 && !weight_hh.empty() && weight_hh[0].dim() == 2, "input, weight_hh: other dimensions");
  const size_t groups = weight_hh.size();
  const int64_t T = input.size(0), B = input.size(1), I = input.size(2), P = groups, h = weight_hh[0].size(1);
  EXPECT(reverse.size() == groups, "reverse: another number of groups");

  const Checker check{input};
  check("input", input, {T, B, I});
  check("weight_ih", weight_ih, groups, {4 * h, I});
  check("weight_hh", weight_hh, groups, {4 * h, h});
  check("bias_ih", bias_ih, groups, {4 * h});
  check("bias_hh", bias_hh, groups, {4 * h});
  check("h_0", h_0, {P, B, h});
  check("c_0", c_0, {P, B, h});
  check("lengths", lengths, {B}, ScalarType::Long);
  check("resets", resets, {T, B}, ScalarType::Bool);
  check("reset_h", reset_h, {P, B, h});
  check("reset_c", reset_c, {P, B, h});
  check("mask_h", mask_h, {P, B, h});
  check("keep_h", keep_h, {T, B, P * h});
  check("keep_c", keep_c, {T, B, P * h});

  const Tensor absent = empty(input, {0});
  return {empty(input, {T, B, P * h}), empty(input, {P, B, h}), empty(input, {P, B, h}),
          all_states ? empty(input, {T, B, P * h}) : absent, save ? empty(input, {T, B, P * 5 * h}) : absent};
}

}  // namespace

LIBRARY(FASTRNN_NAMESPACE, m) {
  m.def(
      "layer_forward(str cell, Tensor input, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, "
      "Tensor[] bias_hh, Tensor[] weight_hr, Tensor[] params, Tensor? h_0, Tensor? c_0, Tensor? lengths, "
      "Tensor? resets, Tensor? reset_h, Tensor? reset_c, Tensor? mask_h, Tensor? keep_h, Tensor? keep_c, "
      "Tensor? batch_sizes, bool[] reverse, bool save, float grad_clip=0.0, bool all_states=False, "
      "Tensor? offsets=None) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor saved)");
}

LIBRARY_IMPL(FASTRNN_NAMESPACE, CPU, m) { m.impl("layer_forward", KERNEL(&layer_forward)); }
