// The emulator's scheduler: blocks in random order, threads as fibers in random order between the points where they meet.
#include "cuda_emulator.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "global_memory.h"
#include "shadow.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulator {
namespace {

constexpr size_t kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 * 1024;
// What a kernel may have without asking, and what it may ask for on sm_80 (static and dynamic together).
constexpr size_t kSharedWithoutAsking = 48 * 1024;
constexpr size_t kSharedAtMost = 163 * 1024;

enum class State { ready, at_barrier, at_warp_function, done };

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, total;
  unsigned group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  Place place;           // of the barrier or warp function it waits at
  const char* function;  // of that warp function
  unsigned mask;
  void* data;
  int predicate;
  std::vector<Copy> copies;
  unsigned groups;  // committed
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x1234567u) {}
  size_t below(size_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<size_t>((state_ >> 11) % n);
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

 private:
  uint64_t state_;
};

uint64_t seed() {
  const char* given = std::getenv("DL_EMULATOR_SEED");
  return given == nullptr ? 1 : std::strtoull(given, nullptr, 10);
}

std::string text(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

}  // namespace

Clock now;

namespace {

// One launch at a time: everything below belongs to the one under way.
std::mutex launch_mutex;
int64_t num_launches = 0;
bool in_thread = false;  // on a fiber's stack, not on the scheduler's
Fiber scheduler;
std::vector<std::unique_ptr<Thread>> pool;
size_t num_threads, num_done, num_waiting;
unsigned current;
std::vector<unsigned> ready;
bool runs_ahead;  // the thread that came last goes on first, so that one warp runs far ahead of the others
Random randomness(seed());
std::string failure;
const char* kernel_name = nullptr;
Place kernel_place;
void (*kernel_body)(void*);
void* kernel_argument;
std::map<const void*, size_t> allowed_shared;
int barrier_result;

Thread& me() { return *pool[current]; }

std::string in_kernel(const std::string& what, Place place) {
  std::string message = std::string("CUDA emulation: kernel ") + kernel_name + " launched at " + text(kernel_place) + ", block " +
                        text(blockIdx) + ": " + what;
  if (place.file != nullptr) message += " at " + text(place);
  return message;
}

// An instruction as its offset in this library, which __main__.py turns into a line.
std::string offset_text(const void* instruction) {
  Dl_info info;
  if (instruction == nullptr || dladdr(instruction, &info) == 0) return "";
  std::ostringstream text;
  text << " [+0x" << std::hex << static_cast<const char*>(instruction) - static_cast<const char*>(info.dli_fbase) - 1 << ']';
  return text.str();
}

void suspend() { switch_fiber(me().fiber, scheduler); }

void thread_main() {
  kernel_body(kernel_argument);
  if (!me().copies.empty()) fail("thread " + text(me().index) + " ends with cp.async copies that it never waited for", {nullptr, 0});
  me().state = State::done;
  ++num_done;
  suspend();
  std::abort();  // a fiber that is done is never resumed
}

void make_ready(unsigned thread) {
  pool[thread]->state = State::ready;
  ready.push_back(thread);
}

// All threads wait, or have left, and nobody can go on: says who waits for whom.
std::string describe_deadlock() {
  const Thread* left = nullptr;
  const Thread* at_barrier = nullptr;
  for (size_t i = 0; i < num_threads; ++i) {
    const Thread& t = *pool[i];
    if (t.state == State::done) left = &t;
    if (t.state == State::at_barrier) at_barrier = &t;
  }
  for (size_t i = 0; i < num_threads; ++i) {
    const Thread& t = *pool[i];
    if (t.state != State::at_warp_function) continue;
    const std::string waits =
        "thread " + text(t.index) + " waits in " + t.function + " at " + text(t.place) + ", mask " + std::to_string(t.mask);
    for (unsigned lane = 0; lane < 32; ++lane) {
      const size_t other = i / 32 * 32 + lane;
      if (!(t.mask >> lane & 1) || other == i) continue;
      if (other >= num_threads) return waits + ", for lane " + std::to_string(lane) + ", which the block does not have";
      const Thread& o = *pool[other];
      const std::string who = ", for thread " + text(o.index);
      if (o.state == State::done) return waits + who + ", which has left the kernel";
      if (o.state == State::at_barrier) return waits + who + ", which waits at the barrier at " + text(o.place);
      if (o.function != t.function || o.mask != t.mask || o.place.line != t.place.line)
        return waits + who + ", which waits in " + o.function + " at " + text(o.place) + ", mask " + std::to_string(o.mask);
    }
  }
  if (at_barrier != nullptr && left != nullptr)
    return "thread " + text(at_barrier->index) + " waits at the barrier at " + text(at_barrier->place) + ", thread " + text(left->index) +
           " has left the kernel";
  return "all threads wait for one another";
}

void release_barrier() {
  barrier_result = 0;
  for (size_t i = 0; i < num_threads; ++i) {
    const Thread& t = *pool[i];
    if (t.place.line != me().place.line || std::strcmp(t.place.file, me().place.file) != 0)
      fail("thread " + text(t.index) + " is at the barrier at " + text(t.place) + ", thread " + text(me().index) + " at another", me().place);
    barrier_result += t.predicate != 0;
  }
  num_waiting = 0;
  ++now.epoch;
  for (size_t i = 0; i < num_threads; ++i) {
    if (i != current) make_ready(static_cast<unsigned>(i));
  }
  me().state = State::ready;
  randomness.shuffle(ready);
}

void run_block() {
  num_done = num_waiting = 0;
  ready.clear();
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& t = *pool[i];
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    t.copies.clear();
    t.groups = 0;
    start_fiber(t.fiber, thread_main);
    make_ready(i);
  }
  randomness.shuffle(ready);
  runs_ahead = randomness.below(2) == 0;
  while (!ready.empty()) {
    const size_t chosen = runs_ahead ? ready.size() - 1 : randomness.below(ready.size());
    current = ready[chosen];
    ready[chosen] = ready.back();
    ready.pop_back();
    threadIdx = me().index;
    in_thread = true;
    switch_fiber(scheduler, me().fiber);
    in_thread = false;
    if (!failure.empty()) throw std::runtime_error(failure);
  }
  if (num_done != num_threads) throw std::runtime_error(in_kernel(describe_deadlock(), {nullptr, 0}));
  const std::string broken = shared_memory::broken_guard();
  if (!broken.empty()) throw std::runtime_error(in_kernel(broken, {nullptr, 0}));
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes, const void* function) {
  const auto refuse = [](const std::string& what) {
    throw std::runtime_error(std::string("CUDA emulation: launch of ") + kernel_name + " at " + text(kernel_place) + ": " + what);
  };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) refuse("a block of " + text(uint3{block.x, block.y, block.z}) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse("a grid of " + text(uint3{grid.x, grid.y, grid.z}) + " blocks");
  const auto asked = allowed_shared.find(function);
  const size_t allowed = asked == allowed_shared.end() ? kSharedWithoutAsking : std::max(kSharedWithoutAsking, asked->second);
  if (shared_bytes > allowed)
    refuse(std::to_string(shared_bytes) + " bytes of dynamic shared memory, allowed are " + std::to_string(allowed));
}

}  // namespace

