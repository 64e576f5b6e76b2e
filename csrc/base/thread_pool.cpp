#include "deltazip/base/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <exception>
#include <fstream>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "deltazip/base/error.h"

namespace deltazip {
namespace {

constexpr int kMaxThreads = 1024;
// Longer than the gap between two regions of a decode step, shorter than anyone's patience.
constexpr auto kSpinTime = std::chrono::microseconds(80);

void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// The CPU quota of the cgroup (v2, then v1) in cores, if there is one.
std::optional<double> cgroup_cores() {
  std::vector<std::string> folders;
  std::ifstream memberships("/proc/self/cgroup");
  for (std::string line; std::getline(memberships, line);) {
    if (line.starts_with("0::")) folders.push_back("/sys/fs/cgroup" + line.substr(3));
  }
  folders.emplace_back("/sys/fs/cgroup");
  for (const std::string& folder : folders) {
    std::ifstream file(folder + "/cpu.max");
    std::string quota;
    double period = 0;
    if (file >> quota >> period && period > 0) {
      if (quota == "max") continue;
      return std::stod(quota) / period;
    }
  }
  std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double quota = -1, period = 0;
  if (quota_file >> quota && period_file >> period && quota > 0 && period > 0) {
    return quota / period;
  }
  return std::nullopt;
}

int available_cores() {
  int cores = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
  if (const std::optional<double> quota = cgroup_cores()) {
    cores = std::min(cores, static_cast<int>(std::ceil(*quota)));
  }
  return std::clamp(cores, 1, kMaxThreads);
}

// The worker number of this thread while it runs a body, or -1: how a nested call is known.
thread_local int current_worker = -1;

}  // namespace

struct ThreadPool::Impl {
  // (epoch << kActiveBits) | active. An odd epoch is open: workers may enter it. A worker that is
  // not scheduled in time never enters, so the caller never waits for one that has no work.
  static constexpr int kActiveBits = 16;
  static constexpr std::uint64_t kEpoch = std::uint64_t{1} << kActiveBits;
  static constexpr std::uint64_t kActiveMask = kEpoch - 1;

  using Body = std::function<void(std::int64_t, std::int64_t, int)>;

  alignas(64) std::atomic<std::uint64_t> state{0};
  alignas(64) std::atomic<std::int64_t> next{0};
  alignas(64) std::atomic<int> num_sleeping{0};
  std::atomic<bool> stopping{false};
  const Body* body = nullptr;
  std::int64_t count = 0, chunk = 1;

  std::mutex error_mutex;
  std::exception_ptr error;
  std::mutex sleep_mutex;
  std::condition_variable wake_up;
  std::mutex caller_mutex;  // one parallel_for at a time
  std::vector<std::thread> threads;

  static bool is_open(std::uint64_t value) { return ((value >> kActiveBits) & 1) != 0; }

  void work(int worker) {
    current_worker = worker;
    try {
      for (;;) {
        const std::int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= count) break;
        (*body)(begin, std::min(begin + chunk, count), worker);
      }
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    current_worker = -1;
  }

  void sleep_until_changed(std::uint64_t seen_epoch) {
    std::unique_lock lock(sleep_mutex);
    num_sleeping.fetch_add(1);
    wake_up.wait(lock,
                 [&] { return stopping.load() || (state.load() >> kActiveBits) != seen_epoch; });
    num_sleeping.fetch_sub(1);
  }

  void run_worker(int worker) {
    std::uint64_t seen_epoch = 0;
    auto idle_since = std::chrono::steady_clock::now();
    for (int spins = 0;; ++spins) {
      if (stopping.load(std::memory_order_relaxed)) return;
      std::uint64_t value = state.load(std::memory_order_acquire);
      const std::uint64_t epoch = value >> kActiveBits;
      if (epoch != seen_epoch && is_open(value)) {
        if (state.compare_exchange_strong(value, value + 1, std::memory_order_acq_rel)) {
          seen_epoch = epoch;
          work(worker);
          state.fetch_sub(1, std::memory_order_acq_rel);
          idle_since = std::chrono::steady_clock::now();
          spins = 0;
        }
        continue;
      }
      pause_briefly();
      if (spins % 32 == 31 && std::chrono::steady_clock::now() - idle_since > kSpinTime) {
        sleep_until_changed(epoch);
        idle_since = std::chrono::steady_clock::now();
      }
    }
  }

  void parallel_for(std::int64_t new_count, std::int64_t new_chunk, const Body& new_body) {
    const std::lock_guard caller_lock(caller_mutex);
    body = &new_body;
    count = new_count;
    chunk = new_chunk;
    next.store(0, std::memory_order_relaxed);
    error = nullptr;
    state.fetch_add(kEpoch);  // opens; releases the fields above
    if (num_sleeping.load() > 0) {
      const std::lock_guard lock(sleep_mutex);
      wake_up.notify_all();
    }
    work(0);
    state.fetch_add(kEpoch);  // closes
    for (int spins = 0; (state.load(std::memory_order_acquire) & kActiveMask) != 0; ++spins) {
      if (spins < 4096) {
        pause_briefly();
      } else {
        std::this_thread::yield();
      }
    }
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }
};

ThreadPool::ThreadPool(int num_threads) : impl_(std::make_unique<Impl>()) {
  DZ_CHECK(num_threads >= 0 && num_threads <= kMaxThreads, "num_threads must be 0 to ", kMaxThreads,
           ", got ", num_threads);
  const int total = num_threads == 0 ? available_cores() : num_threads;
  impl_->threads.reserve(static_cast<std::size_t>(total - 1));
  for (int worker = 1; worker < total; ++worker) {
    impl_->threads.emplace_back([impl = impl_.get(), worker] { impl->run_worker(worker); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(impl_->sleep_mutex);
    impl_->stopping.store(true);
    impl_->wake_up.notify_all();
  }
  for (std::thread& thread : impl_->threads) thread.join();
}

int ThreadPool::num_threads() const { return static_cast<int>(impl_->threads.size()) + 1; }

void ThreadPool::parallel_for(
    std::int64_t count, std::int64_t grain,
    const std::function<void(std::int64_t begin, std::int64_t end, int worker)>& body) {
  DZ_CHECK(grain >= 1, "grain must be at least 1, got ", grain);
  if (count <= 0) return;
  if (current_worker >= 0) {
    body(0, count, current_worker);
    return;
  }
  // A few chunks a thread even out a busy core; all but the last are `grain` or more.
  constexpr std::int64_t kChunksPerThread = 4;
  const std::int64_t num_chunks =
      std::clamp<std::int64_t>(count / grain, 1, num_threads() * kChunksPerThread);
  impl_->parallel_for(count, (count + num_chunks - 1) / num_chunks, body);
}

}  // namespace deltazip
