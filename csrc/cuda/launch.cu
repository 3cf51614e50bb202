// Chooses the tier of a call and hands calls to their tiers.
#include "launch.h"

#include <cstring>

#include "common.cuh"
#include "tiles.h"

namespace fastrnn::cuda {

Tier find_tier(const char* name) {
  int tier = 0;
  while (tier < int(Tier::kUnknown) && std::strcmp(name, kTierNames[tier]) != 0) ++tier;
  return Tier(tier);
}

static Choice step_choice(const ForwardParams& params, bool allow_tf32) {
  Choice choice{};
  choice.tier = Tier::kStep;
  choice.tf32 = allow_tf32 && params.dtype == DType::kFloat32;
  choice.description = "per-step: a cuBLAS product and a pointwise kernel a step";
  return choice;
}

// kUnknown where nothing like it was measured. Cells between have gates as those of the next one up: 2 as 3.
static Tier measured_tier(const ForwardParams& params, bool backward, const Device& device, bool allow_tf32) {
  // Of a single step a launch is all there is.
  if (device.compute_capability != tiles::kMeasuredCapability || params.steps < 2) return Tier::kUnknown;
  const int gates = kCells[params.cell].gates;
  const tiles::Arithmetic arithmetic = tiles::is_half(params.dtype) ? tiles::Arithmetic::kHalf
                                       : allow_tf32                 ? tiles::Arithmetic::kTF32
                                                                    : tiles::Arithmetic::kFloat32;
  for (const tiles::MeasuredTier& x : tiles::kMeasuredTiers)
    if (x.gates == (gates == 2 ? 3 : gates) && x.arithmetic == arithmetic && x.backward == backward &&
        params.batch * params.groups <= x.rows && params.hidden <= x.hidden)
      return x.tier;
  return Tier::kUnknown;
}

Choice choose(const ForwardParams& params, bool backward, const Device& device, bool allow_tf32) {
  Choice choice{};
  if (check_sizes(params) && params.batch > 0 && params.steps > 0) {
    const Tier measured = measured_tier(params, backward, device, allow_tf32);
    if (choose_from(measured, params, backward, device, allow_tf32, &choice)) return choice;
    // Of several groups the grid tier may not hold the weights, where each has a cluster that does.
    if (measured == Tier::kGrid && cluster_choice(params, backward, device, allow_tf32, &choice)) return choice;
    if (resident_choice(params, backward, device, &choice)) return choice;
    if (grid_choice(params, backward, device, allow_tf32, false, &choice)) return choice;
  }
  return step_choice(params, allow_tf32);
}

bool choose_from(Tier tier, const ForwardParams& params, bool backward, const Device& device, bool allow_tf32,
                 Choice* choice) {
  if (!check_sizes(params) || params.batch < 1) return false;
  switch (tier) {
    case Tier::kStep: return *choice = step_choice(params, allow_tf32), true;
    case Tier::kResident: return resident_choice(params, backward, device, choice);
    case Tier::kGrid: return grid_choice(params, backward, device, allow_tf32, true, choice);
    case Tier::kCluster: return cluster_choice(params, backward, device, allow_tf32, choice);
    default: return false;
  }
}

int64_t workspace_bytes(const ForwardParams& params, const Choice& choice, bool backward) {
  const bool has = choice.tier == Tier::kGrid || choice.tier == Tier::kCluster;
  return has ? grid_workspace_bytes(params, choice, backward) : 0;
}

int recurrent_forward(const ForwardParams& params, const Choice& choice, void* workspace, void* stream) {
  if (!check_sizes(params)) return int(dev::kInvalidValue);
  switch (choice.tier) {
    case Tier::kResident: return resident_forward(params, choice, stream);
    case Tier::kGrid: return grid_forward(params, choice, workspace, stream);
    case Tier::kCluster: return cluster_forward(params, choice, workspace, stream);
    default: return int(dev::kInvalidValue);
  }
}

int recurrent_backward(const BackwardParams& params, const Choice& choice, void* workspace, void* stream) {
  if (!check_sizes(params)) return int(dev::kInvalidValue);
  switch (choice.tier) {
    case Tier::kResident: return resident_backward(params, choice, stream);
    case Tier::kGrid: return grid_backward(params, choice, workspace, stream);
    case Tier::kCluster: return cluster_backward(params, choice, workspace, stream);
    default: return int(dev::kInvalidValue);
  }
}

}  // namespace fastrnn::cuda
