// The copy of the codes in leaf order, with its boxes; and the comparison of a codebook with that copy.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/index/tree.h"
#include "core/parallel.h"

namespace revq {
namespace {

// Blocks that a thread takes at a time.
constexpr int64_t kBlocksPerItem = 4;
// Leaves that take more room than this are written past the caches: a store into a cache reads the line before, and
// what is that large would push the codebook out that is being read.
constexpr int64_t kCachedFloats = int64_t{3} << 19;

float smallest(const float* values, int64_t count) { return *std::min_element(values, values + count); }
float largest(const float* values, int64_t count) { return *std::max_element(values, values + count); }

// The box around a block's children, which is a child of the level above.
void raise_box(const IndexLayout& layout, const IndexGroup& group, int level, int64_t block) {
  const float* boxes = group.boxes + (layout.first_block[level] + block) * layout.block_floats();
  float* above = group.boxes + (layout.first_block[level + 1] + block / kFanout) * layout.block_floats();
  const int64_t count = std::min(kFanout, layout.children[level] - block * kFanout);
  for (int64_t j = 0; j < layout.d; ++j) {
    above[j * kFanout + block % kFanout] = smallest(boxes + j * kFanout, count);
    above[(layout.d + j) * kFanout + block % kFanout] = largest(boxes + (layout.d + j) * kFanout, count);
  }
}

// Calls work(group's arrays, group, first block, last block) for all blocks of leaves.
template <typename Work>
void share_blocks(const Index& index, const Work& work) {
  const int64_t blocks = (index.layout.leaves + kFanout - 1) / kFanout;
  const int64_t items = (blocks + kBlocksPerItem - 1) / kBlocksPerItem;
  share_work(index.groups * items, [&](auto& next) {
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t g = item / items, first = item % items * kBlocksPerItem;
      work(index.group(g), g, first, std::min(first + kBlocksPerItem, blocks));
    }
  });
}

}  // namespace

bool fill_index(const float* codebook, const Index& index) {
  const IndexLayout& layout = index.layout;
  const IndexKernels kernels = index_kernels(cpu_isa());
  std::atomic<bool> ids_are_codes{true};
  std::fill_n(index.finite, index.groups, 1);
  const bool stream = index.groups * layout.leaves * layout.panel_floats() > kCachedFloats;
  share_blocks(index, [&](const IndexGroup& group, int64_t g, int64_t first, int64_t last) {
    std::vector<float> corners(corner_floats(layout.d));
    const float* codes = codebook + g * layout.codes * layout.d;
    for (int64_t block = first; block < last; ++block) {
      const uint32_t found = kernels.fill(codes, layout, group, block, corners.data(), stream);
      if (found == 0) continue;
      if (found == kWrongIds) ids_are_codes.store(false, std::memory_order_relaxed);
      std::atomic_ref<int32_t>(index.finite[g]).store(0, std::memory_order_relaxed);
    }
  });
  if (layout.levels >= 3) {
    share_work(index.groups, [&](auto& next) {
      for (int64_t group; (group = next()) >= 0;) {
        for (int level = 1; level + 1 < layout.levels; ++level) {
          for (int64_t block = 0; block * kFanout < layout.children[level]; ++block) {
            raise_box(layout, index.group(group), level, block);
          }
        }
      }
    });
  }
  return ids_are_codes;
}

uint32_t compare_index(const float* codebook, const Index& index) {
  const IndexKernels kernels = index_kernels(cpu_isa());
  std::atomic<uint32_t> found{0};
  share_blocks(index, [&](const IndexGroup& group, int64_t g, int64_t first, int64_t last) {
    const float* codes = codebook + g * index.layout.codes * index.layout.d;
    for (int64_t block = first; block < last && found.load(std::memory_order_relaxed) == 0; ++block) {
      const uint32_t here = kernels.compare(codes, index.layout, group, block);
      if (here != 0) found.store(here, std::memory_order_relaxed);
    }
  });
  return found;
}

}  // namespace revq
