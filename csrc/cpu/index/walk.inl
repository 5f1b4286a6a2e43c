// The walk itself, compiled once per instruction set (index_walk_*.cpp) from one source, and hence with one rounding.
//
// Why a child may be passed over: its bound is D of the query and the nearest point of its box, computed as D itself,
// operation by operation.  Rounding is monotone, so each step of the bound is at most the same step of D for any code
// in the box: bound <= D holds for the rounded numbers, with no slack (docs/kernels.md).  A child is visited unless its
// bound is strictly greater than the best D so far: an equal one may hold a lower index.
//
// How it stays busy: a tree is a chain of waits, each for the step before.  So 32 queries walk together, a level at a
// time, and what they are to visit stands in lists: no step waits for its neighbor, and no branch depends on one.
// What limits it then is the second-level cache, so long lists are put in the order of their blocks.

#ifdef __FAST_MATH__
#error "-ffast-math changes distances: the exactness contract forbids it"
#endif

namespace {

// Lists shorter than this hold too few that wait for the same block.
constexpr int64_t kWorthGrouping = 256;
// What waits is fetched so many entries ahead, where the codes are more than a core's second-level cache holds.
constexpr int64_t kAhead = 6, kCachedFloats = int64_t{1} << 18;
constexpr uint32_t kChild = (1u << kChildBits) - 1;

template <int D>  // the code dimension, or 0 for any
struct Walk {
  const IndexLayout& layout;
  const IndexGroup& group;
  const float* queries;
  WalkSpace& space;

  REVQ_INLINE int64_t dim() const { return D > 0 ? D : layout.d; }
  REVQ_INLINE const float* query(int64_t walker) const { return queries + walker * dim(); }

  // D of a query and the 16 codes of a panel.
  REVQ_INLINE Lanes distance(const float* x, const float* panel) const {
    Lanes sum{};
    for (int64_t j = 0; j < dim(); ++j) {
      const Lanes code = load16(panel + j * 16);
      for (int h = 0; h < kParts; ++h) {
        const Floats difference = x[j] - code.part[h];
        const Floats square = difference * difference;
        sum.part[h] = j == 0 ? square : sum.part[h] + square;
      }
    }
    return sum;
  }

  // D of a query and the nearest point of each box of a block: its lower corners, and behind them the upper ones.
  REVQ_INLINE Lanes bound(const float* x, const float* lower) const {
    const float* upper = lower + dim() * 16;
    Lanes sum{};
    for (int64_t j = 0; j < dim(); ++j) {
      const Lanes low = load16(lower + j * 16), high = load16(upper + j * 16);
      for (int h = 0; h < kParts; ++h) {
        const Floats here = spread(x[j]);
        const Floats difference = here - smaller(larger(here, low.part[h]), high.part[h]);
        const Floats square = difference * difference;
        sum.part[h] = j == 0 ? square : sum.part[h] + square;
      }
    }
    return sum;
  }

  REVQ_INLINE const float* boxes(int level, int64_t block) const {
    return group.boxes + (layout.first_block[level] + block) * 2 * dim() * 16;
  }
  REVQ_INLINE int64_t children(int level, int64_t block) const { return layout.children[level] - block * 16; }

  bool is_far() const { return layout.leaves * layout.panel_floats() > kCachedFloats; }
  REVQ_INLINE static void fetch(const float* from, int64_t registers) {
    for (int64_t j = 0; j < registers; ++j) __builtin_prefetch(from + j * 16);
  }

  REVQ_INLINE void visit_leaf(int64_t walker, int64_t leaf) {
    const Lanes lanes = distance(query(walker), group.panels + leaf * dim() * 16);
    const unsigned mask = at_most(lanes, space.best[walker]);
    if (__builtin_expect(mask == 0, 1)) return;
    const int lane = smallest_lane(lanes, 16);  // the first of equals, and a leaf's numbers ascend: the lowest
    const float value = lanes.part[lane / kWidth][lane % kWidth];
    const int32_t id = group.ids[leaf * 16 + lane];
    const bool nearer = value < space.best[walker] || id < space.chosen[walker];
    space.best[walker] = value;  // at most the best, as the mask says
    space.chosen[walker] = nearer ? id : space.chosen[walker];
  }

