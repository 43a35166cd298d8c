// An allocator for torch's CPU tensors that keeps guards and a shadow for each of them.
#include "global_memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>

#include "shadow.h"

namespace cuda_emulator::global_memory {
namespace {

constexpr size_t kGuard = 4096;          // before and behind a tensor: so that no two tensors share a page
constexpr unsigned char kPoison = 0xff;  // a NaN in every floating type

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Block {
  unsigned char* data;
  size_t bytes;
  std::unique_ptr<unsigned char, Free> memory;
  std::unique_ptr<Shadow, Free> shadow;  // made at the first access: zeros, which cost nothing until they are touched
};

// Of the tensors; pages are read without it, as nobody makes or frees tensors while a kernel runs.
std::mutex mutex;
std::map<uintptr_t, Block> blocks;  // by the address of their first guard

// The tensor of a page, or null: found once, forgotten when tensors come and go.
struct Page {
  uintptr_t number;
  Block* block;
};
std::array<Page, 256> pages;

void forget_pages() { pages.fill({~uintptr_t{0}, nullptr}); }

size_t bytes_with_guards(size_t bytes) { return (bytes + 63) / 64 * 64 + 2 * kGuard; }

Block* find(uintptr_t address) {
  const uintptr_t number = address / 4096;
  Page& page = pages[number % pages.size()];
  if (page.number == number) return page.block;
  const std::lock_guard<std::mutex> lock(mutex);
  Block* found = nullptr;
  auto after = blocks.upper_bound(address);
  if (after != blocks.begin()) {
    --after;
    if (address < after->first + bytes_with_guards(after->second.bytes)) found = &after->second;
  }
  page = {number, found};
  return found;
}

void release(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  blocks.erase(reinterpret_cast<uintptr_t>(data) - kGuard);
  forget_pages();
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, cpu};
    // Multiples of a page, so that a page has one tensor at most.
    const size_t whole = (bytes_with_guards(bytes) + 4095) / 4096 * 4096;
    unsigned char* memory = static_cast<unsigned char*>(std::aligned_alloc(4096, whole));
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, kPoison, kGuard);
    std::memset(memory + kGuard + bytes, kPoison, whole - kGuard - bytes);
    unsigned char* data = memory + kGuard;
    const std::lock_guard<std::mutex> lock(mutex);
    blocks[reinterpret_cast<uintptr_t>(memory)] = {data, bytes, std::unique_ptr<unsigned char, Free>(memory), nullptr};
    forget_pages();
    return {data, data, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

std::string note(const void* p, size_t bytes, bool is_write, unsigned thread) {
  const unsigned char* address = static_cast<const unsigned char*>(p);
  Block* block = find(reinterpret_cast<uintptr_t>(p));
  if (block == nullptr) return "";
  if (address < block->data || address + bytes > block->data + block->bytes)
    return "thread " + thread_text(thread) + (is_write ? " writes " : " reads ") + std::to_string(bytes) + " bytes at " +
           std::to_string(address - block->data) + " of a tensor of " + std::to_string(block->bytes) + " bytes";
  if (block->shadow == nullptr) {
    block->shadow.reset(static_cast<Shadow*>(std::calloc(block->bytes, sizeof(Shadow))));
    if (block->shadow == nullptr) throw std::bad_alloc();
  }
  Shadow* shadow = block->shadow.get() + (address - block->data);
  for (size_t i = 0; i < bytes; ++i) {
    if (const Access* other = touch(shadow[i], is_write, thread)) return race_text(shadow[i], other, is_write, thread) + " in global memory";
  }
  return "";
}

std::string broken_guard() {
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [first, block] : blocks) {
    const unsigned char* end = block.data + block.bytes;
    for (size_t i = 0; i < 64; ++i) {
      if (block.data[-1 - static_cast<ptrdiff_t>(i)] != kPoison || end[i] != kPoison)
        return "something was written beside a tensor of " + std::to_string(block.bytes) + " bytes";
    }
  }
  return "";
}

}  // namespace cuda_emulator::global_memory

extern "C" __attribute__((visibility("default"))) void dl_guard_tensors() {
  static cuda_emulator::global_memory::GuardedAllocator allocator;
  cuda_emulator::global_memory::forget_pages();
  c10::SetCPUAllocator(&allocator, 255);
}
