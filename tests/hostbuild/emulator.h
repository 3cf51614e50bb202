// What a test says to the emulator. From C++ include this; from Python see c_api.cpp and host.py.
//
//   emu::reset();                                             // forget memory, findings, statistics
//   auto* x = static_cast<float*>(emu::alloc(n * 4, "x"));    // kernels see only allocated memory
//   ... fill x ...;  emu::seal(x, n * 4);                     // an input: initialised and read-only
//   auto* y = static_cast<float*>(emu::alloc(n * 4, "y"));    // an output: uninitialised, 0xff in every byte
//   emu::schedule = emu::schedule_of_kind(kind, seed);
//   my_launcher(x, y);                                        // calls fastrnn::dev::launch
//   compare y;  expect emu::findings().empty();
#pragma once
#include <string>
#include <vector>

#include "emu.h"

namespace fastrnn::emu {

enum class Order { kAscending, kDescending, kShuffled, kStarveBlock, kStarveWarp };
enum class Delivery { kEager, kRandom, kLate };

// Everything that may differ from run to run on hardware is drawn from `seed`, so a run can be repeated.
struct Schedule {
  uint64_t seed = 1;
  Order order = Order::kAscending;  // who goes first when several can run
  bool random_pick = false;         // else strict priority by `order`
  int victim = -1;                  // which block or warp starves; -1: drawn
  unsigned preempt = 0;             // one in so many accesses switches to another thread; 0: none
  unsigned stale = 0;               // one in so many word loads sees an older permitted value; 0: none
  Delivery delivery = Delivery::kEager;  // of pushes
  int resident = 0;                 // clusters (blocks) held at once unless coresident; 0: 1 to 3, drawn
  bool races = true;                // happens-before checks
};

constexpr int kScheduleKinds = 8;
Schedule schedule_of_kind(int kind, uint64_t seed);
std::vector<Schedule> schedules(uint64_t seed, int count);  // kinds in turn
// every resident block, then every warp, as the one that starves, with prompt and with late pushes: finds
// protocols that forget somebody
std::vector<Schedule> starve_each(uint64_t seed, int blocks, int warps);

extern Schedule schedule;  // of the next launches

void reset();
void* alloc(size_t bytes, const char* name);  // 256-byte aligned; findings speak of it by name
void define(void* p, size_t bytes);           // the host wrote these bytes, kernels may too
void seal(void* p, size_t bytes);             // the host wrote these bytes, kernels must not
size_t unwritten(const void* p, size_t bytes);  // how many of these bytes nobody has written

const std::vector<std::string>& findings();  // since reset(); one for each pair of source lines

struct Stats {
  uint64_t switches, accesses, word_accesses;
};
extern Stats stats;  // since reset()

}  // namespace fastrnn::emu
