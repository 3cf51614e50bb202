// Who runs the members of a call, csrc/cpu/team.h: the barrier lets those who wait long sleep, and calls that others'
// use of the processors has made slower on threads than on one thread go to one thread for a while.
#include "cpu/team.h"

#include <time.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

using namespace fastrnn::cpu;

namespace {

#define CHECK(condition) \
  if (!(condition)) std::printf("line %d: %s\n", __LINE__, #condition), std::exit(1)

void sleep_ms(int n) { std::this_thread::sleep_for(std::chrono::milliseconds(n)); }

double cpu_seconds() {  // of this thread
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Every thread sees what the others wrote before the barrier, however many there are.
void test_barrier_orders_writes() {
  constexpr int kThreads = 5, kRounds = 300;
  Barrier barrier(kThreads);
  int written[kThreads] = {};
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      for (int round = 1; round <= kRounds; ++round) {
        written[i] = round;
        barrier.wait();
        for (const int x : written) wrong += x != round;
        barrier.wait();
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

void test_who_waits_long_sleeps() {
  Barrier barrier(2);
  std::thread late([&] {
    sleep_ms(300);
    CHECK(barrier.wait() == 0);  // nobody to wait for
  });
  const double before = cpu_seconds();
  const int64_t slept = barrier.wait();
  CHECK(slept > 100'000'000);
  CHECK(cpu_seconds() - before < 0.1);
  late.join();
}

// Runs a call of this much work, whose members say that they slept for a part of their time. Was it on threads?
bool on_threads(int64_t work, int threads_ms, int slept_ms, int one_ms) {
  std::atomic<int> calls{0};
  bool threads = true;
  share_out(
      2, work,
      [&](int) -> int64_t {
        ++calls;
        sleep_ms(threads_ms);
        return int64_t(slept_ms) * 1'000'000;
      },
      [&] {
        threads = false;
        sleep_ms(one_ms);
      });
  CHECK(calls == (threads ? 2 : 0));
  return threads;
}

// Where threads wait much for each other, one thread is tried for four calls, and the faster way is kept for a while.
void test_waits_send_calls_to_one_thread() {
  constexpr int64_t kWork = 1 << 20, kOther = 1 << 26;
  for (int i = 0; i < 4; ++i) CHECK(on_threads(kWork, 200, 195, 10));
  for (int i = 0; i < 4; ++i) CHECK(!on_threads(kWork, 200, 195, 10));
  CHECK(!on_threads(kWork, 200, 195, 10));     // for twice the 840 ms that both took
  CHECK(!on_threads(kWork + 5, 200, 195, 10));
  CHECK(on_threads(kOther, 10, 0, 10));        // calls of another size have not waited
  for (int tries = 0; !on_threads(kWork, 10, 0, 10); ++tries) CHECK(tries < 2000);  // threads are tried again
}

// Where one thread is slower even so, threads are kept.
void test_waiting_threads_may_be_the_faster_way() {
  constexpr int64_t kWork = 1 << 10;
  for (int i = 0; i < 4; ++i) CHECK(on_threads(kWork, 100, 95, 400));
  for (int i = 0; i < 4; ++i) CHECK(!on_threads(kWork, 100, 95, 400));
  for (int i = 0; i < 6; ++i) CHECK(on_threads(kWork, 100, 95, 400));
}

void test_one_member_needs_no_thread() {
  bool ran = false;
  share_out(1, 1, [](int) -> int64_t { std::abort(); }, [&] { ran = true; });
  CHECK(ran);
}

}  // namespace

int main() {
  test_barrier_orders_writes();
  test_who_waits_long_sleeps();
  test_waits_send_calls_to_one_thread();
  test_waiting_threads_may_be_the_faster_way();
  test_one_member_needs_no_thread();
  std::printf("team\n");
}
