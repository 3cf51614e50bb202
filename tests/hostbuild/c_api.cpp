// emulator.h for callers that are not C++ (ctypes: host.py).
#include <cstring>

#include "runtime.h"

#define FASTRNN_EXPORT extern "C" __attribute__((visibility("default")))

using namespace fastrnn;

FASTRNN_EXPORT void emu_reset() { emu::reset(); }
FASTRNN_EXPORT void* emu_alloc(size_t bytes, const char* name) { return emu::alloc(bytes, name); }
FASTRNN_EXPORT void emu_define(void* p, size_t bytes) { emu::define(p, bytes); }
FASTRNN_EXPORT void emu_seal(void* p, size_t bytes) { emu::seal(p, bytes); }
FASTRNN_EXPORT size_t emu_unwritten(const void* p, size_t bytes) { return emu::unwritten(p, bytes); }

// the next launches' schedule; resident 0: as the kind has it
FASTRNN_EXPORT void emu_schedule(int kind, uint64_t seed, int resident, int races) {
  emu::schedule = emu::schedule_of_kind(kind, seed);
  if (resident) emu::schedule.resident = resident;
  emu::schedule.races = races != 0;
}
// the index-th of starve_each(seed, blocks, warps), of 2 * (blocks + warps)
FASTRNN_EXPORT void emu_starve(uint64_t seed, int blocks, int warps, int index) {
  emu::schedule = emu::starve_each(seed, blocks, warps).at(size_t(index));
}
FASTRNN_EXPORT void emu_device(int coresident_blocks, int multiprocessors, int compute_capability,
                               size_t shared_per_block) {
  emu::device = {coresident_blocks, multiprocessors, compute_capability, shared_per_block};
}

FASTRNN_EXPORT int emu_finding_count() { return int(emu::findings().size()); }
FASTRNN_EXPORT const char* emu_finding(int index) { return emu::findings().at(size_t(index)).c_str(); }
FASTRNN_EXPORT const char* emu_error_string(int error) { return dev::error_string(dev::Error(error)); }
FASTRNN_EXPORT void emu_stats(uint64_t* switches_accesses_words) {
  uint64_t all[3] = {emu::stats.switches, emu::stats.accesses, emu::stats.word_accesses};
  std::memcpy(switches_accesses_words, all, sizeof all);
}
