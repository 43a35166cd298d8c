// The choice of isa.h, and the op that tells Python about it.
#include "common/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dist_llm {
namespace {

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::generic:
      return true;
  }
#endif
  return isa == Isa::generic;
}

Isa choose() {
  const char* variable = std::getenv("DIST_LLM_CPU_ISA");
  const std::string requested = variable == nullptr || *variable == '\0' ? "auto" : variable;
  std::string can_run;
  for (Isa candidate : {Isa::avx512, Isa::avx2, Isa::generic}) {
    if (!runs_here(candidate)) continue;
    if (requested == "auto" || requested == isa_name(candidate)) return candidate;
    can_run += std::string(", ") + isa_name(candidate);
  }
  throw std::runtime_error("DIST_LLM_CPU_ISA=" + requested + " cannot run on this processor; choose one of auto" + can_run);
}

std::string cpu_isa() { return isa_name(isa()); }

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::generic:
      return "generic";
  }
  return "unknown";
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

bool multiplies_bf16() {
#if defined(__x86_64__)
  return isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&dist_llm::cpu_isa));
  m.impl("cpu_multiplies_bf16", TORCH_BOX(&dist_llm::multiplies_bf16));
}
