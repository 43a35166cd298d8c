// Fibers: a few instructions on x86-64, ucontext elsewhere (which asks the kernel at every switch).
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace cuda_emulator {

void allocate_stack(Fiber& fiber, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  fiber.stack = static_cast<char*>(memory) + page;
  fiber.stack_bytes = bytes;
}

#if defined(__x86_64__)

// The registers that a called function must keep (System V ABI) go to the old stack and come from the new one.
extern "C" void dl_switch_stacks(void** save_stack_pointer, void* next_stack_pointer);
asm(R"(
.text
.type dl_switch_stacks, @function
.hidden dl_switch_stacks
.globl dl_switch_stacks
dl_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dl_switch_stacks, . - dl_switch_stacks
)");

void start_fiber(Fiber& fiber, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack) + fiber.stack_bytes) & ~uintptr_t{15};
  void** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // where entry would return to
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  fiber.stack_pointer = slot;
}

void switch_fiber(Fiber& from, Fiber& to) { dl_switch_stacks(&from.stack_pointer, to.stack_pointer); }

#else

void start_fiber(Fiber& fiber, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void switch_fiber(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace cuda_emulator
