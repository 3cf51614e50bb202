// Words that blocks share: relaxed, acquire and release accesses. Each word keeps its last stores, and a load
// may return any of them that coherence and happens-before allow.
#include <algorithm>
#include <cstring>
#include <deque>

#include "runtime.h"

namespace fastrnn::emu {

constexpr size_t kHistory = 8;

struct Store {
  uint64_t value;
  uint32_t writer;  // kNobody: before the launch, or a plain store
  Clock clock;
  std::shared_ptr<Clocks> released;  // what an acquire load of it learns; null: relaxed
};
constexpr uint32_t kNobody = ~0u;

// What one thread did to a word last: which store it saw, and when.
struct View {
  uint32_t id;
  size_t seen = 0;
  Clock seen_at = 0, stored_at = 0, loaded_at = 0;
  Pc pc = nullptr;
};

// a thread parked in spin_pause; it sleeps on several words and only the first store counts
struct Sleeper {
  Thread* thread;
  uint64_t ticket;
};

struct Word {
  size_t bytes = 0;
  size_t dropped = 0;  // stores no longer in `stores`; indices count from the first of all
  std::deque<Store> stores;
  std::vector<View> views;
  std::vector<Sleeper> sleepers;

  size_t newest() const { return dropped + stores.size() - 1; }
  View& view(uint32_t id) {
    for (View& v : views)
      if (v.id == id) return v;
    views.push_back({id});
    return views.back();
  }
};

namespace {

std::unordered_map<size_t, Word> words;  // by offset

uint64_t value_at(size_t offset, size_t bytes) {
  uint64_t v = 0;
  std::memcpy(&v, arena + offset, bytes);
  return v;
}

void add_store(Word& w, Store s) {
  w.stores.push_back(std::move(s));
  if (w.stores.size() > kHistory) {
    w.stores.pop_front();
    ++w.dropped;
  }
}

Word& word_at(size_t offset, size_t bytes, Pc pc) {
  Word& w = words[offset];
  if (w.stores.empty()) {
    w.bytes = bytes;
    w.stores.push_back({value_at(offset, bytes), kNobody, 0, nullptr});
    mark_atomic(offset, bytes);
  }
  if (w.bytes != bytes)
    report_at(pc, "word size", "a word is accessed with different sizes");
  uint64_t now = value_at(offset, bytes);
  if (now != w.stores.back().value) add_store(w, {now, kNobody, 0, nullptr});  // a plain store came between
  return w;
}

// The oldest store this thread may still see: not older than what it, or anybody whose look is ordered before
// now, has seen, nor than a store that is ordered before now.
size_t oldest_visible(Word& w, Thread& t) {
  size_t oldest = w.dropped;
  for (const View& v : w.views)
    if (v.id == t.id || (schedule.races && v.seen_at <= t.clock[v.id])) oldest = std::max(oldest, v.seen);
  for (size_t i = w.stores.size(); i-- > 0 && w.dropped + i > oldest;) {
    const Store& s = w.stores[i];
    if (s.writer == kNobody || s.writer == t.id || (schedule.races && s.clock <= t.clock[s.writer]))
      return w.dropped + i;
  }
  return oldest;
}

void watch(Thread& t, Word& w, size_t seen) {
  for (Watch& known : t.watches)
    if (known.word == &w) {  // looked at before: what was older then is what it may have gone by
      known.seen = std::min(known.seen, seen);
      return;
    }
  if (t.watches.size() == kWatches) {
    t.watches.erase(t.watches.begin());
    t.watches_all = false;
  }
  t.watches.push_back({&w, seen});
}

// a loop that never calls spin_pause would keep the others from running
constexpr uint64_t kLoadsWithoutPause = 100000;

bool usable(size_t offset, size_t bytes, bool write, Pc pc, const char* what) {
  if (offset < kArenaBytes) return check_state(offset, bytes, write, pc, what);
  report_at(pc, "foreign", format("%s outside the emulator's memory", what));
  return false;
}

uint64_t load_word(const void* p, size_t bytes, bool acquire, Pc pc) {
  ++stats.word_accesses;
  preempt_perhaps();
  Thread& t = *machine.current;
  size_t offset = offset_of(p);
  if (++machine.idle_loads > kLoadsWithoutPause) give_way(pc);
  if (!usable(offset, bytes, false, pc, "word load")) return 0;
  if (schedule.races) check_races(offset, bytes, false, actor(t), pc, Record::kNo);
  Word& w = word_at(offset, bytes, pc);
  size_t seen = w.newest();
  if (schedule.stale && w.stores.size() > 1 && draw(schedule.stale) == 0) {
    size_t oldest = oldest_visible(w, t);
    seen = oldest + draw(w.newest() - oldest + 1);
  }
  View& v = w.view(t.id);
  v.seen = seen;
  v.pc = pc;
  const Store& s = w.stores[seen - w.dropped];
  if (schedule.races) {
    v.seen_at = v.loaded_at = own_clock(t);
    if (acquire && s.released) join(t.clock, s.released->data());
  }
  watch(t, w, seen);
  return s.value;
}

void store_word(void* p, uint64_t value, size_t bytes, bool release, Pc pc) {
  ++stats.word_accesses;
  preempt_perhaps();
  Thread& t = *machine.current;
  size_t offset = offset_of(p);
  if (!usable(offset, bytes, true, pc, "word store")) return;
  if (schedule.races) check_races(offset, bytes, true, actor(t), pc, Record::kNo);
  Word& w = word_at(offset, bytes, pc);
  Store store{value, t.id, 0, nullptr};
  if (schedule.races) {
    store.clock = own_clock(t);
    if (release) store.released = std::make_shared<Clocks>(t.clock, t.clock + machine.columns);
  }
  add_store(w, std::move(store));
  std::memcpy(arena + offset, &value, bytes);
  mark_written(offset, bytes);
  View& v = w.view(t.id);
  v.seen = w.newest();
  v.pc = pc;
  if (schedule.races) v.seen_at = v.stored_at = own_clock(t)++;
  progressed();
  for (const Sleeper& s : w.sleepers)
    if (s.thread->ticket == s.ticket) wake(*s.thread);
  w.sleepers.clear();
}

}  // namespace

void forget_words() { words.clear(); }

void check_plain_against_words(size_t offset, size_t bytes, bool write, Actor who, Pc pc) {
  for (size_t at = offset / 4 * 4; at < offset + bytes; at += 4) {
    if (!is_atomic(at)) continue;
    auto word = words.find(at);
    if (word == words.end() && at >= 4) word = words.find(at - 4);
    if (word == words.end()) continue;
    for (const View& v : word->second.views)
      if (v.stored_at > who.clock[v.id] || (write && v.loaded_at > who.clock[v.id]))
        report_race("word access and plain access", at, v.id, v.pc, who.id, pc);
  }
}

}  // namespace fastrnn::emu

