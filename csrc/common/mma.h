// Matrix products of a warp on tensor cores, and copies to shared memory that run beside them: thin wrappers of PTX instructions (PTX ISA,
// "Warp-level matrix instructions" and "cp.async"), all from sm_80 on. In the emulation they mean what PTX documents
// (tests/cuda_emulator/include/mma_emulated.h).
//
// A warp holds matrices in fragments. With g = lane / 4 and t = lane % 4, of a 16-bit type two to a register, the lower column (or row) in
// the lower half:
//   A 16 x 16   a[0]: row g, columns 2t, 2t+1    a[1]: row g+8, the same     a[2]: row g, columns 2t+8, 2t+9    a[3]: row g+8, those
//   B 16 x 8    b[0]: rows 2t, 2t+1, column g    b[1]: rows 2t+8, 2t+9, column g
//   C 16 x 8    c[0], c[1]: row g, columns 2t, 2t+1                          c[2], c[3]: row g+8, the same          (fp32)
// So a pair of neighbouring C fragments, rounded, is an A fragment: the result of one product enters the next without moving.
#pragma once

#include <cstdint>

#include "common/cuda_launch.h"

#if defined(DL_EMULATE_CUDA)
#include "mma_emulated.h"
#endif

namespace dist_llm {

__device__ inline uint32_t pack_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

__device__ inline uint32_t pack_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

#if defined(DL_EMULATE_CUDA)

template <class S>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], DL_HERE) {
  cuda_emulator::mma<S>(c, a, b, {file, line});
}

template <bool transposed>
void load_matrices(uint32_t (&out)[4], const void* row, DL_HERE) {
  cuda_emulator::load_matrices(out, row, transposed, {file, line});
}

inline void copy_async(void* shared, const void* global, bool is_there, DL_HERE) {
  cuda_emulator::copy_later(shared, global, is_there ? 16 : 0, 16, {file, line});
}
inline void commit_copies() { cuda_emulator::commit_copies(); }
template <int groups_left>
void wait_for_copies() {
  cuda_emulator::wait_for_copies(groups_left);
}

#else

// c += a b, the products exact and added in fp32; S is __nv_bfloat16 or __half. All lanes of the warp must call it.
template <class S>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices of 16-bit numbers from shared memory (ldmatrix .x4): lane l gives the address of row l % 8 of matrix l / 8, 16 bytes,
// aligned. out[i] has of matrix i: row g, columns 2t and 2t+1; transposed: rows 2t and 2t+1 of column g.
template <bool transposed>
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// 16 bytes from global to shared memory, both aligned, some time before the copy is waited for; zeros when they are not there (`global` is
// then not read).
__device__ inline void copy_async(void* shared, const void* global, bool is_there) {
  const int bytes = is_there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

// The copies of this thread since the last call are one group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `groups_left` of this thread's groups are under way. What others copied is there only after a barrier.
template <int groups_left>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

#endif

}  // namespace dist_llm
