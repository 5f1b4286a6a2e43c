// The search of a block of queries in runs of codes: first pass, candidates, D.  No torch here: the tests' window
// links this too.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/search/certificate.h"
#include "cpu/search/direct.h"
#include "cpu/search/kernels.h"

namespace revq {

// Which clone runs, whether it makes a first pass, and how large the pieces are.
struct Plan {
  int isa = 0;
  bool first_pass = false;
  bool rounded = true;  // whether the first pass may round vectors to whole numbers, where a clone for that exists
  int64_t d = 0;
  int64_t queries = 0;  // per block, at most
  int64_t cell = 0;     // codes that one minimum stands for
  int64_t tiles = 0;    // per run of codes, at most
  double certificate_scale = 1.0;  // the tests make the bound too small

  int64_t codes_per_tile() const;
  int64_t codes_per_run() const;
  int64_t minima_stride() const;    // floats from one query's minima to the next's
  int64_t floats() const;           // of workspace
};

// Queries whose minima exist at a time: whole packs, of which the last may be partly full.
constexpr int64_t kQueriesPerSweep = 96;
static_assert(kQueriesPerSweep % kQueriesPerPack == 0);

// The plan of a search, and one that makes a first pass however small the problem.  The workspace takes at most
// `most_floats`, or what one tile and one pack of queries take.
constexpr int64_t kMostFloats = int64_t{1} << 20;
Plan make_plan(int isa, int64_t N, int64_t K, int64_t d, int64_t most_floats = kMostFloats);
Plan make_first_pass_plan(int isa, int64_t N, int64_t K, int64_t d, int64_t most_floats = kMostFloats);

// How queries were settled, for the tests.
struct Counters {
  int64_t cells = 0;     // candidate cells
  int64_t searched = 0;  // queries times runs of codes that took D over all codes
  int64_t rounded = 0;   // queries times runs of codes that whole numbers settled
};

// One thread's search.  `workspace` holds plan.floats() floats.
class BlockSearch {
 public:
  BlockSearch(const Plan& plan, float* workspace);
  // Where to write the block's queries, [queries][d].
  float* queries() { return queries_; }
  // keys [count]: the smallest keys so far, or kNoKey.
  void begin(int64_t count, const float* center, int64_t* keys);
  // A run of at most plan.codes_per_run() codes, numbered from `first`: keys become the smallest so far.
  void search(CodeRows codes, int64_t first);
  const Counters& counters() const { return counters_; }

 private:
  static constexpr int64_t kMaxCells = 24, kAhead = 32, kMaxWaiting = 64;
  struct Candidates {
    float least;    // of the minima
    float limit;    // what is asked of the minima: a guess, or a NaN for D over all codes
    int64_t count;  // more than kMaxCells: D over all codes
    int32_t cells[kMaxCells];
  };

  bool pack(CodeRows codes, int64_t tiles);
  bool round(float largest, int64_t tiles);
  void exclude_copies(CodeRows codes);
  bool settle_sweep(CodeRows codes, int64_t first, int64_t tiles, int64_t begin, int64_t end);
  void sweep(CodeRows codes, int64_t first, int64_t tiles, int64_t begin, int64_t end);
  bool poor(const Counters& before, size_t unsettled, CodeRows codes, int64_t queries) const;
  float limit(double distance, int64_t q) const;
  float guess(float smallest, int64_t q) const;
  float first_limit(int64_t q, float least) const;
  void find(CodeRows codes, const float* minima, int64_t count, Candidates& found) const;
  void settle(int64_t q, CodeRows codes, int64_t first, const Candidates& found);
  void evaluate();
  bool check(int64_t q, CodeRows codes, int64_t first, const float* minima, int64_t count, Candidates& found);

  Plan plan_;
  const FirstPass* pass_;
  const RoundedPass* rounded_pass_;  // nullptr: not to be used, or no longer
  Certificate certificate_;
  RoundedCertificate rounded_certificate_;
  float *queries_, *packed_, *rounded_queries_, *panels_, *minima_;
  const float* center_ = nullptr;
  int64_t count_ = 0;
  int64_t* keys_ = nullptr;
  Candidates candidates_[kAhead];
  // Cells that wait for D.
  Candidate waiting_[kMaxWaiting];
  struct {
    int64_t query, code;
  } places_[kMaxWaiting];
  int64_t num_waiting_ = 0;
  std::vector<double> norms_;
  // Of the run in hand, if its panels hold whole numbers: the scale, and the squared lengths of the rounded queries.
  bool rounded_ = false;
  float scale_ = 0;
  double longest_ = 0;  // query of the block
  std::vector<int32_t> squares_;
  std::vector<int64_t> unsettled_;
  // Whether codes are known to have many copies, and whether it is worth looking for some.
  bool copies_ = false, may_have_copies_ = true;
  std::vector<int32_t> table_;
  DirectSearch direct_;
  Counters counters_;
};

}  // namespace revq
