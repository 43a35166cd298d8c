// Threads of a block as stacks that one real thread jumps between.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_emulator {

struct Fiber {
  void* stack = nullptr;
  size_t stack_bytes = 0;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// A stack with a page before it that cannot be touched.
void allocate_stack(Fiber& fiber, size_t bytes);

// The next switch to `fiber` calls `entry`, which must not return.
void start_fiber(Fiber& fiber, void (*entry)());

// Leaves `from`, which goes on when something switches back to it, and continues `to`.
void switch_fiber(Fiber& from, Fiber& to);

}  // namespace cuda_emulator
