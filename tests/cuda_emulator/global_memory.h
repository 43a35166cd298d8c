// Tensors on the CPU, as a kernel sees them: each with guards around it and a record of who touched each byte in this launch.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_emulator::global_memory {

// Writes an access down. Gives what is wrong with it, or nothing: beside a tensor, or a race with a thread of the launch. What belongs to no
// tensor passes.
std::string note(const void* p, size_t bytes, bool is_write, unsigned thread);

// A write next to a tensor that nobody saw.
std::string broken_guard();

}  // namespace cuda_emulator::global_memory

// From now on torch's CPU tensors are allocated with guards.
extern "C" void dl_guard_tensors();
