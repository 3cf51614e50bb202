// What the code that nvcc makes calls by itself, under the names of CUDA 12 and 13; none of it is reached or matters.
#define INTERNAL __attribute__((visibility("default")))
INTERNAL void* __cudaRegisterFatBinary(void* binary) { return binary; }
INTERNAL void __cudaRegisterFatBinaryEnd(void) {}
INTERNAL void __cudaUnregisterFatBinary(void) {}
INTERNAL void __cudaRegisterFunction(void) {}
INTERNAL int __cudaPushCallConfiguration(void) { return 0; }
INTERNAL int __cudaPopCallConfiguration(void) { return 0; }
INTERNAL int __cudaGetKernel(void) { return 0; }
INTERNAL int __cudaLaunchKernel(void) { return 0; }
INTERNAL int cudaLaunchKernel(void) { return 0; }
