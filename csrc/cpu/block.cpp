// Per run of codes: scores of all pairs, then per query the cells that the certificate cannot exclude, by D.
#include "block.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "key.h"

namespace revq {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

constexpr int64_t kAlign = 16;  // floats
// Of a candidate cell's rows, at most this many numbers are fetched ahead.
constexpr int64_t kPrefetch = 512;
// With so many queries of a sweep unsettled, and so few codes for one that is a copy, copies are looked for.
constexpr size_t kManyUnsettled = 24;
constexpr int64_t kCodesPerCopy = 4;
// Places of the table of codes that are tried: bounds the time of codes that collide.
constexpr int kProbes = 8;

// Any numbers that agree for codes with the same bits.
uint64_t hash_of(const float* row, int64_t d) {
  uint64_t sum = 0, factor = 0x9E3779B97F4A7C15;
  for (int64_t j = 0; j < d; ++j) {
    sum += (uint64_t{std::bit_cast<uint32_t>(row[j])} + 1) * factor;
    factor = factor * 0xD1342543DE82EF95 + 2;  // odd again
  }
  return sum ^ sum >> 32;
}

}  // namespace

BlockSearch::BlockSearch(const Plan& plan, float* workspace)
    : plan_(plan),
      pass_(first_pass(plan.isa)),
      certificate_(plan.d, plan.certificate_scale),
      norms_(round_up(plan.queries, kQueriesPerPack)),
      direct_(plan.isa, plan.d) {
  unsettled_.reserve(plan.queries);
  queries_ = workspace;
  packed_ = queries_ + round_up(plan.queries * plan.d, kAlign);
  panels_ = packed_ + round_up(round_up(plan.queries, kQueriesPerPack) * plan.d, kAlign);
  minima_ = panels_ + plan.codes_per_run() * (plan.d + 1);
}

void BlockSearch::begin(int64_t count, const float* centre, int64_t* keys) {
  count_ = count;
  centre_ = centre;
  keys_ = keys;
  if (plan_.first_pass) pass_->pack_queries(queries_, count, plan_.d, centre, packed_, norms_.data());
}

void BlockSearch::search(CodeRows codes, int64_t first) {
  unsettled_.clear();
  const int64_t tiles = plan_.first_pass ? divide_up(codes.count, plan_.codes_per_tile()) : 0;
  // A NaN wins by the contract, wherever it stands: no score tells where.
  if (!plan_.first_pass || !pass_->pack_codes(codes, plan_.d, centre_, plan_.cell, tiles, panels_)) {
    for (int64_t q = 0; q < count_; ++q) unsettled_.push_back(q);
  } else {
    if (copies_) exclude_copies(codes);
    for (int64_t begin = 0; begin < count_; begin += kQueriesPerSweep) {
      const size_t before = unsettled_.size();
      const int64_t end = std::min(begin + kQueriesPerSweep, count_);
      sweep(codes, first, tiles, begin, end);
      if (copies_ || !may_have_copies_ || unsettled_.size() - before < kManyUnsettled) continue;
      exclude_copies(codes);
      if (!copies_) continue;
      unsettled_.resize(before);  // once more, without the copies
      sweep(codes, first, tiles, begin, end);
    }
  }
  if (unsettled_.empty()) return;
  counters_.searched += static_cast<int64_t>(unsettled_.size());
  direct_.search(queries_, unsettled_, codes, first, keys_);
}

// A code with the bits of an earlier one has its distance and a higher number, and never wins: its score becomes
// kExcluded.  Else many copies of a winner would fill its list of candidates.
void BlockSearch::exclude_copies(CodeRows codes) {
  const int64_t d = plan_.d, lanes = pass_->lanes, row = kVectorsPerPanel * lanes;
  const auto places = std::bit_ceil(static_cast<uint64_t>(2 * codes.count));
  table_.assign(places, -1);
  int64_t found = 0;
  for (int64_t code = 0; code < codes.count; ++code) {
    const float* numbers = codes.rows + code * codes.stride;
    uint64_t place = hash_of(numbers, d) & (places - 1);
    for (int probe = 0; probe < kProbes; ++probe, place = (place + 1) & (places - 1)) {
      if (table_[place] < 0) {
        table_[place] = static_cast<int32_t>(code);
        break;
      }
      if (std::memcmp(numbers, codes.rows + table_[place] * codes.stride, d * sizeof(float)) != 0) continue;
      ++found;
      const int64_t i = code % plan_.cell, lane = code / plan_.cell % lanes;
      float* panel = panels_ + (code / plan_.codes_per_tile() * plan_.cell + i) / kVectorsPerPanel * (d + 1) * row;
      panel += i % kVectorsPerPanel * lanes + lane;
      for (int64_t j = 0; j <= d; ++j) panel[j * row] = j == 0 ? kExcluded : 0.0f;
      break;
    }
  }
  copies_ = may_have_copies_ = found * kCodesPerCopy >= codes.count;
}

