// Plans: how many threads a call is worth, what they share, and how its weights are read.
#include "plan.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>

#include "../cells/registry.h"
#include "processors.h"

namespace fastrnn::cpu {
namespace {

thread_local bool uniform = false;

}  // namespace

bool set_uniform(bool on) { return std::exchange(uniform, on); }

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

// Waking a thread costs some microseconds, and as much as the call if its core is busy: short calls stay on one.
constexpr int64_t kWorthAThread = 1 << 18;  // multiply-adds a thread and call
// Sharing a small step costs more than it saves: a barrier takes about 1 us, in which a thread does some thousand
// flops.
constexpr int64_t kWorthABarrier = 16 << 10;  // multiply-adds a thread and step

// Multiply-adds of a forward call. layer: null where gates_ih are given.
int64_t work_of(const ForwardParams& p, const LayerParams* layer) {
  return p.steps * p.groups * p.batch * kCells[p.cell].gates * p.hidden * (p.width + (layer ? layer->size : 0));
}

// rows_worth_packing(depth, rows): from how many rows (steps times batch) on weights of so many inputs are packed, where a
// member has so many rows of a step.
template <class RowsWorthPacking>
Plan plan_for(const ForwardParams& p, const LayerParams* layer, int threads, const RowsWorthPacking& rows_worth_packing) {
  Plan plan;
  plan.from_the_end = false;
  const int64_t products = p.batch * kCells[p.cell].gates * p.hidden * p.width;  // a group and step
  const int64_t projected = layer ? p.batch * kCells[p.cell].gates * p.hidden * layer->size : 0;
  plan.work = work_of(p, layer);
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
  if (!plan.split_rows)
    plan.team_size = static_cast<int>(std::clamp<int64_t>(products / kWorthABarrier, 1, plan.team_size));
  if (plan.team_size == 1) plan.split_rows = true;

  // A batch of four, which an unpacked product takes at once, reads weights unpacked where they are narrower so.
  const DType weight_dtype = layer ? layer->weight_dtype : p.dtype;
  const bool narrow = weight_dtype != p.dtype;
  // Packed and unpacked products sum in different orders: where plan.uniform, the steps have no say in which it is.
  plan.uniform = uniform;
  const int64_t pack_rows = (uniform ? 1 : p.steps) * p.batch;
  const int64_t rows = std::max<int64_t>(ceil_div(p.batch, plan.split_rows ? plan.team_size : 1), 1);
  const auto pack = [&](int64_t depth) {
    return weight_dtype != DType::kInt8 && pack_rows >= rows_worth_packing(depth, rows);
  };
  plan.pack_ih = layer && pack(layer->size);
  plan.pack_hh = pack(p.width) && !(narrow && p.batch <= 4);

  // A chunk has enough rows to fill the register tiles many times over while its gates stay in the second-level cache
  // beside the weights; more where weight_ih, read once a chunk, does not fit there itself.
  const int64_t weight_ih = projected / std::max<int64_t>(p.batch, 1) * element / (plan.split_rows ? 1 : plan.team_size);
  constexpr int64_t kSecondLevel = 1 << 20;
  const int64_t chunk_rows = weight_ih <= kSecondLevel ? 96 : weight_ih <= 4 * kSecondLevel ? 256 : 512;
  const int64_t chunks = std::max<int64_t>(ceil_div(p.steps, std::max<int64_t>(chunk_rows / rows, 1)), 1);
  plan.chunk = layer ? std::max<int64_t>(ceil_div(p.steps, chunks), 1) : 0;
  const bool owns_panels = plan.team_size == 1 || !plan.split_rows;
  plan.hh_late = p.steps == 1 && owns_panels;
  plan.ih_late = plan.chunk == p.steps && owns_panels;

  share_rows(p, plan);
  return plan;
}

}  // namespace

// Packing costs about as much as the products with 32 rows. Without it each product of few rows is summed over its lanes at
// the end, which is the less beside it the deeper it is; and where rows of the weights begin anywhere in a cache line, nearly
// every load takes two. A single step's rows are packed in the weights' place (dot-inl.h) if they are one to four vectors;
// of more rows of a single step a panel's memory stays in the cache. A backward pass packs more, some of it once a chunk.
Plan make_plan(const ForwardParams& p, const LayerParams* layer, int threads) {
  constexpr int64_t kRowsWorthPacking = 32, kDepthOfARow = 6, kMostRows = 84, kMostRowsOfAStep = 48;
  constexpr int64_t kRowsAcrossLines = 14, kLine = 64, kNever = std::numeric_limits<int64_t>::max();
  const bool one_step = p.steps == 1 && !uniform;
  const int64_t least_turned = 16, most_turned = 4 * vector_bytes() / computed_bytes(p.dtype);
  const int64_t most = one_step ? kMostRowsOfAStep : kMostRows;
  // Narrower types are widened, unpacked ones once for every tile of rows.
  const bool as_stored = (p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64) &&
                         (!layer || layer->weight_dtype == p.dtype);
  return plan_for(p, layer, threads, [&](int64_t depth, int64_t rows) {
    if (as_stored && one_step && rows >= least_turned && rows <= most_turned) return kNever;
    if (as_stored && depth * computed_bytes(p.dtype) % kLine != 0) return kRowsAcrossLines;
    return as_stored ? std::clamp(depth / kDepthOfARow, kRowsWorthPacking, most) : kRowsWorthPacking;
  });
}

