#pragma once

#include <cstdint>

#include "deltazip/backend/delta_matrix.h"

namespace deltazip::cuda {

// A CTA fills a multiprocessor with two groups of eight warps that share x and nothing else: while
// one adds up a row block, the other streams.
inline constexpr int kGroups = 2;
inline constexpr int kGroupWarps = 8;
inline constexpr int kGroupThreads = kGroupWarps * 32;
inline constexpr int kSbmmThreads = kGroups * kGroupThreads;
// Warp w of a group multiplies row pair w % 2 (32 rows) of the records whose number in their row
// block is w / 2 modulo 4. The order of summation follows from the matrix alone.
inline constexpr int kRowPairs = 2;
inline constexpr int kColumnParts = kGroupWarps / kRowPairs;

// Registers of a lane for half records under way. 48 hold three of int4, 77 KB a multiprocessor.
inline constexpr int kFlightRegisters = 48;
constexpr int half_records_ahead(int registers_each, int token_tiles) {
  const int room = token_tiles == 1 ? kFlightRegisters : kFlightRegisters - 12;
  const int count = room / registers_each;
  return count < 1 ? 1 : count > 4 ? 4 : count;
}

// Of a row block, sent towards L2 while a CTA waits for x.
inline constexpr int kPrefetchedRecords = 16;

inline constexpr int kTokenTile = 8;    // n of mma
inline constexpr int kPassTokens = 16;  // of a task at a time, at most: two token tiles
// Rows of x and of partial sums are this much apart beyond their length, against bank conflicts.
inline constexpr int kXPadBytes = 16;
inline constexpr int kSumPitch = 68;  // floats: 64 rows, and 8 columns of 4 lanes fall apart

// Shared memory: partial sums of both groups, two buffers each; then x, one or two buffers.
inline constexpr int kSharedBytes = 227 * 1024;
inline constexpr int kSumBytesPerToken = kGroups * 2 * kColumnParts * kSumPitch * 4;

}  // namespace deltazip::cuda
