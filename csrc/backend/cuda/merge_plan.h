#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "deltazip/backend/params.h"

namespace deltazip::cuda {

// How a projection of many rows is computed: segments with rows enough get a weight of their own,
// W + delta, written out once; all other rows share the base product and the sparse one.
struct MergePlan {
  struct Segment {
    std::int32_t first_row = 0, num_rows = 0;
    std::vector<SbmmTask> tasks;  // of these rows, by out_offset
  };
  struct Rows {
    std::int32_t first = 0, count = 0;
  };
  std::vector<Segment> merged;   // by rows
  std::vector<Rows> base;        // what `merged` leaves, by rows
  std::vector<SbmmTask> sparse;  // all other tasks, added to what the rows above have written
};

// `tasks` as Ops has checked them: row ranges are the same or disjoint. `merges` says which tasks
// are worth a weight of their own.
MergePlan plan_merges(std::span<const SbmmTask> tasks, std::int64_t num_rows,
                      bool (*merges)(const SbmmTask& task));

}  // namespace deltazip::cuda
