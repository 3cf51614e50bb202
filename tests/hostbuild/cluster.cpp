// What blocks of a cluster do to each other, and what happens behind a thread's back: the cluster barrier,
// mbarriers, pushes into peers' shared memory, asynchronous copies.
//
// Each mbarrier is an actor of its own. A push is a write by that actor, ordered after the past of the thread
// that issued it and before whoever waits for the phase it counts in. Sharing one orders no two pushes.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace fastrnn::emu {
namespace {

constexpr long kMostBytes = (1 << 20) - 1;  // an mbarrier's transaction count, either sign

Barrier* find_barrier(Block& block, size_t offset) {
  auto at = block.barriers.find(offset % kWindowBytes);
  return at == block.barriers.end() ? nullptr : &at->second;
}

// of the calling block; null (with a finding): not initialised
Barrier* own_barrier(const uint64_t* p, Pc pc) {
  Barrier* bar = nullptr;
  size_t offset = offset_of(p);
  Block& block = *machine.current->block;
  if (offset - window_of(block.slot) < kWindowBytes)
    bar = find_barrier(block, offset);
  if (!bar)
    report_at(pc, "no mbarrier", "an mbarrier before its init, by " + name_of_actor(machine.current->id));
  return bar;
}

void end_phase_perhaps(Barrier& bar) {
  if (bar.pending || bar.bytes) return;
  bar.ended = bar.gathering;
  std::fill(bar.gathering.begin(), bar.gathering.end(), 0);
  bar.pending = bar.arrivals;
  ++bar.phase;
  for (Thread* t : bar.waiting) wake(*t);
  bar.waiting.clear();
  progressed();
}

void count_bytes(Barrier& bar, long bytes, Pc pc) {
  bar.bytes += bytes;
  if (bar.bytes > kMostBytes || bar.bytes < -kMostBytes)
    report_at(pc, "count", format("an mbarrier counts %ld bytes, its limit is %ld", bar.bytes, kMostBytes));
}

void deliver(size_t index) {
  std::swap(machine.pushes[index], machine.pushes.back());
  Push push = std::move(machine.pushes.back());
  machine.pushes.pop_back();
  progressed();
  Block& block = machine.blocks[(push.to - kHeapBytes) / kWindowBytes];
  if (block.index != push.block || !block.alive) {
    report_at(push.pc, "gone", format("a push from %s arrives in block %u, which has ended",
                                      name_of_actor(push.from).c_str(), push.block));
    return;
  }
  Thread* running = machine.current;
  machine.current = nullptr;  // no thread does this
  bool ok = check_state(push.to, push.bytes, true, push.pc, "push");
  Barrier* bar = find_barrier(block, push.bar);
  if (ok && schedule.races) {
    Actor who{bar->agent, ++bar->agent_clock, push.clock.data()};
    check_races(push.to, push.bytes, true, who, push.pc, Record::kYes);
    join(bar->gathering.data(), push.clock.data());
    bar->gathering[bar->agent] = std::max(bar->gathering[bar->agent], who.now);
  }
  if (ok) {
    std::memcpy(arena + push.to, push.value, push.bytes);
    mark_written(push.to, push.bytes);
  }
  machine.current = running;
  count_bytes(*bar, -long(push.bytes), push.pc);
  end_phase_perhaps(*bar);
}

}  // namespace

bool deliver_one() {
  std::vector<Push>& pushes = machine.pushes;
  if (pushes.empty()) return false;
  deliver(schedule.delivery == Delivery::kLate ? pushes.size() - 1 : draw(pushes.size()));
  return true;
}

void deliver_perhaps() {
  if (!machine.pushes.empty() && schedule.delivery == Delivery::kRandom && draw(4) == 0)
    deliver(draw(machine.pushes.size()));
}