namespace fastrnn::dev {

using emu::load_word;
using emu::store_word;

uint64_t load_relaxed(const uint64_t* p) { return load_word(p, 8, false, FASTRNN_PC); }
uint32_t load_relaxed(const uint32_t* p) { return uint32_t(load_word(p, 4, false, FASTRNN_PC)); }
// Two loads in any order, others between them, of one aligned access.
void load_relaxed(const uint64_t* p, uint64_t (&v)[2]) {
  const emu::Pc pc = FASTRNN_PC;
  if (emu::offset_of(p) % 16) emu::report_at(pc, "align", "misaligned load of two words");
  const int first = int(emu::draw(2));
  v[first] = load_word(p + first, 8, false, pc);
  v[1 - first] = load_word(p + 1 - first, 8, false, pc);
}
uint64_t load_acquire(const uint64_t* p) { return load_word(p, 8, true, FASTRNN_PC); }
uint32_t load_acquire(const uint32_t* p) { return uint32_t(load_word(p, 4, true, FASTRNN_PC)); }
void store_relaxed(uint64_t* p, uint64_t v) { store_word(p, v, 8, false, FASTRNN_PC); }
void store_relaxed(uint32_t* p, uint32_t v) { store_word(p, v, 4, false, FASTRNN_PC); }
void store_release(uint64_t* p, uint64_t v) { store_word(p, v, 8, true, FASTRNN_PC); }
void store_release(uint32_t* p, uint32_t v) { store_word(p, v, 4, true, FASTRNN_PC); }

// Sleeps until one of the words looked at is stored to; at once if one of them has been since.
void spin_pause() {
  using namespace emu;
  Thread& t = *machine.current;
  bool sleep = t.watches_all && !t.watches.empty();
  for (const Watch& w : t.watches) sleep = sleep && w.seen == w.word->newest();
  if (!sleep) {
    t.watches.clear();
    t.watches_all = true;
    give_way(FASTRNN_PC);
    return;
  }
  t.ticket = ++machine.tickets;
  for (const Watch& w : t.watches) w.word->sleepers.push_back({&t, t.ticket});
  t.watches.clear();
  wait_here("spin", FASTRNN_PC);
  t.ticket = 0;
}

void trap() { emu::stop("trap", emu::line_of(FASTRNN_PC) + ": trap"); }

}  // namespace fastrnn::dev