// Scores of some queries, then their candidates while the minima are in the cache.
void BlockSearch::sweep(CodeRows codes, int64_t first, int64_t tiles, int64_t begin, int64_t end) {
  const int64_t cells = tiles * pass_->lanes, stride = plan_.minima_stride();
  pass_->score(Scores{packed_ + begin * plan_.d, end - begin, plan_.d, panels_, tiles, plan_.cell, minima_, stride});
  const auto minima = [&](int64_t q) { return minima_ + (q - begin) * stride; };
  for (int64_t some = begin; some < end; some += kAhead) {
    const int64_t last = std::min(some + kAhead, end);
    for (int64_t q = some; q < last; ++q) find(q, codes, minima(q), cells, candidates_[q - some]);
    for (int64_t q = some; q < last; ++q) settle(q, codes, first, candidates_[q - some]);
    evaluate();
    for (int64_t q = some; q < last; ++q) {
      if (!check(q, codes, first, minima(q), cells, candidates_[q - some])) unsettled_.push_back(q);
    }
  }
}

// The cells that may hold the winner, by a guess at the limit, and their rows on the way to the cache.
void BlockSearch::find(int64_t q, CodeRows codes, const float* minima, int64_t count, Candidates& found) const {
  const double norm = norms_[q];
  found.guess = -std::numeric_limits<float>::infinity();
  found.count = kMaxCells + 1;  // to be searched by D over all codes
  if (!(norm <= kMaxNorm)) return;
  float known = std::numeric_limits<float>::infinity();
  if (keys_[q] != kNoKey) {
    const float distance = distance_of(keys_[q]);
    if (distance < 0) known = -known;  // a NaN of another run: none here can come before it
    if (distance >= 0 && distance <= kMaxDistance) known = certificate_.limit(distance, norm);
  }
  const float least = pass_->smallest(minima, count);
  if (least > known) {
    found.count = 0;
    found.guess = known;
    return;
  }
  if (least >= kOutlier) return;
  found.guess = std::min(known, certificate_.guess(least, norm));
  found.count = pass_->at_most(minima, count, found.guess, found.cells, kMaxCells);
  for (int64_t i = 0; i < std::min(found.count, kMaxCells); ++i) {
    const int64_t begin = std::min(found.cells[i] * plan_.cell, codes.count - 1);
    const float* rows = codes.rows + begin * codes.stride;
    const int64_t size = std::min((std::min(plan_.cell, codes.count - begin) - 1) * codes.stride + plan_.d, kPrefetch);
    for (int64_t j = 0; j < size; j += 16) __builtin_prefetch(rows + j);
  }
}

// Puts the codes of the candidate cells into the queue for D.
void BlockSearch::settle(int64_t q, CodeRows codes, int64_t first, const Candidates& found) {
  if (found.count > kMaxCells) return;
  counters_.cells += found.count;
  const float* x = queries_ + q * plan_.d;
  for (int64_t i = 0; i < found.count; ++i) {
    const int64_t begin = found.cells[i] * plan_.cell, end = std::min(begin + plan_.cell, codes.count);
    if (plan_.cell >= pass_->lanes) {  // a cell fills registers by itself; its numbers are finite or infinite
      const CodeRows cell{codes.rows + begin * codes.stride, codes.stride, end - begin};
      keys_[q] = std::min(keys_[q], pass_->nearest(x, cell, plan_.d) + first + begin);
      continue;
    }
    for (int64_t code = begin; code < end;) {
      const int64_t count = std::min(end - code, pass_->lanes - waiting_);
      for (int64_t k = 0; k < count; ++k) {
        pairs_.x[waiting_ + k] = x;
        pairs_.row[waiting_ + k] = codes.rows + (code + k) * codes.stride;
        pairs_.code[waiting_ + k] = first + code + k;
        pairs_.query[waiting_ + k] = q;
      }
      code += count;
      waiting_ += count;
      if (waiting_ == pass_->lanes) evaluate();
    }
  }
}

// D of the pairs in the queue; the queue's unused places repeat its first pair.
void BlockSearch::evaluate() {
  if (waiting_ == 0) return;
  for (int64_t i = waiting_; i < pass_->lanes; ++i) {
    pairs_.x[i] = pairs_.x[0];
    pairs_.row[i] = pairs_.row[0];
  }
  float distance[kMaxFirstLanes];
  pass_->distances(pairs_.x, pairs_.row, plan_.d, distance);
  int64_t q = pairs_.query[0], key = keys_[q];
  for (int64_t i = 0; i < waiting_; ++i) {
    if (pairs_.query[i] != q) {
      keys_[q] = key;
      q = pairs_.query[i];
      key = keys_[q];
    }
    key = std::min(key, key_of(distance[i], pairs_.code[i]));
  }
  keys_[q] = key;
  waiting_ = 0;
}

// Whether the cells that were settled are all that the certificate asks for; false when D over all codes has to decide.
bool BlockSearch::check(int64_t q, CodeRows codes, int64_t first, const float* minima, int64_t count,
                        Candidates& found) {
  if (found.count > kMaxCells) return false;
  if (found.count == 0) return true;
  const float distance = distance_of(keys_[q]);
  if (!(distance <= kMaxDistance)) return false;
  const float limit = certificate_.limit(distance, norms_[q]);
  if (limit <= found.guess) return true;
  found.count = pass_->at_most(minima, count, limit, found.cells, kMaxCells);
  settle(q, codes, first, found);
  evaluate();
  return found.count <= kMaxCells;
}

}  // namespace revq
