#include "team.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>

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

// Until word is no longer value. Returns the nanoseconds that it slept.
int64_t wait_while(const std::atomic<int>& word, int value) {
  constexpr int kSpins = 2000;  // 20 to 100 us: longer than a step's uneven shares, shorter than a time slice
  for (int spins = 0; spins < kSpins; ++spins) {
    if (word.load(std::memory_order_acquire) != value) return 0;
    pause();
  }
  const int64_t begin = now();
  word.wait(value, std::memory_order_acquire);
  return now() - begin;
}

// Up to a pause for input, or the end.
bool may_go_on(Part part) { return !part.coroutine.done() && !*part.needs_input; }

// Calls body(thread) on as many threads side by side. Where OpenMP has fewer it calls nothing and returns false.
bool on_threads(int count, const std::function<void(int)>& body) {
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not know how OpenMP's threads wait for each other, and would find races where there are none.
  std::vector<std::thread> others;
  for (int thread = 1; thread < count; ++thread) others.emplace_back(body, thread);
  body(0);
  for (std::thread& other : others) other.join();
  return true;
#else
  bool enough = true;
#pragma omp parallel num_threads(count)
  {
    const int thread = omp_get_thread_num();
    if (omp_get_num_threads() == count)
      body(thread);
    else if (thread == 0)
      enough = false;
  }
  return enough;
#endif
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
  return wait_while(generation_, generation);
}

Parts::~Parts() {
  for (Part part : parts_) part.coroutine.destroy();
}

int64_t Parts::run_alongside(int member, Barrier& barrier) {
  int64_t slept = 0;
  for (Part part = parts_[member];;) {
    part.coroutine.resume();
    if (part.coroutine.done()) return slept;
    slept += barrier.wait();
  }
}

// Up to the next meeting of its team each. The members of a team meet equally often.
void Parts::run_in_turn() {
  for (size_t first = 0; first < parts_.size(); first += team_size_)
    while (!parts_[first].coroutine.done())
      for (int member = 0; member < team_size_; ++member) parts_[first + member].coroutine.resume();
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

Pipeline::~Pipeline() {
  for (const auto& layer : layers_)
    for (Part part : layer->parts) part.coroutine.destroy();
}

void Pipeline::add(int stage, std::vector<Part> parts) {
  layers_.push_back(std::make_unique<Layer>(stage, std::move(parts)));
}

// Before the first chunk a part packs its weights, and pauses for its input.
int64_t Pipeline::run_alongside(int member) {
  const int stage = member / team_size_, own = member % team_size_;
  int64_t slept = 0;
  for (int64_t chunk = -1; chunk < chunks_; ++chunk)
    for (size_t l = 0; l < layers_.size(); ++l) {
      Layer& layer = *layers_[l];
      if (layer.stage != stage || own >= static_cast<int>(layer.parts.size())) continue;
      if (l > 0 && chunk >= 0) {
        std::atomic<int>& below = layers_[l - 1]->chunks;
        for (int done; (done = below.load(std::memory_order_acquire)) <= chunk;) slept += wait_while(below, done);
      }
      Part part = layer.parts[own];
      for (part.coroutine.resume(); may_go_on(part); part.coroutine.resume()) slept += layer.barrier.wait();
      slept += layer.barrier.wait();  // the chunk's last step is everybody's
      if (own > 0 || chunk < 0) continue;
      layer.chunks.store(static_cast<int>(chunk + 1), std::memory_order_release);
      layer.chunks.notify_all();
    }
  return slept;
}

void Pipeline::run_in_turn() {
  for (int64_t chunk = -1; chunk < chunks_; ++chunk)
    for (const auto& layer : layers_) do {
        for (Part part : layer->parts) part.coroutine.resume();
      } while (may_go_on(layer->parts[0]));
}

void Pipeline::run(int64_t work) {
  share_out(
      stages_ * team_size_, work, [&](int member) { return run_alongside(member); }, [&] { run_in_turn(); });
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
  int64_t slept = 0, finished = 0;
  const bool all = on_threads(members, [&](int thread) {
    const int64_t own = alongside(thread);
    if (thread == 0) slept = own, finished = now();
  });
  if (!all) return in_turn();
  const int64_t end = now();
  experience.learn(end, members, work, end - begin, slept + end - finished, /*on_threads=*/true);
}

}  // namespace fastrnn::cpu
