// The bound that turns the first pass into a short list of candidates: all of its constants, and nothing else.  The proof
// is in docs/kernels.md, "The certificate" and "The first pass in int16".
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>

namespace revq {

// Half the distance between 1 and the next float32: one rounding's relative error.
constexpr double kUnit = 0x1p-24;
// gamma_n = n u / (1 - n u) is at most kHigherOrders * n u up to this d; beyond it there is no first pass.
constexpr int64_t kMaxCertifiedDim = int64_t{1} << 16;
constexpr double kHigherOrders = 1.02;
// A query farther than this from the center, or with a larger best distance than this, goes to brute force.
constexpr double kMaxNorm = 0x1p48;
constexpr double kMaxDistance = 0x1p98;
// Codes with |c'|^2 / 2 of at least this can win for none of the other queries; their score is kExcluded.
constexpr float kOutlier = 0x1p99f;
constexpr float kExcluded = FLT_MAX;
// Vectors of the int16 pass are scaled to a length of at most kMaxScaled.  So the length of a rounded one, of up to
// kMaxCertifiedDim elements, stays below kMaxRounded: an element fits into 16 bits, and a sum, which is at most 3 / 2 of
// the squared length, into 32.
constexpr double kMaxScaled = 32000.0, kMaxRounded = 32767.0;
constexpr int32_t kExcludedWord = INT32_MAX;
constexpr double kMostLimit = 2147483520.0;  // the float32 before kExcludedWord's; every score is smaller
// The error of a scaled and rounded element: rounding, and the scaling's own error of 2^-24 of less than 2^15.
constexpr double kRoundedBy = 0.5 + 0x1p-8;

// The first pass computes s = |c'|^2 / 2 - x'.c' in float32, where x' = fl(x - m) and c' = fl(c - m).
class Certificate {
 public:
  // `scale` is 1; tests make it smaller, to see that a wrong index comes out.
  explicit Certificate(int64_t d, double scale = 1.0)
      : score_(scale * kHigherOrders * static_cast<double>(d + 1) * kUnit),
        score_underflow_(static_cast<double>(d + 1) * 0x1p-147),
        shift_(scale * kHigherOrders * kUnit),
        distance_(scale * kHigherOrders * static_cast<double>(d + 2) * kUnit),
        distance_underflow_(static_cast<double>(d) * 0x1p-148) {}

  // A code whose D is at most `distance` has a computed score of at most this; norm is |x'|.
  float limit(double distance, double norm) const {
    const double shifted = reach(distance, norm);
    const double bound = 0.5 * (shifted - norm) * (shifted + norm) + slack(shifted, norm);
    const float rounded = static_cast<float>(bound);
    return rounded < bound ? next_up(rounded) : rounded;
  }

  // |x' - c'| of a code whose D is at most `distance` is at most this.
  double reach(double distance, double norm) const {
    const double radius = std::sqrt((distance + distance_underflow_) * (1 + distance_));  // |x - c|
    return (radius + 2 * shift_ * norm) * (1 + shift_);
  }

  // About the largest score that can still win if `smallest` is the least; only speed depends on how near it is.
  float guess(float smallest, double norm) const {
    const auto length = static_cast<float>(norm);
    const float shifted = std::sqrt(std::max(0.0f, length * length + 2.0f * smallest));
    return smallest + 4.0f * static_cast<float>(slack(shifted, length));
  }

 private:
  // |computed - true score| for a code at |x' - c'| = distance from a query: |c'| <= |x'| + |x' - c'|.
  double slack(double distance, double norm) const {
    return score_ * (norm + distance) * (2 * norm + distance) + score_underflow_;
  }

  // The next float32 of a finite one; std::nextafter is a call.
  static float next_up(float value) {
    const auto bits = std::bit_cast<int32_t>(value + 0.0f);  // -0 becomes 0
    return std::bit_cast<float>(bits < 0 ? bits - 1 : bits + 1);
  }

  double score_, score_underflow_, shift_, distance_, distance_underflow_;
};

// The int16 pass computes S = ceil(|C|^2 / 2) - X.C in integers, where X and C are x' and c' times a scale, rounded.
class Int16Certificate {
 public:
  explicit Int16Certificate(int64_t d, double scale = 1.0)
      : both_(2 * scale * kRoundedBy * std::sqrt(static_cast<double>(d))) {}

  // A code with |x' - c'| of at most `reach`, scaled, has a score of at most this; square is |X|^2.
  float limit(double reach, int32_t square) const {
    const double distance = reach + both_;  // |X - C|
    return static_cast<float>(std::min(kMostLimit, 0.5 * (distance * distance - square) + 1));
  }

  // About the largest score that can still win if `smallest` is the least; only speed depends on how near it is.
  float guess(float smallest, int32_t square) const {
    const double distance = std::sqrt(std::max(0.0, 2.0 * smallest + square));  // |X - C| of the best
    return limit(distance + 0.25 * both_, square);
  }

 private:
  double both_;  // the errors of X and of C together
};

}  // namespace revq
