#pragma once

// Test operands in a backend's own memory, with NaN before and after them.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "deltazip/backend/backend.h"

namespace deltazip::testing {

float round_to(float value, DType dtype);
std::vector<std::byte> to_bytes(std::span<const float> values, DType dtype);
std::vector<float> to_floats(std::span<const std::byte> bytes, DType dtype);

// Bytes of 0xFF, which are NaN in every floating dtype, with as many more before and after.
class GuardedBuffer {
 public:
  GuardedBuffer(Backend& backend, Stream& stream, std::size_t num_bytes);

  void* data() const { return static_cast<std::byte*>(buffer_.data()) + kGuardBytes; }
  std::size_t num_bytes() const { return num_bytes_; }
  void upload(std::span<const std::byte> bytes);
  std::vector<std::byte> download() const;  // after all that the stream was given
  bool guards_intact() const;

 private:
  static constexpr std::size_t kGuardBytes = 256;
  std::vector<std::byte> download_all() const;

  Backend& backend_;
  Stream& stream_;
  std::size_t num_bytes_;
  Buffer buffer_;
};

// A layer's KV cache; floats travel in its dtype.
class KvMemory {
 public:
  // `shape` is a layer without pointers. Slots that hold NaN are as good as never written.
  KvMemory(Backend& backend, Stream& stream, const KvLayer& shape, std::span<const float> keys,
           std::span<const float> values);

  const KvLayer& layer() const { return layer_; }
  void upload(std::span<const float> keys, std::span<const float> values);
  std::vector<float> keys() const { return to_floats(keys_.download(), layer_.dtype); }
  std::vector<float> values() const { return to_floats(values_.download(), layer_.dtype); }
  bool guards_intact() const { return keys_.guards_intact() && values_.guards_intact(); }

 private:
  GuardedBuffer keys_, values_;
  KvLayer layer_;
};

// An activation: [rows, columns] of the backend's memory.
class DeviceMatrix {
 public:
  DeviceMatrix(Backend& backend, Stream& stream, std::int64_t rows, std::int64_t columns,
               DType dtype);

  TensorView view() const { return {buffer_.data(), dtype_, {rows_, columns_}}; }
  void poison();
  std::vector<float> download() const { return to_floats(buffer_.download(), dtype_); }
  bool guards_intact() const { return buffer_.guards_intact(); }

 private:
  std::int64_t rows_, columns_;
  DType dtype_;
  GuardedBuffer buffer_;
};

// Elements of the keys, or of the values, of a layer.
std::size_t num_elements(const KvLayer& layer);

}  // namespace deltazip::testing
