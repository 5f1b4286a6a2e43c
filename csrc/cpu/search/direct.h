// D over all codes of a run: for small problems, and for queries that the first pass does not settle.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/search/kernels.h"
#include "cpu/search/exact.h"

namespace revq {

class DirectSearch {
 public:
  DirectSearch(int isa, int64_t d) : pass_(first_pass(isa)), tile_(search_tile(isa)), d_(d), zeros_(d) {}
  // keys[q] of the named rows q of queries [][d]: the smallest so far, the codes being numbered from `first`.
  void search(const float* queries, const std::vector<int64_t>& named, CodeRows codes, int64_t first, int64_t* keys);

 private:
  const FirstPass* pass_;
  SearchTile tile_;
  int64_t d_;
  std::vector<float> zeros_, panels_;
};

}  // namespace revq
