// The CPU recurrence from the outside: choose the instruction set once, plan a call, run it.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <numeric>
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

bool supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (name == "avx512bf16") return supported("avx512") && __builtin_cpu_supports("avx512bf16");
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("f16c");
#endif
  return name == "baseline";
}

struct Choice {
  const Kernels *all, *of_bfloat16;
};

Choice choose() {
  const char* wanted = std::getenv("FASTRNN_ISA");
  for (const Choice& choice : {Choice{avx512_kernels(), avx512bf16_kernels()}, {avx512_kernels(), avx512_kernels()},
                               {avx2_kernels(), avx2_kernels()}, {baseline_kernels(), baseline_kernels()}}) {
    const Kernels* newest = choice.of_bfloat16;
    if (choice.all && newest && (!wanted || std::string(wanted) == newest->name) && supported(newest->name))
      return choice;
  }
  throw std::invalid_argument("FASTRNN_ISA: expected avx512bf16, avx512, avx2 or baseline, as this CPU and build have "
                              "them, got " + std::string(wanted ? wanted : ""));
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

const Kernels& kernels(DType dtype) { return dtype == DType::kBFloat16 ? *choice().of_bfloat16 : *choice().all; }

struct Free {
  void operator()(char* p) const { std::free(p); }
};

using Memory = std::unique_ptr<char, Free>;

// Fails as torch's allocator does, with its words: they are what callers look for. Packed weights that are read once a
// step from beyond the second-level cache are read the faster the fewer pages they have.
Memory allocate(int64_t bytes) {
  const bool huge = bytes >= 2 * kHugePage;
  if (huge) bytes = round_up(bytes, kHugePage);
  Memory memory(static_cast<char*>(std::aligned_alloc(huge ? kHugePage : 64, bytes)));
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
void run(const Plan& plan, int64_t workspace_bytes, const Make& make) {
  const int64_t bytes = round_up(std::max<int64_t>(workspace_bytes, 64), 64);
  const Memory workspace = allocate(bytes * plan.teams);
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
  run(plan, of_dtype.forward_workspace(params, layer, plan),
      [&](char* own, int member) { return of_dtype.forward(params, layer, plan, own, member); });
}

void run_backward(const BackwardParams& params, const LayerBackwardParams* layer, int threads) {
  const Plan plan = fitting_plan(threads, [&](int threads) { return make_backward_plan(params, layer, threads); });
  const Kernels& of_dtype = kernels(params.dtype);
  run(plan, of_dtype.backward_workspace(params, layer, plan),
      [&](char* own, int member) { return of_dtype.backward(params, layer, plan, own, member); });
}

thread_local bool uniform = false;

}  // namespace

void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const int64_t from = reinterpret_cast<int64_t>(data), begin = round_up(from, kHugePage);
  const int64_t end = (from + bytes) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

bool set_uniform(bool on) { return std::exchange(uniform, on); }

const char* instruction_set() { return choice().of_bfloat16->name; }

void share_rows(const ForwardParams& p, Plan& plan) {
  plan.shared_lengths = !p.lengths || p.lengths_stride_p == 0;
  const int members = plan.split_rows ? plan.team_size : 1;
  std::vector<int64_t> order(p.batch);
  for (int64_t group = 0; group < (plan.shared_lengths ? 1 : p.groups); ++group) {
    const auto length = [&](int64_t row) {
      return p.lengths ? p.lengths[row * p.lengths_stride_b + group * p.lengths_stride_p] : p.steps;
    };
    std::iota(order.begin(), order.end(), 0);
    if (p.lengths)
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
    int64_t first = 0;
    for (int member = 0; member < members; ++member) {
      Rows rows;
      rows.first = first;
      // Every members-th row, so that long and short ones are shared evenly.
      for (int64_t i = member; i < p.batch; i += members) {
        rows.row.push_back(order[i]);
        rows.length.push_back(length(order[i]));
      }
      first += rows.size();
      plan.all_rows.push_back(std::move(rows));
    }
  }
}

namespace {

// rows_worth_packing(depth): from how many rows (steps times batch) on weights of so many inputs are packed.
template <class RowsWorthPacking>
Plan plan_for(const ForwardParams& p, const LayerParams* layer, int threads, const RowsWorthPacking& rows_worth_packing) {
  Plan plan;
  plan.from_the_end = false;
  // Waking a thread costs some microseconds, and as much as the call if its core is busy: short calls stay on one.
  constexpr int64_t kWorthAThread = 1 << 18;  // multiply-adds a thread and call
  const int64_t products = p.batch * kCells[p.cell].gates * p.hidden * p.width;  // a group and step
  const int64_t projected = layer ? p.batch * kCells[p.cell].gates * p.hidden * layer->size : 0;
  plan.work = p.steps * p.groups * (products + projected);
  threads = static_cast<int>(std::clamp<int64_t>(plan.work / kWorthAThread, 1, std::max(threads, 1)));
  plan.teams = static_cast<int>(std::min<int64_t>(threads, p.groups));
  plan.team_size = threads / plan.teams;
  // Splitting rows needs no barrier but streams all weights through every core; it pays while they fit beside the
  // rest in a core's second-level cache and every thread keeps a few tiles of rows.
  constexpr int64_t kCachedWeights = 512 << 10, kRowsPerThread = 8;
  const int64_t element = computed_bytes(p.dtype);
  const int64_t weights = (kCells[p.cell].gates * p.hidden * p.width + (p.weight_hr ? p.hidden * p.width : 0)) * element;
  plan.split_rows = plan.team_size == 1 ||
                    (weights <= kCachedWeights && p.batch >= kRowsPerThread * plan.team_size);
  // Sharing a small step costs more than it saves: a barrier takes about 1 us, in which a thread does some thousand
  // flops.
  constexpr int64_t kWorthABarrier = 16 << 10;  // multiply-adds a thread and step
  if (!plan.split_rows)
    plan.team_size = static_cast<int>(std::clamp<int64_t>(products / kWorthABarrier, 1, plan.team_size));
  if (plan.team_size == 1) plan.split_rows = true;

  // A batch of four, which an unpacked product takes at once, reads weights unpacked where they are narrower so.
  const DType weight_dtype = layer ? layer->weight_dtype : p.dtype;
  const bool narrow = weight_dtype != p.dtype;
  // Packed and unpacked products sum in different orders: where plan.uniform, the steps have no say in which it is.
  plan.uniform = uniform;
  const int64_t pack_rows = (uniform ? 1 : p.steps) * p.batch;
  const auto pack = [&](int64_t depth) { return weight_dtype != DType::kInt8 && pack_rows >= rows_worth_packing(depth); };
  plan.pack_ih = layer && pack(layer->size);
  plan.pack_hh = pack(p.width) && !(narrow && p.batch <= 4);

  // A chunk has enough rows to fill the register tiles many times over while its gates stay in the second-level cache
  // beside the weights; more where weight_ih, read once a chunk, does not fit there itself.
  const int64_t rows = std::max<int64_t>(ceil_div(p.batch, plan.split_rows ? plan.team_size : 1), 1);
  const int64_t weight_ih = projected / std::max<int64_t>(p.batch, 1) * element / (plan.split_rows ? 1 : plan.team_size);
  constexpr int64_t kSecondLevel = 1 << 20;
  const int64_t chunk_rows = weight_ih <= kSecondLevel ? 96 : weight_ih <= 4 * kSecondLevel ? 256 : 512;
  const int64_t chunks = std::max<int64_t>(ceil_div(p.steps, std::max<int64_t>(chunk_rows / rows, 1)), 1);
  plan.chunk = layer ? std::max<int64_t>(ceil_div(p.steps, chunks), 1) : 0;
  plan.pack_late = plan.chunk == p.steps && (plan.team_size == 1 || !plan.split_rows);

  share_rows(p, plan);
  return plan;
}

}  // namespace

// Packing costs about as much as the products with 32 rows. Without it each product is summed over its lanes at the end,
// which is the less beside it the deeper it is; but many steps read packed weights faster, however deep, for those lie in
// huge pages. A backward pass packs more, some of it once a chunk.
Plan make_plan(const ForwardParams& p, const LayerParams* layer, int threads) {
  constexpr int64_t kRowsWorthPacking = 32, kDepthOfARow = 6, kMostRows = 84;
  // Narrower types are widened, unpacked ones once for every tile of rows.
  const bool as_stored = (p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64) &&
                         (!layer || layer->weight_dtype == p.dtype);
  return plan_for(p, layer, threads, [&](int64_t depth) {
    return as_stored ? std::clamp(depth / kDepthOfARow, kRowsWorthPacking, kMostRows) : kRowsWorthPacking;
  });
}

Plan make_backward_plan(const BackwardParams& p, const LayerBackwardParams* layer, int threads) {
  constexpr int64_t kRowsWorthPacking = 96;
  const auto rows_worth_packing = [](int64_t) { return kRowsWorthPacking; };
  if (!layer) return plan_for(p, nullptr, threads, rows_worth_packing);
  LayerParams alike{};
  alike.size = layer->size;
  alike.weight_dtype = p.dtype;
  Plan plan = plan_for(p, &alike, threads, rows_worth_packing);
  // Enough rows that adding to the weights' gradients is little beside the products, few enough for the caches.
  constexpr int64_t kChunkRows = 512;
  plan.chunk = std::clamp<int64_t>(kChunkRows / std::max<int64_t>(p.batch, 1), 1, std::max<int64_t>(p.steps, 1));
  // Weights that have to be packed however few the rows are (of half types, of odd sizes): a panel's memory stays in the
  // cache, and all panels' would be as much as the weights take. So few rows are one block of the input's gradient, which
  // reads a panel once.
  plan.pack_late = plan.team_size == 1 && p.steps * p.batch < kRowsWorthPacking;
  return plan;
}

void recurrent_forward(const ForwardParams& params, int threads) { run_forward(params, nullptr, threads); }

void layer_forward(const ForwardParams& params, const LayerParams& layer, int threads) {
  run_forward(params, &layer, threads);
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
  const Memory workspace = allocate(bytes * members);
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