void check_block_end(Block& block) {
  for (const auto& [offset, bar] : block.barriers)
    if (bar.bytes)
      report("bytes left",
             format("block %u ends with an mbarrier (byte %zu) %ld bytes %s its count", block.index, offset,
                    std::abs(bar.bytes), bar.bytes > 0 ? "below" : "beyond"));
}

void push_async(void* dst, const void* v, size_t bytes, uint64_t* bar, unsigned rank) {
  Pc pc = FASTRNN_PC;
  preempt_perhaps();
  Thread& t = *machine.current;
  const Cluster& cluster = *t.block->cluster;
  if (rank >= machine.config.cluster) {
    report_at(pc, "rank", format("push to rank %u of a cluster of %u", rank, machine.config.cluster));
    return;
  }
  size_t own = window_of(t.block->slot), to = offset_of(dst), at_bar = offset_of(bar);
  if (to - own >= kWindowBytes || at_bar - own >= kWindowBytes) {
    report_at(pc, "push window", "a push names addresses outside its own block's shared memory");
    return;
  }
  Block& target = *cluster.blocks[rank];
  Barrier* peer = find_barrier(target, at_bar);
  if (!peer && target.alive) {
    report_at(pc, "no peer mbarrier", format("push to block %u before its mbarrier's init", target.index));
    return;
  }
  if (peer && &target != t.block && !peer->visible)
    report_at(pc, "invisible",
              "push to an mbarrier without mbarrier_init_fence and sync_cluster since its init");
  size_t window = window_of(target.slot);
  Push push{window + (to - own), window + (at_bar - own), target.index, {}, bytes, t.id, {}, pc};
  std::memcpy(push.value, v, bytes);
  if (schedule.races) {
    push.clock.assign(t.clock, t.clock + machine.columns);
    ++own_clock(t);
  }
  machine.pushes.push_back(std::move(push));
  progressed();
  if (schedule.delivery == Delivery::kEager) deliver(machine.pushes.size() - 1);
}

void copy_async_wait(int pending) {
  Pc pc = FASTRNN_PC;
  preempt_perhaps();
  Thread& t = *machine.current;
  while (int(t.copy_groups.size()) > pending) {
    for (const Copy& c : t.copy_groups.front()) {
      // both sides are touched anywhere between issue and here, so they are checked at both
      std::memset(state_of + c.to, kInit, 16);
      if (schedule.races) {
        bool constant = state_of[c.from] == kReadOnly;
        if (!constant) check_races(c.from, 16, false, actor(t), c.pc, Record::kYes);
        check_races(c.to, 16, true, actor(t), pc, Record::kYes);
      }
      std::memcpy(arena + c.to, arena + c.from, 16);
    }
    t.copy_groups.erase(t.copy_groups.begin());
  }
  progressed();
}

}  // namespace fastrnn::emu

