// Loads an AOTInductor package and prints the sum of absolute values of each result for fixed inputs with T = 7, B = 5.
// Arguments: the package, then libraries to load first, the last of which registers torch.ops.fastrnn.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>

int main(int argc, char** argv) {
  for (int i = 2; i < argc; ++i)
    if (!dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL)) {
      std::cerr << dlerror() << "\n";
      return 1;
    }
  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const int64_t T = 7, B = 5;
  const at::Tensor x = at::arange(T * B * 8, at::kFloat).reshape({T, B, 8}).sin();
  const at::Tensor lengths = at::arange(B, at::kLong) % T + 1;
  for (const at::Tensor& y : loader.run({x, lengths})) std::cout << y.abs().sum().item<float>() << "\n";
}
