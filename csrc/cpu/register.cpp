// Registers the CPU kernels of the operators that revq_kernels/ops.py defines.  Messages for users come from
// revq_kernels/validation.py.  The checks here (types, shapes, strides, ranges of indices) keep a direct call of an
// operator from reading outside its tensors.  Devices need no check, because the dispatcher sends only CPU tensors
// here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "core/isa.h"
#include "cpu/accumulate.h"
#include "cpu/index/tree.h"
#include "cpu/search.h"

namespace revq {
namespace {

Problem check_search(const Tensor& x, const Tensor& codebook) {
  STD_TORCH_CHECK(codebook.dim() == 3 && x.dim() >= 2, "x: expected [..., G, d] and codebook [G, K, d]");
  STD_TORCH_CHECK(is_input_type(x.scalar_type()), "x: expected ", name_of_input_types());
  STD_TORCH_CHECK(is_input_type(codebook.scalar_type()), "codebook: expected ", name_of_input_types());
  const Problem problem{GroupedRows(x).rows(), codebook.size(0), codebook.size(1), codebook.size(2)};
  STD_TORCH_CHECK(x.size(x.dim() - 2) == problem.G && x.size(x.dim() - 1) == problem.d,
                  "x: expected G and d of the codebook");
  STD_TORCH_CHECK(
      problem.G >= 1 && problem.K >= 1 && problem.K <= INT32_MAX && problem.d >= 1 && problem.d <= INT32_MAX,
      "codebook: expected G >= 1, 1 <= K < 2^31 and 1 <= d < 2^31");
  return problem;
}

void check_count(const Tensor& count, int64_t G) {
  STD_TORCH_CHECK(count.scalar_type() == ScalarType::Long && count.dim() == 2 && count.size(0) == G && G >= 1 &&
                      count.size(1) >= 1 && count.is_contiguous(),
                  "count: expected contiguous int64 [G, K]");
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

std::vector<int64_t> without_last(const Tensor& x) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.pop_back();
  return sizes;
}

Tensor nearest_code(const Tensor& x, const Tensor& codebook) {
  const Problem problem = check_search(x, codebook);
  Tensor indices = empty(x, without_last(x), ScalarType::Long);
  search(GroupedRows(x), Codebook(codebook), problem, static_cast<int64_t*>(indices.mutable_data_ptr()), nullptr,
         x.scalar_type(), nullptr);
  return indices;
}

std::tuple<Tensor, Tensor> quantize(const Tensor& x, const Tensor& codebook, std::optional<Tensor> count) {
  const Problem problem = check_search(x, codebook);
  if (count.has_value()) {
    check_count(*count, problem.G);
    STD_TORCH_CHECK(count->size(1) == problem.K, "count: expected K of the codebook");
  }
  Tensor indices = empty(x, without_last(x), ScalarType::Long);
  Tensor quantized = empty(x, sizes_of(x), x.scalar_type());
  auto* chosen = static_cast<int64_t*>(indices.mutable_data_ptr());
  search(GroupedRows(x), Codebook(codebook), problem, chosen, quantized.mutable_data_ptr(), x.scalar_type(),
         count.has_value() ? static_cast<int64_t*>(count->mutable_data_ptr()) : nullptr);
  return {quantized, indices};
}

void check_range(const int64_t* indices, int64_t size, int64_t K) {
  for (int64_t i = 0; i < size; ++i) {
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < K, "indices: expected values in [0, K=", K, "), got ", indices[i]);
  }
}

void count_codes_(Tensor count, const Tensor& indices) {
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() >= 1, "indices: expected int64 [..., G]");
  const int64_t G = indices.size(indices.dim() - 1);
  check_count(count, G);
  // Always a copy: a caller may pass indices that share memory with count, and counting would change them.
  const Tensor packed = torch::stable::contiguous(torch::stable::clone(indices));
  const auto* chosen = static_cast<const int64_t*>(packed.const_data_ptr());
  check_range(chosen, indices.numel(), count.size(1));
  add_counts(chosen, Problem{indices.numel() / G, G, count.size(1), 1},
             static_cast<int64_t*>(count.mutable_data_ptr()));
}

