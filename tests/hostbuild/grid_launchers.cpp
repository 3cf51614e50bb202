// The grid tier's launchers for tests/cuda/test_host_grid.py: any tile may be asked for, also ones that no table
// holds.
#include "cuda/grid_tiles.h"
#include "cuda/launch.h"
#include "emulator.h"

#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))

using namespace fastrnn;

namespace {
cuda::Choice choice_of(int units, int rows, int threads, bool tf32, bool flags) {
  cuda::Choice choice{};
  choice.tier = cuda::Tier::kGrid;
  choice.units = units;
  choice.rows = rows;
  choice.threads = threads;
  choice.tf32 = tf32;
  choice.variant = flags;
  return choice;
}
}  // namespace

// So that the caller's picture of BackwardParams is not older than this one.
FASTRNN_EXPORT int64_t grid_test_params_bytes() { return sizeof(BackwardParams); }

FASTRNN_EXPORT int64_t grid_test_workspace(const BackwardParams* p, bool backward, int units, int rows,
                                           int threads, bool tf32, bool flags) {
  return cuda::grid_workspace_bytes(*p, choice_of(units, rows, threads, tf32, flags), backward);
}

FASTRNN_EXPORT int grid_test_run(const BackwardParams* p, bool backward, int units, int rows, int threads,
                                 bool tf32, bool flags, void* workspace) {
  const cuda::Choice choice = choice_of(units, rows, threads, tf32, flags);
  return backward ? cuda::grid_backward(*p, choice, workspace, nullptr)
                  : cuda::grid_forward(*p, choice, workspace, nullptr);
}

// What the table says: 0 where the tier does not take the call.
FASTRNN_EXPORT int grid_test_choice(const BackwardParams* p, bool backward, int multiprocessors, bool allow_tf32,
                                    int64_t numbers[6]) {
  cuda::Choice choice{};
  if (!cuda::grid_choice(*p, backward, {multiprocessors, 90, 232448}, allow_tf32, false, &choice)) return 0;
  const int64_t values[] = {choice.units, choice.rows, choice.threads, choice.blocks, choice.shared,
                            choice.variant};
  for (int i = 0; i < 6; ++i) numbers[i] = values[i];
  return 1;
}
