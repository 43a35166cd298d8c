// The shared memory of the block that runs: poisoned, guarded, and with a record of who touched each byte since the last barrier.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_emulator {

std::string thread_text(unsigned thread);

namespace shared_memory {

// Forgets the last block's; everything is NaN.
void begin_block(size_t dynamic_bytes, size_t at_most);

void* dynamic();
void* of_tag(const void* tag, size_t bytes, size_t alignment);

// Barriers order what comes before and after them: for all threads, or for the lanes of a warp.
void next_epoch();
void next_warp_epoch(unsigned warp, unsigned mask);

// Whether an address is in the block's shared memory or close to it.
bool contains(const void* p);

// Writes an access down. Gives what is wrong with it, or nothing: outside all arrays, never written, or a race with another thread.
std::string note(const void* p, size_t bytes, bool is_write, unsigned thread);

// A write next to the arrays that nobody saw.
std::string broken_guard();

}  // namespace shared_memory
}  // namespace cuda_emulator
