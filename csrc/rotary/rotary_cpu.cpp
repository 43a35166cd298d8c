// Rotary position embedding on CPU; the contract is in rotary.h, the kernel in rotary_rows.inc.
#include "rotary/rotary.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/isa.h"
#include "common/tensors.h"
#include "common/vec_math.h"
#include "rotary/table_vec.h"

namespace dist_llm {

template <class S>
struct RotaryArgs {
  const S* x;
  const float* cos;
  const float* sin;
  S* y;
  float sign;  // of the angle
  rotary::Shape shape;
};

// Pairs of a head whose cosines and sines are kept at a time: a multiple of every pair_width.
constexpr int64_t kChunk = 512;

}  // namespace dist_llm

#define DL_ISA_SOURCE "rotary/rotary_rows.inc"
#include "common/foreach_isa.h"

namespace dist_llm {
namespace {

// Elements a thread should have before another one is worth waking.
constexpr int64_t kGrain = 16384;

Tensor rotary_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const rotary::Shape shape = rotary::check_input(x, cos, sin);
  Tensor y = rotary::new_result(x);
  with_type(x, "rotary", [&](auto s) {
    using S = decltype(s);
    const RotaryArgs<S> args{in<S>(x), in<float>(cos), in<float>(sin), out<S>(y), inverse ? -1.f : 1.f, shape};
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.heads * 2 * shape.half));
    torch::stable::parallel_for(0, shape.batch * shape.tokens, grain, [&](int64_t begin, int64_t end) {
      DL_PER_ISA(turn_tokens<S>(args, begin, end))
    });
  });
  return y;
}

}  // namespace
}  // namespace dist_llm

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("rotary", TORCH_BOX(&dist_llm::rotary_cpu));
}
