// Shared memory with a shadow, and guards around its arrays.
#include "shared_memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <new>

#include "cuda_emulator.h"
#include "shadow.h"

namespace cuda_emulator::shared_memory {
namespace {

constexpr size_t kGuard = 4096;             // around every array
constexpr size_t kArena = size_t{1} << 20;  // arrays and guards
constexpr unsigned char kPoison = 0xff;     // a NaN in every floating type

unsigned char* arena = nullptr;
Shadow* shadow = nullptr;
uint32_t* owner = nullptr;  // the number of the block in which a byte belonged to an array
size_t used = 0, budget = 0, declared = 0;
void* dynamic_base = nullptr;
uint32_t block = 0;
std::map<const void*, void*> by_tag;

template <class T>
T* reserve(size_t count) {
  void* p = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(p);
}

// An address that is a multiple of `alignment` and of nothing larger: a kernel that needs more has to say so.
void* take(size_t bytes, size_t alignment) {
  declared += bytes;
  if (declared > budget) fail(std::to_string(declared) + " bytes of shared memory, sm_80 has " + std::to_string(budget), {nullptr, 0});
  const size_t begin = (used + kGuard + 2 * alignment - 1) / (2 * alignment) * (2 * alignment) + alignment;
  if (begin + bytes + kGuard > kArena) fail("too many arrays of shared memory", {nullptr, 0});
  std::memset(arena + used, kPoison, begin + bytes + kGuard - used);
  for (size_t i = begin; i < begin + bytes; ++i) owner[i] = block;
  used = begin + bytes;
  return arena + begin;
}

}  // namespace

void begin_block(size_t dynamic_bytes, size_t at_most) {
  if (arena == nullptr) {
    arena = reserve<unsigned char>(kArena);
    shadow = reserve<Shadow>(kArena);
    owner = reserve<uint32_t>(kArena);
  }
  ++block;
  by_tag.clear();
  used = declared = 0;
  budget = at_most;
  dynamic_base = take(dynamic_bytes, 128);
}

void* dynamic() { return dynamic_base; }

void* of_tag(const void* tag, size_t bytes, size_t alignment) {
  const auto found = by_tag.find(tag);
  if (found != by_tag.end()) return found->second;
  return by_tag[tag] = take(bytes, alignment);
}

bool contains(const void* p) { return p >= arena && p < arena + kArena; }

std::string note(const void* p, size_t bytes, bool is_write, unsigned thread) {
  const size_t begin = static_cast<size_t>(static_cast<const unsigned char*>(p) - arena);
  for (size_t i = begin; i < begin + bytes; ++i) {
    if (i >= kArena || owner[i] != block)
      return "thread " + thread_text(thread) + (is_write ? " writes" : " reads") + " outside the arrays of shared memory";
    // What was there in an earlier block is gone.
    if (shadow[i].write.epoch < now.first_of_block) shadow[i].write = {};
    if (shadow[i].read.epoch < now.first_of_block) shadow[i].read = {};
    if (!is_write && shadow[i].write.epoch == 0) return "thread " + thread_text(thread) + " reads shared memory that nobody wrote";
    if (const Access* other = touch(shadow[i], is_write, thread)) return race_text(shadow[i], other, is_write, thread);
  }
  return "";
}

std::string broken_guard() {
  for (size_t i = 0; i < used + kGuard; ++i) {
    if (owner[i] != block && arena[i] != kPoison) return "something was written outside the arrays of shared memory";
  }
  return "";
}

}  // namespace cuda_emulator::shared_memory