  // The leaves that wait and are bounded by at most a share of their walker's best.
  void visit_leaves(float share) {
    Waiting& near = space.near;
    move_near(space.leaves, space.best, share, near);
    const bool far = is_far();
    for (int64_t i = 0; i < near.size; ++i) {
      if (far && i + kAhead < near.size) fetch(group.panels + (near.entry[i + kAhead] & kChild) * dim() * 16, dim());
      visit_leaf(near.entry[i] >> kChildBits, near.entry[i] & kChild);
    }
    space.visited_leaves += near.size;
  }

  // The leaves that wait: the nearer ones first, as they lower the best and so spare some of the others.
  void flush_leaves() {
    visit_leaves(0.5f);
    visit_leaves(1.0f);
    space.leaves.size = 0;
  }

  // Brings those that wait for one block together, so that the first of them fetches it for all.
  static void group_by_block(const Waiting& list, uint32_t* order) {
    constexpr uint32_t kBuckets = 256;
    static_assert(kWaiting + 16 < 1 << 16, "a place in a list fits 16 bits");
    uint16_t start[kBuckets] = {};
    for (int64_t i = 0; i < list.size; ++i) ++start[list.entry[i] % kBuckets];
    uint16_t before = 0;
    for (uint32_t bucket = 0; bucket < kBuckets; ++bucket) {
      const uint16_t count = start[bucket];
      start[bucket] = before;
      before += count;
    }
    for (int64_t i = 0; i < list.size; ++i) order[start[list.entry[i] % kBuckets]++] = list.entry[i];
  }

  // The blocks that wait at a level: their children join the lists below, which are emptied when they are full.
  void flush_blocks(int level) {
    Waiting& list = space.blocks[level];
    Waiting& below = level == 0 ? space.leaves : space.blocks[level - 1];
    space.visited_blocks += list.size;
    const float* best = space.best;
    uint32_t grouped[kWaiting];
    const uint32_t* entries = list.entry;
    if (list.size >= kWorthGrouping) group_by_block(list, grouped), entries = grouped;
    const bool far = is_far();
    const Walk here = *this;  // what the lists' stores cannot change
    const float* first_box = boxes(level, 0);
    const int64_t count = layout.children[level], size = list.size, box_floats = 2 * dim() * 16;
    for (int64_t i = 0; i < size; ++i) {
      if (far && i + kAhead < size) fetch(first_box + (entries[i + kAhead] & kChild) * box_floats, box_floats / 16);
      const int64_t walker = entries[i] >> kChildBits, block = entries[i] & kChild;
      const Lanes bounds = here.bound(here.query(walker), first_box + block * box_floats);
      append(below, at_most(bounds, best[walker]) & present(count - block * 16), walker, block * 16, bounds);
      if (__builtin_expect(below.size > kWaiting - 16, 0)) level == 0 ? flush_leaves() : flush_blocks(level - 1);
    }
    list.size = 0;
  }

