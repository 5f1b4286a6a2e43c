// The key of the contract, which orders candidates: NaN first, then the distance, then the code.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace revq {

// Greater than every key, for no distance has the bits of INT32_MAX.
constexpr int64_t kNoKey = std::numeric_limits<int64_t>::max();

inline int64_t key_of(float distance, int64_t code) {
  const int64_t bits = distance != distance ? -1 : std::bit_cast<int32_t>(distance);
  return bits * (int64_t{1} << 32) + code;
}

inline int64_t code_of(int64_t key) { return key & 0xFFFFFFFF; }

// The distance of a key that is not kNoKey: -1 stands for a NaN.
inline float distance_of(int64_t key) {
  const auto bits = static_cast<int32_t>(key >> 32);
  return bits < 0 ? -1.0f : std::bit_cast<float>(bits);
}

}  // namespace revq
