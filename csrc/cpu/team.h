// Who runs the members of a plan: as many threads side by side, or one thread that takes them in turn. What a member
// computes is the same either way, to the last bit, so whichever is faster on the machine as it is now may be taken.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "plan.h"

namespace fastrnn::cpu {

// A barrier for the threads of one team, met once or twice a step. It spins, for where every thread has a processor the
// others are near. Where one has none the rest sleep after a while: it may need theirs.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  int64_t wait();  // returns the nanoseconds that it slept

 private:
  const int size_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

// The parts of a call, one a member, which it owns.
class Parts {
 public:
  Parts(int members, int team_size) : team_size_(team_size) { parts_.reserve(members); }
  Parts(const Parts&) = delete;
  ~Parts();
  void add(Part part) { parts_.push_back(part); }
  void run(int64_t work);  // multiply-adds of them all
  // What run chooses from. One thread of a team: calls this for its own member; returns the nanoseconds that it slept.
  int64_t run_alongside(int member, Barrier& barrier);
  void run_in_turn();

 private:
  const int team_size_;
  std::vector<Part> parts_;
};

// Calls alongside(member) for all members at once, each on a thread, or in_turn() on this thread alone: where there is
// but one member, where OpenMP has fewer threads (OMP_THREAD_LIMIT, OMP_DYNAMIC), and where that has lately been faster
// for calls of about as much work, since others had the processors. alongside returns the nanoseconds that it slept.
void share_out(int members, int64_t work, const std::function<int64_t(int)>& alongside,
               const std::function<void()>& in_turn);

}  // namespace fastrnn::cpu
