// One launch from start to end: shape checks, residency, the starting order of blocks; and the schedules.
#include "runtime.h"

#include <algorithm>
#include <cstring>

namespace fastrnn::emu {

Machine machine;
Schedule schedule;
Stats stats;
Device device;

namespace {

constexpr unsigned kAgentsPerBlock = 8;  // mbarriers a block may have
constexpr size_t kMostColumns = 1 << 17, kMostClocks = 1 << 28;

int refuse(int error, const std::string& text) {
  report("refused " + text, "launch refused: " + text);
  return error;
}

int check_shape(const Config& c) {
  unsigned blocks = c.grid.x * c.grid.y * c.grid.z;
  if (!blocks || !c.block || c.block > 1024 || c.block % 32)
    return refuse(dev::kInvalidConfiguration, format("grid of %u blocks of %u threads", blocks, c.block));
  if (!c.cluster || c.cluster > 16 || c.grid.x % c.cluster)
    return refuse(dev::kInvalidConfiguration, format("grid.x %u in clusters of %u", c.grid.x, c.cluster));
  if (c.shared > device.shared_per_block + kSharedSlack)
    return refuse(dev::kInvalidValue, format("%zu bytes of shared memory", c.shared));
  if (schedule.races && size_t(blocks) * (c.block + kAgentsPerBlock) > kMostColumns)
    return refuse(dev::kInvalidConfiguration, "grid too large for the emulator's vector clocks");
  size_t resident = c.coresident ? blocks : size_t(std::max(3, schedule.resident)) * c.cluster;
  if (schedule.races && resident * c.block * blocks * (c.block + kAgentsPerBlock) > kMostClocks)
    return refuse(dev::kInvalidConfiguration, "grid too large for the emulator's race checks");
  // what the real launch answers too: the launcher's to handle, not a finding
  if (c.coresident && int(blocks) > std::min(device.coresident_blocks, kMaxResident))
    return dev::kCooperativeLaunchTooLarge;
  return dev::kSuccess;
}

// priority of resident threads
void order_threads() {
  Machine& m = machine;
  int count = int(m.threads.size());
  std::vector<int> order(size_t(count), 0);
  for (int i = 0; i < count; ++i) order[size_t(i)] = schedule.order == Order::kDescending ? count - 1 - i : i;
  if (schedule.order >= Order::kShuffled)
    for (int i = count - 1; i > 0; --i) std::swap(order[size_t(i)], order[draw(uint64_t(i) + 1)]);
  if (schedule.order >= Order::kStarveBlock) {
    int unit = schedule.order == Order::kStarveBlock ? int(m.config.block) : 32, units = count / unit;
    int victim = schedule.victim >= 0 ? schedule.victim % units : int(draw(uint64_t(units)));
    std::stable_partition(order.begin(), order.end(), [=](int t) { return t / unit != victim; });
  }
  m.at_rank = order;
  for (int i = 0; i < count; ++i) m.threads[size_t(order[size_t(i)])].rank = i;
}

// hardware starts blocks mostly in ascending order but does not promise it
void order_clusters() {
  Machine& m = machine;
  m.cluster_order.resize(m.clusters_in_grid);
  for (uint32_t i = 0; i < m.clusters_in_grid; ++i) m.cluster_order[i] = i;
  if (schedule.order == Order::kDescending) std::reverse(m.cluster_order.begin(), m.cluster_order.end());
  if (schedule.order >= Order::kShuffled)
    for (uint32_t i = m.clusters_in_grid - 1; i > 0; --i)
      std::swap(m.cluster_order[i], m.cluster_order[draw(i + 1)]);
}

void set_up(const Config& config, void (*body)(void*), void* context) {
  Machine& m = machine;
  Clocks clocks = std::move(m.clocks);  // its memory, which threads clear as they start, and a launch is over soon
  m = Machine();
  m.clocks = std::move(clocks);
  m.config = config;
  m.body = body;
  m.context = context;
  m.random = schedule.seed * 0x9E3779B97F4A7C15ull | 1;
  for (int i = 0; i < 8; ++i) draw();
  m.blocks_in_grid = config.grid.x * config.grid.y * config.grid.z;
  m.threads_in_grid = m.blocks_in_grid * config.block;
  m.columns = (m.threads_in_grid + m.blocks_in_grid * kAgentsPerBlock + 15) / 16 * 16;
  m.clusters_in_grid = m.blocks_in_grid / config.cluster;

  uint32_t resident = m.clusters_in_grid, drawn = 1 + uint32_t(draw(3));
  if (!config.coresident) resident = schedule.resident > 0 ? uint32_t(schedule.resident) : drawn;
  resident = std::min({resident, m.clusters_in_grid, kMaxResident / config.cluster});
  size_t resident_blocks = size_t(resident) * config.cluster;
  size_t resident_threads = resident_blocks * config.block;
  m.clusters.resize(resident);
  m.blocks.resize(resident_blocks);
  m.threads.resize(resident_threads);
  if (schedule.races) m.clocks.resize(resident_threads * m.columns);
  m.ready.assign((resident_threads + 63) / 64, 0);
  reserve_stacks(int(resident_threads));
  forget_read_sets();
  forget_heap_accesses();
  forget_words();
  order_threads();
  order_clusters();
  for (uint32_t i = 0; i < resident; ++i) m.clusters[i].slot = int(i);
}

dim3 block_index(uint32_t linear) {
  const dim3& g = machine.config.grid;
  return {linear % g.x, linear / g.x % g.y, linear / g.x / g.y};
}

void start_thread(Block& block, unsigned index) {
  Machine& m = machine;
  size_t slot = size_t(block.slot) * m.config.block + index;
  Thread& t = m.threads[slot];
  int rank = t.rank;
  t = Thread();
  t.rank = rank;
  t.slot = int(slot);
  t.id = block.index * m.config.block + index;
  t.lane = int(index % 32);
  t.warp = int(index / 32);
  t.block = &block;
  t.place = {dim3(index, 0, 0), block_index(block.index), dim3(m.config.block), m.config.grid};
  if (schedule.races) {
    t.clock = &m.clocks[slot * m.columns];
    std::memset(t.clock, 0, m.columns * sizeof(Clock));
    own_clock(t) = 1;
  }
  prepare(t.fiber, t.slot, thread_main);
  wake(t);
}

void start_cluster(Cluster& cluster, uint32_t index) {
  Machine& m = machine;
  cluster.blocks.clear();
  cluster.alive = int(m.config.cluster * m.config.block);
  for (unsigned rank = 0; rank < m.config.cluster; ++rank) {
    size_t slot = size_t(cluster.slot) * m.config.cluster + rank;
    Block& block = m.blocks[slot];
    block = Block();
    block.index = index * m.config.cluster + rank;
    block.slot = int(slot);
    block.alive = int(m.config.block);
    block.cluster = &cluster;
    block.warp_ops.resize(m.config.block / 32);
    cluster.blocks.push_back(&block);
    clear_window(block.slot, m.config.shared);
    for (unsigned i = 0; i < m.config.block; ++i) start_thread(block, i);
  }
}

}  // namespace

const Place& place() { return machine.current->place; }

void start_clusters() {
  Machine& m = machine;
  for (Cluster& c : m.clusters)
    if (!c.alive && m.clusters_started < m.clusters_in_grid)
      start_cluster(c, m.cluster_order[m.clusters_started++]);
}

void thread_main() {
  Machine& m = machine;
  m.body(m.context);
  Thread& t = *m.current;
  Block& block = *t.block;
  t.done = true;
  --block.cluster->alive;
  progressed();
  if (!t.open_copies.empty() || !t.copy_groups.empty())
    report("copy left", "a thread ends with asynchronous copies it has not waited for");
  if (--block.alive == 0) check_block_end(block);
  if (!block.at_barrier.empty()) {
    report_at(block.at_barrier[0]->pc, "left", "a thread ends while its block waits at this barrier");
    if (int(block.at_barrier.size()) == block.alive) {
      for (Thread* waiting : block.at_barrier) wake(*waiting);
      block.at_barrier.clear();
    }
  }
  wait_here("end", nullptr);
}

int run(const Config& config, void (*body)(void*), void* context) {
  map_arena();
  if (int error = check_shape(config)) return error;
  set_up(config, body, context);
  {
    Watchdog watchdog;
    run_until_done();
  }
  machine.current = nullptr;
  if (!machine.fatal && !machine.pushes.empty())
    report_at(machine.pushes[0].pc, "push left",
              "a push still in flight at the grid's end, from " + name_of_actor(machine.pushes[0].from));
  return dev::kSuccess;
}

std::vector<Schedule> schedules(uint64_t seed, int count) {
  std::vector<Schedule> list;
  for (int i = 0; i < count; ++i)
    list.push_back(schedule_of_kind(i % kScheduleKinds, seed * 1000003 + uint64_t(i)));
  return list;
}

Schedule schedule_of_kind(int kind, uint64_t seed) {
  Schedule s;
  s.seed = seed;
  switch (kind) {
    case 0:  // ascending, everything prompt; blocks one by one, so that no wait between them can stay hidden
      s.resident = 1;
      break;
    case 1:
      s.resident = 1;
      s.order = Order::kDescending;
      s.delivery = Delivery::kLate;
      break;
    case 2:
      s.order = Order::kShuffled;
      s.random_pick = true;
      s.delivery = Delivery::kRandom;
      s.stale = 4;
      break;
    case 3:
      s.order = Order::kStarveBlock;
      s.delivery = Delivery::kLate;
      s.stale = 2;
      break;
    case 4:  // switches almost everywhere
      s.order = Order::kShuffled;
      s.random_pick = true;
      s.preempt = 30;
      s.delivery = Delivery::kRandom;
      s.stale = 4;
      break;
    case 5:  // priorities with change points
      s.order = Order::kShuffled;
      s.preempt = 200;
      s.delivery = Delivery::kLate;
      s.stale = 3;
      break;
    case 6:
      s.order = Order::kStarveWarp;
      s.preempt = 2000;
      s.delivery = Delivery::kRandom;
      break;
    default:
      s.order = Order::kStarveBlock;
      s.preempt = 500;
      s.delivery = Delivery::kLate;
      s.stale = 2;
      break;
  }
  return s;
}

std::vector<Schedule> starve_each(uint64_t seed, int blocks, int warps) {
  std::vector<Schedule> list;
  for (int i = 0; i < blocks + warps; ++i)
    for (Delivery delivery : {Delivery::kEager, Delivery::kLate}) {
      Schedule s;
      s.seed = seed * 1000003 + list.size();
      s.order = i < blocks ? Order::kStarveBlock : Order::kStarveWarp;
      s.victim = i < blocks ? i : i - blocks;
      s.delivery = delivery;
      s.stale = 2;
      list.push_back(s);
    }
  return list;
}

}  // namespace fastrnn::emu

namespace fastrnn::dev {

const char* error_string(Error e) {
  switch (e) {
    case kSuccess: return "no error";
    case kInvalidValue: return "invalid argument";
    case kInvalidConfiguration: return "invalid configuration argument";
    case kCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

}  // namespace fastrnn::dev
