// Who runs the members of a plan: as many threads side by side, or one thread that takes them in turn. What a member
// computes is the same either way, to the last bit, so whichever is faster on the machine as it is now may be taken.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
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

// Layers one upon the other whose parts follow each other through the steps: a layer works on a chunk of steps when the
// layer below has finished it. A stage is a team of threads and the layers that it runs, one after the other in each chunk.
// Stages wait while the first chunks come and the last ones go. Where share_out takes that for a want of processors, it
// tries one thread, and keeps what is faster.
class Pipeline {
 public:
  Pipeline(int stages, int team_size, int64_t chunks) : stages_(stages), team_size_(team_size), chunks_(chunks) {}
  Pipeline(const Pipeline&) = delete;
  ~Pipeline();
  // The next layer's parts, one a member, at most team_size of them. Stages come in order.
  void add(int stage, std::vector<Part> parts);
  void run(int64_t work);
  // What run chooses from, as those of Parts.
  int64_t run_alongside(int member);
  void run_in_turn();

 private:
  struct Layer {
    Layer(int stage, std::vector<Part> parts)
        : stage(stage), parts(std::move(parts)), barrier(static_cast<int>(this->parts.size())) {}
    const int stage;
    const std::vector<Part> parts;
    Barrier barrier;
    std::atomic<int> chunks{0};  // finished
  };

  const int stages_, team_size_;
  const int64_t chunks_;
  std::vector<std::unique_ptr<Layer>> layers_;
};

// Calls alongside(member) for all members at once, each on a thread, or in_turn() on this thread alone: where there is
// but one member, where OpenMP has fewer threads (OMP_THREAD_LIMIT, OMP_DYNAMIC), and where that has lately been faster
// for calls of about as much work, since others had the processors. alongside returns the nanoseconds that it slept.
void share_out(int members, int64_t work, const std::function<int64_t(int)>& alongside,
               const std::function<void()>& in_turn);

}  // namespace fastrnn::cpu
