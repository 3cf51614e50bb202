// Happens-before: vector clocks and, per 4-byte word, who wrote last and who read since (FastTrack).
//
// A word is followed as a whole until something smaller than it is accessed; then its halves, then its bytes,
// are followed on their own, so that neighbouring bf16 or byte elements do not count as one.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace fastrnn::emu {
namespace {

struct Cell {
  Clock write_clock = 0, read_clock = 0;
  uint32_t writer = 0, reader = 0;
  uint32_t read_set = 0;  // index, when several threads read it without order; 0: none
  Pc write_pc = nullptr, read_pc = nullptr;
};

// Clocks of the last read by each thread from `first` on: a block's for shared memory, else the grid's.
struct ReadSet {
  uint32_t first = 0;
  Clocks clocks;
};

constexpr size_t kWord = 4;
enum Split : uint8_t { kWhole = 0, kHalves = 1, kBytes = 2, kSplitMask = 3, kAtomic = 0x80 };

Cell* words = nullptr;      // [kArenaBytes / 4]
Cell* pieces = nullptr;     // [kArenaBytes]: of words that are split; a half uses every second one
uint8_t* split_of = nullptr;  // [kArenaBytes / 4]
std::vector<ReadSet> read_sets;
std::vector<uint32_t> free_read_sets;

void map_cells() {
  if (words) return;
  auto map = [](size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) abort();
    return p;
  };
  words = static_cast<Cell*>(map(kArenaBytes / kWord * sizeof(Cell)));
  pieces = static_cast<Cell*>(map(kArenaBytes * sizeof(Cell)));
  split_of = static_cast<uint8_t*>(map(kArenaBytes / kWord));
}

uint32_t new_read_set(uint32_t first, uint32_t size) {
  uint32_t index;
  if (free_read_sets.empty()) {
    index = uint32_t(read_sets.size());
    read_sets.emplace_back();
  } else {
    index = free_read_sets.back();
    free_read_sets.pop_back();
  }
  read_sets[index].first = first;
  read_sets[index].clocks.assign(size, 0);
  return index;
}

void split(size_t word, Split wanted) {
  Split now = Split(split_of[word] & kSplitMask);
  if (now >= wanted) return;
  split_of[word] = uint8_t((split_of[word] & ~kSplitMask) | wanted);
  Cell* cells = pieces + word * kWord;
  auto copy = [](Cell& to, const Cell& from) {
    to = from;
    if (!from.read_set) return;
    ReadSet set = read_sets[from.read_set];
    to.read_set = new_read_set(set.first, uint32_t(set.clocks.size()));
    read_sets[to.read_set].clocks = std::move(set.clocks);
  };
  if (now == kWhole) {
    cells[0] = words[word];
    copy(cells[2], words[word]);
  }
  if (wanted == kBytes) {
    copy(cells[1], cells[0]);
    copy(cells[3], cells[2]);
  }
}

void record_read(Cell& c, size_t offset, Actor who, Pc pc) {
  c.read_pc = pc;
  if (c.read_set) {
    ReadSet& set = read_sets[c.read_set];
    set.clocks[who.id - set.first] = who.now;
    return;
  }
  if (!c.read_clock || c.reader == who.id || c.read_clock <= who.clock[c.reader]) {
    c.read_clock = who.now;
    c.reader = who.id;
    return;
  }
  uint32_t first = 0, size = machine.threads_in_grid;
  if (in_window(offset)) {
    first = who.id / machine.config.block * machine.config.block;
    size = machine.config.block;
  }
  c.read_set = new_read_set(first, size);
  ReadSet& set = read_sets[c.read_set];
  set.clocks[c.reader - first] = c.read_clock;
  set.clocks[who.id - first] = who.now;
}

