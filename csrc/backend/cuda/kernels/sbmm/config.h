#pragma once

#include <cstdint>

#include "backend/cuda/kernels/sbmm/record.h"

namespace deltazip::cuda {

// Two CTAs of eight warps share a multiprocessor and nothing else: while one adds up a row block,
// waits for x or has ended and made room for one of the next kernel, the other streams.
inline constexpr int kCtasPerSm = 2;
inline constexpr int kWarps = 8;
inline constexpr int kSbmmThreads = kWarps * 32;
// Warp w multiplies row pair w % 2 (32 rows) of the records whose number in the matrix is w / 2
// modulo 4. The order of summation follows from the matrix alone.
inline constexpr int kRowPairs = 2;
inline constexpr int kColumnParts = kWarps / kRowPairs;

// Registers of a lane for half records under way. 48 hold three of int4, 77 KB a multiprocessor.
inline constexpr int kFlightRegisters = 48;
constexpr int half_records_ahead(int registers_each, int token_tiles) {
  const int room = token_tiles <= 2 ? kFlightRegisters : kFlightRegisters / 2;
  const int count = room / registers_each;
  return count < 1 ? 1 : count > 4 ? 4 : count;
}

// Of its first row block, sent towards L2 while a CTA waits for the kernel before.
inline constexpr int kPrefetchedRecords = 32;

inline constexpr int kTokenTile = 4;    // n of mma is 8: high and low bytes of x
inline constexpr int kPassTokens = 16;  // of a task at a time, at most: four token tiles
inline constexpr int kSumPitch = 72;    // floats: 64 rows, and 8 columns of 4 lanes fall apart

// x comes as two groups of copies: products begin when that of so many records (2048 columns) is
// there, enough for all half records under way.
inline constexpr int kChunkRecords = 16;

// A token of x in shared memory: high bytes, low bytes, scales. What is between them makes eight
// rows of bytes, those of four tokens, fall on all banks.
struct XPlace {
  int low_offset, scales_offset, pitch;
};
constexpr XPlace x_place(int records) {
  const int row = records * kRecordColumns;
  return {row + 16, 2 * row + 32, 2 * row + 32 + (records * 4 + 127) / 128 * 128};
}

// Shared memory of a CTA: partial sums, two buffers; then x. The rest is for what is static.
inline constexpr int kSharedBytes = 113 * 1024 - 256;
inline constexpr int kSumBytesPerToken = 2 * kColumnParts * kSumPitch * 4;

}  // namespace deltazip::cuda
