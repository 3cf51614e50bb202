// A CUDA runtime without a GPU: what launchers ask of it is written down, and may be told to fail. Shared memory limits
// are kept per kernel, as the real one does.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
std::string calls, fails;  // fails: the function that is to fail next
std::map<const void*, size_t> limits;
cudaError_t last = cudaSuccess;
constexpr int kOptIn = 232448;

cudaError_t say(const char* name, const std::string& text, cudaError_t error = cudaSuccess) {
  calls += std::string(name) + " " + text + "\n";
  if (fails == name) error = cudaErrorUnknown;
  if (error != cudaSuccess) last = error;
  return error;
}
size_t limit_of(const void* kernel) { return limits.count(kernel) ? limits[kernel] : 48 << 10; }
}  // namespace

EXPORT const char* fake_calls() { return calls.c_str(); }
EXPORT void fake_reset(const char* failing) { calls.clear(), limits.clear(), fails = failing, last = cudaSuccess; }
EXPORT int fake_pending() { return int(last); }

EXPORT cudaError_t cudaGetDevice(int* device) { return *device = 0, say("cudaGetDevice", ""); }
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = kOptIn; break;
    default: *value = 0;
  }
  return say("cudaDeviceGetAttribute", "");
}
EXPORT cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute which, int value) {
  const cudaError_t error = value > kOptIn ? cudaErrorInvalidValue : cudaSuccess;
  if (which == cudaFuncAttributeMaxDynamicSharedMemorySize && !error) limits[kernel] = size_t(value);
  const bool shared = which == cudaFuncAttributeMaxDynamicSharedMemorySize;
  const bool clusters = which == cudaFuncAttributeNonPortableClusterSizeAllowed;
  const std::string name = shared ? "shared" : clusters ? "nonportable clusters" : "?";
  return say("cudaFuncSetAttribute", name + " " + std::to_string(value), error);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void** arguments) {
  std::string text = std::to_string(c->gridDim.x) + "x" + std::to_string(c->blockDim.x) + " " +
                     std::to_string(c->dynamicSmemBytes) + " of " + std::to_string(limit_of(kernel)) + " (" +
                     std::to_string(*static_cast<int*>(arguments[0])) + ", " +
                     std::to_string(int(*static_cast<float*>(arguments[1]))) + ")";
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id == cudaLaunchAttributeCooperative) text += " cooperative";
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension)
      text += " clusters of " + std::to_string(c->attrs[i].val.clusterDim.x);
  }
  return say("cudaLaunchKernelExC", text,
             c->dynamicSmemBytes > limit_of(kernel) ? cudaErrorInvalidValue : cudaSuccess);
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                          unsigned) {
  return *blocks = 2, say("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", "");
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int block,
                                                                 size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, block, shared, 0);
}
EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  return last = cudaSuccess, error;
}
