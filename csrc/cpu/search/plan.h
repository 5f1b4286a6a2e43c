// The plan of a search: which form it takes, and how large its pieces are.  None of it changes a result.
#pragma once

#include <cstdint>

#include "cpu/search/kernels.h"
#include "cpu/search/tuning.h"

namespace revq {

struct Plan {
  int isa = 0;
  bool first_pass = false;  // else exact distances over all codes
  bool int16 = true;        // whether the first pass may round to int16, where a clone for that exists
  int64_t d = 0;
  int64_t queries = 0;             // per block, at most
  int64_t cell = 0;                // codes that one minimum stands for
  int64_t tiles = 0;               // per run of codes, at most
  double certificate_scale = 1.0;  // tests make the bound too small

  int64_t codes_per_tile() const;
  int64_t codes_per_run() const;
  int64_t minima_stride() const;  // floats from one query's minima to the next's
  int64_t floats() const;         // of workspace
};

// The plan of a search, and one that makes a first pass however small the problem.  The workspace takes at most
// `max_floats`, or what one tile and one pack of queries take.
Plan make_plan(int isa, int64_t N, int64_t K, int64_t d, int64_t max_floats = kMaxWorkspace);
Plan make_first_pass_plan(int isa, int64_t N, int64_t K, int64_t d, int64_t max_floats = kMaxWorkspace);

}  // namespace revq