  // The block of leaves that looks nearest from above: its leaves give each walker a good best to start with.
  void seed(int64_t count) {
    const int top = layout.levels - 1;
    for (int64_t walker = 0; walker < count; ++walker) space.seed[walker] = 0;
    for (int level = top; level > 0; --level) {
      for (int64_t walker = 0; walker < count; ++walker) {
        const int32_t block = space.seed[walker];
        const Lanes bounds = bound(query(walker), boxes(level, block));
        __builtin_memcpy(space.passed[level][walker], &bounds, sizeof bounds);
        space.seed[walker] = block * 16 + smallest_lane(bounds, children(level, block));
      }
    }
    for (int64_t walker = 0; walker < count; ++walker) {
      const int32_t block = space.seed[walker];
      const Lanes bounds = bound(query(walker), boxes(0, block));
      const int64_t leaves = children(0, block);
      const int nearest = smallest_lane(bounds, leaves);
      space.best[walker] = __builtin_inff();
      space.chosen[walker] = INT32_MAX;
      visit_leaf(walker, block * 16 + nearest);
      const unsigned mask = at_most(bounds, space.best[walker]) & present(leaves) & ~(1u << nearest);
      append(space.leaves, mask, walker, block * 16, bounds);
      if (space.leaves.size > kWaiting - 16) flush_leaves();
    }
    flush_leaves();
    space.visited_blocks += count * layout.levels;
    space.visited_leaves += count;
  }

  // What the seed's way down left aside at a level, by the bounds it took there.
  void siblings(int level, int64_t count) {
    Waiting& below = space.blocks[level - 1];
    for (int64_t walker = 0; walker < count; ++walker) {
      const int64_t child = space.seed[walker] >> 4 * (level - 1), block = child / 16;
      const Lanes bounds = load16(space.passed[level][walker]);
      const unsigned mask = at_most(bounds, space.best[walker]) & present(children(level, block));
      append(below, mask & ~(1u << child % 16), walker, block * 16, bounds);
      if (below.size > kWaiting - 16) flush_blocks(level - 1);
    }
  }

  void run(int64_t count) {
    seed(count);
    for (int level = 1; level < layout.levels; ++level) {  // the nearest of what is left first
      siblings(level, count);
      for (int below = level - 1; below >= 0; --below) flush_blocks(below);
      flush_leaves();
    }
  }
};

// Calls use(Walk<D>) with the D of the layout where the compiler shall know it, else with 0.
template <typename Use>
void with_walk(const IndexLayout& layout, const IndexGroup& group, const float* queries, WalkSpace& space, Use use) {
  switch (layout.d) {
    case 4: return use(Walk<4>{layout, group, queries, space});
    case 8: return use(Walk<8>{layout, group, queries, space});
    case 16: return use(Walk<16>{layout, group, queries, space});
    default: return use(Walk<0>{layout, group, queries, space});
  }
}

}  // namespace

void index_walk(const IndexLayout& layout, const IndexGroup& group, const float* queries, int64_t count,
                WalkSpace& space) {
  with_walk(layout, group, queries, space, [&](auto walk) { walk.run(count); });
}

void index_bound(const IndexLayout& layout, const IndexGroup& group, const float* query, int level, int64_t block,
                 float* bounds) {
  WalkSpace unused;
  with_walk(layout, group, query, unused, [&](auto walk) {
    const Lanes lanes = walk.bound(query, walk.boxes(level, block));
    __builtin_memcpy(bounds, &lanes, sizeof lanes);
  });
}

int32_t index_scan(const IndexLayout& layout, const IndexGroup& group, const float* query) {
  int32_t best = INT32_MAX, lowest = INT32_MAX;  // the two words of the contract's key
  WalkSpace unused;
  const Walk<0> walk{layout, group, query, unused};
  for (int64_t leaf = 0; leaf < layout.leaves; ++leaf) {
    const Lanes lanes = walk.distance(query, group.panels + leaf * layout.d * 16);
    int32_t keys[16];
    for (int h = 0; h < kParts; ++h) {
      const Ints key = (Ints)lanes.part[h] | (Ints)(lanes.part[h] != lanes.part[h]);  // a NaN: -1, before all numbers
      __builtin_memcpy(keys + h * kWidth, &key, sizeof key);
    }
    const int32_t* ids = group.ids + leaf * 16;
    for (int lane = 0; lane < 16; ++lane) {
      if (keys[lane] < best || (keys[lane] == best && ids[lane] < lowest)) {
        best = keys[lane];
        lowest = ids[lane];
      }
    }
  }
  return lowest;
}
