// Ones with a probability, else zeros, out of a seed.
#pragma once
#include "isa-inl.h"

#include "simd-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

typedef uint64_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));

// The i-th numbers of SplitMix64 (Steele, Lea & Flood 2014) from a seed, without those before them.
FASTRNN_HD Words random_bits(uint64_t seed, Words i) {
  Words z = seed + (i + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Elements begin .. end - 1 of out, begin being even: each half of a number decides one, the lower half the first.
template <class S>
void bernoulli(S* out, int64_t begin, int64_t end, uint64_t seed, double p) {
  typedef uint32_t Halves __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  constexpr int L = Vec<float>::kLanes;
  const uint32_t below = uint32_t(p < 1 ? p * 0x1p32 : 0);
  Words i;
  for (int l = 0; l < L / 2; ++l) i[l] = begin / 2 + l;
  for (int64_t at = begin; at < end; at += L, i += L / 2) {
    const int n = end - at < L ? int(end - at) : L;
    const Vec<float> ones = (Halves)random_bits(seed, i) < below ? Vec<float>(1).v : Vec<float>(p < 1 ? 0 : 1).v;
    if constexpr (std::is_same_v<S, uint8_t>) {
      const Half16 halves = __builtin_convertvector((Vec<float>::Bits)(ones.v != 0) & 1, Half16);
      const auto bytes = __builtin_convertvector(halves, Traits<float>::Bytes);
      __builtin_memcpy(out + at, &bytes, n);
    } else if constexpr (std::is_same_v<S, double>) {
      alignas(64) float lanes[L];
      store(lanes, ones);
      for (int l = 0; l < n; ++l) out[at + l] = lanes[l];
    } else {
      store(out + at, ones, n);
    }
  }
}
inline void bernoulli(DType dtype, void* out, int64_t begin, int64_t end, uint64_t seed, double p) {
  switch (dtype) {
    case DType::kFloat64: return bernoulli(static_cast<double*>(out), begin, end, seed, p);
    case DType::kBFloat16: return bernoulli(static_cast<BFloat16*>(out), begin, end, seed, p);
    case DType::kFloat16: return bernoulli(static_cast<Half*>(out), begin, end, seed, p);
    case DType::kBool: return bernoulli(static_cast<uint8_t*>(out), begin, end, seed, p);
    default: return bernoulli(static_cast<float*>(out), begin, end, seed, p);
  }
}

}  // namespace fastrnn::cpu::FASTRNN_ISA
