// Who touched a byte last, and whether that happened before what a thread does now.
//
// Time passes at barriers: `epoch` grows by one at every barrier of a block and at the begin of every block, a warp's own counter at every
// __syncwarp of all its lanes. Accesses of one block in one epoch are not ordered, nor are accesses of two blocks of a launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_emulator {

std::string thread_text(unsigned thread);

struct Clock {
  uint32_t epoch = 0;
  uint32_t first_of_block = 0;
  uint32_t first_of_launch = 0;
  uint32_t warps[32] = {};
};

extern Clock now;

struct Access {
  uint32_t epoch;       // 0: never
  uint32_t warp_epoch;  // of the thread's warp
  uint16_t thread;
  bool by_lanes;   // other lanes of that warp too, in that epoch of both
  bool by_warps;   // other warps too, in that epoch
  bool by_blocks;  // other blocks of the launch too
};

struct Shadow {
  Access write, read;
};

inline bool is_ordered(const Access& before, unsigned thread) {
  if (before.epoch < now.first_of_launch) return true;
  if (before.epoch < now.first_of_block || before.by_blocks) return false;
  if (before.epoch != now.epoch) return true;
  if (before.by_warps) return false;
  if (before.thread == thread && !before.by_lanes) return true;
  return before.thread / 32u == thread / 32 && before.warp_epoch < now.warps[thread / 32];
}

inline void record(Access& access, unsigned thread) {
  const uint32_t warp_epoch = now.warps[thread / 32];
  const bool is_now = access.epoch == now.epoch;
  const bool is_other_warp = is_now && access.thread / 32u != thread / 32;
  const bool is_other_lane = is_now && !is_other_warp && access.warp_epoch == warp_epoch && (access.by_lanes || access.thread != thread);
  const bool is_other_block =
      access.epoch >= now.first_of_launch && access.epoch > 0 && (access.by_blocks || access.epoch < now.first_of_block);
  access = {now.epoch, warp_epoch, static_cast<uint16_t>(thread), is_other_lane, is_other_warp || (is_now && access.by_warps), is_other_block};
}

// Writes down an access of one byte. Gives what it races with, or nothing.
inline const Access* touch(Shadow& shadow, bool is_write, unsigned thread) {
  if (!is_ordered(shadow.write, thread)) return &shadow.write;
  if (is_write && !is_ordered(shadow.read, thread)) return &shadow.read;
  record(is_write ? shadow.write : shadow.read, thread);
  return nullptr;
}

inline std::string race_text(const Shadow& shadow, const Access* other, bool is_write, unsigned thread) {
  const bool is_other_block = other->by_blocks || other->epoch < now.first_of_block;
  return "thread " + thread_text(thread) + (is_write ? " writes" : " reads") + " what " +
         (is_other_block ? "another block of the launch" : "thread " + thread_text(other->thread)) +
         (other == &shadow.write ? " wrote" : " read") + (is_other_block ? "" : ", with no barrier between");
}

}  // namespace cuda_emulator
