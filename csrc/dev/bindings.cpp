// A window for the tests (built with REVQ_DEV=1, never in a wheel): every clone of the tile, on raw arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <memory>
#include <stdexcept>

#include "../cpu/float_mode.h"
#include "../cpu/index_walk.h"
#include "../cpu/tile.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;

// queries [n, d] (n a multiple of QUERIES_PER_STEP), panels [p, d, LANES] -> (key [n, LANES], panel [n, LANES]).
py::tuple run_tile(int isa, const Floats& queries, const Floats& panels, int first_panel) {
  const auto tile = isa <= revq::cpu_isa() ? revq::search_tile(isa) : nullptr;
  if (tile == nullptr) throw std::invalid_argument("this machine or build has no such clone");
  const py::ssize_t n = queries.shape(0), lanes = revq::kLanes;
  if (n % revq::kQueriesPerStep != 0 || panels.shape(2) != lanes || panels.shape(1) != queries.shape(1)) {
    throw std::invalid_argument("expected queries [n, d] and panels [p, d, LANES]");
  }
  std::vector<revq::Best> best(n);
  for (auto& b : best) {
    std::fill_n(b.key, lanes, std::numeric_limits<int32_t>::max());
    std::fill_n(b.panel, lanes, 0);
  }
  {
    const revq::KeepDenormals guard;
    tile(queries.data(), n, queries.shape(1), panels.data(), panels.shape(0), first_panel, best.data());
  }
  py::array_t<int32_t> key({n, lanes}), panel({n, lanes});
  for (py::ssize_t i = 0; i < n; ++i) {
    std::copy_n(best[i].key, lanes, key.mutable_data(i, 0));
    std::copy_n(best[i].panel, lanes, panel.mutable_data(i, 0));
  }
  return py::make_tuple(key, panel);
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

}  // namespace

PYBIND11_MODULE(_dev, m) {
  m.attr("LANES") = revq::kLanes;
  m.attr("QUERIES_PER_STEP") = revq::kQueriesPerStep;
  m.def("cpu_isa", &revq::cpu_isa);
  m.attr("WAITING") = revq::kWaiting;
  m.def("run_index", &run_index);
  m.def("run_bound", &run_bound);
  m.def("run_tile", &run_tile, py::arg("isa"), py::arg("queries"), py::arg("panels"), py::arg("first_panel") = 0);
}
