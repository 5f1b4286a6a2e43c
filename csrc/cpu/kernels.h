// Lists the clones, which nothing else does.  A clone is the kernels compiled for one instruction set; isa.h decides
// which clones this build contains.  The namespaces do not declare the same tables: not every clone has an int16 pass,
// and the VNNI clone has nothing else.
#pragma once

#include "core/isa.h"
#include "cpu/index/kernels.h"
#include "cpu/search/kernels.h"

namespace revq {

namespace baseline {
extern const SearchKernels search_kernels;
extern const TreeKernels tree_kernels;
}  // namespace baseline

#if REVQ_X86_CLONES
namespace x86_64_v3 {
extern const SearchKernels search_kernels;
extern const Int16Kernels int16_kernels;
extern const TreeKernels tree_kernels;
}  // namespace x86_64_v3

namespace x86_64_v4 {
extern const SearchKernels search_kernels;
extern const TreeKernels tree_kernels;
}  // namespace x86_64_v4

namespace x86_64_v4_vnni {
extern const Int16Kernels int16_kernels;
}  // namespace x86_64_v4_vnni
#endif

struct Kernels {
  const SearchKernels* search = nullptr;
  const Int16Kernels* int16 = nullptr;  // the first pass in int16; nullptr if it is not faster than in float32
  const TreeKernels* tree = nullptr;
};

// The kernels for an instruction set as cpu_isa() numbers them.  All are nullptr if this build has no such clone.
inline Kernels kernels(int isa) {
  switch (isa) {
    case 0: return {&baseline::search_kernels, nullptr, &baseline::tree_kernels};
#if REVQ_X86_CLONES
    case 1: return {&x86_64_v3::search_kernels, &x86_64_v3::int16_kernels, &x86_64_v3::tree_kernels};
    // Without VNNI, AVX-512 needs two instructions for two int16 products per lane, as many as float32 needs.
    case 2: return {&x86_64_v4::search_kernels, nullptr, &x86_64_v4::tree_kernels};
    case 3: return {&x86_64_v4::search_kernels, &x86_64_v4_vnni::int16_kernels, &x86_64_v4::tree_kernels};
#endif
    default: return {};
  }
}

}  // namespace revq
