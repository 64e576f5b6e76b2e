#include "deltazip/base/thread_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

struct Range {
  std::int64_t begin, end;
  int worker;
};

std::vector<Range> ranges_of(ThreadPool& pool, std::int64_t count, std::int64_t grain) {
  std::vector<Range> ranges;
  std::mutex mutex;
  pool.parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end, int worker) {
    const std::lock_guard lock(mutex);
    ranges.push_back({begin, end, worker});
  });
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return ranges;
}

TEST(ThreadPoolTest, RangesCoverEverythingOnce) {
  for (const int num_threads : {1, 2, 3, 8}) {
    ThreadPool pool(num_threads);
    EXPECT_EQ(pool.num_threads(), num_threads);
    for (const std::int64_t count : {0, 1, 2, 7, 100, 1001}) {
      for (const std::int64_t grain : {1, 3, 64, 5000}) {
        std::int64_t next = 0;
        const std::vector<Range> ranges = ranges_of(pool, count, grain);
        for (const Range& range : ranges) {
          EXPECT_EQ(range.begin, next);
          EXPECT_GT(range.end, range.begin);
          EXPECT_TRUE(range.end - range.begin >= grain || range.end == count);
          EXPECT_TRUE(range.worker >= 0 && range.worker < num_threads);
          next = range.end;
        }
        EXPECT_EQ(next, count);
      }
    }
  }
}

TEST(ThreadPoolTest, WorkersNeverShareANumberAtOnce) {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> busy(4);
  std::atomic<int> clashes{0};
  for (int round = 0; round < 200; ++round) {
    pool.parallel_for(64, 1, [&](std::int64_t, std::int64_t, int worker) {
      if (busy[static_cast<std::size_t>(worker)].fetch_add(1) != 0) ++clashes;
      busy[static_cast<std::size_t>(worker)].fetch_sub(1);
    });
  }
  EXPECT_EQ(clashes, 0);
}

TEST(ThreadPoolTest, NestedCallsRunSeriallyAsTheSameWorker) {
  ThreadPool pool(3);
  std::atomic<std::int64_t> sum{0};
  std::atomic<int> strangers{0};
  pool.parallel_for(12, 1, [&](std::int64_t begin, std::int64_t end, int worker) {
    for (std::int64_t i = begin; i < end; ++i) {
      pool.parallel_for(10, 1, [&](std::int64_t first, std::int64_t last, int inner) {
        if (inner != worker || first != 0 || last != 10) ++strangers;
        sum += last - first;
      });
    }
  });
  EXPECT_EQ(sum, 120);
  EXPECT_EQ(strangers, 0);
}

TEST(ThreadPoolTest, TheFirstExceptionIsRethrownAndThePoolGoesOn) {
  ThreadPool pool(3);
  for (int round = 0; round < 50; ++round) {
    EXPECT_THROW(pool.parallel_for(100, 1,
                                   [&](std::int64_t begin, std::int64_t, int) {
                                     if (begin >= 50) throw std::runtime_error("at fifty");
                                   }),
                 std::runtime_error);
    std::atomic<std::int64_t> sum{0};
    pool.parallel_for(100, 1,
                      [&](std::int64_t begin, std::int64_t end, int) { sum += end - begin; });
    EXPECT_EQ(sum, 100);
  }
}

TEST(ThreadPoolTest, CallersFromSeveralThreadsTakeTurns) {
  ThreadPool pool(2);
  std::atomic<std::int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 100; ++round) {
        pool.parallel_for(16, 1,
                          [&](std::int64_t begin, std::int64_t end, int) { sum += end - begin; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum, 4 * 100 * 16);
}

// Sleeping workers wake up, and a pool that has slept can be destroyed.
TEST(ThreadPoolTest, WakesAfterAPause) {
  ThreadPool pool(3);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    std::atomic<std::int64_t> sum{0};
    pool.parallel_for(30, 1,
                      [&](std::int64_t begin, std::int64_t end, int) { sum += end - begin; });
    EXPECT_EQ(sum, 30);
  }
}

TEST(ThreadPoolTest, ManyPoolsComeAndGo) {
  for (int round = 0; round < 100; ++round) {
    ThreadPool pool(2);
    if (round % 2 == 0) {
      EXPECT_FALSE(ranges_of(pool, 10, 1).empty());
    }
  }
}

TEST(ThreadPoolTest, ZeroIsOneThreadPerCore) {
  ThreadPool pool(0);
  EXPECT_GE(pool.num_threads(), 1);
  EXPECT_LE(pool.num_threads(), static_cast<int>(std::thread::hardware_concurrency()));
  EXPECT_THROW(ThreadPool(-1), InvalidArgument);
  EXPECT_THROW(ThreadPool(100000), InvalidArgument);
  EXPECT_THROW(pool.parallel_for(10, 0, [](std::int64_t, std::int64_t, int) {}), InvalidArgument);
}

}  // namespace
}  // namespace deltazip
