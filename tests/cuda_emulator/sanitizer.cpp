// What the compiler calls where it instruments a kernel: loads and stores (-fsanitize=thread), misaligned ones and indices outside an
// array (-fsanitize=alignment,bounds). These are definitions of our own; no sanitizer library is linked.
#include <cstdint>
#include <cstring>

#include "cuda_emulator.h"

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

struct OutOfBounds {
  SourceLocation location;
};

// Inlined, so that the return address is the kernel's.
__attribute__((always_inline)) inline void read(const void* p, size_t bytes) {
  cuda_emulator::note_access(p, bytes, false, -1, __builtin_return_address(0));
}
__attribute__((always_inline)) inline void write(const void* p, size_t bytes) {
  cuda_emulator::note_access(p, bytes, true, -1, __builtin_return_address(0));
}

[[noreturn]] void misaligned(const TypeMismatch* data, uintptr_t address) {
  cuda_emulator::fail(
      "address " + std::to_string(address) + " is not a multiple of " + std::to_string(1u << data->log_alignment),
      {data->location.file, static_cast<int>(data->location.line)});
}

[[noreturn]] void out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  cuda_emulator::fail(
      "index " + std::to_string(static_cast<int64_t>(index)) + " is outside its array",
      {data->location.file, static_cast<int>(data->location.line)});
}

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t address) { misaligned(data, address); }
void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* data, uintptr_t address) { misaligned(data, address); }
void __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) { out_of_bounds(data, index); }
void __ubsan_handle_out_of_bounds_abort(const OutOfBounds* data, uintptr_t index) { out_of_bounds(data, index); }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read1(void* p) { read(p, 1); }
void __tsan_read2(void* p) { read(p, 2); }
void __tsan_read4(void* p) { read(p, 4); }
void __tsan_read8(void* p) { read(p, 8); }
void __tsan_read16(void* p) { read(p, 16); }
void __tsan_write1(void* p) { write(p, 1); }
void __tsan_write2(void* p) { write(p, 2); }
void __tsan_write4(void* p) { write(p, 4); }
void __tsan_write8(void* p) { write(p, 8); }
void __tsan_write16(void* p) { write(p, 16); }
void __tsan_unaligned_read2(void* p) { read(p, 2); }
void __tsan_unaligned_read4(void* p) { read(p, 4); }
void __tsan_unaligned_read8(void* p) { read(p, 8); }
void __tsan_unaligned_read16(void* p) { read(p, 16); }
void __tsan_unaligned_write2(void* p) { write(p, 2); }
void __tsan_unaligned_write4(void* p) { write(p, 4); }
void __tsan_unaligned_write8(void* p) { write(p, 8); }
void __tsan_unaligned_write16(void* p) { write(p, 16); }
void __tsan_read_range(void* p, size_t bytes) { read(p, bytes); }
void __tsan_write_range(void* p, size_t bytes) { write(p, bytes); }
void __tsan_volatile_read1(void* p) { read(p, 1); }
void __tsan_volatile_read2(void* p) { read(p, 2); }
void __tsan_volatile_read4(void* p) { read(p, 4); }
void __tsan_volatile_read8(void* p) { read(p, 8); }
void __tsan_volatile_write1(void* p) { write(p, 1); }
void __tsan_volatile_write2(void* p) { write(p, 2); }
void __tsan_volatile_write4(void* p) { write(p, 4); }
void __tsan_volatile_write8(void* p) { write(p, 8); }

// Host code: reference counts and the like.
int32_t __tsan_atomic32_load(const int32_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int64_t __tsan_atomic64_load(const int64_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int8_t __tsan_atomic8_load(const int8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(int32_t* p, int32_t v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
void __tsan_atomic64_store(int64_t* p, int64_t v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
int32_t __tsan_atomic32_fetch_add(int32_t* p, int32_t v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
int32_t __tsan_atomic32_fetch_sub(int32_t* p, int32_t v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
int64_t __tsan_atomic64_fetch_add(int64_t* p, int64_t v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
int64_t __tsan_atomic64_fetch_sub(int64_t* p, int64_t v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }

}  // extern "C"