void fail(const std::string& what, Place place) {
  if (!in_thread) throw std::runtime_error(kernel_name == nullptr ? "CUDA emulation: " + what : in_kernel(what, place));
  failure = in_kernel(what.starts_with("thread ") ? what : "thread " + text(me().index) + ": " + what, place);
  suspend();
  std::abort();  // the launch is over
}

void run(
    const char* kernel, Place place, dim3 grid, dim3 block, size_t shared_bytes, const void* function, void (*body)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  ++num_launches;
  kernel_name = kernel;
  kernel_place = place;
  check_launch(grid, block, shared_bytes, function);
  kernel_body = body;
  kernel_argument = argument;
  blockDim = block;
  gridDim = grid;
  num_threads = size_t{block.x} * block.y * block.z;
  failure.clear();
  while (pool.size() < num_threads) {
    pool.push_back(std::make_unique<Thread>());
    allocate_stack(pool.back()->fiber, kStackBytes);
  }
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  randomness.shuffle(blocks);
  now.first_of_launch = now.epoch + 1;
  for (const uint64_t i : blocks) {
    blockIdx = {
        static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y), static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
    now.first_of_block = ++now.epoch;
    std::fill(std::begin(now.warps), std::end(now.warps), 0u);
    shared_memory::begin_block(shared_bytes, kSharedAtMost);
    run_block();
  }
  const std::string broken = global_memory::broken_guard();
  if (!broken.empty()) throw std::runtime_error(in_kernel(broken, {nullptr, 0}));
}

