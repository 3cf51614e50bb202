// Accuracy of the SIMD exp, tanh and log1p, in ulp of the exact result, and exactness of the 16-bit conversions, for the
// instruction set that FASTRNN_AVX512BF16, FASTRNN_AVX512, FASTRNN_AVX2 or none of them names (cpu/isa-inl.h).
// Prints "name value limit" lines; exits with 1 if a value is above its limit.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>

#include "cpu/rows-inl.h"
#include "cpu/simd-inl.h"

#include "cells/activations.h"

namespace fastrnn::cpu::FASTRNN_ISA {

bool good = true;
void report(const char* name, double value, double limit) {
  std::printf("%s %.3f %.1f\n", name, value, limit);
  if (!(value <= limit)) good = false;
}

template <class T>
double ulps(T got, long double want) {
  if (want == 0) return got == 0 ? 0 : 1e9;
  const T nearest = static_cast<T>(want);
  const int exponent = std::ilogb(nearest);
  const int smallest = std::numeric_limits<T>::min_exponent - 1;
  const long double ulp =
      std::ldexp(1.0L, (exponent < smallest ? smallest : exponent) - std::numeric_limits<T>::digits + 1);
  return static_cast<double>(std::fabs((static_cast<long double>(got) - want) / ulp));
}

template <class T, class F>
T lane0(T x, F f) {
  alignas(64) T lanes[Vec<T>::kLanes];
  store(lanes, f(Vec<T>(x)));
  return lanes[0];
}

template <class T>
void specials(const char* type) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const T tiny = std::numeric_limits<T>::denorm_min();
  const auto e = [](Vec<T> x) { return exp(x); };
  const auto t = [](Vec<T> x) { return tanh(x); };
  double wrong = 0;
  wrong += lane0<T>(0, e) != 1;
  wrong += lane0<T>(tiny, e) != 1;
  wrong += !std::isnan(lane0<T>(nan, e));
  wrong += !(lane0<T>(-inf, e) < 1e-37) || !(lane0<T>(inf, e) > 1e38);
  wrong += lane0<T>(inf, t) != 1 || lane0<T>(-inf, t) != -1;
  wrong += !std::isnan(lane0<T>(nan, t));
  wrong += lane0<T>(tiny, t) != tiny || lane0<T>(-tiny, t) != -tiny;
  wrong += !std::signbit(lane0<T>(T(-0.0), t)) || lane0<T>(0, t) != 0;
  const auto s = [](Vec<T> x) { return sigmoid(x); };
  wrong += lane0<T>(inf, s) != 1 || !(lane0<T>(-inf, s) < 1e-37) || !std::isnan(lane0<T>(nan, s));
  const auto r = [](Vec<T> x) { return relu(x); };
  wrong += lane0<T>(-3, r) != 0 || lane0<T>(3, r) != 3 || !std::isnan(lane0<T>(nan, r));
  const auto l = [](Vec<T> x) { return log_sigmoid(x); };
  wrong += !(std::abs(lane0<T>(inf, l)) < 1e-37) || lane0<T>(-inf, l) != -inf || !std::isnan(lane0<T>(nan, l));
  const auto m = [&](T a, T b) { return lane0<T>(a, [b](Vec<T> x) { return maximum(x, Vec<T>(b)); }); };
  wrong += m(-3, 2) != 2 || m(3, 2) != 3 || m(2, 2) != 2 || m(-inf, 2) != 2 || !std::isnan(m(nan, 2)) || !std::isnan(m(2, nan));
  const auto w = [](Vec<T> x) { return where_zero(x, Vec<T>(1), Vec<T>(2)); };
  wrong += lane0<T>(0, w) != 1 || lane0<T>(T(-0.0), w) != 1 || lane0<T>(tiny, w) != 2 || lane0<T>(nan, w) != 2;
  report((std::string("specials_") + type).c_str(), wrong, 0);
}

// Every `stride`-th float of either sign, a whole vector at a time.
void floats(uint32_t stride) {
  constexpr int L = Vec<float>::kLanes;
  double worst_exp = 0, worst_tanh = 0, worst_log1p = 0;
  alignas(64) float x[L], y[L];
  int n = 0;
  for (uint64_t bits = 0; bits < (uint64_t(1) << 32); bits += stride) {
    const uint32_t b = static_cast<uint32_t>(bits);
    std::memcpy(&x[n], &b, 4);
    if (!std::isfinite(x[n]) || ++n < L) continue;
    n = 0;
    store(y, exp(load(x)));
    for (int k = 0; k < L; ++k)
      if (x[k] >= -87.3f && x[k] <= 88.3f) worst_exp = std::fmax(worst_exp, ulps(y[k], std::exp(double(x[k]))));
    store(y, tanh(load(x)));
    for (int k = 0; k < L; ++k) worst_tanh = std::fmax(worst_tanh, ulps(y[k], std::tanh(double(x[k]))));
    if (!(x[0] >= 0 && x[0] <= 1)) continue;  // neighbours of one sign, and nearly of one size
    store(y, log1p(load(x)));
    for (int k = 0; k < L; ++k)
      if (x[k] <= 1) worst_log1p = std::fmax(worst_log1p, ulps(y[k], std::log1p(double(x[k]))));
  }
  report("log1p_float_ulp", worst_log1p, 3);
  report("exp_float_ulp", worst_exp, 2);
  report("tanh_float_ulp", worst_tanh, 3);
}

