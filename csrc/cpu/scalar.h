// Storage types and constants that every instruction set shares. Plain C++, compiled for the baseline.
#pragma once
#include <cstdint>

#include "../host_device.h"

namespace fastrnn::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// 1 / k!
template <class T>
constexpr T inverse_factorial(int k) {
  double f = 1;
  for (int i = 2; i <= k; ++i) f *= i;
  return T(1 / f);
}

}  // namespace fastrnn::cpu
