"""fastrnn against cuDNN on a CUDA GPU: correctness, then timings, in one command (benchmarks/gpu_check.sh)."""
