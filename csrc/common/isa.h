// Which vector instructions the CPU kernels of this process use.
//
// Chosen once, at the first question, from what the processor has and from DIST_LLM_CPU_ISA = auto | avx512 | avx2 | generic.
// A name the processor cannot run is an error, never an illegal instruction.
#pragma once

namespace dist_llm {

enum class Isa { generic, avx2, avx512 };

// Throws std::runtime_error, naming the choices, when DIST_LLM_CPU_ISA is unknown or cannot run here.
Isa isa();

const char* isa_name(Isa isa);

// Whether that is AVX-512 and the processor also multiplies pairs of bf16 numbers (AVX512_BF16).
bool multiplies_bf16();

}  // namespace dist_llm

// Calls the kernel compiled for the instructions in use: DL_PER_ISA(forward<S, W>(args, begin, end)).
#if defined(__x86_64__)
#define DL_PER_ISA(...)                            \
  switch (::dist_llm::isa()) {                     \
    case ::dist_llm::Isa::avx512:                  \
      avx512::__VA_ARGS__;                         \
      break;                                       \
    case ::dist_llm::Isa::avx2:                    \
      avx2::__VA_ARGS__;                           \
      break;                                       \
    case ::dist_llm::Isa::generic:                 \
      generic::__VA_ARGS__;                        \
      break;                                       \
  }
#else
#define DL_PER_ISA(...) generic::__VA_ARGS__;
#endif
