// Checks at the top of an entry point: the message carries the argument's name and its value.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>

namespace dist_llm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i > 0 ? ", " : "") << t.size(i);
  out << ')';
  return out.str();
}

// cpu, cuda:1
inline std::string device_of(const Tensor& t) {
  const auto device = t.device();
  if (device.is_cpu()) return "cpu";
  const int type = static_cast<int>(device.type());
  const std::string name = device.is_cuda() ? "cuda" : "device type " + std::to_string(type);
  return device.has_index() ? name + ":" + std::to_string(static_cast<int>(device.index())) : name;
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " ", shape_of(t), " must be contiguous; call .contiguous() on it first");
}

inline void check_same_device(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  STD_TORCH_CHECK(
      t.device() == like.device(), name, " is on ", device_of(t), " but ", like_name, " is on ", device_of(like), "; move one of them");
}

inline void check_same_shape(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, name, " ", shape_of(t), " must have the shape of ", like_name, " ", shape_of(like));
}

inline void check_same_dtype(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  STD_TORCH_CHECK(
      t.scalar_type() == like.scalar_type(), name, " is ", torch::headeronly::toString(t.scalar_type()), " but ", like_name, " is ",
      torch::headeronly::toString(like.scalar_type()), "; they must have the same dtype");
}

}  // namespace dist_llm
