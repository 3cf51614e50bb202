// Runs a kernel of mutants.cu on random inputs and compares with a plain double loop. Called through ctypes
// by tests/cuda/test_hostbuild.py; also the example of how a C++ test drives the emulator.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "emulator.h"
#include "mutants.h"

#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))

using namespace fastrnn;

namespace {

struct Shape {
  int T, B, H, U, groups, extra_blocks;
};

std::mt19937 generator;

float* random_input(size_t count, float scale, const char* name) {
  auto* p = static_cast<float*>(emu::alloc(count * 4, name));
  std::uniform_real_distribution<float> uniform(-scale, scale);
  for (size_t i = 0; i < count; ++i) p[i] = uniform(generator);
  emu::seal(p, count * 4);
  return p;
}

// exactly representable in every format
float* eighths_input(size_t count, const char* name) {
  auto* p = static_cast<float*>(emu::alloc(count * 4, name));
  for (size_t i = 0; i < count; ++i) p[i] = float(int(generator() % 33) - 16) / 8.f;
  emu::seal(p, count * 4);
  return p;
}

float* output(size_t count, const char* name) { return static_cast<float*>(emu::alloc(count * 4, name)); }

uint64_t* zeroed_words(size_t count) {
  auto* p = static_cast<uint64_t*>(emu::alloc(count * 8, "words"));
  std::memset(p, 0, count * 8);
  emu::define(p, count * 8);
  return p;
}

// NaN counts as infinite
double worst(double so_far, double difference) {
  difference = std::fabs(difference);
  return difference <= so_far ? so_far : std::isnan(difference) ? INFINITY : difference;
}

double recurrence_error(const mutants::Args& a, bool in_bf16) {
  auto rounded = [=](double v) {
    return in_bf16 ? double(dev::to_float(dev::from_float<dev::bf16>(float(v)))) : v;
  };
  double error = 0;
  size_t BH = size_t(a.B) * size_t(a.H), H = size_t(a.H);
  for (size_t group = 0; group < size_t(a.groups); ++group) {
    std::vector<double> h(a.h_0 + group * BH, a.h_0 + (group + 1) * BH), h_new(BH);
    for (size_t t = 0; t < size_t(a.T); ++t) {
      size_t at = (group * size_t(a.T) + t) * BH;
      for (size_t i = 0; i < BH; ++i) {
        double z = a.x[at + i];
        for (size_t k = 0; k < H; ++k) z += rounded(a.w[i % H * H + k]) * rounded(h[i / H * H + k]);
        h_new[i] = std::tanh(z);
        error = worst(error, h_new[i] - a.y[at + i]);
      }
      h = h_new;
    }
  }
  return error;
}

using LaunchFunction = int (*)(const mutants::Args&);

// `launches` runs over one workspace with new inputs each; its step flags count up unless `same_epoch`
double run_recurrence(LaunchFunction launch, bool in_bf16, const Shape& s, int fault, int launches,
                      bool same_epoch) {
  size_t T = size_t(s.T), B = size_t(s.B), H = size_t(s.H), groups = size_t(s.groups);
  mutants::Args a{};
  a.T = s.T, a.B = s.B, a.H = s.H, a.U = s.U;
  a.groups = s.groups, a.extra_blocks = s.extra_blocks, a.fault = fault;
  a.words = zeroed_words(std::max<size_t>(4 * B * H, 64));
  a.payload = emu::alloc(2 * B * H * 2, "payload");
  double error = 0;
  for (int launch_index = 0; launch_index < launches; ++launch_index) {
    a.epoch = same_epoch ? 0 : uint32_t(launch_index * s.T);
    a.x = random_input(groups * T * B * H, 1.f, "x");
    a.w = random_input(H * H, 1.5f / std::sqrt(float(H)), "w");
    a.h_0 = random_input(groups * B * H, 1.f, "h_0");
    a.y = output(groups * T * B * H, "y");
    if (launch(a)) return INFINITY;
    error = worst(error, recurrence_error(a, in_bf16));
  }
  return error;
}

double run_operations(int fault) {
  mutants::Args a{};
  a.fault = fault;
  a.x = eighths_input(16 * 16, "x");
  a.w = eighths_input(16 * 8, "w");
  a.y = output(480, "y");
  if (mutants::launch_operations(a)) return INFINITY;
  double sum = 32, error = 0;
  for (int l = 0; l < 32; ++l) sum += a.x[l];
  for (int l = 0; l < 32; ++l) {
    error = worst(error, a.y[l] - sum);
    error = worst(error, a.y[32 + l] - a.x[l ^ 5]);
    error = worst(error, a.y[64 + l] - a.x[3]);
  }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      double d = 1;
      for (int k = 0; k < 16; ++k) d += a.x[row * 16 + k] * a.w[k * 8 + column];
      for (int format = 0; format < 3; ++format)
        error = worst(error, a.y[96 + 128 * format + row * 8 + column] - d);
    }
  return error;
}

