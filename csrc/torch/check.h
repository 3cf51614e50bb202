// Checks that raise torch's errors, with messages put together without iostreams: a compiler may link libstdc++ into
// the module, and two copies of its streams and locales in one process must not meet.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <concepts>
#include <cstdio>
#include <string>
#include <string_view>

namespace fastrnn {

inline std::string_view text(const char* x) { return x; }
inline const std::string& text(const std::string& x) { return x; }
inline std::string text(std::integral auto x) { return std::to_string(x); }
inline std::string text(double x) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", x);
  return digits;
}
inline std::string_view text(c10::ScalarType x) { return c10::toString(x); }
inline std::string text(c10::Device x) { return x.str(); }
inline std::string text(c10::IntArrayRef sizes) {
  std::string s = "[";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

std::string message(const auto&... parts) {
  std::string s;
  (s.append(text(parts)), ...);
  return s;
}

}  // namespace fastrnn

// To torch a message is one string, which it takes as it is. They become RuntimeError, TypeError, ValueError and
// NotImplementedError.
#define RNN_CHECK(condition, ...) TORCH_CHECK(condition, ::fastrnn::message(__VA_ARGS__))
#define RNN_CHECK_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, ::fastrnn::message(__VA_ARGS__))
#define RNN_CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(condition, ::fastrnn::message(__VA_ARGS__))
#define RNN_CHECK_NOT_IMPLEMENTED(condition, ...) \
  TORCH_CHECK_NOT_IMPLEMENTED(condition, ::fastrnn::message(__VA_ARGS__))
