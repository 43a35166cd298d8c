// Compiles the file named by DL_ISA_SOURCE once for each instruction set, into namespaces avx512, avx2 and generic.
//
// No include guard: include it once in each source that has kernels. The file it compiles marks every function DL_KERNEL
// and computes with the vector type V of vec.h. It must define no lambda (a lambda does not inherit the target attribute)
// and call no function template of the standard library (the linker could keep the copy for the newer processor).
#include "common/vec.h"

namespace dist_llm {

namespace generic {
namespace {
#define DL_KERNEL
using V = VecGeneric;
#include DL_ISA_SOURCE
#undef DL_KERNEL
}  // namespace
}  // namespace generic

#if defined(__x86_64__)
namespace avx2 {
namespace {
#define DL_KERNEL __attribute__((target("avx2,fma")))
using V = VecAvx2;
#include DL_ISA_SOURCE
#undef DL_KERNEL
}  // namespace
}  // namespace avx2

namespace avx512 {
namespace {
#define DL_KERNEL __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
using V = VecAvx512;
#include DL_ISA_SOURCE
#undef DL_KERNEL
}  // namespace
}  // namespace avx512
#endif

}  // namespace dist_llm
