// A pybind11 module for the tests (built with REVQ_DEV=1, never in a wheel): it calls the kernels of every clone on raw
// arrays.
// csrc/README.md explains clone, run, tile, panel and cell; a key packs an exact distance and a code
// (search/kernels.h).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>

#include "core/float_mode.h"
#include "core/isa.h"
#include "cpu/kernels.h"
#include "cpu/search/block.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;

revq::Kernels kernels_for(int isa) {
  const revq::Kernels found = isa <= revq::cpu_isa() ? revq::kernels(isa) : revq::Kernels{};
  if (found.search == nullptr) throw std::invalid_argument("this machine or build has no such clone");
  return found;
}

// Exact distances: queries [n, d], panels [p, d, LANES] of codes -> the smallest key [n] per query.  The first code has
// the number `first`.
py::array_t<int64_t> run_tile(int isa, const Floats& queries, const Floats& panels, int64_t first) {
  const revq::Kernels clone = kernels_for(isa);
  const int64_t n = queries.shape(0), d = queries.shape(1);
  if (panels.shape(2) != revq::kPanelCodes || panels.shape(1) != d) {
    throw std::invalid_argument("expected queries [n, d] and panels [p, d, LANES]");
  }
  std::vector<int64_t> rows(n);
  for (int64_t q = 0; q < n; ++q) rows[q] = q;
  py::array_t<int64_t> keys(n);
  std::fill_n(keys.mutable_data(), n, revq::kNoKey);
  const revq::KeepDenormals guard;
  clone.search->exact({queries.data(), rows.data(), n, d, panels.data(), panels.shape(0), first, keys.mutable_data()});
  return keys;
}

using Ids = py::array_t<int32_t, py::array::c_style>;

revq::TreeGroup group_of(const Floats& panels, const Ids& ids, const Floats& boxes) {
  return {const_cast<float*>(panels.data()), const_cast<int32_t*>(ids.data()), const_cast<float*>(boxes.data())};
}