void* dynamic_shared() { return shared_memory::dynamic(); }

void* static_shared(const void* tag, size_t bytes, size_t alignment) { return shared_memory::of_tag(tag, bytes, alignment); }

int meet_block(int predicate, Place place) {
  Thread& t = me();
  t.state = State::at_barrier;
  t.place = place;
  t.predicate = predicate;
  if (++num_waiting == num_threads) {
    release_barrier();
  } else {
    suspend();
  }
  return barrier_result;
}

void meet_warp(const char* function, unsigned mask, void* data, Combine combine, Place place) {
  Thread& t = me();
  const unsigned first = current / 32 * 32;
  if (!(mask >> (current % 32) & 1)) fail(std::string(function) + " with a mask that leaves the calling lane out", place);
  t.state = State::at_warp_function;
  t.function = function;
  t.mask = mask;
  t.data = data;
  t.place = place;
  void* lanes[32] = {};
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread* other = first + lane < num_threads ? pool[first + lane].get() : nullptr;
    if (other == nullptr || other->state != State::at_warp_function || other->function != function || other->mask != mask ||
        other->place.line != place.line || other->place.file != place.file) {
      suspend();
      return;
    }
    lanes[lane] = other->data;
  }
  combine(lanes, mask);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && first + lane != current) make_ready(first + lane);
  }
  t.state = State::ready;
}

void sync_warp(unsigned mask, Place place) {
  meet_warp(
      "__syncwarp", mask, nullptr,
      [](void* const*, unsigned met) {
        if (met == 0xffffffffu) ++now.warps[current / 32];
      },
      place);
}

unsigned lane_of_thread() { return current % 32; }

unsigned threads_of_warp() { return static_cast<unsigned>(std::min<size_t>(32, num_threads - current / 32 * 32)); }

bool is_shared(const void* p) { return shared_memory::contains(p); }

void note_access(const void* p, size_t bytes, bool is_write, int lane, const void* instruction) {
  // Functions of the standard library, which this code shares with the kernels', can be instrumented too.
  static bool is_noting = false;
  if (!in_thread || is_noting) return;
  is_noting = true;
  const unsigned thread = lane < 0 ? current : current / 32 * 32 + static_cast<unsigned>(lane);
  const auto note = shared_memory::contains(p) ? shared_memory::note : global_memory::note;
  const std::string wrong = note(p, bytes, is_write, thread);
  is_noting = false;
  if (!wrong.empty()) fail(wrong + offset_text(instruction), {nullptr, 0});
}

void copy_later(void* shared, const void* global, unsigned bytes, unsigned total, Place place) {
  if (!shared_memory::contains(shared)) fail("cp.async to what is not shared memory", place);
  if (reinterpret_cast<uintptr_t>(shared) % total != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(global) % total != 0))
    fail("cp.async between addresses that are not multiples of " + std::to_string(total), place);
  me().copies.push_back({shared, global, bytes, total, me().groups});
}

void commit_copies() { ++me().groups; }

void wait_for_copies(unsigned groups_left) {
  Thread& t = me();
  size_t kept = 0;
  for (const Copy& copy : t.copies) {
    if (copy.group + groups_left >= t.groups) {
      t.copies[kept++] = copy;
      continue;
    }
    if (copy.bytes > 0) note_access(copy.from, copy.bytes, false);
    note_access(copy.to, copy.total, true);
    std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.total - copy.bytes);
  }
  t.copies.resize(kept);
}

void allow_shared(const void* function, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedAtMost)
    fail(std::to_string(bytes) + " bytes of dynamic shared memory asked for; sm_80 has " + std::to_string(kSharedAtMost), {nullptr, 0});
  const std::lock_guard<std::mutex> lock(launch_mutex);
  allowed_shared[function] = static_cast<size_t>(bytes);
}

std::string thread_text(unsigned thread) { return text(pool[thread]->index); }

}  // namespace cuda_emulator

extern "C" __attribute__((visibility("default"))) int64_t dl_launches() { return cuda_emulator::num_launches; }
