#pragma once

#include <cstdint>

#include "deltazip/backend/delta_matrix.h"

namespace deltazip::cuda {

// One CTA of a multiprocessor: consumers, a warp that fetches records, a warp that fetches x. Four
// consumers a scheduler hide the chain from LDS over decoding to mma without pipelining by hand.
inline constexpr int kSbmmConsumerWarps = 16;
inline constexpr int kSbmmThreads = (kSbmmConsumerWarps + 2) * 32;
// Consumer warp w multiplies row pair w % 2 (32 rows) of the records whose number in their row
// block is w / 2 modulo 8: x is read from shared memory twice a record.
inline constexpr int kRowPairs = 2;
inline constexpr int kColumnParts = kSbmmConsumerWarps / kRowPairs;

// A span is the unit of work and of summation: a row block's records are cut into spans by number
// alone, so a row's bits do not depend on the launch. 16 halve 4096 columns: 192 row blocks in
// halves share evenly among 132 CTAs, whole they do not.
inline constexpr int kSpanRecords = 16;
// A stage is what one bulk copy fetches, 17 to 35 KB: each hand-over costs all sixteen consumers a
// barrier, so measured time falls up to here. A divisor of a span.
constexpr int stage_records(DeltaType type) {
  switch (type) {
    case DeltaType::kSparse24Int4:
      return 8;
    case DeltaType::kSparse24Int2:
    case DeltaType::kSparse24Ternary:
      return 16;
    case DeltaType::kDenseInt8:
      return 2;
    default:
      return 4;
  }
}
// At most, of a task with a second token tile: two stages that carry x must fit.
inline constexpr int kTwoTileStageRecords = 8;

inline constexpr int kMaxStages = 16;
inline constexpr int kTokenTile = 8;    // n of mma
inline constexpr int kPassTokens = 16;  // of a task at a time: two token tiles, one a consumer
static_assert(kPassTokens <= kSbmmConsumerWarps);
// Rows of x and of partial sums are this much apart beyond their length, against bank conflicts.
inline constexpr int kXPadBytes = 16;
inline constexpr int kSumPitch = 68;  // floats: 64 rows, and 8 columns of 4 lanes fall apart

// Shared memory: barriers, partial sums, stages, x.
inline constexpr int kBarrierBytes = 1024;
inline constexpr int kSharedBytes = 227 * 1024;
inline constexpr int kRingBytesWanted = 112 * 1024;
inline constexpr int kRingBytesLeast = 48 * 1024;  // below, too little is in flight (30 to 60 KB)

}  // namespace deltazip::cuda
