// The tile for any processor.
#include "tile.h"

namespace revq::baseline {
#include "tile.inl"
}  // namespace revq::baseline
