// What the emulator's own source files share. Kernels see emu.h, tests emulator.h.
//
//   fibers.cpp       switching between threads' stacks
//   schedule.cpp     who runs next, deadlocks, the watchdog
//   run.cpp          one launch from start to end, residency, the schedules themselves
//   memory.cpp       the arena, its state per byte, red zones, the hooks g++ calls
//   races.cpp        vector clocks and the happens-before detector (FastTrack)
//   words.cpp        relaxed, acquire and release accesses, stale loads, spin_pause
//   collectives.cpp  block barrier, warp operations, mma, number formats
//   cluster.cpp      cluster barrier, mbarriers, pushes, asynchronous copies
//   report.cpp       findings and source lines
//
// These are compiled without -fsanitize.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>
#if !defined(__x86_64__) || defined(FASTRNN_EMU_UCONTEXT)
#define FASTRNN_EMU_USES_UCONTEXT 1
#include <ucontext.h>
#endif

#include "emulator.h"

namespace fastrnn::emu {

using Pc = const void*;  // a return address into the kernel
#define FASTRNN_PC __builtin_return_address(0)

// ---- report.cpp ----

std::string line_of(Pc pc);  // "file.cu:12"
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
// "file.cu:12: text"; the same kind at the same line counts once
void report_at(Pc pc, const char* kind, const std::string& text);
// without a line of its own; `key` is what counts as the same finding
void report(const std::string& key, const std::string& text);
bool first_report(const void* a, const void* b);  // of this pair: saves writing a finding again and again
void forget_findings();

// ---- fibers.cpp ----

constexpr size_t kStackBytes = 64 << 10;  // one guard page at its low end included

struct Fiber {
#ifdef FASTRNN_EMU_USES_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};
void reserve_stacks(int count);  // while no fiber lives
bool on_stack(const void* p);    // any fiber's
void prepare(Fiber& fiber, int stack_index, void (*entry)());  // entry must not return
void switch_fiber(Fiber& from, Fiber& to);

// ---- the launch that is running ----

using Clock = uint32_t;
using Clocks = std::vector<Clock>;
struct Block;
struct Word;

constexpr size_t kWatches = 64;
struct Watch {
  Word* word;
  size_t seen;  // index of the store that the load returned
};

struct Copy {  // 16 bytes on their way from global to shared memory
  size_t from, to;
  Pc pc;
};

struct Thread {
  Fiber fiber;
  Place place;
  uint32_t id = 0;  // linear in the grid: its column in every vector clock
  int slot = 0;     // among the resident threads: its stack, its row of clocks
  int rank = 0;     // its position in the order of priority
  int lane = 0, warp = 0;
  bool done = false;
  Block* block = nullptr;
  Clock* clock = nullptr;       // [columns]
  const char* doing = "start";  // what it waits for
  Pc pc = nullptr;
  std::vector<Watch> watches;  // words loaded since the last spin_pause
  bool watches_all = true;     // none of them was dropped
  uint64_t ticket = 0;         // of the present sleep in spin_pause; 0: awake
  uint64_t idle_turns = 0, idle_since = 0;
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copy_groups;  // the oldest first
};

struct WarpOp {
  int kind;
  unsigned mask, arrived = 0;
  Pc pc = nullptr;  // of the first lane
  void* lane[32];
};

struct Barrier {  // an mbarrier: an asynchronous agent with a column of its own
  unsigned arrivals = 0, pending = 0, phase = 0;
  long bytes = 0;  // expected and not yet arrived; may be below zero before the expectation is stated
  Clocks gathering, ended;  // of the phase that runs, of the one that ended last
  std::vector<Thread*> waiting;
  uint32_t agent = 0;
  Clock agent_clock = 0;
  bool fenced = false, visible = false;  // to the other blocks of the cluster
};

struct Cluster;
struct Block {
  uint32_t index = 0;  // linear in the grid
  int slot = 0;        // among the resident blocks: its window of shared memory
  int alive = 0;
  Cluster* cluster = nullptr;
  std::vector<Thread*> at_barrier;
  std::vector<std::vector<WarpOp>> warp_ops;  // [warps]
  std::map<size_t, size_t> pieces;            // offset -> bytes
  std::map<size_t, Barrier> barriers;         // by offset in the window
};

struct Cluster {
  int slot = 0, alive = 0;
  std::vector<Block*> blocks;
  std::vector<Thread*> at_barrier;
};

struct Push {
  size_t to, bar;  // arena offsets
  uint32_t block;  // index of the target
  uint8_t value[16];
  size_t bytes;
  uint32_t from;  // thread id
  Clocks clock;
  Pc pc;
};

struct Machine {
  Config config;
  void (*body)(void*);
  void* context;
  uint32_t blocks_in_grid = 0, threads_in_grid = 0, columns = 0;
  uint32_t clusters_started = 0, clusters_in_grid = 0;
  std::vector<uint32_t> cluster_order;
  std::vector<Thread> threads;    // [resident]
  std::vector<Block> blocks;      // [resident]
  std::vector<Cluster> clusters;  // [resident]
  Clocks clocks;                  // [resident threads, columns]
  Thread* current = nullptr;      // null: the launcher's own stack
  Fiber launcher;
  std::vector<uint64_t> ready;  // bit per rank
  std::vector<int> at_rank;     // rank -> slot
  std::vector<Push> pushes;     // in flight
  uint64_t random = 1;
  uint64_t progress = 0;       // stores, barriers and the like: what can end a wait
  uint64_t idle_reads = 0, idle_loads = 0;  // plain reads and word loads since then
  uint64_t tickets = 0;
  bool fatal = false;
  const char* broken = nullptr;  // what a signal found
  Pc broken_pc = nullptr;
  std::vector<uint32_t> agent_blocks;  // whose mbarrier an agent is
};
extern Machine machine;

inline uint64_t draw() {
  uint64_t& r = machine.random;
  r ^= r << 13;
  r ^= r >> 7;
  r ^= r << 17;
  return r * 0x2545F4914F6CDD1Dull >> 16;
}
inline uint64_t draw(uint64_t below) { return draw() % below; }

// ---- schedule.cpp ----

void dispatch();                               // lets whoever is next run
void wait_here(const char* doing, Pc pc);      // until wake()
void give_way(Pc pc);                          // in a spin: behind everybody else, still runnable
void wake(Thread& thread);
void preempt_perhaps();
void run_until_done();                         // the launcher's loop
[[noreturn]] void stop(const std::string& key, const std::string& text);  // ends the launch from a fiber
inline void progressed() {
  ++machine.progress;
  machine.idle_reads = machine.idle_loads = 0;
}

struct Watchdog {  // ends a launch whose thread faults, or loops without ever calling the emulator
  Watchdog();
  ~Watchdog();
};

// ---- run.cpp ----

void start_clusters();  // in place of those that have ended
void thread_main();     // a fiber's entry

// ---- memory.cpp ----

constexpr size_t kHeapBytes = size_t(192) << 20;
constexpr size_t kWindowBytes = 256 << 10;  // one block's shared memory
constexpr int kMaxResident = 64;            // blocks
constexpr size_t kArenaBytes = kHeapBytes + kMaxResident * kWindowBytes;
constexpr size_t kSharedSlack = 4 << 10;    // for red zones, beyond the device's limit

enum State : uint8_t { kNone = 0, kUninit = 1, kInit = 2, kReadOnly = 3, kInFlight = 4 };
extern uint8_t* arena;
extern uint8_t* state_of;  // [kArenaBytes]

inline size_t offset_of(const void* p) { return size_t(static_cast<const uint8_t*>(p) - arena); }
inline size_t window_of(int block_slot) { return kHeapBytes + size_t(block_slot) * kWindowBytes; }
inline bool in_window(size_t offset) { return offset >= kHeapBytes; }
void map_arena();
void clear_window(int block_slot, size_t bytes);
std::string name_of(size_t offset);     // "h + 12", "shared memory of block 3, piece 1 + 8"
std::string name_of_actor(uint32_t id);  // thread or mbarrier
// bounds, initialisation, read-only, alignment, other blocks' windows; false: the access must not happen
bool check_state(size_t offset, size_t bytes, bool write, Pc pc, const char* what);
void mark_written(size_t offset, size_t bytes);

// ---- races.cpp ----

struct Actor {
  uint32_t id;
  Clock now;
  const Clock* clock;
};
inline Clock& own_clock(Thread& t) { return t.clock[t.id]; }
inline Actor actor(Thread& t) { return {t.id, own_clock(t), t.clock}; }
void join(Clock* into, const Clock* from);
void meet(const std::vector<Thread*>& threads);  // everything before is ordered before everything after
void forget_accesses(size_t offset, size_t bytes);
void forget_read_sets();
void forget_heap_accesses();
enum class Record { kYes, kNo };
// reports accesses of the bytes that are not ordered before this one
void check_races(size_t offset, size_t bytes, bool write, Actor who, Pc pc, Record record);
void mark_atomic(size_t offset, size_t bytes);
bool is_atomic(size_t offset);  // any of the 4 bytes around it was accessed as a word
void report_race(const char* kind, size_t offset, uint32_t a, Pc a_pc, uint32_t b, Pc b_pc);

// ---- words.cpp ----

void forget_words();
void check_plain_against_words(size_t offset, size_t bytes, bool write, Actor who, Pc pc);

// ---- cluster.cpp ----

bool deliver_one();  // a push in flight; false: there is none
void deliver_perhaps();
void check_block_end(Block& block);

}  // namespace fastrnn::emu
