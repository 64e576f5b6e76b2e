#include "backend/device_memory.h"

#include <algorithm>
#include <cstring>

namespace deltazip::testing {
namespace {

constexpr std::byte kPoison{0xFF};

template <typename T>
T read(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

}  // namespace

float round_to(float value, DType dtype) {
  if (dtype == DType::kFloat16) return to_float(to_half(value));
  if (dtype == DType::kBFloat16) return to_float(to_bfloat16(value));
  return value;
}

std::vector<std::byte> to_bytes(std::span<const float> values, DType dtype) {
  const std::size_t size = size_of(dtype);
  std::vector<std::byte> bytes(values.size() * size);
  const auto write_each = [&](const auto& convert) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto value = convert(values[i]);
      std::memcpy(bytes.data() + i * size, &value, sizeof(value));
    }
  };
  if (dtype == DType::kFloat16) {
    write_each([](float v) { return to_half(v); });
  } else if (dtype == DType::kBFloat16) {
    write_each([](float v) { return to_bfloat16(v); });
  } else {
    write_each([](float v) { return v; });
  }
  return bytes;
}

std::vector<float> to_floats(std::span<const std::byte> bytes, DType dtype) {
  const std::size_t size = size_of(dtype);
  std::vector<float> values(bytes.size() / size);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::byte* at = bytes.data() + i * size;
    values[i] = dtype == DType::kFloat16    ? to_float(read<Half>(at))
                : dtype == DType::kBFloat16 ? to_float(read<BFloat16>(at))
                                            : read<float>(at);
  }
  return values;
}

GuardedBuffer::GuardedBuffer(Backend& backend, Stream& stream, std::size_t num_bytes)
    : backend_(backend),
      stream_(stream),
      num_bytes_(num_bytes),
      buffer_(backend.allocate(num_bytes + 2 * kGuardBytes)) {
  const std::vector<std::byte> poison(buffer_.num_bytes(), kPoison);
  backend.copy_to_device(buffer_.data(), poison.data(), poison.size(), stream);
  stream.synchronize();
}

void GuardedBuffer::upload(std::span<const std::byte> bytes) {
  backend_.copy_to_device(data(), bytes.data(), std::min(bytes.size(), num_bytes_), stream_);
  stream_.synchronize();
}

std::vector<std::byte> GuardedBuffer::download_all() const {
  std::vector<std::byte> all(buffer_.num_bytes());
  stream_.synchronize();
  backend_.copy_to_host(all.data(), buffer_.data(), all.size(), stream_);
  stream_.synchronize();
  return all;
}

std::vector<std::byte> GuardedBuffer::download() const {
  const std::vector<std::byte> all = download_all();
  const auto begin = all.begin() + kGuardBytes;
  return {begin, begin + static_cast<std::ptrdiff_t>(num_bytes_)};
}

bool GuardedBuffer::guards_intact() const {
  const std::vector<std::byte> all = download_all();
  const auto is_poison = [](std::byte b) { return b == kPoison; };
  return std::all_of(all.begin(), all.begin() + kGuardBytes, is_poison) &&
         std::all_of(all.end() - kGuardBytes, all.end(), is_poison);
}

std::size_t num_elements(const KvLayer& layer) {
  return static_cast<std::size_t>(layer.num_blocks) * static_cast<std::size_t>(layer.num_kv_heads) *
         static_cast<std::size_t>(layer.block_size) * static_cast<std::size_t>(layer.head_dim);
}

KvMemory::KvMemory(Backend& backend, Stream& stream, const KvLayer& shape,
                   std::span<const float> keys, std::span<const float> values)
    : keys_(backend, stream, num_elements(shape) * size_of(shape.dtype)),
      values_(backend, stream, num_elements(shape) * size_of(shape.dtype)),
      layer_(shape) {
  layer_.keys = keys_.data();
  layer_.values = values_.data();
  upload(keys, values);
}

void KvMemory::upload(std::span<const float> keys, std::span<const float> values) {
  keys_.upload(to_bytes(keys, layer_.dtype));
  values_.upload(to_bytes(values, layer_.dtype));
}

DeviceMatrix::DeviceMatrix(Backend& backend, Stream& stream, std::int64_t rows,
                           std::int64_t columns, DType dtype)
    : rows_(rows),
      columns_(columns),
      dtype_(dtype),
      buffer_(backend, stream, static_cast<std::size_t>(rows * columns) * size_of(dtype)) {}

void DeviceMatrix::poison() {
  buffer_.upload(std::vector<std::byte>(buffer_.num_bytes(), kPoison));
}

}  // namespace deltazip::testing
