// The CPU recurrence from the outside: choose the instruction set once, plan a call, run it.
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(_WIN32)
#include <malloc.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "../cells/registry.h"
#include "../launch.h"
#include "plan.h"
#include "processors.h"
#include "team.h"

namespace fastrnn::cpu {
namespace {

#if defined(__x86_64__)
// AMX, of bfloat16. Linux keeps its registers for a process that has asked for them, and for all of its threads. It refuses
// where it does not know them, or where a thread's stack for signals is too small for them.
bool may_use_amx() {
#if defined(__linux__)
  constexpr unsigned kBFloat16 = 1 << 22, kTiles = 1 << 24;  // of leaf 7's EDX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBFloat16) && (d & kTiles) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
bool has_f16c() {  // which clang 14's __builtin_cpu_supports does not know
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (name == "avx512bf16") return supported("avx512") && __builtin_cpu_supports("avx512bf16");
  if (name == "amx") return supported("avx512bf16") && may_use_amx();
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
  return name == "baseline";
}

struct Choice {
  const char* name;
  const Kernels *all, *of_bfloat16;
};

// By the environment, which need not say anything.
bool wanted(const std::string& name) {
  const char* one = std::getenv("FASTRNN_ISA");
  return !one || name == one;
}

Choice choose() {
  for (const Choice& choice : {Choice{"amx", avx512_kernels(), avx512bf16_kernels()},
                               {"avx512bf16", avx512_kernels(), avx512bf16_kernels()},
                               {"avx512", avx512_kernels(), avx512_kernels()},
                               {"avx2", avx2_kernels(), avx2_kernels()},
                               {"baseline", baseline_kernels(), baseline_kernels()}})
    if (choice.all && choice.of_bfloat16 && wanted(choice.name) && supported(choice.name)) return choice;
  const char* one = std::getenv("FASTRNN_ISA");
  throw std::invalid_argument("FASTRNN_ISA: expected amx, avx512bf16, avx512, avx2 or baseline, as this CPU and build "
                              "have them, got " + std::string(one ? one : ""));
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

const Kernels& kernels(DType dtype) { return dtype == DType::kBFloat16 ? *choice().of_bfloat16 : *choice().all; }

// Windows' own free does not know how to free what is aligned.
#if defined(_WIN32)
void* aligned(int64_t alignment, int64_t bytes) { return _aligned_malloc(bytes, alignment); }
void free_aligned(void* p) { _aligned_free(p); }
#else
void* aligned(int64_t alignment, int64_t bytes) { return std::aligned_alloc(alignment, bytes); }
void free_aligned(void* p) { std::free(p); }
#endif

struct Free {
  void operator()(char* p) const { free_aligned(p); }
};

using Memory = std::unique_ptr<char, Free>;

// Fails as torch's allocator does, with its words: they are what callers look for. Packed weights that are read once a
// step from beyond the second-level cache are read the faster the fewer pages they have; but a huge page is new in every
// call, and the kernel clears all of it, which takes a few steps to gain.
Memory allocate(int64_t bytes, int64_t steps) {
  constexpr int64_t kStepsWorthClearing = 8;
  const bool huge = bytes >= 2 * kHugePage && steps >= kStepsWorthClearing;
  if (huge) bytes = round_up(bytes, kHugePage);
  Memory memory(static_cast<char*>(aligned(huge ? kHugePage : 64, bytes)));
  if (!memory)
    throw std::runtime_error("can't allocate memory: the workspace of a call takes " + std::to_string(bytes) + " bytes");
  if (huge) use_huge_pages(memory.get(), bytes);
  return memory;
}

// No more than there are processors: threads beyond them would only wait for each other. make(threads) gives a plan.
template <class Make>
Plan fitting_plan(int threads, const Make& make) {
  Plan plan = make(threads);
  if (plan.members() > 1)
    if (const int processors = usable_processors(); processors < plan.members()) plan = make(processors);
  return plan;
}

// make(a team's workspace, member) gives a member's part.
template <class Make>
void run(const Plan& plan, int64_t steps, int64_t workspace_bytes, const Make& make) {
  const int64_t bytes = round_up(std::max<int64_t>(workspace_bytes, 64), 64);
  const Memory workspace = allocate(bytes * plan.teams, steps);
  Parts parts(plan.members(), plan.team_size);
  for (int member = 0; member < plan.members(); ++member)
    parts.add(make(workspace.get() + member / plan.team_size * bytes, member));
  parts.run(plan.work);
}

// Was the last call of one step with these weights, on this thread, one from the first unit to the last? Weights are told
// apart by where they lie; those that share a place here spoil each other's turns, which costs time and nothing else.
bool take_turns(const void* weights) {
  thread_local std::array<bool, 256> turns{};
  bool& turn = turns[reinterpret_cast<uintptr_t>(weights) * 0x9e3779b97f4a7c15 >> 56];
  return std::exchange(turn, !turn);
}

void run_forward(const ForwardParams& params, const LayerParams* layer, int threads) {
  Plan plan = fitting_plan(threads, [&](int threads) { return make_plan(params, layer, threads); });
  plan.from_the_end = layer && params.steps == 1 && take_turns(params.weight_hh);
  const Kernels& of_dtype = kernels(params.dtype);
  run(plan, params.steps, of_dtype.forward_workspace(params, layer, plan),
      [&](char* own, int member) { return of_dtype.forward(params, layer, plan, own, member); });
}

void run_backward(const BackwardParams& params, const LayerBackwardParams* layer, int threads) {
  const Plan plan = fitting_plan(threads, [&](int threads) { return make_backward_plan(params, layer, threads); });
  const Kernels& of_dtype = kernels(params.dtype);
  run(plan, params.steps, of_dtype.backward_workspace(params, layer, plan),
      [&](char* own, int member) { return of_dtype.backward(params, layer, plan, own, member); });
}

}  // namespace

void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const int64_t from = reinterpret_cast<int64_t>(data), begin = round_up(from, kHugePage);
  const int64_t end = (from + bytes) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

const char* instruction_set() { return choice().name; }

int vector_bytes() {
  static const int bytes = [] {
    const char* one = std::getenv("FASTRNN_ISA");
    const std::string name = one ? one : supported("avx512") ? "avx512" : supported("avx2") ? "avx2" : "baseline";
    return name == "baseline" ? 16 : name == "avx2" ? 32 : 64;
  }();
  return bytes;
}

bool has_matrix_unit() {
#if defined(FASTRNN_SOFTWARE_MATRIX)
  return true;
#else
  static const bool has = wanted("amx") && supported("amx");
  return has;
#endif
}

void recurrent_forward(const ForwardParams& params, int threads) { run_forward(params, nullptr, threads); }

void layer_forward(const ForwardParams& params, const LayerParams& layer, int threads) {
  run_forward(params, &layer, threads);
}

void layers_forward(const std::vector<LayerCall>& layers, int stages, int threads) {
  if (stages == 1) {
    for (const LayerCall& call : layers) layer_forward(call.params, call.layer, threads);
    return;
  }
  threads = std::max(std::min(threads, usable_processors()), stages);
  const PipelinePlan plan = make_pipeline_plan(layers, stages, threads);
  std::vector<Memory> workspaces;
  Pipeline pipeline(stages, plan.team_size, plan.chunks);
  int64_t work = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto& [params, layer] = layers[l];
    const Kernels& of_dtype = kernels(params.dtype);
    workspaces.push_back(allocate(round_up(of_dtype.forward_workspace(params, &layer, plan.layers[l]), 64), params.steps));
    std::vector<Part> parts;
    for (int member = 0; member < plan.layers[l].team_size; ++member)
      parts.push_back(of_dtype.forward(params, &layer, plan.layers[l], workspaces[l].get(), member));
    pipeline.add(plan.stage[l], std::move(parts));
    work += plan.layers[l].work;
  }
  pipeline.run(work);
}

void recurrent_backward(const BackwardParams& params, int threads) { run_backward(params, nullptr, threads); }

void layer_backward(const BackwardParams& params, const LayerBackwardParams& layer, int threads) {
  run_backward(params, &layer, threads);
}

void gemm(const GemmParams& params, int threads) {
  constexpr int64_t kWorthAThread = 1 << 16;  // multiply-adds
  const int64_t work = params.m * params.n * params.k;
  int members = static_cast<int>(std::clamp<int64_t>(work / kWorthAThread, 1, std::max(threads, 1)));
  if (members > 1) members = std::min(members, usable_processors());
  const int64_t bytes = round_up(std::max<int64_t>(kernels(params.dtype).gemm_workspace(params), 64), 64);
  const Memory workspace = allocate(bytes * members, 1);
  const auto one = [&](int member) { kernels(params.dtype).gemm(params, workspace.get() + member * bytes, member, members); };
  share_out(
      members, work, [&](int member) { return one(member), 0; },
      [&] {
        for (int member = 0; member < members; ++member) one(member);
      });
}

void bernoulli(DType dtype, void* out, int64_t begin, int64_t end, uint64_t seed, double p) {
  kernels(DType::kFloat32).bernoulli(dtype, out, begin, end, seed, p);  // one table has it for every dtype
}

}  // namespace fastrnn::cpu
