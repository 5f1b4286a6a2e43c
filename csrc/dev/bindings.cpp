// A window for the tests (built with REVQ_DEV=1, never in a wheel): every clone of the tile, on raw arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <stdexcept>

#include "../cpu/float_mode.h"
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

}  // namespace

PYBIND11_MODULE(_dev, m) {
  m.attr("LANES") = revq::kLanes;
  m.attr("QUERIES_PER_STEP") = revq::kQueriesPerStep;
  m.def("cpu_isa", &revq::cpu_isa);
  m.def("run_tile", &run_tile, py::arg("isa"), py::arg("queries"), py::arg("panels"), py::arg("first_panel") = 0);
}
