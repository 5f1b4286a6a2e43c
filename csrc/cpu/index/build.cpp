// Builds the order of the codes: a kd tree that halves the widest dimension, down to leaves of kLeafCodes.
#include <algorithm>
#include <bit>

#include <torch/csrc/stable/ops.h>

#include "core/parallel.h"
#include "cpu/index/tree.h"

namespace revq {
namespace {

struct Range {
  int64_t group, first_leaf, last_leaf;
};

// An integer that orders as the float does, for every bit pattern: nth_element relies on an order that a NaN would break.
uint32_t sortable(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

class Splitter {
 public:
  Splitter(const float* codebook, const Tree& tree) : codebook_(codebook), tree_(tree) {}

  // Splits a range in two along its widest dimension; returns the leaf that starts the second part.
  int64_t split(const Range& range) {
    const TreeLayout& layout = tree_.layout;
    const int64_t leaves = range.last_leaf - range.first_leaf;
    // The first part has a power of two of leaves, so that every aligned run of 2^n leaves is a subtree.
    const int64_t left = int64_t{1} << (std::bit_width(static_cast<uint64_t>(leaves - 1)) - 1);
    int32_t* ids = tree_.group(range.group).ids;
    const int64_t begin = range.first_leaf * kLeafCodes, middle = begin + left * kLeafCodes;
    const int64_t end = std::min(range.last_leaf * kLeafCodes, layout.codes);
    const float* codes = codebook_ + range.group * layout.codes * layout.d;
    const int64_t axis = widest(codes, ids + begin, end - begin);
    keys_.resize(end - begin);
    for (int64_t i = begin; i < end; ++i) {  // the index breaks ties: the parts do not depend on the order of the ids
      keys_[i - begin] = uint64_t{sortable(codes[ids[i] * layout.d + axis])} << 32 | static_cast<uint32_t>(ids[i]);
    }
    std::nth_element(keys_.begin(), keys_.begin() + (middle - begin), keys_.end());
    for (int64_t i = begin; i < end; ++i) ids[i] = static_cast<int32_t>(static_cast<uint32_t>(keys_[i - begin]));
    return range.first_leaf + left;
  }

  void split_all(const Range& range) {
    if (range.last_leaf - range.first_leaf <= 1) return;
    const int64_t middle = split(range);
    split_all({range.group, range.first_leaf, middle});
    split_all({range.group, middle, range.last_leaf});
  }

 private:
  int64_t widest(const float* codes, const int32_t* ids, int64_t count) {
    const int64_t d = tree_.layout.d, step = std::max<int64_t>(1, count / kVarianceSamples);
    sum_.assign(d, 0.0);
    square_.assign(d, 0.0);
    int64_t taken = 0;
    for (int64_t i = 0; i < count; i += step, ++taken) {
      const float* code = codes + ids[i] * d;
      for (int64_t j = 0; j < d; ++j) {
        const double value = code[j] - codes[ids[0] * d + j];
        sum_[j] += value;
        square_[j] += value * value;
      }
    }
    int64_t best = 0;
    double widest = -1.0;
    for (int64_t j = 0; j < d; ++j) {
      const double variance = square_[j] - sum_[j] * sum_[j] / static_cast<double>(taken);
      if (variance > widest) widest = variance, best = j;
    }
    return best;
  }

  const float* codebook_;
  const Tree& tree_;
  std::vector<uint64_t> keys_;
  std::vector<double> sum_, square_;
};

}  // namespace

void order_codes(const float* codebook, const Tree& tree) {
  const TreeLayout& layout = tree.layout;
  std::vector<Range> open;
  for (int64_t group = 0; group < tree.groups; ++group) {
    int32_t* ids = tree.group(group).ids;
    for (int64_t code = 0; code < layout.codes; ++code) ids[code] = static_cast<int32_t>(code);
    open.push_back({group, 0, layout.leaves});
  }
  // Large ranges are split first, one per thread, until there are enough of them to share out.
  const int64_t enough = kRangesPerThread * static_cast<int64_t>(torch::stable::get_num_threads());
  while (!open.empty() && static_cast<int64_t>(open.size()) < enough && layout.leaves > enough) {
    std::vector<Range> halves(open.size() * 2);
    share_work(open.size(), [&](auto& next) {
      Splitter splitter(codebook, tree);
      for (int64_t i; (i = next()) >= 0;) {
        const Range range = open[i];
        const int64_t middle = splitter.split(range);
        halves[2 * i] = {range.group, range.first_leaf, middle};
        halves[2 * i + 1] = {range.group, middle, range.last_leaf};
      }
    });
    std::erase_if(halves, [](const Range& range) { return range.last_leaf - range.first_leaf <= 1; });
    open = std::move(halves);
  }
  share_work(open.size(), [&](auto& next) {
    Splitter splitter(codebook, tree);
    for (int64_t i; (i = next()) >= 0;) splitter.split_all(open[i]);
  });
  share_work(tree.groups, [&](auto& next) {
    for (int64_t group; (group = next()) >= 0;) {
      int32_t* ids = tree.group(group).ids;
      for (int64_t first = 0; first < layout.codes; first += kLeafCodes) {
        std::sort(ids + first, ids + std::min(first + kLeafCodes, layout.codes));
      }
      for (int64_t i = layout.codes; i < layout.leaves * kLeafCodes; ++i) ids[i] = ids[layout.codes - 1];
    }
  });
}

}  // namespace revq
