#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

#include "deltazip/backend/backend.h"
#include "deltazip/base/error.h"

namespace deltazip::test {

// Memory and tiling only: a "device" whose bytes are counted, and where a test can make any call
// wait or fail. The tiling is the file's own bytes, one kind after the other.
class FakeBackend : public Backend {
 public:
  explicit FakeBackend(bool shares) : shares_(shares) {}

  std::function<void()> on_tile;            // before each matrix
  std::function<void()> on_copy;            // before each copy to the device
  std::function<void()> on_synchronize;     // of a stream
  std::atomic<bool> host_is_full{false};    // allocate_host throws
  std::atomic<bool> device_is_full{false};  // allocate throws
  mutable std::atomic<int> num_tiled{0};
  std::atomic<std::int64_t> host_bytes{0}, device_bytes{0};  // alive

  std::string description() const override { return "fake"; }
  Ops& ops() override { throw InternalError("no ops here"); }
  MemoryInfo memory_info() const override { return {}; }
  bool shares_host_memory() const override { return shares_; }
  DType activation_dtype(DType) const override { return DType::kFloat32; }

  Buffer allocate(std::size_t num_bytes) override {
    return make(num_bytes, device_is_full, device_bytes);
  }
  Buffer allocate_host(std::size_t num_bytes) override {
    return make(num_bytes, host_is_full, host_bytes);
  }
  std::unique_ptr<Stream> create_stream() override { return std::make_unique<FakeStream>(*this); }
  std::unique_ptr<Event> create_event() override { return std::make_unique<FakeEvent>(); }
  void copy_to_device(void* device, const void* host, std::size_t num_bytes, Stream&) override {
    if (on_copy) on_copy();
    std::memcpy(device, host, num_bytes);
  }
  void copy_to_host(void* host, const void* device, std::size_t num_bytes, Stream&) override {
    std::memcpy(host, device, num_bytes);
  }
  void copy_on_device(void* to, const void* from, std::size_t num_bytes, Stream&) override {
    std::memcpy(to, from, num_bytes);
  }
  std::size_t packed_bytes(DType, std::int64_t, std::int64_t) const override { return 0; }
  void pack_weight(void*, ConstTensorView, Stream&) override {}

  std::size_t tiled_bytes(DeltaType type, std::int64_t rows, std::int64_t columns,
                          std::int32_t group_size) const override {
    const std::int64_t blocks = (columns + 31) / 32;
    const std::int64_t groups = (columns + group_size - 1) / group_size;
    constexpr std::int64_t kBlockBytes[] = {8 + 4, 4 + 4, 5, 16, 32, 3};
    return static_cast<std::size_t>(rows *
                                    (blocks * kBlockBytes[static_cast<int>(type)] + 2 * groups));
  }
  void tile_delta(void* host, const DeltaSource& source) const override {
    if (on_tile) on_tile();
    ++num_tiled;
    auto* out = static_cast<std::byte*>(host);
    for (const auto part : {source.values, source.indices, source.scales}) {
      out = std::copy(part.begin(), part.end(), out);
    }
  }

 private:
  class FakeStream : public Stream {
   public:
    explicit FakeStream(FakeBackend& backend) : backend_(backend) {}

   private:
    void synchronize() override {
      if (backend_.on_synchronize) backend_.on_synchronize();
    }
    FakeBackend& backend_;
  };
  class FakeEvent : public Event {
    double ms_since(const Event&) const override { return 0.0; }
    void record(Stream&) override {}
    bool is_done() const override { return true; }
    void wait(Stream&) override {}
    void synchronize() override {}
  };

  static Buffer make(std::size_t num_bytes, const std::atomic<bool>& is_full,
                     std::atomic<std::int64_t>& alive) {
    if (is_full) throw ResourceExhausted("fake memory is full");
    const auto size = static_cast<std::int64_t>(num_bytes);
    void* data = std::aligned_alloc(64, (num_bytes + 63) / 64 * 64);
    std::memset(data, 0xFF, num_bytes);  // NaN, if anything reads what was not written
    alive += size;
    return Buffer(data, num_bytes, std::shared_ptr<void>(data, [size, &alive](void* memory) {
                    std::free(memory);
                    alive -= size;
                  }));
  }

  const bool shares_;
};

}  // namespace deltazip::test
