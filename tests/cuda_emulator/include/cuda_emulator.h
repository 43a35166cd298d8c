// CUDA kernels as plain C++: what the stand-ins for CUDA's headers, and the macros of csrc/common/cuda_launch.h, are made of.
//
// A thread of a block is a fiber. It runs until it meets others (a barrier, a warp function) or ends; then another one runs, chosen at
// random. Everything a kernel does wrong is an exception of the launch, with the kernel's name, the block and the thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint3 {
  unsigned x, y, z;
};

using cudaStream_t = void*;

// Of the thread that runs now.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace cuda_emulator {

struct Place {
  const char* file;
  int line;
};

// Ends the launch with an exception.
[[noreturn]] void fail(const std::string& what, Place place);

void run(
    const char* kernel, Place place, dim3 grid, dim3 block, size_t shared_bytes, const void* function, void (*body)(void*), void* argument);

// Kernels get what they were launched with by value, evaluated once.
template <class... Parameters, class... Arguments>
void launch(
    const char* name, const char* file, int line, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
    void (*kernel)(Parameters...), Arguments&&... arguments) {
  static_cast<void>(stream);
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(std::forward<Arguments>(arguments))...)};
  run(
      name, {file, line}, grid, block, shared_bytes, reinterpret_cast<const void*>(kernel),
      [](void* p) {
        const Call& c = *static_cast<Call*>(p);
        std::apply(c.kernel, c.parameters);
      },
      &call);
}

void* dynamic_shared();
void* static_shared(const void* tag, size_t bytes, size_t alignment);

// One object for all threads of a block; `tag` is the address of something that every declaration has of its own.
template <class T>
T& shared(const void* tag, size_t alignment = alignof(T)) {
  return *static_cast<T*>(static_shared(tag, sizeof(T), alignment));
}

// Waits for all threads of the block. Gives the number of threads that came with a predicate that is not 0.
int meet_block(int predicate, Place place);

// A warp function: waits for the lanes of `mask`. The last one to come calls `combine` with the data of every lane.
using Combine = void (*)(void* const* lanes, unsigned mask);
void meet_warp(const char* function, unsigned mask, void* data, Combine combine, Place place);

// __syncwarp: also orders what the lanes read and write in shared memory.
void sync_warp(unsigned mask, Place place);

unsigned lane_of_thread();
unsigned threads_of_warp();
bool is_shared(const void* p);

// A read or write, of shared memory or of anything else: by this thread, or by another lane of its warp. `instruction` is where it
// comes from, if known.
void note_access(const void* p, size_t bytes, bool is_write, int lane = -1, const void* instruction = nullptr);

// cp.async: copied when waited for, and not before. `bytes` of source, then zeros up to `total`.
void copy_later(void* shared, const void* global, unsigned bytes, unsigned total, Place place);
void commit_copies();
void wait_for_copies(unsigned groups_left);

void allow_shared(const void* function, int bytes);

}  // namespace cuda_emulator

// How many kernels this process has launched.
extern "C" int64_t dl_launches();
