// Fills a tree: copies the codes into the leaves and computes the boxes around them.  A block holds the boxes of up to
// 16 children (kFanout), on every instruction set: leaves at level 0, blocks of the level below at the others
// (layout.h).
#include <algorithm>
#include <atomic>
#include <vector>

#include "core/parallel.h"
#include "cpu/index/tree.h"

namespace revq {
namespace {

float smallest(const float* values, int64_t count) { return *std::min_element(values, values + count); }
float largest(const float* values, int64_t count) { return *std::max_element(values, values + count); }

// Writes the box around all children of a block.  In the level above, this box is one child of a block.
void raise_box(const TreeLayout& layout, const TreeGroup& group, int level, int64_t block) {
  const float* boxes = group.boxes + (layout.first_block[level] + block) * layout.block_floats();
  float* above = group.boxes + (layout.first_block[level + 1] + block / kFanout) * layout.block_floats();
  const int64_t count = std::min(kFanout, layout.children[level] - block * kFanout);
  for (int64_t j = 0; j < layout.d; ++j) {
    above[j * kFanout + block % kFanout] = smallest(boxes + j * kFanout, count);
    above[(layout.d + j) * kFanout + block % kFanout] = largest(boxes + (layout.d + j) * kFanout, count);
  }
}

// Shares the blocks of level 0 among the threads: calls work(group's arrays, group's number, first block, last block).
template <typename Work>
void share_blocks(const Tree& tree, const Work& work) {
  const int64_t blocks = divide_up(tree.layout.leaves, kFanout);
  const int64_t items = divide_up(blocks, kBlocksPerItem);
  share_work(tree.groups * items, [&](auto& next) {
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t g = item / items, first = item % items * kBlocksPerItem;
      work(tree.group(g), g, first, std::min(first + kBlocksPerItem, blocks));
    }
  });
}

}  // namespace

bool fill_tree(const float* codebook, const Tree& tree) {
  const TreeLayout& layout = tree.layout;
  const TreeKernels& clone = *kernels(cpu_isa()).tree;
  std::atomic<bool> ids_are_codes{true};
  std::fill_n(tree.finite, tree.groups, 1);
  const bool past_caches = tree.groups * layout.leaves * layout.panel_floats() > kCachedLeafFloats;
  share_blocks(tree, [&](const TreeGroup& group, int64_t g, int64_t first, int64_t last) {
    std::vector<float> corners(corner_floats(layout.d));
    const float* codes = codebook + g * layout.codes * layout.d;
    for (int64_t block = first; block < last; ++block) {
      const uint32_t found = clone.fill(codes, layout, group, block, corners.data(), past_caches);
      if (found == 0) continue;
      if (found == kWrongIds) ids_are_codes.store(false, std::memory_order_relaxed);
      std::atomic_ref<int32_t>(tree.finite[g]).store(0, std::memory_order_relaxed);
    }
  });
  if (layout.levels >= 3) {
    share_work(tree.groups, [&](auto& next) {
      for (int64_t group; (group = next()) >= 0;) {
        for (int level = 1; level + 1 < layout.levels; ++level) {
          for (int64_t block = 0; block * kFanout < layout.children[level]; ++block) {
            raise_box(layout, tree.group(group), level, block);
          }
        }
      }
    });
  }
  return ids_are_codes;
}

}  // namespace revq
