// The arena (device heap, then one window of shared memory per resident block), the state of each of its
// bytes, and the hooks that -fsanitize=thread makes kernel code call.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace fastrnn::emu {

uint8_t* arena = nullptr;
uint8_t* state_of = nullptr;

namespace {

struct Allocation {
  size_t offset, bytes;
  std::string name;
};
std::vector<Allocation> allocations;
size_t heap_top = 0;

constexpr size_t kGap = 256;  // unaddressable, behind each allocation
// Plain reads of a whole grid without a write, a barrier or the like: a spin loop on plain memory.
constexpr uint64_t kIdleReads = 3000000;

void* map(size_t bytes) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (p == MAP_FAILED) abort();
  return p;
}

bool all(size_t offset, size_t bytes, State wanted) {
  for (size_t i = 0; i < bytes; ++i)
    if (state_of[offset + i] != wanted) return false;
  return true;
}

// the common case in one comparison: all bytes initialised
inline bool all_init(size_t offset, size_t bytes) {
  uint64_t pattern = 0x0202020202020202u, states = 0;
  switch (bytes) {
    case 2: std::memcpy(&states, state_of + offset, 2); return states == (pattern & 0xffffu);
    case 4: std::memcpy(&states, state_of + offset, 4); return states == (pattern & 0xffffffffu);
    case 8: std::memcpy(&states, state_of + offset, 8); return states == pattern;
    default: return all(offset, bytes, kInit);
  }
}

int block_slot_of(size_t offset) { return int((offset - kHeapBytes) / kWindowBytes); }

// Kernels may touch their own stack, their arguments and constants of the program, but no other host memory.
void check_foreign(const void* p, Pc pc) {
  constexpr ptrdiff_t kArgumentBytes = 8 << 10;
  ptrdiff_t from_arguments = static_cast<const char*>(p) - static_cast<const char*>(machine.context);
  if (on_stack(p) || (from_arguments >= 0 && from_arguments < kArgumentBytes)) return;
  if (p >= &machine.threads.front() && p <= &machine.threads.back() + 1) return;  // threadIdx and the like
  Dl_info info;
  if (dladdr(p, &info)) return;
  report_at(pc, "foreign", "access to host memory that is not emu::alloc's");
}

inline void plain_access(const void* p, size_t bytes, bool write, Pc pc) {
  size_t offset = offset_of(p);
  if (!machine.current) return;
  if (offset >= kArenaBytes) {
    check_foreign(p, pc);
    return;
  }
  ++stats.accesses;
  Thread& t = *machine.current;
  if (write) {
    progressed();
  } else if (++machine.idle_reads > kIdleReads) {
    stop("plain spin", line_of(pc) + ": no thread makes progress, " + name_of_actor(t.id) + " reads " +
                           name_of(offset) + " over and over (a spin loop without load_relaxed?)");
  }
  if (check_state(offset, bytes, write, pc, write ? "write" : "read")) {
    bool constant = state_of[offset] == kReadOnly;
    if (write) mark_written(offset, bytes);
    if (schedule.races && !constant) {
      check_races(offset, bytes, write, actor(t), pc, Record::kYes);
      check_plain_against_words(offset, bytes, write, actor(t), pc);
    }
  }
  preempt_perhaps();
}

}  // namespace

void map_arena() {
  if (arena) return;
  arena = static_cast<uint8_t*>(map(kArenaBytes));
  state_of = static_cast<uint8_t*>(map(kArenaBytes));
}

void* alloc(size_t bytes, const char* name) {
  map_arena();
  size_t offset = (heap_top + 255) / 256 * 256;
  if (offset + bytes + kGap > kHeapBytes) {
    report("heap", format("the emulator's heap (%zu bytes) is full", kHeapBytes));
    return nullptr;
  }
  std::memset(arena + offset, 0xff, bytes);
  std::memset(state_of + offset, kUninit, bytes);
  allocations.push_back({offset, bytes, name});
  forget_accesses(offset, bytes);
  heap_top = offset + bytes + kGap;
  return arena + offset;
}

void define(void* p, size_t bytes) { std::memset(state_of + offset_of(p), kInit, bytes); }
void seal(void* p, size_t bytes) { std::memset(state_of + offset_of(p), kReadOnly, bytes); }

size_t unwritten(const void* p, size_t bytes) {
  size_t count = 0;
  for (size_t i = 0; i < bytes; ++i) count += state_of[offset_of(p) + i] == kUninit;
  return count;
}

void reset() {
  map_arena();
  std::memset(state_of, kNone, heap_top);
  heap_top = 0;
  allocations.clear();
  forget_findings();
  stats = {};
}

void forget_heap_accesses() {
  for (const Allocation& a : allocations) forget_accesses(a.offset, a.bytes);
}

void clear_window(int block_slot, size_t bytes) {
  static size_t used[kMaxResident];  // bytes of the slot's block before; nothing behind them has another state
  size_t offset = window_of(block_slot);
  std::memset(state_of + offset, kNone, std::max(used[block_slot], bytes));
  used[block_slot] = bytes;
  std::memset(arena + offset, 0xff, bytes);
  forget_accesses(offset, bytes);
}

char* shared_base() { return reinterpret_cast<char*>(arena + window_of(machine.current->block->slot)); }