namespace fastrnn::dev {

using namespace emu;

void copy_async16(void* shared, const void* global) {
  Pc pc = FASTRNN_PC;
  preempt_perhaps();
  Thread& t = *machine.current;
  size_t to = offset_of(shared), from = offset_of(global);
  if (to >= kArenaBytes || !in_window(to) || in_window(from)) {
    report_at(pc, "copy", "copy_async16 goes from global to shared memory only");
    return;
  }
  if (!check_state(from, 16, false, pc, "read") || !check_state(to, 16, true, pc, "write")) return;
  if (schedule.races) {
    if (state_of[from] != kReadOnly) check_races(from, 16, false, actor(t), pc, Record::kYes);
    check_races(to, 16, true, actor(t), pc, Record::kYes);
  }
  std::memset(arena + to, 0xff, 16);
  std::memset(state_of + to, kInFlight, 16);
  t.open_copies.push_back({from, to, pc});
}

void copy_async_commit() {
  Thread& t = *machine.current;
  t.copy_groups.push_back(std::move(t.open_copies));
  t.open_copies.clear();
}

unsigned cluster_rank() { return machine.current->block->index % machine.config.cluster; }
unsigned cluster_size() { return machine.config.cluster; }

void sync_cluster() {
  Pc pc = FASTRNN_PC;
  Thread& t = *machine.current;
  Cluster& cluster = *t.block->cluster;
  if (cluster.alive != int(machine.config.cluster * machine.config.block))
    report_at(pc, "ended", "barrier in a cluster of which threads have ended");
  cluster.at_barrier.push_back(&t);
  if (int(cluster.at_barrier.size()) < cluster.alive) {
    wait_here("sync_cluster", pc);
    return;
  }
  for (Block* block : cluster.blocks)
    for (auto& [offset, bar] : block->barriers) bar.visible = bar.fenced;
  t.pc = pc;
  meet(cluster.at_barrier);
  for (Thread* w : cluster.at_barrier) wake(*w);
  cluster.at_barrier.clear();
  dispatch();
}

void mbarrier_init(uint64_t* p, unsigned arrivals) {
  Pc pc = FASTRNN_PC;
  preempt_perhaps();
  Thread& t = *machine.current;
  size_t offset = offset_of(p);
  if (offset - window_of(t.block->slot) >= kWindowBytes) {
    report_at(pc, "mbarrier", "an mbarrier outside its block's shared memory");
    return;
  }
  if (!check_state(offset, 8, true, pc, "mbarrier init")) return;
  mark_written(offset, 8);
  Barrier bar;
  bar.arrivals = bar.pending = arrivals;
  if (schedule.races) {
    check_races(offset, 8, true, actor(t), pc, Record::kYes);
    bar.gathering.assign(machine.columns, 0);
    bar.ended = bar.gathering;
    bar.agent = machine.threads_in_grid + uint32_t(machine.agent_blocks.size());
    machine.agent_blocks.push_back(t.block->index);
    if (bar.agent >= machine.columns) stop("agents", "more mbarriers than the emulator has room for");
  }
  t.block->barriers[offset % kWindowBytes] = std::move(bar);
}

void mbarrier_init_fence() {
  for (auto& [offset, bar] : machine.current->block->barriers) bar.fenced = true;
}

void mbarrier_arrive_expect(uint64_t* p, unsigned bytes) {
  Pc pc = FASTRNN_PC;
  preempt_perhaps();
  Barrier* bar = own_barrier(p, pc);
  if (!bar) return;
  Thread& t = *machine.current;
  if (schedule.races) {
    check_races(offset_of(p), 8, false, actor(t), pc, Record::kNo);  // its init must be ordered before this
    join(bar->gathering.data(), t.clock);
    ++own_clock(t);
  }
  count_bytes(*bar, long(bytes), pc);
  if (bar->pending == 0) {
    report_at(pc, "arrivals", "more arrivals in a phase than the mbarrier was initialised for");
    return;
  }
  --bar->pending;
  end_phase_perhaps(*bar);
}

bool mbarrier_test(uint64_t* p, unsigned parity) {
  Pc pc = FASTRNN_PC;
  preempt_perhaps();
  Barrier* bar = own_barrier(p, pc);
  if (!bar) return true;
  if ((bar->phase & 1) == parity) {
    give_way(pc);
    return false;
  }
  if (schedule.races) join(machine.current->clock, bar->ended.data());
  return true;
}

void mbarrier_wait(uint64_t* p, unsigned parity) {
  Pc pc = FASTRNN_PC;
  preempt_perhaps();
  Barrier* bar = own_barrier(p, pc);
  if (!bar) return;
  Thread& t = *machine.current;
  if (schedule.races) check_races(offset_of(p), 8, false, actor(t), pc, Record::kNo);
  while ((bar->phase & 1) == parity) {
    bar->waiting.push_back(&t);
    wait_here("mbarrier_wait", pc);
  }
  if (schedule.races) join(t.clock, bar->ended.data());
}

}  // namespace fastrnn::dev
