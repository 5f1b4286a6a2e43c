// One tile of the search: a block of queries against a few hundred packed codes, with D of the contract.
#pragma once

#include <cstdint>

// Clones need gcc 12 on x86-64: it knows the architecture levels by name.  Elsewhere the baseline tile runs.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define REVQ_X86_CLONES 1
#endif

namespace revq {

// Codes stand in panels of kLanes, transposed: panel[j * kLanes + lane] is number j of code `lane`.
constexpr int64_t kLanes = 16;

// Rows named[0..count) of queries [][d], and panels [num_panels][d][kLanes] of codes that are numbered from `first`.
// keys[q] of the named rows q: the smallest so far.
struct Tile {
  const float* queries;
  const int64_t* named;
  int64_t count, d;
  const float* panels;
  int64_t num_panels, first;
  int64_t* keys;
};
using SearchTile = void (*)(const Tile& tile);

// 0 baseline, 1 x86-64-v3, 2 x86-64-v4, 3 x86-64-v4 with VNNI: the clones that this machine runs.
int cpu_isa();

// The clone of the tile for an instruction set that the machine has; nullptr when this build has none.
SearchTile search_tile(int isa);

namespace baseline { void search_tile(const Tile&); }
namespace x86_64_v3 { void search_tile(const Tile&); }
namespace x86_64_v4 { void search_tile(const Tile&); }

}  // namespace revq
