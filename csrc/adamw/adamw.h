// AdamW (Loshchilov and Hutter, arXiv:1711.05101) over a list of tensors in one pass over memory, with the scaling of the gradients
// before it (clipping) and the rounded copies after it; and the sum of squares that clipping needs. The definition is
// dist_llm/kernels/adamw/reference.py; the schemas are in native.py beside it.
//
//   adamw_step(params!, grads, exp_avgs!, exp_avg_sqs!, copies!, grad_scale, lr, beta1, beta2, eps, weight_decay, step) -> ()
//     g = grad * grad_scale,  m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//     p = p (1 - lr weight_decay) - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps),  copy = p
//     The order of operations is that of torch.optim.AdamW(fused=True).
//   sum_of_squares(tensors) -> sum                                  over all elements of all tensors
//
// Shapes   params, grads, exp_avgs, exp_avg_sqs have one tensor for each parameter, of one size; copies too, or is empty.
//          grad_scale, sum: (). Empty tensors and empty lists of parameters are allowed; tensors has at least one.
// Dtypes   params, exp_avgs, exp_avg_sqs, grad_scale fp32; grads fp32 or bf16 (CUDA: fp16 too), all alike; copies bf16 (CUDA: or fp16),
//          all alike; tensors fp32 or bf16 (CUDA: fp16 too), mixed as one likes; sum fp64. Everything else is computed in fp32, squares in fp64.
// Memory   all tensors contiguous, on one device; only params, exp_avgs, exp_avg_sqs and copies are written, all of their elements.
//          Lists do not overlap.
// Numbers  the same bits at any number of threads: an element belongs to one thread, and what is summed together depends on sizes alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "common/checks.h"

namespace dist_llm::adamw {

// The numbers of one step that all elements share, rounded to fp32 where torch's fused kernel rounds them.
struct Constants {
  float decay;       // 1 - lr weight_decay
  float weight1;     // 1 - beta1
  float beta2;
  float weight2;     // 1 - beta2
  float correction;  // sqrt(1 - beta2^step)
  float eps;
  float step_size;   // lr / (1 - beta1^step)
};

inline Constants constants_of(double lr, double beta1, double beta2, double eps, double weight_decay, double step) {
  STD_TORCH_CHECK(step >= 1., "step (", step, ") must be at least 1: the first step is 1");
  STD_TORCH_CHECK(beta1 >= 0. && beta1 < 1. && beta2 >= 0. && beta2 < 1., "beta1 (", beta1, ") and beta2 (", beta2, ") must be in [0, 1)");
  return {
      static_cast<float>(1. - lr * weight_decay), static_cast<float>(1. - beta1), static_cast<float>(beta2), static_cast<float>(1. - beta2),
      static_cast<float>(std::sqrt(1. - std::pow(beta2, step))), static_cast<float>(eps),
      static_cast<float>(lr / (1. - std::pow(beta1, step)))};
}

// One tensor of a list: all have the dtype wanted, are contiguous and lie on the device of `like`.
inline void check_tensor(const Tensor& t, const Tensor& like, ScalarType type, const char* list, size_t index) {
  const std::string name = std::string(list) + "[" + std::to_string(index) + "]";
  STD_TORCH_CHECK(
      t.scalar_type() == type, name, " is ", torch::headeronly::toString(t.scalar_type()), "; it must be ", torch::headeronly::toString(type));
  check_contiguous(t, name.c_str());
  check_same_device(t, like, name.c_str(), "params[0]");
}

struct Lists {
  const std::vector<Tensor>& params;
  const std::vector<Tensor>& grads;
  const std::vector<Tensor>& exp_avgs;
  const std::vector<Tensor>& exp_avg_sqs;
  const std::vector<Tensor>& copies;
};

// The checks of adamw_step; params is not empty.
inline void check_lists(const Lists& lists, const Tensor& grad_scale) {
  const size_t count = lists.params.size();
  STD_TORCH_CHECK(
      lists.grads.size() == count && lists.exp_avgs.size() == count && lists.exp_avg_sqs.size() == count &&
          (lists.copies.empty() || lists.copies.size() == count),
      "params has ", count, " tensors, grads ", lists.grads.size(), ", exp_avgs ", lists.exp_avgs.size(), ", exp_avg_sqs ",
      lists.exp_avg_sqs.size(), ", copies ", lists.copies.size(), "; they must have one for each parameter (copies: or none)");
  const Tensor& like = lists.params[0];
  STD_TORCH_CHECK(
      grad_scale.dim() == 0 && grad_scale.scalar_type() == ScalarType::Float, "grad_scale ", shape_of(grad_scale), " in ",
      torch::headeronly::toString(grad_scale.scalar_type()), " must be one fp32 number, of shape ()");
  check_same_device(grad_scale, like, "grad_scale", "params[0]");
  const auto check = [&](const std::vector<Tensor>& list, ScalarType type, const char* name) {
    for (size_t i = 0; i < list.size(); ++i) {
      check_tensor(list[i], like, type, name, i);
      STD_TORCH_CHECK(
          list[i].numel() == lists.params[i].numel(), name, "[", i, "] ", shape_of(list[i]), " must have the size of params[", i, "] ",
          shape_of(lists.params[i]));
    }
  };
  check(lists.params, ScalarType::Float, "params");
  check(lists.grads, lists.grads[0].scalar_type(), "grads");
  check(lists.exp_avgs, ScalarType::Float, "exp_avgs");
  check(lists.exp_avg_sqs, ScalarType::Float, "exp_avg_sqs");
  if (!lists.copies.empty()) check(lists.copies, lists.copies[0].scalar_type(), "copies");
}

inline void check_tensors(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "sum_of_squares needs at least one tensor: an empty list has no device");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::string name = "tensors[" + std::to_string(i) + "]";
    check_contiguous(tensors[i], name.c_str());
    check_same_device(tensors[i], tensors[0], name.c_str(), "tensors[0]");
  }
}

}  // namespace dist_llm::adamw
