#include "backend/cpu/cpu_backend.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <string>

#include "backend/cpu/cpu_ops.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/layout.h"
#include "backend/cpu/pack.h"
#include "deltazip/base/error.h"

namespace deltazip::cpu {
namespace {

// Smaller requests are made without asking how much memory there is.
constexpr std::size_t kAlwaysTriedBytes = std::size_t{256} << 20;

// Every op is done when its call returns, so there is never anything to wait for.
class CpuStream final : public Stream {
 public:
  void synchronize() override {}
};

class CpuEvent final : public Event {
 public:
  void record(Stream&) override { at_ = std::chrono::steady_clock::now(); }
  bool is_done() const override { return true; }
  void wait(Stream&) override {}
  void synchronize() override {}
  double ms_since(const Event& before) const override {
    const auto passed = at_ - dynamic_cast<const CpuEvent&>(before).at_;
    return std::chrono::duration<double, std::milli>(passed).count();
  }

 private:
  std::chrono::steady_clock::time_point at_;
};

// What /proc/meminfo and the cgroup (v2, then v1) say.
MemoryInfo read_memory_info() {
  MemoryInfo info;
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  for (std::size_t kibibytes = 0; file >> key >> kibibytes; std::getline(file, unit)) {
    if (key == "MemTotal:") info.total_bytes = kibibytes * 1024;
    if (key == "MemAvailable:") info.free_bytes = kibibytes * 1024;
  }
  if (info.total_bytes == 0) {
    const auto page_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    info.total_bytes = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * page_bytes;
    info.free_bytes = info.total_bytes;
  }
  const auto limit_by = [&](const std::string& limit_path, const std::string& usage_path) {
    std::size_t limit = 0, usage = 0;
    std::ifstream limit_file(limit_path), usage_file(usage_path);
    if (limit_file >> limit && usage_file >> usage && limit < info.total_bytes) {
      info.total_bytes = limit;
      info.free_bytes = std::min(info.free_bytes, limit > usage ? limit - usage : 0);
    }
  };
  std::ifstream memberships("/proc/self/cgroup");
  for (std::string line; std::getline(memberships, line);) {
    if (!line.starts_with("0::")) continue;
    const std::string folder = "/sys/fs/cgroup" + line.substr(3);
    limit_by(folder + "/memory.max", folder + "/memory.current");
  }
  limit_by("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current");
  limit_by("/sys/fs/cgroup/memory/memory.limit_in_bytes",
           "/sys/fs/cgroup/memory/memory.usage_in_bytes");
  return info;
}

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options)
      : kernels_(choose_kernels(options.isa)), pool_(options.num_threads), ops_(kernels_, pool_) {}

  std::string description() const override {
    const int threads = pool_.num_threads();
    return "cpu: " + std::string(kernels_.name) + ", " + std::to_string(threads) +
           (threads == 1 ? " thread" : " threads");
  }
  Ops& ops() override { return ops_; }
  MemoryInfo memory_info() const override { return read_memory_info(); }
  bool shares_host_memory() const override { return true; }
  DType activation_dtype(DType) const override { return DType::kFloat32; }

  Buffer allocate(std::size_t num_bytes) override {
    // Linux promises what it does not have, and kills later: what cannot fit is refused here.
    const bool can_fit =
        num_bytes < kAlwaysTriedBytes || num_bytes <= read_memory_info().total_bytes;
    std::shared_ptr<void> owner(can_fit ? allocate_aligned(num_bytes) : nullptr, FreeDeleter{});
    if (!owner) {
      detail::fail<ResourceExhausted>("cpu: cannot allocate ", num_bytes, " bytes; ",
                                      read_memory_info().free_bytes, " are free");
    }
    void* data = owner.get();
    return {data, num_bytes, std::move(owner)};
  }
  Buffer allocate_host(std::size_t num_bytes) override { return allocate(num_bytes); }
  std::unique_ptr<Stream> create_stream() override { return std::make_unique<CpuStream>(); }
  std::unique_ptr<Event> create_event() override { return std::make_unique<CpuEvent>(); }
  void copy_to_device(void* device, const void* host, std::size_t num_bytes, Stream&) override {
    if (num_bytes > 0) std::memmove(device, host, num_bytes);
  }
  void copy_to_host(void* host, const void* device, std::size_t num_bytes, Stream&) override {
    if (num_bytes > 0) std::memmove(host, device, num_bytes);
  }
  void copy_on_device(void* to, const void* from, std::size_t num_bytes, Stream&) override {
    if (num_bytes > 0) std::memmove(to, from, num_bytes);
  }

  std::size_t packed_bytes(DType dtype, std::int64_t rows, std::int64_t columns) const override {
    DZ_CHECK(is_floating(dtype), "cpu: a weight must be float32, float16 or bfloat16, got ",
             name(dtype));
    DZ_CHECK(rows > 0 && columns > 0, "cpu: a weight must not be empty, got [", rows, ", ", columns,
             "]");
    return static_cast<std::size_t>(packed_weight_bytes(dtype, rows, columns));
  }
  void pack_weight(void* device, ConstTensorView host, Stream&) override {
    DZ_CHECK(host.rank() == 2, "cpu: a weight must be a matrix, got ", host.shape.str());
    packed_bytes(host.dtype, host.size(0), host.size(1));
    pool_.parallel_for(divide_up(host.size(0), kWeightPanelRows), 1,
                       [&](std::int64_t first, std::int64_t last, int) {
                         pack_weight_panels(device, host, first, last);
                       });
  }
  std::size_t tiled_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                          std::int32_t group_size) const override {
    return static_cast<std::size_t>(tiled_delta_bytes(type, rows, columns, group_size));
  }
  void tile_delta(void* host, const DeltaSource& source) const override {
    cpu::tile_delta(host, source);
  }

 private:
  const Kernels& kernels_;
  ThreadPool pool_;
  CpuOps ops_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

}  // namespace deltazip::cpu