Plan make_backward_plan(const BackwardParams& p, const LayerBackwardParams* layer, int threads) {
  constexpr int64_t kRowsWorthPacking = 96;
  const auto rows_worth_packing = [](int64_t, int64_t) { return kRowsWorthPacking; };
  if (!layer) return plan_for(p, nullptr, threads, rows_worth_packing);
  LayerParams alike{};
  alike.size = layer->size;
  alike.weight_dtype = p.dtype;
  Plan plan = plan_for(p, &alike, threads, rows_worth_packing);
  // Enough rows that adding to the weights' gradients is little beside the products, few enough for the caches.
  constexpr int64_t kChunkRows = 512;
  plan.chunk = std::clamp<int64_t>(kChunkRows / std::max<int64_t>(p.batch, 1), 1, std::max<int64_t>(p.steps, 1));
  // A panel's memory stays in the cache, and all panels' would be as much as the weights take. So the rows of one step, and
  // few rows of several, are one block of the input's gradient, which reads a panel once. (Weights of half types or odd
  // sizes are packed for any number of rows.)
  plan.ih_late = plan.team_size == 1 && (p.steps == 1 || p.steps * p.batch < kRowsWorthPacking);
  return plan;
}

// A stage's time is that of its layers, one after the other in each chunk; the slowest stage sets the pace, and the last
// one ends stages - 1 chunks after it would have alone.
PipelinePlan make_pipeline_plan(const std::vector<LayerCall>& layers, int stages, int threads) {
  const int count = static_cast<int>(layers.size());
  const int64_t steps = layers[0].params.steps, batch = std::max<int64_t>(layers[0].params.batch, 1);
  PipelinePlan result{};
  std::vector<double> pace(stages);
  int64_t most = steps;
  for (int l = 0; l < count; ++l) {
    const auto& [p, layer] = layers[l];
    Plan plan = make_plan(p, &layer, std::max(threads / stages, 1));
    const double step = double(plan.work) / double(std::max<int64_t>(steps, 1)) / plan.members();
    result.stage.push_back(l * stages / count);
    pace[result.stage[l]] += step + (plan.split_rows ? 0 : kWorthABarrier);
    result.team_size = std::max(result.team_size, plan.members());
    most = std::min(most, plan.chunk);
    result.layers.push_back(std::move(plan));
  }
  result.time = *std::max_element(pace.begin(), pace.end());
  result.chunks = 1;
  if (stages == 1) return result;
  // Many chunks, so that stages soon have work; but enough rows in each that weight_ih is read for a few of them at once.
  constexpr int64_t kChunks = 16, kRows = 8;  // of a stage, in a chunk
  const int64_t least = std::min(ceil_div(kRows, batch), most);
  const int64_t chunk = std::clamp<int64_t>(steps / (kChunks * (stages - 1)), least, most);
  result.chunks = ceil_div(steps, chunk);
  for (Plan& plan : result.layers) {
    plan.chunk = chunk;
    plan.hh_late = plan.ih_late = false;
    plan.follows = true;
  }
  result.time *= 1 + double(stages - 1) / double(result.chunks);
  return result;
}

// No more than there are processors: threads beyond them would only wait for each other.
int stages_of(const std::vector<LayerCall>& layers, int threads) {
  // Fewer steps than this are a few chunks, of which filling and emptying the stages takes too much.
  constexpr int64_t kSteps = 32;
  if (layers.size() < 2 || layers[0].params.steps < kSteps) return 1;
  int64_t work = 0;
  for (const auto& [params, layer] : layers) work += work_of(params, &layer);
  const int most = static_cast<int>(std::min<int64_t>({int64_t(layers.size()), threads, work / kWorthAThread}));
  if (most < 2) return 1;
  threads = std::min(threads, usable_processors());
  // What the cost model does not know has to be worth it, too: the caches, and threads that others keep.
  constexpr double kWorthStages = 0.9;
  int best = 1;
  double least = kWorthStages * make_pipeline_plan(layers, 1, threads).time;
  for (int stages = 2; stages <= std::min(most, threads); ++stages)
    if (const double time = make_pipeline_plan(layers, stages, threads).time; time < least) best = stages, least = time;
  return best;
}

}  // namespace fastrnn::cpu
