// How a kernel reads and writes tensors: any strides, and any of the three input types.
#pragma once

#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "core/isa.h"
#include "core/sizes.h"

namespace revq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* name_of_input_types() { return "float32, bfloat16 or float16"; }

inline bool is_input_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

template <typename T>
void load_row(const void* base, int64_t offset, int64_t stride, int64_t count, float* out) {
  const T* row = static_cast<const T*>(base) + offset;
  if (stride == 1) {  // a loop of its own, which the compiler vectorizes
    for (int64_t j = 0; j < count; ++j) out[j] = static_cast<float>(row[j]);
    return;
  }
  for (int64_t j = 0; j < count; ++j) out[j] = static_cast<float>(row[j * stride]);
}

template <typename T>
void store_row(void* base, int64_t offset, int64_t count, const float* in) {
  T* row = static_cast<T*>(base) + offset;
  for (int64_t j = 0; j < count; ++j) row[j] = static_cast<T>(in[j]);
}

#if defined(__x86_64__)
// The conversion of float16 by the processor: as exact, and many times as fast.  Returns how many it converted.
__attribute__((target("avx,f16c"))) inline int64_t load_halves(const void* base, int64_t count, float* out) {
  const auto* from = static_cast<const uint16_t*>(base);
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    _mm256_storeu_ps(out + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
  }
  if (j + 4 <= count) {
    _mm_storeu_ps(out + j, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + j))));
    j += 4;
  }
  return j;
}

inline void load_half_row(const void* base, int64_t offset, int64_t count, float* out) {
  const auto* row = static_cast<const c10::Half*>(base) + offset;
  static const bool fast = cpu_has_f16c();
  const int64_t done = fast ? load_halves(row, count, out) : 0;
  load_row<c10::Half>(row, done, 1, count - done, out + done);
}
#else
inline void load_half_row(const void* base, int64_t offset, int64_t count, float* out) {
  load_row<c10::Half>(base, offset, 1, count, out);
}
#endif

// Reads `count` elements `stride` apart, converted exactly to float32.
inline void load(ScalarType type, const void* base, int64_t offset, int64_t stride, int64_t count, float* out) {
  if (type == ScalarType::Float) return load_row<float>(base, offset, stride, count, out);
  if (type == ScalarType::BFloat16) return load_row<c10::BFloat16>(base, offset, stride, count, out);
  if (stride == 1) return load_half_row(base, offset, count, out);
  load_row<c10::Half>(base, offset, stride, count, out);
}

inline void store(ScalarType type, void* base, int64_t offset, int64_t count, const float* in) {
  if (type == ScalarType::Float) return store_row<float>(base, offset, count, in);
  if (type == ScalarType::BFloat16) return store_row<c10::BFloat16>(base, offset, count, in);
  store_row<c10::Half>(base, offset, count, in);
}

// A tensor [..., G, d] of any strides, read a row at a time: no contiguous copy of it is made.
class GroupedRows {
 public:
  explicit GroupedRows(const Tensor& tensor) : data_(tensor.const_data_ptr()), type_(tensor.scalar_type()) {
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    const int64_t leading = static_cast<int64_t>(sizes.size()) - 2;
    for (int64_t i = 0; i < leading; ++i) {
      sizes_.push_back(sizes[i]);
      strides_.push_back(strides[i]);
    }
    group_stride_ = strides[leading];
    element_stride_ = strides[leading + 1];
    width_ = sizes[leading + 1];
  }

  int64_t rows() const {
    int64_t total = 1;
    for (const int64_t size : sizes_) total *= size;
    return total;
  }

  void read(int64_t row, int64_t group, float* out) const {
    int64_t offset = group * group_stride_;
    for (int64_t i = static_cast<int64_t>(sizes_.size()) - 1; i > 0; --i) {
      offset += (row % sizes_[i]) * strides_[i];
      row /= sizes_[i];
    }
    if (!sizes_.empty()) offset += row * strides_[0];  // without a division where there is one leading dimension
    load(type_, data_, offset, element_stride_, width_, out);
  }

 private:
  const void* data_;
  ScalarType type_;
  std::vector<int64_t> sizes_, strides_;
  int64_t group_stride_, element_stride_, width_;
};

// A codebook [G, K, d] of any strides.
class Codebook {
 public:
  explicit Codebook(const Tensor& tensor)
      : data_(tensor.const_data_ptr()), type_(tensor.scalar_type()), width_(tensor.size(2)) {
    const auto strides = tensor.strides();
    for (int i = 0; i < 3; ++i) strides_[i] = strides[i];
  }

  void read(int64_t group, int64_t code, float* out) const {
    load(type_, data_, group * strides_[0] + code * strides_[1], strides_[2], width_, out);
  }

  // Reads `count` consecutive rows.
  void read_rows(int64_t group, int64_t first, int64_t count, float* out) const {
    if (strides_[1] == width_ && (strides_[2] == 1 || width_ == 1)) {
      return load(type_, data_, group * strides_[0] + first * strides_[1], 1, count * width_, out);
    }
    for (int64_t i = 0; i < count; ++i) read(group, first + i, out + i * width_);
  }

  // The rows of a group, row_stride() apart, where they can be used without a copy; else nullptr.
  const float* rows(int64_t group) const {
    if (type_ != ScalarType::Float || (strides_[2] != 1 && width_ > 1)) return nullptr;
    return static_cast<const float*>(data_) + group * strides_[0];
  }

  int64_t row_stride() const { return strides_[1]; }

 private:
  const void* data_;
  ScalarType type_;
  int64_t width_, strides_[3];
};

}  // namespace revq
