// The copy of the codes in leaf order, with its boxes; and the comparison of a codebook with that copy.
#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

#include "index.h"
#include "work_queue.h"

namespace revq {
namespace {

// Leaves whose rows are fetched before they are read: their order is no processor's guess.
constexpr int64_t kLeavesAhead = 10;

// Blocks that a thread takes at a time.
constexpr int64_t kBlocksPerItem = 4;

typedef float Four __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));

Four load4(const float* from) {
  Four value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

void store4(float* to, Four value) { __builtin_memcpy(to, &value, sizeof value); }

// Turns four rows of four into four columns of four.
void transpose(Four& a, Four& b, Four& c, Four& d) {
  const Four ab = __builtin_shuffle(a, b, Bits{0, 4, 1, 5}), ab2 = __builtin_shuffle(a, b, Bits{2, 6, 3, 7});
  const Four cd = __builtin_shuffle(c, d, Bits{0, 4, 1, 5}), cd2 = __builtin_shuffle(c, d, Bits{2, 6, 3, 7});
  a = __builtin_shuffle(ab, cd, Bits{0, 1, 4, 5});
  b = __builtin_shuffle(ab, cd, Bits{2, 3, 6, 7});
  c = __builtin_shuffle(ab2, cd2, Bits{0, 1, 4, 5});
  d = __builtin_shuffle(ab2, cd2, Bits{2, 3, 6, 7});
}

// The 16 rows of a leaf's codes, where the codebook has them.
struct Rows {
  const float* row[kLeafCodes];

  Rows(const float* codes, const IndexLayout& layout, const IndexGroup& group, int64_t leaf) {
    const int32_t* ids = group.ids + leaf * kLeafCodes;
    const int32_t* later = group.ids + std::min(leaf + kLeavesAhead, layout.leaves - 1) * kLeafCodes;
    for (int64_t lane = 0; lane < kLeafCodes; ++lane) {
      __builtin_prefetch(codes + later[lane] * layout.d);
      row[lane] = codes + ids[lane] * layout.d;
    }
  }
};

// The corners of a box, and bits that are zero while all numbers are finite.
struct Corners {
  std::vector<float> low, high;
  uint32_t special = 0;

  explicit Corners(int64_t d) : low(d), high(d) {}
};

// Numbers j ... j + 3 of a leaf's codes: into its panel and its corners.
void fill_four(const Rows& rows, int64_t j, float* panel, Corners& box) {
  Four low = load4(rows.row[0] + j), high = low;
  Bits special{};
  for (int64_t lane = 0; lane < kLeafCodes; lane += 4) {
    Four four[4];
    for (int i = 0; i < 4; ++i) {
      four[i] = load4(rows.row[lane + i] + j);
      low = four[i] < low ? four[i] : low;
      high = four[i] > high ? four[i] : high;
      special |= (Bits)(four[i] - four[i]);  // +0, or a NaN for infinities and NaNs
    }
    transpose(four[0], four[1], four[2], four[3]);
    for (int i = 0; i < 4; ++i) store4(panel + (j + i) * kLeafCodes + lane, four[i]);
  }
  store4(&box.low[j], low);
  store4(&box.high[j], high);
  box.special |= special[0] | special[1] | special[2] | special[3];
}

void fill_one(const Rows& rows, int64_t j, float* panel, Corners& box) {
  box.low[j] = box.high[j] = rows.row[0][j];
  for (int64_t lane = 0; lane < kLeafCodes; ++lane) {
    const float value = rows.row[lane][j];
    panel[j * kLeafCodes + lane] = value;
    box.low[j] = std::min(box.low[j], value);
    box.high[j] = std::max(box.high[j], value);
    box.special |= std::bit_cast<uint32_t>(value - value);
  }
}

void write_box(const IndexLayout& layout, const IndexGroup& group, int level, int64_t child, const Corners& corners) {
  float* box = group.boxes + (layout.first_block[level] + child / kFanout) * layout.block_floats() + child % kFanout;
  for (int64_t j = 0; j < layout.d; ++j) {
    box[j * kFanout] = corners.low[j];
    box[(layout.d + j) * kFanout] = corners.high[j];
  }
}

float smallest(const float* values, int64_t count) { return *std::min_element(values, values + count); }
float largest(const float* values, int64_t count) { return *std::max_element(values, values + count); }

// The box around a block's children, which is a child of the level above.
void raise_box(const IndexLayout& layout, const IndexGroup& group, int level, int64_t block, Corners& box) {
  const float* boxes = group.boxes + (layout.first_block[level] + block) * layout.block_floats();
  const int64_t count = std::min(kFanout, layout.children[level] - block * kFanout);
  for (int64_t j = 0; j < layout.d; ++j) {
    box.low[j] = smallest(boxes + j * kFanout, count);
    box.high[j] = largest(boxes + (layout.d + j) * kFanout, count);
  }
  write_box(layout, group, level + 1, block, box);
}

// The leaves under one block of level 0, and the box around them; returns whether all codes are finite.
bool fill_block(const float* codes, const IndexLayout& layout, const IndexGroup& group, int64_t block, Corners& box) {
  const int64_t end = std::min((block + 1) * kFanout, layout.leaves);
  box.special = 0;
  for (int64_t leaf = block * kFanout; leaf < end; ++leaf) {
    const Rows rows(codes, layout, group, leaf);
    float* panel = group.panels + leaf * layout.panel_floats();
    int64_t j = 0;
    for (; j + 4 <= layout.d; j += 4) fill_four(rows, j, panel, box);
    for (; j < layout.d; ++j) fill_one(rows, j, panel, box);
    write_box(layout, group, 0, leaf, box);
  }
  if (layout.levels > 1) raise_box(layout, group, 0, block, box);
  return box.special == 0;
}

bool block_holds(const float* codes, const IndexLayout& layout, const IndexGroup& group, int64_t block) {
  const int64_t end = std::min((block + 1) * kFanout, layout.leaves);
  uint32_t difference = 0;
  for (int64_t leaf = block * kFanout; leaf < end; ++leaf) {
    const Rows rows(codes, layout, group, leaf);
    const float* panel = group.panels + leaf * layout.panel_floats();
    int64_t j = 0;
    Bits four_differ{};
    for (; j + 4 <= layout.d; j += 4) {
      for (int64_t lane = 0; lane < kLeafCodes; lane += 4) {
        Four four[4];
        for (int i = 0; i < 4; ++i) four[i] = load4(rows.row[lane + i] + j);
        transpose(four[0], four[1], four[2], four[3]);
        for (int i = 0; i < 4; ++i) four_differ |= (Bits)four[i] ^ (Bits)load4(panel + (j + i) * kLeafCodes + lane);
      }
    }
    difference |= four_differ[0] | four_differ[1] | four_differ[2] | four_differ[3];
    for (; j < layout.d; ++j) {
      for (int64_t lane = 0; lane < kLeafCodes; ++lane) {
        difference |= std::bit_cast<uint32_t>(rows.row[lane][j]) ^ std::bit_cast<uint32_t>(panel[j * kLeafCodes + lane]);
      }
    }
  }
  return difference == 0;
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

void fill_index(const float* codebook, const Index& index) {
  const IndexLayout& layout = index.layout;
  std::fill_n(index.finite, index.groups, 1);
  share_blocks(index, [&](const IndexGroup& group, int64_t g, int64_t first, int64_t last) {
    Corners box(layout.d);
    const float* codes = codebook + g * layout.codes * layout.d;
    for (int64_t block = first; block < last; ++block) {
      if (fill_block(codes, layout, group, block, box)) continue;
      std::atomic_ref<int32_t>(index.finite[g]).store(0, std::memory_order_relaxed);
    }
  });
  if (layout.levels < 3) return;
  share_work(index.groups, [&](auto& next) {
    Corners box(layout.d);
    for (int64_t group; (group = next()) >= 0;) {
      for (int level = 1; level + 1 < layout.levels; ++level) {
        for (int64_t block = 0; block * kFanout < layout.children[level]; ++block) {
          raise_box(layout, index.group(group), level, block, box);
        }
      }
    }
  });
}

bool index_holds(const float* codebook, const Index& index) {
  std::atomic<bool> same{true};
  share_blocks(index, [&](const IndexGroup& group, int64_t g, int64_t first, int64_t last) {
    const float* codes = codebook + g * index.layout.codes * index.layout.d;
    for (int64_t block = first; block < last && same.load(std::memory_order_relaxed); ++block) {
      if (!block_holds(codes, index.layout, group, block)) same.store(false, std::memory_order_relaxed);
    }
  });
  return same;
}

}  // namespace revq
