// The CPU kernels of the index operators that revq_kernels/ops.py defines, with the checks that keep a direct call from
// reading outside its tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/index/tree.h"

namespace revq {
namespace {

constexpr const char* kWrongIdsMessage = "ids: expected values in [0, K), as index_build returned";

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

void check_codebook(const Tensor& codebook) {
  STD_TORCH_CHECK(codebook.dim() == 3 && codebook.scalar_type() == ScalarType::Float && codebook.is_contiguous(),
                  "codebook: expected contiguous float32 [G, K, d]");
  STD_TORCH_CHECK(codebook.size(0) >= 1 && codebook.size(1) >= 1 && codebook.size(1) <= INT32_MAX - 16 &&
                      codebook.size(2) >= 1,
                  "codebook: expected G >= 1, 1 <= K < 2^31 - 16 and d >= 1");
}

// The four tensors of an index of [G, K, d].
Index view(const Tensor& panels, const Tensor& ids, const Tensor& boxes, const Tensor& finite, int64_t num_codes) {
  STD_TORCH_CHECK(panels.dim() == 4 && panels.size(2) >= 1 && panels.size(0) >= 1 && num_codes >= 1 &&
                      num_codes <= INT32_MAX - 16,
                  "panels: expected [G, leaves, d, 16]");
  const IndexLayout layout(num_codes, panels.size(2));
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

const float* codes_for(const Tensor& codebook, const Index& index) {
  check_codebook(codebook);
  STD_TORCH_CHECK(codebook.size(0) == index.groups && codebook.size(1) == index.layout.codes &&
                      codebook.size(2) == index.layout.d,
                  "codebook: expected the shape that the index was built for");
  return static_cast<const float*>(codebook.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> index_build(const Tensor& codebook) {
  check_codebook(codebook);
  const int64_t G = codebook.size(0);
  const IndexLayout layout(codebook.size(1), codebook.size(2));
  Tensor panels = empty(codebook, {G, layout.leaves, layout.d, kLeafCodes}, ScalarType::Float);
  Tensor ids = empty(codebook, {G, layout.leaves, kLeafCodes}, ScalarType::Int);
  Tensor boxes = torch::stable::new_zeros(codebook, {G, layout.blocks, 2, layout.d, kFanout}, ScalarType::Float);
  Tensor finite = empty(codebook, {G}, ScalarType::Int);
  const Index index = view(panels, ids, boxes, finite, layout.codes);
  const float* codes = codes_for(codebook, index);
  order_codes(codes, index);
  fill_index(codes, index);
  return {panels, ids, boxes, finite};
}

void index_refit_(Tensor panels, const Tensor& ids, Tensor boxes, Tensor finite, const Tensor& codebook) {
  const Index index = view(panels, ids, boxes, finite, codebook.dim() == 3 ? codebook.size(1) : 0);
  const bool filled = fill_index(codes_for(codebook, index), index);
  STD_TORCH_CHECK(filled, kWrongIdsMessage);
}

bool index_matches(const Tensor& panels, const Tensor& ids, const Tensor& boxes, const Tensor& finite,
                   const Tensor& codebook) {
  const Index index = view(panels, ids, boxes, finite, codebook.dim() == 3 ? codebook.size(1) : 0);
  const uint32_t found = compare_index(codes_for(codebook, index), index);
  STD_TORCH_CHECK(found != kWrongIds, kWrongIdsMessage);
  return found == 0;
}

Tensor index_digest(const Tensor& codebook) {
  check_codebook(codebook);
  const int64_t count = codebook.size(0) * codebook.size(1) * codebook.size(2);
  Tensor digests = empty(codebook, {digest_rows(count), 4}, ScalarType::Long);
  hash_codebook(static_cast<const float*>(codebook.const_data_ptr()), count,
                static_cast<int64_t*>(digests.mutable_data_ptr()));
  return digests;
}

std::tuple<Tensor, Tensor> index_search(const Tensor& x, const Tensor& panels, const Tensor& ids, const Tensor& boxes,
                                        const Tensor& finite, int64_t num_codes) {
  const Index index = view(panels, ids, boxes, finite, num_codes);
  STD_TORCH_CHECK(x.dim() >= 2 && is_input_type(x.scalar_type()) && x.size(x.dim() - 2) == index.groups &&
                      x.size(x.dim() - 1) == index.layout.d,
                  "x: expected [..., G, d] of the index, ", name_of_input_types());
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.pop_back();
  Tensor indices = empty(x, sizes, ScalarType::Long);
  Tensor visits = empty(x, {3}, ScalarType::Long);
  const SearchVisits done =
      search_index(GroupedRows(x), GroupedRows(x).rows(), index, static_cast<int64_t*>(indices.mutable_data_ptr()));
  auto* out = static_cast<int64_t*>(visits.mutable_data_ptr());
  out[0] = done.leaves, out[1] = done.blocks, out[2] = done.scanned;
  return {indices, visits};
}

}  // namespace
}  // namespace revq

STABLE_TORCH_LIBRARY_IMPL(revq, CPU, m) {
  m.impl("index_build", TORCH_BOX(&revq::index_build));
  m.impl("index_refit_", TORCH_BOX(&revq::index_refit_));
  m.impl("index_matches", TORCH_BOX(&revq::index_matches));
  m.impl("index_digest", TORCH_BOX(&revq::index_digest));
  m.impl("index_search", TORCH_BOX(&revq::index_search));
}