void check_reads_before_write(const Cell& c, size_t offset, Actor who, Pc pc) {
  if (!c.read_set) {
    if (c.read_clock > who.clock[c.reader])
      report_race("read, then write", offset, c.reader, c.read_pc, who.id, pc);
    return;
  }
  const ReadSet& set = read_sets[c.read_set];
  const Clock *read = set.clocks.data(), *known = who.clock + set.first;
  size_t n = set.clocks.size();
  unsigned later = 0;
  for (size_t i = 0; i < n; ++i) later |= unsigned(read[i] > known[i]);
  if (!later) return;
  for (size_t i = 0; i < n; ++i)
    if (read[i] > known[i]) {
      report_race("read, then write", offset, set.first + uint32_t(i), c.read_pc, who.id, pc);
      return;
    }
}

void check_cell(Cell& c, size_t offset, bool write, Actor who, Pc pc, Record record) {
  if (!write && c.reader == who.id && c.read_clock == who.now && c.write_clock <= who.clock[c.writer]) return;
  if (c.write_clock > who.clock[c.writer])
    report_race(write ? "write, then write" : "write, then read", offset, c.writer, c.write_pc, who.id, pc);
  if (write) check_reads_before_write(c, offset, who, pc);
  if (record == Record::kNo) return;
  if (!write) {
    record_read(c, offset, who, pc);
    return;
  }
  c.write_clock = who.now;
  c.writer = who.id;
  c.write_pc = pc;
  c.read_clock = 0;
  if (c.read_set) free_read_sets.push_back(c.read_set);
  c.read_set = 0;
}

}  // namespace

// In vectors, or this loop is a quarter of a run: nothing here changes the number of columns or lies in both rows.
#if defined(__x86_64__)
[[gnu::target_clones("avx2", "default")]]
#endif
void join(Clock* __restrict into, const Clock* __restrict from) {
  const size_t columns = machine.columns;
  for (size_t i = 0; i < columns; ++i) into[i] = std::max(into[i], from[i]);
}

void meet(const std::vector<Thread*>& threads) {
  progressed();
  if (!schedule.races) return;
  static Clocks all;
  all.assign(machine.columns, 0);
  for (Thread* t : threads) join(all.data(), t->clock);
  for (Thread* t : threads) {
    Clock mine = own_clock(*t);
    std::memcpy(t->clock, all.data(), machine.columns * sizeof(Clock));
    own_clock(*t) = mine + 1;
  }
}

void forget_accesses(size_t offset, size_t bytes) {
  map_cells();
  size_t first = offset / kWord, count = (bytes + kWord - 1) / kWord;
  std::fill(words + first, words + first + count, Cell());
  std::memset(split_of + first, kWhole, count);
}

void forget_read_sets() {
  read_sets.resize(1);
  free_read_sets.clear();
}

void report_race(const char* kind, size_t offset, uint32_t a, Pc a_pc, uint32_t b, Pc b_pc) {
  if (!first_report(a_pc, b_pc)) return;
  std::string a_line = line_of(a_pc), b_line = line_of(b_pc);
  report("race " + a_line + " " + b_line,
         format("%s: race (%s): %s there after %s at %s, %s", b_line.c_str(), kind, name_of_actor(b).c_str(),
                name_of_actor(a).c_str(), a_line.c_str(), name_of(offset).c_str()));
}

void mark_atomic(size_t offset, size_t bytes) {
  for (size_t w = offset / kWord; w * kWord < offset + bytes; ++w) split_of[w] |= kAtomic;
}

bool is_atomic(size_t offset) { return split_of[offset / kWord] & kAtomic; }

void check_races(size_t offset, size_t bytes, bool write, Actor who, Pc pc, Record record) {
  size_t end = offset + bytes;
  for (size_t word = offset / kWord; word * kWord < end; ++word) {
    size_t low = std::max(offset, word * kWord), high = std::min(end, (word + 1) * kWord);
    if (high - low < kWord) split(word, high - low == 2 && low % 2 == 0 ? kHalves : kBytes);
    switch (split_of[word] & kSplitMask) {
      case kWhole: check_cell(words[word], low, write, who, pc, record); break;
      case kHalves:
        for (size_t i = low; i < high; i += 2) check_cell(pieces[i], i, write, who, pc, record);
        break;
      default:
        for (size_t i = low; i < high; ++i) check_cell(pieces[i], i, write, who, pc, record);
    }
  }
}

}  // namespace fastrnn::emu
