#pragma once

#include <cstdint>

namespace deltazip {

using SequenceId = std::int64_t;
using BlockId = std::int32_t;
using SlotId = std::int32_t;     // the place on the device that holds one delta
using VariantId = std::int32_t;  // never reused; kBaseVariant has no delta and needs no slot

inline constexpr VariantId kBaseVariant = 0;
inline constexpr SlotId kNoSlot = -1;

}  // namespace deltazip