void doubles(int64_t points) {
  double worst_exp = 0, worst_tanh = 0, worst_log1p = 0;
  const auto l = [](Vec<double> x) { return log1p(x); };
  const auto e = [](Vec<double> x) { return exp(x); };
  const auto t = [](Vec<double> x) { return tanh(x); };
  for (int64_t k = 0; k <= points; ++k) {
    const double u = double(k) / points;
    const double x = -708.3 + (709.0 + 708.3) * u, near = 40 * u * u * u;
    worst_exp = std::fmax(worst_exp, ulps(lane0(x, e), std::exp((long double)x)));
    worst_exp = std::fmax(worst_exp, ulps(lane0(-near, e), std::exp((long double)-near)));
    worst_tanh = std::fmax(worst_tanh, ulps(lane0(near, t), std::tanh((long double)near)));
    for (const double y : {u, u * u * u})
      worst_log1p = std::fmax(worst_log1p, ulps(lane0(y, l), std::log1p((long double)y)));
  }
  report("log1p_double_ulp", worst_log1p, 3);
  report("exp_double_ulp", worst_exp, 2);
  report("tanh_double_ulp", worst_tanh, 3);
}

float half_value(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                         : std::ldexp(float(mantissa), -24);
  return h & 0x8000 ? -magnitude : magnitude;
}
float bfloat_value(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Each 16-bit value reads exactly and writes back unchanged; halfway points round to even.
template <class S, class Value>
void conversions(const char* name, Value value) {
  constexpr int L = Vec<float>::kLanes;
  double wrong = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    S in[L] = {}, out[L] = {};
    in[0].bits = in[L - 1].bits = static_cast<uint16_t>(bits);
    alignas(64) float x[L];
    store(x, load(in));
    const float want = value(bits);
    if (std::isnan(want)) {
      store(out, load(in));
      wrong += !std::isnan(x[0]) || !std::isnan(value(out[0].bits));
      continue;
    }
    wrong += x[0] != want || x[L - 1] != want || std::signbit(x[0]) != std::signbit(want);
    store(out, load(in));
#if defined(FASTRNN_AVX512BF16)
    if (std::is_same_v<S, BFloat16> && std::fpclassify(want) == FP_SUBNORMAL) {  // as the processor rounds
      wrong += out[0].bits != (bits & 0x8000) || out[L - 1].bits != (bits & 0x8000);
      continue;
    }
#endif
    wrong += out[0].bits != bits || out[L - 1].bits != bits;
    const uint16_t next = static_cast<uint16_t>(bits + 1);
    const float above = value(next);
    if (!std::isfinite(want) || !std::isfinite(above)) continue;
    store(out, Vec<float>(float((double(want) + above) / 2)));
    wrong += out[0].bits != (bits & 1 ? next : bits);
    store(out, Vec<float>(std::nextafterf(float((double(want) + above) / 2), want)));
    wrong += out[0].bits != bits;
  }
  report(name, wrong, 0);
}

// Partial loads read zeros behind the end, partial stores write nothing there.
template <class S>
void partial(const char* name) {
  using T = typename Compute<S>::type;
  constexpr int L = Vec<T>::kLanes;
  double wrong = 0;
  for (int n = 0; n <= L; ++n) {
    S in[L], out[L];
    std::memset(in, 0x3f, sizeof in);
    std::memset(out, 0x11, sizeof out);
    alignas(64) T x[L];
    store(x, load(in, n));
    store(out, load(in), n);
    for (int k = 0; k < L; ++k) {
      wrong += k < n ? x[k] == 0 : x[k] != 0;
      wrong += (std::memcmp(&out[k], &in[k], sizeof(S)) == 0) != (k < n);
    }
  }
  report(name, wrong, 0);
}

// Each of N terms of every unit is in its own sum alone; lanes beyond the last unit are in none, whatever they hold.
template <class T, int N>
void row_sums(const char* name) {
  double wrong = 0;
  for (int units = 1; units <= 40; ++units) {
    const auto sums = sum_over_units<T, N>(units, [](int64_t j, int) {
      constexpr int L = Vec<T>::kLanes;
      Pack<Vec<T>, N> terms;
      for (int k = 0; k < N; ++k) {
        alignas(64) T lanes[L];
        for (int l = 0; l < L; ++l) lanes[l] = T((j + l + 1) * (k + 1));
        terms[k] = load(lanes);
      }
      return terms;
    });
    for (int k = 0; k < N; ++k) wrong += sums[k] != T(units * (units + 1) / 2 * (k + 1));
  }
  report(name, wrong, 0);
}
template <class T>
void all_row_sums(const char* name) {
  row_sums<T, 1>(name);
  row_sums<T, 2>(name);
  row_sums<T, 3>(name);
  row_sums<T, 9>(name);
  row_sums<T, 16>(name);
  row_sums<T, 21>(name);
}

}  // namespace fastrnn::cpu::FASTRNN_ISA

int main() {
  using namespace fastrnn::cpu;
  using namespace fastrnn::cpu::FASTRNN_ISA;
  floats(FASTRNN_TEST_STRIDE);
  doubles(FASTRNN_TEST_POINTS);
  specials<float>("float");
  specials<double>("double");
  conversions<Half>("float16", half_value);
  conversions<BFloat16>("bfloat16", bfloat_value);
  partial<float>("partial_float");
  partial<double>("partial_double");
  partial<Half>("partial_float16");
  all_row_sums<float>("row_sums_float");
  all_row_sums<double>("row_sums_double");
  return good ? 0 : 1;
}