Tensor segment_sum(const Tensor& grad, const Tensor& indices, int64_t num_codes) {
  STD_TORCH_CHECK(grad.dim() >= 2 && is_input_type(grad.scalar_type()), "grad: expected [..., G, d], ",
                  name_of_input_types());
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && sizes_of(indices) == without_last(grad),
                  "indices: expected int64 [..., G] of grad");
  const Problem problem{GroupedRows(grad).rows(), grad.size(grad.dim() - 2), num_codes, grad.size(grad.dim() - 1)};
  STD_TORCH_CHECK(
      problem.G >= 1 && problem.d >= 1 && problem.d <= INT32_MAX && problem.K >= 1 && problem.K <= INT32_MAX,
      "grad: expected G >= 1, 1 <= d < 2^31 and 1 <= num_codes < 2^31");
  const Tensor packed = torch::stable::contiguous(indices);
  const auto* chosen = static_cast<const int64_t*>(packed.const_data_ptr());
  check_range(chosen, indices.numel(), num_codes);
  Tensor total = empty(grad, {problem.G, problem.K, problem.d}, ScalarType::Float);
  sum_segments(GroupedRows(grad), chosen, problem, static_cast<float*>(total.mutable_data_ptr()));
  return total;
}

// ---- The tree (CodebookIndex).

void check_tree_codebook(const Tensor& codebook) {
  STD_TORCH_CHECK(codebook.dim() == 3 && codebook.scalar_type() == ScalarType::Float && codebook.is_contiguous(),
                  "codebook: expected contiguous float32 [G, K, d]");
  STD_TORCH_CHECK(
      codebook.size(0) >= 1 && codebook.size(1) >= 1 && codebook.size(1) <= INT32_MAX - 16 && codebook.size(2) >= 1,
      "codebook: expected G >= 1, 1 <= K < 2^31 - 16 and d >= 1");
}

// The trees of a codebook [G, K, d], as index_build returned them in four tensors.  Checks their types and shapes.
Tree tree_of(const Tensor& panels, const Tensor& ids, const Tensor& boxes, const Tensor& finite, int64_t num_codes) {
  STD_TORCH_CHECK(
      panels.dim() == 4 && panels.size(2) >= 1 && panels.size(0) >= 1 && num_codes >= 1 && num_codes <= INT32_MAX - 16,
      "panels: expected [G, leaves, d, 16]");
  const TreeLayout layout(num_codes, panels.size(2));
  const int64_t G = panels.size(0);
  const auto fits = [](const Tensor& tensor, ScalarType type, const std::vector<int64_t>& sizes) {
    return tensor.scalar_type() == type && sizes_of(tensor) == sizes && tensor.is_contiguous();
  };
  STD_TORCH_CHECK(fits(panels, ScalarType::Float, {G, layout.leaves, layout.d, kLeafCodes}) &&
                      fits(ids, ScalarType::Int, {G, layout.leaves, kLeafCodes}) &&
                      fits(boxes, ScalarType::Float, {G, layout.blocks, 2, layout.d, kFanout}) &&
                      fits(finite, ScalarType::Int, {G}),
                  "expected the tensors that index_build returned");
  return {layout,
          G,
          static_cast<float*>(panels.mutable_data_ptr()),
          static_cast<int32_t*>(ids.mutable_data_ptr()),
          static_cast<float*>(boxes.mutable_data_ptr()),
          static_cast<int32_t*>(finite.mutable_data_ptr())};
}

// Whether two contiguous tensors of 4-byte elements overlap.
bool share_memory(const Tensor& a, const Tensor& b) {
  const auto first = reinterpret_cast<uintptr_t>(a.const_data_ptr());
  const auto second = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  return first < second + 4 * b.numel() && second < first + 4 * a.numel();
}

