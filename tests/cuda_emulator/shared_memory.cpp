// Shared memory with a shadow: for every byte the last thread that wrote it and the last that read it, and when.
#include "shared_memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <utility>

#include "cuda_emulator.h"

namespace cuda_emulator::shared_memory {
namespace {

constexpr size_t kGuard = 4096;             // around every array
constexpr size_t kArena = size_t{1} << 20;  // arrays and guards
constexpr unsigned char kPoison = 0xff;     // a NaN in every floating type

struct Access {
  uint32_t epoch;       // of the block; 0: never
  uint32_t warp_epoch;  // of the thread's warp
  uint16_t thread;
  bool by_lanes;  // other lanes of that warp too
  bool by_warps;  // other warps too
};

struct Shadow {
  Access write, read;
  uint32_t array;  // the number of the block in which this byte belonged to an array
};

unsigned char* arena = nullptr;
Shadow* shadow = nullptr;
size_t used = 0;
size_t dynamic_size = 0;
size_t budget = 0, declared = 0;
void* dynamic_base = nullptr;
uint32_t epoch = 0, first_epoch = 0, block = 0;
uint32_t warp_epochs[32];
std::map<const void*, std::pair<void*, size_t>> by_tag;

void reserve() {
  if (arena != nullptr) return;
  const auto map = [](size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    return p;
  };
  arena = static_cast<unsigned char*>(map(kArena));
  shadow = static_cast<Shadow*>(map(kArena * sizeof(Shadow)));
}

// An address that is a multiple of `alignment` and of nothing larger: a kernel that needs more has to say so.
void* take(size_t bytes, size_t alignment) {
  declared += bytes;
  if (declared > budget)
    fail(std::to_string(declared) + " bytes of shared memory, sm_80 has " + std::to_string(budget), {nullptr, 0});
  size_t begin = (used + kGuard + 2 * alignment - 1) / (2 * alignment) * (2 * alignment) + alignment;
  if (begin + bytes + kGuard > kArena) fail("too many arrays of shared memory", {nullptr, 0});
  std::memset(arena + used, kPoison, begin + bytes + kGuard - used);
  for (size_t i = begin; i < begin + bytes; ++i) shadow[i].array = block;
  used = begin + bytes;
  return arena + begin;
}

// Whether what `before` says happened before what the thread does now.
bool is_ordered(const Access& before, unsigned thread, unsigned warp_of_before) {
  if (before.epoch != epoch) return true;
  if (before.by_warps) return false;
  if (before.thread == thread && !before.by_lanes) return true;
  return warp_of_before == thread / 32 && before.warp_epoch < warp_epochs[thread / 32];
}

void record(Access& access, unsigned thread) {
  const bool is_now = access.epoch == epoch;
  const bool is_other_warp = is_now && access.thread / 32u != thread / 32;
  const bool is_other_lane =
      is_now && !is_other_warp && access.warp_epoch == warp_epochs[thread / 32] && (access.by_lanes || access.thread != thread);
  access = {epoch, warp_epochs[thread / 32], static_cast<uint16_t>(thread), is_other_lane, is_other_warp || (is_now && access.by_warps)};
}

std::string race(const char* what, unsigned thread, const char* before, const Access& access, size_t offset) {
  return std::string("thread ") + thread_text(thread) + " " + what + " byte " + std::to_string(offset) +
         " of the shared memory's arena that thread " + thread_text(access.thread) + " " + before + " with no barrier between";
}

}  // namespace

void begin_block(size_t dynamic_bytes, size_t at_most) {
  reserve();
  ++block;
  first_epoch = ++epoch;
  std::memset(warp_epochs, 0, sizeof warp_epochs);
  by_tag.clear();
  used = declared = 0;
  budget = at_most;
  dynamic_size = dynamic_bytes;
  dynamic_base = take(dynamic_bytes, 128);
}

void* dynamic() { return dynamic_base; }

void* of_tag(const void* tag, size_t bytes, size_t alignment) {
  const auto found = by_tag.find(tag);
  if (found != by_tag.end()) return found->second.first;
  void* p = take(bytes, alignment);
  by_tag[tag] = {p, bytes};
  return p;
}

void next_epoch() { ++epoch; }

void next_warp_epoch(unsigned warp, unsigned mask) {
  if (mask == 0xffffffffu) ++warp_epochs[warp];
}

bool contains(const void* p) { return p >= arena && p < arena + kArena; }

std::string note(const void* p, size_t bytes, bool is_write, unsigned thread) {
  const size_t begin = static_cast<size_t>(static_cast<const unsigned char*>(p) - arena);
  for (size_t i = begin; i < begin + bytes; ++i) {
    Shadow& s = shadow[i];
    if (s.array != block) return "thread " + thread_text(thread) + (is_write ? " writes" : " reads") + " outside the arrays of shared memory";
    if (!is_ordered(s.write, thread, s.write.thread / 32u))
      return race(is_write ? "writes" : "reads", thread, "wrote", s.write, i);
    if (is_write) {
      if (!is_ordered(s.read, thread, s.read.thread / 32u)) return race("writes", thread, "read", s.read, i);
      record(s.write, thread);
    } else {
      if (s.write.epoch < first_epoch) return "thread " + thread_text(thread) + " reads shared memory that nobody wrote";
      record(s.read, thread);
    }
  }
  return "";
}

std::string broken_guard() {
  for (size_t i = 0; i < used + kGuard; ++i) {
    if (shadow[i].array != block && arena[i] != kPoison) return "something was written outside the arrays of shared memory";
  }
  return "";
}

}  // namespace cuda_emulator::shared_memory
