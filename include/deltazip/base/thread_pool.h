#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace deltazip {

// A fixed set of workers for data-parallel loops. The calling thread works too.
// One parallel_for at a time; a nested call from a worker runs serially.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // counts the caller; 0: one per available core
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Calls body(begin, end, worker) on disjoint ranges that cover [0, count), `grain` or more each.
  // worker is in [0, num_threads). The first exception is rethrown when all have stopped.
  void parallel_for(
      std::int64_t count, std::int64_t grain,
      const std::function<void(std::int64_t begin, std::int64_t end, int worker)>& body);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace deltazip