bool is_finite(const float* values, int64_t count) {
  return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

// Queries [n, d] in the tree of one group -> (index [n] of the walk, index [n] of the scan).  The walk skips subtrees
// by their bounds; the scan compares with all codes.  The walk takes only finite queries and codes; for others both
// are the index of the scan, as in the operator.
py::tuple run_index(int isa, const Floats& queries, const Floats& panels, const Ids& ids, const Floats& boxes,
                    int64_t num_codes) {
  const revq::TreeKernels& tree = *kernels_for(isa).tree;
  const revq::TreeLayout layout(num_codes, queries.shape(1));
  const auto group = group_of(panels, ids, boxes);
  const py::ssize_t n = queries.shape(0);
  const revq::KeepDenormals guard;
  py::array_t<int32_t> walked(n), scanned(n);
  const auto space = std::make_unique<revq::WalkSpace>();
  std::vector<py::ssize_t> rows;
  std::vector<float> finite;
  const auto walk = [&] {
    tree.walk(layout, group, finite.data(), rows.size(), *space);
    for (size_t i = 0; i < rows.size(); ++i) *walked.mutable_data(rows[i]) = space->index[i];
    rows.clear();
    finite.clear();
  };
  const bool may_walk = is_finite(panels.data(), panels.size());
  for (py::ssize_t i = 0; i < n; ++i) {
    const float* query = queries.data(i, 0);
    *walked.mutable_data(i) = *scanned.mutable_data(i) = tree.scan(layout, group, query);
    if (!may_walk || !is_finite(query, layout.d)) continue;
    rows.push_back(i);
    finite.insert(finite.end(), query, query + layout.d);
    if (rows.size() == revq::kWalkers) walk();
  }
  if (!rows.empty()) walk();
  return py::make_tuple(walked, scanned);
}

// The bounds [n, 16] of the first 16 leaves for queries [n, d].
py::array_t<float> run_bound(int isa, const Floats& queries, const Floats& boxes, int64_t num_codes) {
  const revq::TreeKernels& tree = *kernels_for(isa).tree;
  const revq::TreeLayout layout(num_codes, queries.shape(1));
  const revq::TreeGroup group{nullptr, nullptr, const_cast<float*>(boxes.data())};
  const revq::KeepDenormals guard;
  py::array_t<float> bounds({queries.shape(0), py::ssize_t{16}});
  for (py::ssize_t i = 0; i < queries.shape(0); ++i) {
    tree.bound(layout, group, queries.data(i, 0), 0, 0, bounds.mutable_data(i, 0));
  }
  return bounds;
}

// The brute-force search: queries [n, d], codes [K, d], center [d], which the first pass subtracts from both ->
// (index [n], three counters): candidate cells; pairs (query, run) that took exact distances over all codes of the run;
// pairs (query, run) whose first pass in int16 was kept.
py::tuple search(int isa, const Floats& queries, const Floats& codes, const Floats& center, double certificate_scale,
                 int64_t tiles, bool int16) {
  kernels_for(isa);
  const int64_t n = queries.shape(0), K = codes.shape(0), d = codes.shape(1);
  if (n == 0 || queries.shape(1) != d || center.shape(0) != d) throw std::invalid_argument("expected one d, and n > 0");
  revq::Plan plan = revq::make_first_pass_plan(isa, n, K, d);
  plan.certificate_scale = certificate_scale;
  plan.int16 = int16;
  if (tiles > 0) plan.tiles = std::min(plan.tiles, tiles);
  std::vector<float> memory(plan.floats() + 16);
  std::vector<int64_t> keys(n, revq::kNoKey);
  revq::BlockSearch block(plan, memory.data());
  const revq::KeepDenormals guard;
  for (int64_t first = 0; first < n; first += plan.queries) {
    const int64_t count = std::min(plan.queries, n - first);
    std::copy_n(queries.data(first, 0), count * d, block.queries());
    block.begin(count, center.data(), keys.data() + first);
    for (int64_t code = 0; code < K; code += plan.codes_per_run()) {
      block.search({codes.data(code, 0), d, std::min(plan.codes_per_run(), K - code)}, code);
    }
  }
  py::array_t<int64_t> index(n);
  for (int64_t i = 0; i < n; ++i) index.mutable_at(i) = revq::code_of(keys[i]);
  return py::make_tuple(index, block.counters().cells, block.counters().brute_force, block.counters().int16);
}

// An attack on the certificate: queries [n, d], codes [K, d], center [d], exact distance [n, K] -> slack [n, K].  The
// certificate (search/certificate.h) says that the first pass's score of a code is at most limit(its exact distance);
// the slack is this limit minus the score.  A negative slack is a counterexample; inf stands for codes and queries
// outside the range of the certificate.  If longest > 0, this is the int16 pass, with vectors scaled to a Euclidean
// length of at most `longest`.
Floats margins(int isa, const Floats& queries, const Floats& codes, const Floats& center, const Floats& distance,
               double certificate_scale, double longest) {
  const revq::Kernels clone = kernels_for(isa);
  const bool in_int16 = longest > 0;
  const revq::SearchKernels& pass = *clone.search;
  const revq::Int16Kernels* int16 = clone.int16;
  if (in_int16 && (int16 == nullptr || longest > revq::kMaxScaled)) throw std::invalid_argument("no such pass");
  const int64_t n = queries.shape(0), K = codes.shape(0), d = codes.shape(1), cell = revq::kVectorsPerPanel;
  const int64_t tiles = revq::divide_up(K, pass.lanes), padded = n + revq::kQueriesPerPack;
  std::vector<float> rows(cell * K * d);  // each code is repeated through a cell: a cell's minimum is its score
  for (int64_t i = 0; i < cell * K; ++i) std::copy_n(codes.data(i / cell, 0), d, rows.data() + i * d);
  std::vector<float> panels(tiles * pass.lanes * cell * (d + 1)), packed(padded * d), rounded(padded * d);
  std::vector<float> minima(padded * tiles * pass.lanes);
  std::vector<double> norms(padded);
  std::vector<int32_t> squares(padded);
  const revq::KeepDenormals guard;
  const float largest = pass.pack_codes({rows.data(), d, cell * K}, d, center.data(), cell, tiles, panels.data());
  if (std::isnan(largest)) throw std::invalid_argument("a code holds a NaN");
  pass.pack_queries(queries.data(), n, d, center.data(), packed.data(), norms.data());
  revq::Scores scores{packed.data(), n, d, panels.data(), tiles, cell, minima.data(), tiles * pass.lanes};
  float scale = 1;
  if (in_int16) {
    const double most = std::max(*std::max_element(norms.begin(), norms.begin() + n), std::sqrt(2.0 * largest));
    if (!(most > 0 && most < 0x1p60)) throw std::invalid_argument("vectors have no scale");
    scale = static_cast<float>(longest / most);
    int16->round_codes(panels.data(), d, tiles * cell / revq::kVectorsPerPanel, scale);
    int16->round_queries(packed.data(), n, d, scale, rounded.data(), squares.data());
    scores.queries = rounded.data();
    scores.rows = (d + 1) / 2;
  }
  (in_int16 ? int16->score : pass.score)(scores);
  const revq::Certificate certificate(d, certificate_scale);
  const revq::Int16Certificate int16_certificate(d, certificate_scale);
  Floats result({n, K});
  for (int64_t q = 0; q < n; ++q) {
    for (int64_t k = 0; k < K; ++k) {
      const float score = minima[q * tiles * pass.lanes + k], D = distance.at(q, k);
      const bool covered = norms[q] <= revq::kMaxNorm && D <= revq::kMaxDistance;
      const float limit = !covered   ? std::numeric_limits<float>::infinity()
                          : in_int16 ? int16_certificate.limit(certificate.reach(D, norms[q]) * scale, squares[q])
                                     : certificate.limit(D, norms[q]);
      result.mutable_at(q, k) = limit - score;
    }
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_dev, m) {
  m.attr("LANES") = revq::kPanelCodes;
  m.def("cpu_isa", &revq::cpu_isa);
  m.attr("MAX_PENDING") = revq::kMaxPending;
  m.def("run_index", &run_index);
  m.def("run_bound", &run_bound);
  m.def("run_tile", &run_tile, py::arg("isa"), py::arg("queries"), py::arg("panels"), py::arg("first") = 0);
  m.def("search", &search, py::arg("isa"), py::arg("queries"), py::arg("codes"), py::arg("center"),
        py::arg("certificate_scale") = 1.0, py::arg("tiles") = 0, py::arg("int16") = true);
  m.def("margins", &margins, py::arg("isa"), py::arg("queries"), py::arg("codes"), py::arg("center"),
        py::arg("distance"), py::arg("certificate_scale") = 1.0, py::arg("longest") = 0.0);
  m.def("has_int16", [](int isa) { return revq::kernels(isa).int16 != nullptr; });
  m.attr("MAX_SCALED") = revq::kMaxScaled;
}
