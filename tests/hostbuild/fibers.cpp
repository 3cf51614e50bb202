// Stacks and the switch between them.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>

#include "runtime.h"

namespace fastrnn::emu {
namespace {

char* stacks = nullptr;
int stack_count = 0;

// A power-of-two distance would put the hot end of every stack in the same cache sets.
size_t stagger(int index) { return size_t(index) * 1088 % 8192 / 64 * 64; }

}  // namespace

void reserve_stacks(int count) {
  if (count <= stack_count) return;
  if (stacks) munmap(stacks, size_t(stack_count) * kStackBytes);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* p = mmap(nullptr, size_t(count) * kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (p == MAP_FAILED) abort();
  stacks = static_cast<char*>(p);
  stack_count = count;
  size_t page = size_t(sysconf(_SC_PAGESIZE));
  for (int i = 0; i < count; ++i) mprotect(stacks + size_t(i) * kStackBytes, page, PROT_NONE);
}

bool on_stack(const void* p) {
  return p >= stacks && p < stacks + size_t(stack_count) * kStackBytes;
}

#ifdef FASTRNN_EMU_USES_UCONTEXT

void prepare(Fiber& fiber, int index, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks + size_t(index) * kStackBytes;
  fiber.context.uc_stack.ss_size = kStackBytes - stagger(index);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// (void** save, void* load): saves the callee-saved registers and the stack pointer, loads the other's
extern "C" void fastrnn_emu_switch(void** save, void* load);
asm(R"(
.text
.globl fastrnn_emu_switch
.type fastrnn_emu_switch,@function
fastrnn_emu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fastrnn_emu_switch, .-fastrnn_emu_switch
)");

void prepare(Fiber& fiber, int index, void (*entry)()) {
  char* top = stacks + size_t(index + 1) * kStackBytes - stagger(index) - 64;
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // what entry would return to; leaves the stack as a call would
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber.stack_pointer = sp;
}

void switch_fiber(Fiber& from, Fiber& to) { fastrnn_emu_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace fastrnn::emu
