// The torch-free entry points of the recurrences.
#pragma once
#include <vector>

#include "params.h"

namespace fastrnn::cpu {

// Runs on at most `threads` OpenMP threads, this one included. Throws std::bad_alloc if the workspace cannot be
// had; nothing has been written then.
void recurrent_forward(const ForwardParams& params, int threads);
// The same with the projection inside; params.gates_ih is not read.
void layer_forward(const ForwardParams& params, const LayerParams& layer, int threads);

// A layer of several, one upon the other: each but the lowest reads the output of the one below. Of one group, from the
// first step to the last, without lengths.
struct LayerCall {
  ForwardParams params;
  LayerParams layer;
};
// In how many stages to run them: 1, one layer after the other, or more, side by side on as many teams of threads. A
// stage's layers follow those below through the steps, so no output may then lie in another's memory.
int stages_of(const std::vector<LayerCall>& layers, int threads);
void layers_forward(const std::vector<LayerCall>& layers, int stages, int threads);

void recurrent_backward(const BackwardParams& params, int threads);
// The same with the products of the layer's gradients inside.
void layer_backward(const BackwardParams& params, const LayerBackwardParams& layer, int threads);

// The matrix products around a recurrence, by its own micro-kernel. The same terms.
void gemm(const GemmParams& params, int threads);

// Elements begin .. end - 1 of out: 1 with probability p, else 0; each as the seed and its place alone decide, whoever
// writes it. begin is even. For float32, float64, bfloat16 and float16.
void bernoulli(DType dtype, void* out, int64_t begin, int64_t end, uint64_t seed, double p);

// A hint to the operating system, of memory that nothing has been written to: pages of this size where they fit.
constexpr int64_t kHugePage = 2 << 20;
void use_huge_pages(void* data, int64_t bytes);

// Instruction set of the kernels in use: "amx", "avx512bf16", "avx512", "avx2" or "baseline". Chosen once per process: the
// best that the CPU has, or what the environment variable FASTRNN_ISA names. Throws std::invalid_argument if that is unknown
// or not to be had.
const char* instruction_set();

}  // namespace fastrnn::cpu
