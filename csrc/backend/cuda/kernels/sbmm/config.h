#pragma once

#include <cstdint>

#include "deltazip/backend/delta_matrix.h"

namespace deltazip::cuda {

// One CTA of a multiprocessor: consumers, a warp that fetches records, a warp that fetches x.
inline constexpr int kSbmmConsumerWarps = 8;
inline constexpr int kSbmmThreads = (kSbmmConsumerWarps + 2) * 32;
// Consumer warp w multiplies row pair w % 2 (32 rows) of the records whose number in their segment
// is w / 2 modulo 4: x is read from shared memory twice a record, a third of what LDS can give.
inline constexpr int kRowPairs = 2;
inline constexpr int kColumnParts = 4;

// A segment is the unit of work and of summation: a row block's records are cut into segments by
// its shape alone, so a row's bits do not depend on the launch. Long enough to pay for the sum over
// warps (ternary needs its issue slots), short enough to share 6 MB evenly among 132 CTAs.
constexpr int segment_records(DeltaType type) {
  return type == DeltaType::kSparse24Ternary ? 16 : 8;
}
// A stage is what one bulk copy fetches: about 12 KB keeps the copy engine at full rate.
constexpr int stage_records(DeltaType type) {
  switch (type) {
    case DeltaType::kSparse24Ternary:
      return 8;
    case DeltaType::kDenseInt8:
      return 2;
    default:
      return 4;
  }
}

inline constexpr int kMaxStages = 16;
inline constexpr int kTokenTile = 8;  // n of mma
inline constexpr int kMaxTiles = 2;   // token tiles of one pass: what registers hold
inline constexpr int kPassTokens = kTokenTile * kMaxTiles;
inline constexpr int kMaxPieceTokens = 64;  // of a task at a time
// Rows of x and of partial sums are this much apart beyond their length, against bank conflicts.
inline constexpr int kXPadBytes = 16;
inline constexpr int kSumPitch = 68;  // floats: 64 rows, and 8 columns of 4 lanes fall apart

// Shared memory: barriers and zeros, partial sums, stages, x.
inline constexpr int kBarrierBytes = 1024;
inline constexpr int kSharedBytes = 227 * 1024;
inline constexpr int kStageBytesWanted = 100 * 1024;
inline constexpr int kStageBytesLeast = 56 * 1024;  // below, too little is in flight (30 to 60 KB)

}  // namespace deltazip::cuda
