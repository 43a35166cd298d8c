// Typed pointers into tensors, and the storage types of them on CUDA; tensors.h is the same for CPU.
#pragma once

#include "common/checks.h"
#include "common/cuda_launch.h"

namespace dist_llm {

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* out(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f(S{}) with the storage type of t: float, __nv_bfloat16 or __half.
template <class F>
void with_type(const Tensor& t, const char* op, const F& f) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return f(float{});
  if (type == ScalarType::BFloat16) return f(__nv_bfloat16{});
  if (type == ScalarType::Half) return f(__half{});
  STD_TORCH_CHECK(false, op, " on CUDA takes fp32, bf16 or fp16, not ", torch::headeronly::toString(type));
}

// Calls f(S{}, W{}) with the storage types of activations and weights: equal, or weights in fp32.
template <class F>
void with_types(const Tensor& x, const Tensor& weight, const char* op, const F& f) {
  const ScalarType xt = x.scalar_type(), wt = weight.scalar_type();
  if (xt == ScalarType::Float && wt == ScalarType::Float) return f(float{}, float{});
  if (xt == ScalarType::BFloat16 && wt == ScalarType::BFloat16) return f(__nv_bfloat16{}, __nv_bfloat16{});
  if (xt == ScalarType::BFloat16 && wt == ScalarType::Float) return f(__nv_bfloat16{}, float{});
  if (xt == ScalarType::Half && wt == ScalarType::Half) return f(__half{}, __half{});
  if (xt == ScalarType::Half && wt == ScalarType::Float) return f(__half{}, float{});
  STD_TORCH_CHECK(
      false, op, " on CUDA takes x in fp32, bf16 or fp16 and weight in the dtype of x or fp32, not x in ",
      torch::headeronly::toString(xt), " and weight in ", torch::headeronly::toString(wt));
}

}  // namespace dist_llm
