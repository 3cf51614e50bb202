#include "team.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrnn::cpu {
namespace {

int64_t now() {  // nanoseconds
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// A lock that is tried and never waited for. std::mutex would ask for glibc 2.34 (tools/wheel_facts.py).
class TryLock {
 public:
  bool try_lock() { return !taken_.exchange(true, std::memory_order_acquire); }
  void unlock() { taken_.store(false, std::memory_order_release); }

 private:
  std::atomic<bool> taken_{false};
};

// What calls of about as much work have lately taken, on threads and on one thread alone.
//
// Calls run on threads while those wait little for each other: processors are free, and nothing is tried out. Where the
// waits of a few calls add up to so much that one thread may take no longer, the next few run on one, and whichever way
// took less is kept for a while: twice as long as the comparison took, and twice as long again after each further one,
// up to 64 times. Both ways are timed on the machine as it is at the time, so nothing has to be known about what else
// runs.
class Experience {
 public:
  bool prefers_one(int64_t time) {
    const std::unique_lock held(lock_, std::try_to_lock);
    if (!held) return false;
    if (state_ == kOne && time >= until_) start(kThreads);
    return state_ != kThreads;
  }
  // A call has ended that took `took` nanoseconds, `waited` of them waiting, on threads or not.
  void learn(int64_t end, int members, int64_t work, int64_t took, int64_t waited, bool on_threads) {
    const std::unique_lock held(lock_, std::try_to_lock);
    if (!held || state_ == kOne || on_threads != (state_ == kThreads)) return;
    Trial& trial = on_threads ? threads_ : one_;
    trial.calls += 1;
    trial.work += double(work);
    trial.took += double(took);
    trial.waited += double(waited);
    if (trial.calls < kCalls || trial.took < kLong) return;
    if (state_ == kThreads) {
      const double alone = members * (trial.took - trial.waited);
      const bool crowded = trial.waited > kMuch * trial.took && alone < 2 * trial.took;
      return start(crowded && end >= until_ ? kTrial : kThreads);
    }
    doublings_ = std::min(doublings_ + 1, 6);
    until_ = end + (int64_t(threads_.took + one_.took) << doublings_);
    const bool one_wins = one_.took * threads_.work < threads_.took * one_.work;
    start(one_wins ? kOne : kThreads);
  }

 private:
  static constexpr int kCalls = 4;       // of a way, at least (as many backward as forward), and
  static constexpr double kLong = 10e6;  // ns of them: some time slices
  static constexpr double kMuch = 0.2;

  enum State { kThreads, kTrial, kOne };  // kTrial: one thread, and its calls are timed
  struct Trial {
    int calls = 0;
    double work = 0, took = 0, waited = 0;
  };

  void start(State state) {
    state_ = state;
    (state == kThreads ? threads_ : one_) = {};
  }

  TryLock lock_;
  State state_ = kThreads;
  Trial threads_, one_;
  int64_t until_ = 0;  // the last comparison's outcome is kept
  int doublings_ = 0;
};

Experience& experience_with(int64_t work) {
  static Experience all[64];
  int size = 0;
  while (work > 1) work >>= 1, ++size;
  return all[size];
}

}  // namespace

int64_t Barrier::wait() {
  if (size_ == 1) return 0;
  const int generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    generation_.notify_all();
    return 0;
  }
  constexpr int kSpins = 2000;  // 20 to 100 us: longer than a step's uneven shares, shorter than a time slice
  for (int spins = 0; spins < kSpins; ++spins) {
    if (generation_.load(std::memory_order_acquire) != generation) return 0;
    pause();
  }
  const int64_t begin = now();
  generation_.wait(generation, std::memory_order_acquire);
  return now() - begin;
}

Parts::~Parts() {
  for (Part part : parts_) part.destroy();
}

int64_t Parts::run_alongside(int member, Barrier& barrier) {
  int64_t slept = 0;
  for (Part part = parts_[member];;) {
    part.resume();
    if (part.done()) return slept;
    slept += barrier.wait();
  }
}

// Up to the next meeting of its team each. The members of a team meet equally often.
void Parts::run_in_turn() {
  for (size_t first = 0; first < parts_.size(); first += team_size_)
    while (!parts_[first].done())
      for (int member = 0; member < team_size_; ++member) parts_[first + member].resume();
}

void Parts::run(int64_t work) {
  const int members = static_cast<int>(parts_.size());
  std::vector<std::unique_ptr<Barrier>> barriers;
  if (members > 1)
    for (int first = 0; first < members; first += team_size_) barriers.push_back(std::make_unique<Barrier>(team_size_));
  share_out(
      members, work, [&](int member) { return run_alongside(member, *barriers[member / team_size_]); },
      [&] { run_in_turn(); });
}

void share_out(int members, int64_t work, const std::function<int64_t(int)>& alongside,
               const std::function<void()>& in_turn) {
  // One thread enters no parallel region: worker processes made by fork after OpenMP has started must not.
  if (members == 1) return in_turn();
  Experience& experience = experience_with(work);
  const int64_t begin = now();
  if (experience.prefers_one(begin)) {
    in_turn();
    const int64_t end = now();
    return experience.learn(end, members, work, end - begin, 0, /*on_threads=*/false);
  }
  bool complete = true;
  int64_t slept = 0, finished = 0;
#pragma omp parallel num_threads(members)
  {
    const int thread = omp_get_thread_num();
    if (omp_get_num_threads() == members) {
      const int64_t own = alongside(thread);
      if (thread == 0) slept = own, finished = now();
    } else if (thread == 0)
      complete = false;
  }
  if (!complete) return in_turn();
  const int64_t end = now();
  experience.learn(end, members, work, end - begin, slept + end - finished, /*on_threads=*/true);
}

}  // namespace fastrnn::cpu
