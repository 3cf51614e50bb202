// Who runs next; deadlocks; threads that never stop.
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdlib>

#include "runtime.h"

namespace fastrnn::emu {
namespace {

// Turns of a spinning thread while nothing in the grid moved, before the launch is given up.
constexpr uint64_t kIdleTurns = 20000;
// The watchdog's period, in CPU time.
constexpr long kTickNanoseconds = 250000000;

void switch_to(Thread* to) {  // null: the launcher
  Thread* from = machine.current;
  if (from == to) return;
  machine.current = to;
  ++stats.switches;
  switch_fiber(from ? from->fiber : machine.launcher, to ? to->fiber : machine.launcher);
}

void set_ready(const Thread& t, bool on) {
  uint64_t bit = uint64_t(1) << (t.rank & 63);
  uint64_t& word = machine.ready[size_t(t.rank) >> 6];
  word = on ? word | bit : word & ~bit;
}
bool is_ready(const Thread& t) { return machine.ready[size_t(t.rank) >> 6] >> (t.rank & 63) & 1; }

// the first runnable thread at or after this rank, around the end; null: none
Thread* first_ready(size_t rank) {
  size_t count = machine.ready.size(), at = rank >> 6;
  uint64_t bits = machine.ready[at] & (~uint64_t(0) << (rank & 63));
  for (size_t i = 0; i <= count; ++i) {
    if (bits) return &machine.threads[size_t(machine.at_rank[(at << 6) + size_t(__builtin_ctzll(bits))])];
    at = (at + 1) % count;
    bits = machine.ready[at];
  }
  return nullptr;
}

Thread* next_thread() { return first_ready(schedule.random_pick ? draw(machine.threads.size()) : 0); }

void move_to_rank(Thread& t, int rank) {
  if (t.rank == rank) return;
  Thread& other = machine.threads[size_t(machine.at_rank[size_t(rank)])];
  bool mine = is_ready(t), others = is_ready(other);
  std::swap(machine.at_rank[size_t(t.rank)], machine.at_rank[size_t(rank)]);
  std::swap(t.rank, other.rank);
  set_ready(t, mine);
  set_ready(other, others);
}

std::string who_waits_where() {
  std::map<std::string, int> groups;
  for (const Thread& t : machine.threads)
    if (!t.done && t.block)
      ++groups[format("of block %u: %s (%s)", t.block->index, t.doing, line_of(t.pc).c_str())];
  std::string text;
  int shown = 0;
  for (const auto& [where, count] : groups) {
    if (++shown > 8) {
      text += format(" [and %zu more groups]", groups.size() - 8);
      break;
    }
    text += format(" [%d thread%s %s]", count, count == 1 ? "" : "s", where.c_str());
  }
  uint32_t unstarted = machine.clusters_in_grid - machine.clusters_started;
  if (unstarted)
    text += format(" [%u block(s) not started: the launch is not coresident]",
                   unstarted * machine.config.cluster);
  return text;
}

uint64_t calls_at_last_tick;

// Signals interrupt a fiber; switching away from the handler abandons it.
void abandon(const char* why, void* interrupted) {
  machine.fatal = true;
  machine.broken = why;
  machine.broken_pc = machine.current->pc;
#ifdef __x86_64__
  auto* context = static_cast<ucontext_t*>(interrupted);
  machine.broken_pc = reinterpret_cast<Pc>(context->uc_mcontext.gregs[REG_RIP] + 1);
#else
  (void)interrupted;
#endif
  switch_to(nullptr);
}

void on_tick(int, siginfo_t*, void* interrupted) {
  uint64_t calls = stats.switches + stats.accesses + stats.word_accesses;
  bool moved = calls != calls_at_last_tick;
  calls_at_last_tick = calls;
  if (!moved && machine.current) abandon("a thread loops without end or memory access", interrupted);
}

void on_fault(int number, siginfo_t*, void* interrupted) {
  if (!machine.current) {  // not a kernel's doing
    signal(number, SIG_DFL);
    raise(number);
    return;
  }
  abandon(number == SIGFPE ? "division by zero" : "a wild address or an overrun stack", interrupted);
}

constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction previous_fault[3];
stack_t previous_stack;
char fault_stack[64 << 10];
timer_t timer;
struct sigaction previous_action;

}  // namespace

void dispatch() {
  if (machine.fatal) switch_to(nullptr);
  deliver_perhaps();
  switch_to(next_thread());
}

void wait_here(const char* doing, Pc pc) {
  Thread& t = *machine.current;
  t.doing = doing;
  t.pc = pc;
  set_ready(t, false);
  dispatch();
}

void wake(Thread& t) { set_ready(t, true); }

void give_way(Pc pc) {
  Thread& t = *machine.current;
  t.doing = "spin";
  t.pc = pc;
  if (t.idle_since != machine.progress) {
    t.idle_since = machine.progress;
    t.idle_turns = 0;
  }
  if (++t.idle_turns > kIdleTurns && !deliver_one()) stop("livelock", "livelock:" + who_waits_where());
  // not the last rank: two spinning threads would take turns in it for ever
  if (!schedule.random_pick) move_to_rank(t, int(draw(machine.threads.size())));
  dispatch();
}

// With strict priorities a switch is a change point of the PCT scheduler: the thread falls back in the order.
void preempt_perhaps() {
  if (!schedule.preempt || draw(schedule.preempt)) return;
  Thread& t = *machine.current;
  size_t last = machine.threads.size() - 1;
  if (!schedule.random_pick) move_to_rank(t, int(draw(2) ? last : draw(last + 1)));
  t.doing = "running";
  dispatch();
}

void stop(const std::string& key, const std::string& text) {
  report(key, text);
  machine.fatal = true;
  switch_to(nullptr);
  abort();  // nobody switches back
}

void run_until_done() {
  for (;;) {
    start_clusters();
    if (machine.fatal) break;
    if (Thread* t = next_thread()) {
      switch_to(t);
    } else if (!deliver_one()) {
      break;
    }
    if (machine.fatal) break;
  }
  if (machine.broken) report_at(machine.broken_pc, "broken", machine.broken);
  if (machine.fatal) return;
  for (const Cluster& c : machine.clusters)
    if (c.alive) {
      report("deadlock", "deadlock:" + who_waits_where());
      return;
    }
}

Watchdog::Watchdog() {
  calls_at_last_tick = ~uint64_t(0);
  struct sigaction action = {};
  action.sa_sigaction = on_tick;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
  sigaction(SIGRTMIN + 7, &action, &previous_action);
  struct sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGRTMIN + 7;
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif
  event.sigev_notify_thread_id = int(syscall(SYS_gettid));
  timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer);
  struct itimerspec period = {{0, kTickNanoseconds}, {0, kTickNanoseconds}};
  timer_settime(timer, 0, &period, nullptr);

  stack_t stack = {};
  stack.ss_sp = fault_stack;
  stack.ss_size = sizeof fault_stack;
  sigaltstack(&stack, &previous_stack);
  struct sigaction fault = {};
  fault.sa_sigaction = on_fault;
  fault.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  for (int i = 0; i < 3; ++i) sigaction(kFaults[i], &fault, &previous_fault[i]);
}

Watchdog::~Watchdog() {
  timer_delete(timer);
  sigaction(SIGRTMIN + 7, &previous_action, nullptr);
  for (int i = 0; i < 3; ++i) sigaction(kFaults[i], &previous_fault[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

}  // namespace fastrnn::emu
