// The coroutine that is a member's part of a call. It pauses where its team has to meet, and whoever runs it (team.h)
// resumes it when the others are there too, or takes the team's members in turn.
#pragma once
#include "isa-inl.h"

#include "matrix-inl.h"

namespace fastrnn::cpu::FASTRNN_ISA {

// kMeet: its team has to be there. kInput: likewise, and what it reads next may be another layer's to write (Pipeline).
enum Pause { kMeet, kInput };

// What a worker's run() returns: its coroutine, which pauses before the first line and at every co_yield, and lives until
// it is destroyed. No exception leaves it: nothing in it throws.
struct Paused {
  struct Always {
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<>) const noexcept {}
    void await_resume() const noexcept {}
  };
  struct promise_type {
    bool needs_input = false;

    Paused get_return_object() noexcept {
      return {{std::coroutine_handle<promise_type>::from_promise(*this), &needs_input}};
    }
    Always initial_suspend() const noexcept { return {}; }
    Always final_suspend() const noexcept {
      leave_matrix_unit();
      return {};
    }
    Always yield_value(Pause why) noexcept {
      leave_matrix_unit();
      needs_input = why == kInput;
      return {};
    }
    void return_void() const noexcept {}
    void unhandled_exception() const noexcept { __builtin_abort(); }
  };
  Part part;
};

}  // namespace fastrnn::cpu::FASTRNN_ISA