// Called by every thread of a block; the first one opens the piece.
void declare_shared(char* base, size_t offset, size_t bytes) {
  Block& block = *machine.current->block;
  auto [known, is_new] = block.pieces.emplace(offset, bytes);
  if (!is_new) {
    if (known->second != bytes) report("carve", "threads of a block carve shared memory differently");
    return;
  }
  if (offset + bytes > machine.config.shared) {
    report("carve past", format("shared memory carved to byte %zu, %zu launched", offset + bytes,
                                machine.config.shared));
    return;
  }
  std::memset(state_of + offset_of(base) + offset, kUninit, bytes);
}

std::string name_of(size_t offset) {
  if (in_window(offset)) {
    const Block& block = machine.blocks[size_t(block_slot_of(offset))];
    size_t byte = (offset - kHeapBytes) % kWindowBytes;
    auto piece = block.pieces.upper_bound(byte);
    if (piece == block.pieces.begin())
      return format("shared memory of block %u, byte %zu", block.index, byte);
    --piece;
    return format("shared memory of block %u, piece %d + %zu", block.index,
                  int(std::distance(block.pieces.begin(), piece)), byte - piece->first);
  }
  for (const Allocation& a : allocations)
    if (offset >= a.offset && offset < a.offset + a.bytes + kGap)
      return format("%s + %zu (of %zu)", a.name.c_str(), offset - a.offset, a.bytes);
  return format("global memory + %zu", offset);
}

std::string name_of_actor(uint32_t id) {
  if (id >= machine.threads_in_grid)
    return format("a push into block %u", machine.agent_blocks[id - machine.threads_in_grid]);
  return format("block %u thread %u", id / machine.config.block, id % machine.config.block);
}

bool check_state(size_t offset, size_t bytes, bool write, Pc pc, const char* what) {
  if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && offset % bytes)
    report_at(pc, "align", format("misaligned %s of %zu bytes", what, bytes));
  const Thread* t = machine.current;  // null: a push that arrives
  if (t && in_window(offset) && block_slot_of(offset) != t->block->slot) {
    report_at(pc, "remote", format("plain %s of another block's shared memory", what));
    return false;
  }
  if (all_init(offset, bytes)) return true;
  for (size_t i = 0; i < bytes; ++i) {
    uint8_t s = state_of[offset + i];
    auto access = [=] {
      return format("%s of %zu bytes by %s, %s", what, bytes, t ? name_of_actor(t->id).c_str() : "a push",
                    name_of(offset).c_str());
    };
    if (s == kNone) {
      report_at(pc, write ? "bounds, write" : "bounds, read", "out of bounds: " + access());
      return false;
    }
    if (s == kInFlight) report_at(pc, "in flight", "bytes an asynchronous copy still writes: " + access());
    if (write && s == kReadOnly) {
      report_at(pc, "read-only", "read-only memory: " + access());
      return false;
    }
    if (!write && s == kUninit) {
      report_at(pc, "uninitialised", "uninitialised memory: " + access());
      return true;
    }
    if (write && s == kUninit && all(offset, bytes, kUninit)) return true;
    if (!write && s == kReadOnly && all(offset, bytes, kReadOnly)) return true;
  }
  return true;
}

void mark_written(size_t offset, size_t bytes) { std::memset(state_of + offset, kInit, bytes); }

// A struct copy or an explicit memcpy in a kernel, in 4-byte accesses where it can be.
void access_range(const void* p, size_t bytes, bool write, Pc pc) {
  const char* at = static_cast<const char*>(p);
  for (size_t i = 0; i < bytes;) {
    size_t step = bytes - i >= 4 && reinterpret_cast<uintptr_t>(at + i) % 4 == 0 ? 4 : 1;
    plain_access(at + i, step, write, pc);
    i += step;
  }
}

}  // namespace fastrnn::emu

using fastrnn::emu::access_range;
using fastrnn::emu::plain_access;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t n) { access_range(p, n, false, FASTRNN_PC); }
void __tsan_write_range(void* p, size_t n) { access_range(p, n, true, FASTRNN_PC); }

#define FASTRNN_HOOKS(n)                                                           \
  void __tsan_read##n(void* p) { plain_access(p, n, false, FASTRNN_PC); }                \
  void __tsan_write##n(void* p) { plain_access(p, n, true, FASTRNN_PC); }                \
  void __tsan_unaligned_read##n(void* p) { plain_access(p, n, false, FASTRNN_PC); }      \
  void __tsan_unaligned_write##n(void* p) { plain_access(p, n, true, FASTRNN_PC); }      \
  void __tsan_volatile_read##n(void* p) { plain_access(p, n, false, FASTRNN_PC); }       \
  void __tsan_volatile_write##n(void* p) { plain_access(p, n, true, FASTRNN_PC); }
FASTRNN_HOOKS(1)
FASTRNN_HOOKS(2)
FASTRNN_HOOKS(4)
FASTRNN_HOOKS(8)
FASTRNN_HOOKS(16)

void* fastrnn_emu_memcpy(void* to, const void* from, size_t n) {
  access_range(from, n, false, FASTRNN_PC);
  access_range(to, n, true, FASTRNN_PC);
  return std::memcpy(to, from, n);
}
void* fastrnn_emu_memmove(void* to, const void* from, size_t n) {
  access_range(from, n, false, FASTRNN_PC);
  access_range(to, n, true, FASTRNN_PC);
  return std::memmove(to, from, n);
}
void* fastrnn_emu_memset(void* to, int value, size_t n) {
  access_range(to, n, true, FASTRNN_PC);
  return std::memset(to, value, n);
}

}  // extern "C"
