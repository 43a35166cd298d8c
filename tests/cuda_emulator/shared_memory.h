// The shared memory of the block that runs: poisoned, guarded, and with a record of who touched each byte.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_emulator::shared_memory {

// Forgets the last block's; everything is NaN.
void begin_block(size_t dynamic_bytes, size_t at_most);

void* dynamic();
void* of_tag(const void* tag, size_t bytes, size_t alignment);

// Whether an address is in the block's shared memory or close to it.
bool contains(const void* p);

// Writes an access down. Gives what is wrong with it, or nothing: outside all arrays, never written, or a race with another thread.
std::string note(const void* p, size_t bytes, bool is_write, unsigned thread);

// A write next to the arrays that nobody saw.
std::string broken_guard();

}  // namespace cuda_emulator::shared_memory
