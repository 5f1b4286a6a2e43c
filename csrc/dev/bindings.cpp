// A window for the tests (built with REVQ_DEV=1, never in a wheel): every clone of the kernels, on raw arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>

#include "cpu/search/block.h"
#include "core/float_mode.h"
#include "cpu/index/kernels.h"
#include "cpu/search/key.h"
#include "cpu/search/exact.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;

void check_isa(int isa) {
  if (isa < 0 || isa > revq::cpu_isa() || revq::search_tile(isa) == nullptr) {
    throw std::invalid_argument("this machine or build has no such clone");
  }
}

// queries [n, d], panels [p, d, LANES] of codes numbered from `first` -> keys [n].
py::array_t<int64_t> run_tile(int isa, const Floats& queries, const Floats& panels, int64_t first) {
  check_isa(isa);
  const int64_t n = queries.shape(0), d = queries.shape(1);
  if (panels.shape(2) != revq::kLanes || panels.shape(1) != d) {
    throw std::invalid_argument("expected queries [n, d] and panels [p, d, LANES]");
  }
  std::vector<int64_t> named(n);
  for (int64_t q = 0; q < n; ++q) named[q] = q;
  py::array_t<int64_t> keys(n);
  std::fill_n(keys.mutable_data(), n, revq::kNoKey);
  const revq::KeepDenormals guard;
  revq::search_tile(isa)(
      {queries.data(), named.data(), n, d, panels.data(), panels.shape(0), first, keys.mutable_data()});
  return keys;
}

revq::IndexKernels kernels_for(int isa) {
  const auto kernels = isa <= revq::cpu_isa() ? revq::index_kernels(isa) : revq::IndexKernels{};
  if (kernels.walk == nullptr) throw std::invalid_argument("this machine or build has no such clone");
  return kernels;
}

using Ids = py::array_t<int32_t, py::array::c_style>;

revq::IndexGroup group_of(const Floats& panels, const Ids& ids, const Floats& boxes) {
  return {const_cast<float*>(panels.data()), const_cast<int32_t*>(ids.data()), const_cast<float*>(boxes.data())};
}

// queries [n, d] on the arrays of one group -> (chosen [n] of the walk, chosen [n] of the scan).
py::tuple run_index(int isa, const Floats& queries, const Floats& panels, const Ids& ids, const Floats& boxes,
                    int64_t num_codes) {
  const auto kernels = kernels_for(isa);
  const revq::IndexLayout layout(num_codes, queries.shape(1));
  const auto group = group_of(panels, ids, boxes);
  const py::ssize_t n = queries.shape(0);
  const revq::KeepDenormals guard;
  py::array_t<int32_t> walked(n), scanned(n);
  const auto space = std::make_unique<revq::WalkSpace>();
  for (py::ssize_t first = 0; first < n; first += revq::kWalkers) {
    const int64_t count = std::min<int64_t>(revq::kWalkers, n - first);
    kernels.walk(layout, group, queries.data(first, 0), count, *space);
    std::copy_n(space->chosen, count, walked.mutable_data(first));
  }
  for (py::ssize_t i = 0; i < n; ++i) *scanned.mutable_data(i) = kernels.scan(layout, group, queries.data(i, 0));
  return py::make_tuple(walked, scanned);
}

// The bounds [n, 16] of the first 16 leaves for queries [n, d].
py::array_t<float> run_bound(int isa, const Floats& queries, const Floats& boxes, int64_t num_codes) {
  const auto kernels = kernels_for(isa);
  const revq::IndexLayout layout(num_codes, queries.shape(1));
  const revq::IndexGroup group{nullptr, nullptr, const_cast<float*>(boxes.data())};
  const revq::KeepDenormals guard;
  py::array_t<float> bounds({queries.shape(0), py::ssize_t{16}});
  for (py::ssize_t i = 0; i < queries.shape(0); ++i) {
    kernels.bound(layout, group, queries.data(i, 0), 0, 0, bounds.mutable_data(i, 0));
  }
  return bounds;
}

// queries [n, d], codes [K, d], center [d] -> (index [n], candidate cells, queries times runs of codes that took D over
// all, and that whole numbers settled).
py::tuple search(int isa, const Floats& queries, const Floats& codes, const Floats& center, double certificate_scale,
                 int64_t tiles, bool rounded) {
  check_isa(isa);
  const int64_t n = queries.shape(0), K = codes.shape(0), d = codes.shape(1);
  if (n == 0 || queries.shape(1) != d || center.shape(0) != d) throw std::invalid_argument("expected one d, and n > 0");
  revq::Plan plan = revq::make_first_pass_plan(isa, n, K, d);
  plan.certificate_scale = certificate_scale;
  plan.rounded = rounded;
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
  return py::make_tuple(index, block.counters().cells, block.counters().searched, block.counters().rounded);
}