const float* codes_for(const Tensor& codebook, const Tree& tree) {
  check_tree_codebook(codebook);
  STD_TORCH_CHECK(
      codebook.size(0) == tree.groups && codebook.size(1) == tree.layout.codes && codebook.size(2) == tree.layout.d,
      "codebook: expected the shape that the index was built for");
  return static_cast<const float*>(codebook.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> index_build(const Tensor& codebook) {
  check_tree_codebook(codebook);
  const int64_t G = codebook.size(0);
  const TreeLayout layout(codebook.size(1), codebook.size(2));
  Tensor panels = empty(codebook, {G, layout.leaves, layout.d, kLeafCodes}, ScalarType::Float);
  Tensor ids = empty(codebook, {G, layout.leaves, kLeafCodes}, ScalarType::Int);
  Tensor boxes = torch::stable::new_zeros(codebook, {G, layout.blocks, 2, layout.d, kFanout}, ScalarType::Float);
  Tensor finite = empty(codebook, {G}, ScalarType::Int);
  const Tree tree = tree_of(panels, ids, boxes, finite, layout.codes);
  const float* codes = codes_for(codebook, tree);
  order_codes(codes, tree);
  fill_tree(codes, tree);
  return {panels, ids, boxes, finite};
}

void index_refit_(Tensor panels, const Tensor& ids, Tensor boxes, Tensor finite, const Tensor& codebook) {
  const Tree tree = tree_of(panels, ids, boxes, finite, codebook.dim() == 3 ? codebook.size(1) : 0);
  for (const Tensor& written : {panels, boxes, finite}) {  // ids must not change between their check and their use
    STD_TORCH_CHECK(!share_memory(ids, written), "ids: expected memory apart from panels, boxes and finite");
  }
  const bool filled = fill_tree(codes_for(codebook, tree), tree);
  STD_TORCH_CHECK(filled, "ids: expected values in [0, K), as index_build returned");
}

std::tuple<Tensor, Tensor> index_search(const Tensor& x, const Tensor& panels, const Tensor& ids, const Tensor& boxes,
                                        const Tensor& finite, int64_t num_codes) {
  const Tree tree = tree_of(panels, ids, boxes, finite, num_codes);
  STD_TORCH_CHECK(x.dim() >= 2 && is_input_type(x.scalar_type()) && x.size(x.dim() - 2) == tree.groups &&
                      x.size(x.dim() - 1) == tree.layout.d,
                  "x: expected [..., G, d] of the index, ", name_of_input_types());
  Tensor indices = empty(x, without_last(x), ScalarType::Long);
  Tensor visits = empty(x, {3}, ScalarType::Long);
  const SearchVisits done =
      search_tree(GroupedRows(x), GroupedRows(x).rows(), tree, static_cast<int64_t*>(indices.mutable_data_ptr()));
  STD_TORCH_CHECK(done.strays == 0, "panels, ids, boxes, finite: expected the tensors that index_build returned, but ",
                  done.strays, " queries found no code in [0, K)");
  auto* out = static_cast<int64_t*>(visits.mutable_data_ptr());
  out[0] = done.leaves, out[1] = done.blocks, out[2] = done.scanned;
  return {indices, visits};
}

int64_t cpu_isa_of_this_machine() { return cpu_isa(); }

}  // namespace
}  // namespace revq

STABLE_TORCH_LIBRARY_IMPL(revq, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&revq::nearest_code));
  m.impl("quantize", TORCH_BOX(&revq::quantize));
  m.impl("count_codes_", TORCH_BOX(&revq::count_codes_));
  m.impl("segment_sum", TORCH_BOX(&revq::segment_sum));
  m.impl("index_build", TORCH_BOX(&revq::index_build));
  m.impl("index_refit_", TORCH_BOX(&revq::index_refit_));
  m.impl("index_search", TORCH_BOX(&revq::index_search));
}

STABLE_TORCH_LIBRARY_IMPL(revq, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&revq::cpu_isa_of_this_machine));
}
