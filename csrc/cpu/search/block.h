// The search of a block of queries in runs of codes: first pass, candidates, exact distances.  No torch here: the
// module of the tests (csrc/dev) links this too.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/search/certificate.h"
#include "cpu/search/plan.h"

namespace revq {

// Exact distances over all codes of a run: for small problems, and for queries that the first pass does not settle.
class BruteForce {
 public:
  BruteForce(int isa, int64_t d) : kernels_(*kernels(isa).search), d_(d), zeros_(d) {}
  // keys[q] of each query q of `rows`, from queries [][d], becomes the smallest so far.  The first code has the
  // number `first`.
  void search(const float* queries, const std::vector<int64_t>& rows, CodeRows codes, int64_t first, int64_t* keys);

 private:
  const SearchKernels& kernels_;
  int64_t d_;
  std::vector<float> zeros_, panels_;
};

// How queries were settled, for the tests.
struct Counters {
  int64_t cells = 0;        // candidate cells
  int64_t brute_force = 0;  // pairs (query, run) that took exact distances over all codes of the run
  int64_t int16 = 0;        // pairs (query, run) whose first pass in int16 was kept
};

// One thread's search.  `workspace` holds plan.floats() floats.
class BlockSearch {
 public:
  BlockSearch(const Plan& plan, float* workspace);
  // Where to write the block's queries, [queries][d].
  float* queries() { return queries_; }
  // Starts a block.  keys [count]: the smallest keys so far, or kNoKey.
  void begin(int64_t count, const float* center, int64_t* keys);
  // Searches a run of at most plan.codes_per_run() codes, of which the first has the number `first`.  keys become the
  // smallest so far.
  void search(CodeRows codes, int64_t first);
  const Counters& counters() const { return counters_; }

 private:
  struct Candidates {
    float least;    // of the minima
    float limit;    // cells with a minimum of at most this were asked for: a guess, or a NaN for brute force
    int64_t count;  // more than kMaxCells: brute force
    int32_t cells[kMaxCells];
  };

  bool pack(CodeRows codes, int64_t tiles);
  bool round(float largest, int64_t tiles);
  void exclude_duplicates(CodeRows codes);
  bool settle_sweep(CodeRows codes, int64_t first, int64_t tiles, int64_t begin, int64_t end);
  void sweep(CodeRows codes, int64_t first, int64_t tiles, int64_t begin, int64_t end);
  bool int16_is_inefficient(const Counters& before, size_t unsettled, CodeRows codes, int64_t queries) const;
  float limit(double distance, int64_t q) const;
  float guess(float smallest, int64_t q) const;
  float first_limit(int64_t q, float least) const;
  void find(CodeRows codes, const float* minima, int64_t count, Candidates& found) const;
  void add_pending(int64_t q, CodeRows codes, int64_t first, const Candidates& found);
  void evaluate_pending();
  bool check(int64_t q, CodeRows codes, int64_t first, const float* minima, int64_t count, Candidates& found);

  Plan plan_;
  const SearchKernels& kernels_;
  const Int16Kernels* int16_kernels_;  // nullptr: not to be used, or no longer
  Certificate certificate_;
  Int16Certificate int16_certificate_;
  float *queries_, *packed_, *rounded_queries_, *panels_, *minima_;
  const float* center_ = nullptr;
  int64_t count_ = 0;
  int64_t* keys_ = nullptr;
  Candidates candidates_[kQueriesPerStage];
  // Cells whose exact distances are still to be computed.
  Candidate pending_[kMaxPendingCells];
  struct {
    int64_t query, code;
  } pending_places_[kMaxPendingCells];
  int64_t num_pending_ = 0;
  std::vector<double> norms_;
  // Of the current run, if its panels are int16: the scale, and the squared lengths of the rounded queries.
  bool rounded_ = false;
  float scale_ = 0;
  double longest_ = 0;  // norm of a query of the block
  std::vector<int32_t> squares_;
  std::vector<int64_t> unsettled_;
  // Whether codes are known to have many duplicates, and whether it is worth looking for some.
  bool duplicates_ = false, may_have_duplicates_ = true;
  std::vector<int32_t> table_;
  BruteForce brute_force_;
  Counters counters_;
};

}  // namespace revq
