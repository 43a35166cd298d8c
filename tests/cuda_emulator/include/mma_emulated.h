// The matrix instructions of csrc/common/mma.h as the tables of the PTX ISA describe them ("Matrix fragments for mma.m16n8k16 with
// floating-point type", "Warp-level matrix load instruction: ldmatrix").
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace cuda_emulator {

template <class S>
float half_of(uint32_t pair, int which) {
  S value;
  value.bits = static_cast<unsigned short>(pair >> (16 * which));
  return value;
}

template <class S>
DL_NOT_SEEN void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  struct Fragments {
    float* c;
    const uint32_t* a;
    const uint32_t* b;
  } mine{c, a, b};
  const Combine multiply = [](void* const* lanes, unsigned) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments& f = *static_cast<Fragments*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) left[g + (i / 2 % 2) * 8][t * 2 + i % 2 + (i / 4) * 8] = half_of<S>(f.a[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) right[t * 2 + i % 2 + (i / 2) * 8][g] = half_of<S>(f.b[i / 2], i % 2);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Fragments& f = *static_cast<Fragments*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
        float sum = f.c[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        f.c[i] = sum;
      }
    }
  };
  if (threads_of_warp() != 32) fail("mma in a warp that is not whole", place);
  meet_warp("mma", 0xffffffffu, &mine, multiply, place);
}

DL_NOT_SEEN inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed, Place place) {
  struct Rows {
    uint32_t* out;
    const void* row;
    bool transposed;
  } mine{out, row, transposed};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix of a row that is not aligned to 16 bytes", place);
  if (!is_shared(row)) fail("ldmatrix of what is not shared memory", place);
  const Combine load = [](void* const* lanes, unsigned) {
    unsigned short matrices[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Rows& r = *static_cast<Rows*>(lanes[lane]);
      note_access(r.row, 16, false, lane);
      std::memcpy(matrices[lane / 8][lane % 8], r.row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Rows& r = *static_cast<Rows*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const unsigned short low = r.transposed ? matrices[i][2 * t][g] : matrices[i][g][2 * t];
        const unsigned short high = r.transposed ? matrices[i][2 * t + 1][g] : matrices[i][g][2 * t + 1];
        r.out[i] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  };
  meet_warp("ldmatrix", 0xffffffffu, &mine, load, place);
}

}  // namespace cuda_emulator