// queries [n, d], codes [K, d], distance [n, K] (D of the contract) -> limit(D) - computed score, [n, K]: what the
// certificate leaves of its slack, negative for a counterexample; inf for codes and queries that it does not speak of.
// In whole numbers, limit and score are those of vectors scaled to a length of at most `longest`.
Floats margins(int isa, const Floats& queries, const Floats& codes, const Floats& center, const Floats& distance,
               double certificate_scale, double longest) {
  check_isa(isa);
  const bool rounded = longest > 0;
  const revq::FirstPass& pass = *revq::first_pass(isa);
  const revq::RoundedPass* rounding = revq::rounded_pass(isa);
  if (rounded && (rounding == nullptr || longest > revq::kMaxScaled)) throw std::invalid_argument("no such pass");
  const int64_t n = queries.shape(0), K = codes.shape(0), d = codes.shape(1), cell = revq::kVectorsPerPanel;
  const int64_t tiles = (K + pass.lanes - 1) / pass.lanes, padded = n + revq::kQueriesPerPack;
  std::vector<float> rows(cell * K * d);  // every code fills a cell of its own
  for (int64_t i = 0; i < cell * K; ++i) std::copy_n(codes.data(i / cell, 0), d, rows.data() + i * d);
  std::vector<float> panels(tiles * pass.lanes * cell * (d + 1)), packed(padded * d), whole(padded * d);
  std::vector<float> minima(padded * tiles * pass.lanes);
  std::vector<double> norms(padded);
  std::vector<int32_t> squares(padded);
  const revq::KeepDenormals guard;
  const float largest = pass.pack_codes({rows.data(), d, cell * K}, d, center.data(), cell, tiles, panels.data());
  if (std::isnan(largest)) throw std::invalid_argument("a code holds a NaN");
  pass.pack_queries(queries.data(), n, d, center.data(), packed.data(), norms.data());
  revq::Scores scores{packed.data(), n, d, panels.data(), tiles, cell, minima.data(), tiles * pass.lanes};
  float scale = 1;
  if (rounded) {
    const double most = std::max(*std::max_element(norms.begin(), norms.begin() + n), std::sqrt(2.0 * largest));
    if (!(most > 0 && most < 0x1p60)) throw std::invalid_argument("vectors have no scale");
    scale = static_cast<float>(longest / most);
    rounding->round_codes(panels.data(), d, tiles * cell / revq::kVectorsPerPanel, scale);
    rounding->round_queries(packed.data(), n, d, scale, whole.data(), squares.data());
    scores.queries = whole.data();
    scores.rows = (d + 1) / 2;
  }
  (rounded ? rounding->score : pass.score)(scores);
  const revq::Certificate certificate(d, certificate_scale);
  const revq::RoundedCertificate whole_certificate(d, certificate_scale);
  Floats result({n, K});
  for (int64_t q = 0; q < n; ++q) {
    for (int64_t k = 0; k < K; ++k) {
      const float score = minima[q * tiles * pass.lanes + k], D = distance.at(q, k);
      const bool covered = norms[q] <= revq::kMaxNorm && D <= revq::kMaxDistance;
      const float limit = !covered  ? std::numeric_limits<float>::infinity()
                          : rounded ? whole_certificate.limit(certificate.reach(D, norms[q]) * scale, squares[q])
                                    : certificate.limit(D, norms[q]);
      result.mutable_at(q, k) = limit - score;
    }
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_dev, m) {
  m.attr("LANES") = revq::kLanes;
  m.def("cpu_isa", &revq::cpu_isa);
  m.attr("WAITING") = revq::kWaiting;
  m.def("run_index", &run_index);
  m.def("run_bound", &run_bound);
  m.def("run_tile", &run_tile, py::arg("isa"), py::arg("queries"), py::arg("panels"), py::arg("first") = 0);
  m.def("search", &search, py::arg("isa"), py::arg("queries"), py::arg("codes"), py::arg("center"),
        py::arg("certificate_scale") = 1.0, py::arg("tiles") = 0, py::arg("rounded") = true);
  m.def("margins", &margins, py::arg("isa"), py::arg("queries"), py::arg("codes"), py::arg("center"),
        py::arg("distance"), py::arg("certificate_scale") = 1.0, py::arg("longest") = 0.0);
  m.def("has_rounded_pass", [](int isa) { return revq::rounded_pass(isa) != nullptr; });
  m.attr("MAX_SCALED") = revq::kMaxScaled;
}
