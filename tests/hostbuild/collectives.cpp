// The block barrier, warp operations and mma.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace fastrnn::emu {
namespace {

enum Kind { kSyncWarp, kShuffle, kWarpSum, kMmaBf16, kMmaF16, kMmaTf32 };

struct ShuffleLane {
  uint32_t in, out;
  int operand;
  bool is_xor;
};
struct SumLane {
  float* z;
  int n;
};
struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

const char* name_of_kind(int kind) {
  static const char* names[] = {"sync_warp", "shuffle", "warp_sum", "mma bf16", "mma f16", "mma tf32"};
  return names[kind];
}

void finish_shuffle(const WarpOp& op, Pc pc) {
  for (int l = 0; l < 32; ++l) {
    if (!(op.mask >> l & 1)) continue;
    auto* me = static_cast<ShuffleLane*>(op.lane[l]);
    int source = me->is_xor ? l ^ me->operand : me->operand & 31;
    if (source < 32 && op.mask >> source & 1) {
      me->out = static_cast<ShuffleLane*>(op.lane[source])->in;
    } else {
      report_at(pc, "source", "a shuffle reads a lane outside its mask");
      me->out = 0x7fc0deadu;
    }
  }
}

void finish_sum(const WarpOp& op) {
  int n = static_cast<SumLane*>(op.lane[0])->n;
  for (int i = 0; i < n; ++i) {
    float v[32], next[32];
    for (int l = 0; l < 32; ++l) v[l] = static_cast<SumLane*>(op.lane[l])->z[i];
    for (int m = 16; m > 0; m >>= 1) {
      for (int l = 0; l < 32; ++l) next[l] = v[l] + v[l ^ m];
      std::memcpy(v, next, sizeof v);
    }
    for (int l = 0; l < 32; ++l) static_cast<SumLane*>(op.lane[l])->z[i] = v[l];
  }
}

float element(int kind, uint32_t reg, int half) {
  if (kind == kMmaTf32) return dev::bits_to_float(reg & ~0x1fffu);  // the hardware ignores the low bits
  uint16_t bits = uint16_t(half ? reg >> 16 : reg);
  return kind == kMmaBf16 ? dev::to_float(dev::bf16{bits}) : dev::to_float(dev::f16{bits});
}

// fragments as device_cuda.cuh describes them: g = lane / 4, q = lane % 4
void finish_mma(const WarpOp& op) {
  bool tf32 = op.kind == kMmaTf32;
  int depth = tf32 ? 8 : 16, per_register = tf32 ? 1 : 2;
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    auto* lane = static_cast<MmaLane*>(op.lane[l]);
    int g = l / 4, q = l % 4;
    for (int half = 0; half < per_register; ++half) {
      for (int i = 0; i < 4; ++i)
        a[g + 8 * (i % 2)][per_register * q + half + depth / 2 * (i / 2)] =
            element(op.kind, lane->a[i], half);
      for (int i = 0; i < 2; ++i)
        b[per_register * q + half + depth / 2 * i][g] = element(op.kind, lane->b[i], half);
    }
  }
  for (int l = 0; l < 32; ++l) {
    auto* lane = static_cast<MmaLane*>(op.lane[l]);
    int g = l / 4, q = l % 4;
    for (int i = 0; i < 4; ++i) {
      float sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[g + 8 * (i / 2)][k] * b[k][2 * q + i % 2];
      lane->d[i] += sum;
    }
  }
}

// Lanes meet by kind and mask. Only sync_warp orders memory.
void warp_operation(int kind, unsigned mask, void* mine, Pc pc) {
  Thread& t = *machine.current;
  std::vector<WarpOp>& open = t.block->warp_ops[size_t(t.warp)];
  Thread* warp = &t - t.lane;
  if (!(mask >> t.lane & 1))
    report_at(pc, "mask", format("%s by a lane outside its mask", name_of_kind(kind)));
  mask |= 1u << t.lane;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1 && warp[l].done)
      report_at(pc, "ended", format("%s names a lane that has ended", name_of_kind(kind)));

  auto same = [=](const WarpOp& o) { return o.kind == kind && o.mask == mask; };
  auto op = std::find_if(open.begin(), open.end(), same);
  if (op == open.end()) {
    open.push_back({});
    op = open.end() - 1;
    op->kind = kind;
    op->mask = mask;
    op->pc = pc;
  }
  if (kind >= kMmaBf16 && op->pc != pc && line_of(op->pc) != line_of(pc))
    report_at(pc, "aligned", "lanes meet in different mma instructions, the other one at " + line_of(op->pc));
  op->arrived |= 1u << t.lane;
  op->lane[t.lane] = mine;
  if (op->arrived != mask) {
    wait_here(name_of_kind(kind), pc);
    return;
  }

  WarpOp whole = *op;
  open.erase(op);
  switch (kind) {
    case kSyncWarp: break;
    case kShuffle: finish_shuffle(whole, pc); break;
    case kWarpSum: finish_sum(whole); break;
    default: finish_mma(whole);
  }
  if (kind == kSyncWarp) {
    std::vector<Thread*> lanes;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) lanes.push_back(warp + l);
    meet(lanes);
  }
  progressed();
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) wake(warp[l]);
  dispatch();
}

}  // namespace

uint32_t shuffle(uint32_t v, int lane_or_mask, bool is_xor, unsigned mask) {
  ShuffleLane lane{v, 0, lane_or_mask, is_xor};
  warp_operation(kShuffle, mask, &lane, FASTRNN_PC);
  return lane.out;
}

void warp_sum(float* z, int n) {
  SumLane lane{z, n};
  warp_operation(kWarpSum, dev::kFullMask, &lane, FASTRNN_PC);
}

void mma(Mma kind, float* d, const uint32_t* a, const uint32_t* b) {
  MmaLane lane{d, a, b};
  warp_operation(kMmaBf16 + int(kind), dev::kFullMask, &lane, FASTRNN_PC);
}

}  // namespace fastrnn::emu

namespace fastrnn::dev {

void sync_warp() { emu::warp_operation(emu::kSyncWarp, kFullMask, nullptr, FASTRNN_PC); }

void sync_block() {
  using namespace emu;
  Pc pc = FASTRNN_PC;
  Thread& t = *machine.current;
  Block& block = *t.block;
  std::vector<Thread*>& waiting = block.at_barrier;
  if (block.alive != int(machine.config.block))
    report_at(pc, "ended", "barrier in a block of which threads have ended");
  if (!waiting.empty() && waiting[0]->pc != pc && line_of(waiting[0]->pc) != line_of(pc))
    report_at(pc, "barriers", "threads of a block meet at different barriers, the other one at " +
                                  line_of(waiting[0]->pc));
  waiting.push_back(&t);
  if (int(waiting.size()) < block.alive) {
    wait_here("sync_block", pc);
    return;
  }
  t.pc = pc;
  meet(waiting);
  for (Thread* w : waiting) wake(*w);
  waiting.clear();
  dispatch();
}

}  // namespace fastrnn::dev
