// fastrnn::dev's launches, for tests/cuda/test_launch.py.
#include "cuda/device.cuh"

namespace {
__global__ void first_kernel(int, float) {}
__global__ void second_kernel(int, float) {}
}  // namespace

extern "C" __attribute__((visibility("default"))) int probe(int second, unsigned blocks, size_t shared,
                                                            unsigned cluster, int coresident) {
  fastrnn::dev::Launch launch{dim3(blocks), 64, shared, cluster, coresident != 0, nullptr};
  return int(fastrnn::dev::launch(second ? second_kernel : first_kernel, launch, 3, 5.f));
}
extern "C" __attribute__((visibility("default"))) int probe_occupancy(size_t shared, int* blocks) {
  return int(fastrnn::dev::max_coresident_blocks(first_kernel, 64, shared, blocks));
}