double run_tile(int fault, int blocks) {
  constexpr int kThreads = 64;
  mutants::Args a{};
  a.fault = fault;
  a.groups = blocks;
  a.x = random_input(kThreads * 4, 1.f, "x");
  if (fault == mutants::kNoTileBarrier) emu::define(const_cast<float*>(a.x), kThreads * 16);
  a.y = output(size_t(blocks) * kThreads, "y");
  std::vector<float> on_host(1);
  if (fault == mutants::kHostPointer) a.w = on_host.data();
  if (mutants::launch_tile(a)) return INFINITY;
  double error = 0;
  for (int i = 0; i < blocks * kThreads; ++i) {
    const float* x = a.x + (i + 1) % kThreads * 4;
    error = worst(error, a.y[i] - (double(x[0]) + x[1] + x[2] + x[3] + i % kThreads));
  }
  return error;
}

double run_waits(int fault, int blocks) {
  mutants::Args a{};
  a.fault = fault;
  a.groups = blocks;
  a.words = zeroed_words(size_t(blocks));
  a.y = output(size_t(blocks), "y");
  if (mutants::launch_waits(a)) return INFINITY;
  double error = 0;
  for (int i = 0; i < blocks; ++i) error = worst(error, a.y[i] - double(i));
  return error;
}

}  // namespace

// The largest error; findings are the emulator's.
// kernel: w(ords), f(lags), c(luster), o(perations), t(ile), s(pins)
FASTRNN_EXPORT double mutants_run(char kernel, int fault, int T, int B, int H, int U, int groups,
                                  int extra_blocks, int launches, int same_epoch) {
  emu::reset();
  generator.seed(7);
  Shape s{T, B, H, U, groups, extra_blocks};
  switch (kernel) {
    case 'w': return run_recurrence(mutants::launch_words, false, s, fault, launches, same_epoch);
    case 'f': return run_recurrence(mutants::launch_flags, true, s, fault, launches, same_epoch);
    case 'c': return run_recurrence(mutants::launch_cluster, false, s, fault, launches, same_epoch);
    case 'o': return run_operations(fault);
    case 't': return run_tile(fault, groups);
    default: return run_waits(fault, groups);
  }
}

// y [blocks, 64] from x [64, 4], both from emu::alloc
FASTRNN_EXPORT int mutants_tile(const float* x, float* y, int blocks) {
  mutants::Args a{};
  a.x = x, a.y = y, a.groups = blocks;
  return mutants::launch_tile(a);
}

// for comparison with another implementation of the formats
FASTRNN_EXPORT unsigned mutants_to_bf16(float v) { return dev::from_float<dev::bf16>(v).bits; }
FASTRNN_EXPORT unsigned mutants_to_f16(float v) { return dev::from_float<dev::f16>(v).bits; }
FASTRNN_EXPORT float mutants_from_f16(unsigned bits) { return dev::to_float(dev::f16{uint16_t(bits)}); }
