#include "model/tiny_delta.h"

#include <cstring>
#include <random>

namespace deltazip::test {
namespace {

std::size_t padded(std::int64_t columns) {
  return static_cast<std::size_t>((columns + 31) / 32 * 32);
}

void set_nibble(std::vector<std::byte>& bytes, std::size_t index, unsigned value) {
  bytes[index / 2] |= static_cast<std::byte>(value << (index % 2 * 4));
}

constexpr unsigned kPairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};

// One row's codes, following docs/delta_format.md word for word; returns its unscaled values.
std::vector<float> random_row(TinyDeltaMatrix& out, std::size_t row, std::size_t width,
                              std::mt19937& random) {
  std::vector<float> values(width, 0.0F);
  const std::size_t groups = width / 4;
  for (std::size_t j = 0; j < groups && is_sparse(out.type); ++j) {
    const std::size_t group = row * groups + j;
    if (has_states(out.type)) {
      const unsigned bits = out.type == DeltaType::kSparse24Ternary ? 5 : 3;
      const unsigned code = draw(random, 1U << bits), d = code - 8;
      std::byte* word = out.values.data() + group / 8 * bits;
      for (unsigned bit = 0; bit < bits; ++bit) {
        const std::size_t at = group % 8 * bits + bit;
        word[at / 8] |= static_cast<std::byte>((code >> bit & 1U) << (at % 8));
      }
      if (code < 8) {
        values[4 * j + code / 2] = code % 2 == 0 ? 1.0F : -1.0F;
      } else {
        values[4 * j + kPairs[d / 4][0]] = (d & 1U) != 0 ? -1.0F : 1.0F;
        values[4 * j + kPairs[d / 4][1]] = (d & 2U) != 0 ? -1.0F : 1.0F;
      }
      continue;
    }
    const unsigned* pair = kPairs[draw(random, 6)];
    set_nibble(out.indices, group, pair[0] | pair[1] << 2);
    const bool is_int4 = out.type == DeltaType::kSparse24Int4;
    for (unsigned kept = 0; kept < 2; ++kept) {
      const unsigned code = draw(random, is_int4 ? 16 : 4);
      if (is_int4) {
        set_nibble(out.values, 2 * group + kept, code);
      } else {
        set_nibble(out.values, group, code << (2 * kept));
      }
      values[4 * j + pair[kept]] =
          is_int4 ? static_cast<float>(code) - 8.0F : 2.0F * static_cast<float>(code) - 3.0F;
    }
  }
  for (std::size_t k = 0; k < width && !is_sparse(out.type); ++k) {
    const bool is_int4 = out.type == DeltaType::kDenseInt4;
    const unsigned code = draw(random, is_int4 ? 16 : 256);
    if (is_int4) {
      set_nibble(out.values, row * width + k, code);
    } else {
      out.values[row * width + k] = static_cast<std::byte>(code);
    }
    values[k] = static_cast<float>(code) - (is_int4 ? 8.0F : 128.0F);
  }
  return values;
}

std::size_t value_bytes_per_row(DeltaType type, std::size_t width) {
  switch (type) {
    case DeltaType::kSparse24Int4:
      return width / 4;
    case DeltaType::kSparse24Int2:
      return width / 8;
    case DeltaType::kSparse24Ternary:
      return width / 32 * 5;
    case DeltaType::kDenseInt4:
      return width / 2;
    case DeltaType::kDenseInt8:
      return width;
    case DeltaType::kSparse14Sign:
      return width / 32 * 3;
  }
  return 0;
}

}  // namespace

DeltaSource TinyDeltaMatrix::source(std::int64_t rows, std::int64_t columns) const {
  return {type, rows, columns, group_size, values, indices, scales};
}

TinyDeltaMatrix make_tiny_delta_matrix(DeltaType type, std::int64_t rows, std::int64_t columns,
                                       float size, std::uint32_t seed) {
  std::mt19937 random(seed);
  TinyDeltaMatrix out{type, 32, {}, {}, {}, {}};
  const std::size_t width = padded(columns), num_rows = static_cast<std::size_t>(rows);
  out.values.resize(num_rows * value_bytes_per_row(type, width));
  if (type == DeltaType::kSparse24Int4 || type == DeltaType::kSparse24Int2) {
    out.indices.resize(num_rows * width / 8);
  }
  for (std::size_t row = 0; row < num_rows; ++row) {
    const std::vector<float> values = random_row(out, row, width, random);
    std::vector<float> scales;
    for (std::size_t group = 0; group < width / 32; ++group) {
      const Half scale = to_half(size * static_cast<float>(1 + draw(random, 100)) / 100.0F);
      scales.push_back(to_float(scale));
      const auto* bytes = reinterpret_cast<const std::byte*>(&scale);
      out.scales.insert(out.scales.end(), bytes, bytes + sizeof(scale));
    }
    for (std::size_t k = 0; k < static_cast<std::size_t>(columns); ++k) {
      out.dense.push_back(values[k] * scales[k / 32]);
    }
  }
  return out;
}

DeviceDelta TinyDelta::on(const Backend& backend, Backend& allocator,
                          const TinyModel& model) const {
  auto host = std::make_shared<HostDelta>();
  std::size_t end = 0;
  const auto place = [&](DeltaPart& part, std::size_t num_bytes) {
    part.offset = end;
    part.num_bytes = num_bytes;
    end += (num_bytes + 63) / 64 * 64;
  };
  for (const auto& [name, tensor] : model.tensors) {
    DeltaPart part;
    part.name = name;
    if (const auto it = matrices.find(name); it != matrices.end()) {
      part.kind = DeltaKind::kMatrix;
      part.matrix = {nullptr, backend.tiled_type(it->second.type), it->second.group_size,
                     tensor.shape[0], tensor.shape[1]};
      place(part, backend.tiled_bytes(it->second.type, part.matrix.rows, part.matrix.columns,
                                      part.matrix.group_size));
    } else if (const auto found = replaced.find(name); found != replaced.end()) {
      part.kind = DeltaKind::kReplaced;
      part.num_elements = static_cast<std::int64_t>(found->second.size());
      place(part, found->second.size() * sizeof(float));
    }
    host->parts.push_back(part);
  }
  host->bytes = allocator.allocate_host(end);
  auto* bytes = static_cast<std::byte*>(host->bytes.data());
  for (const DeltaPart& part : host->parts) {
    if (part.kind == DeltaKind::kMatrix) {
      backend.tile_delta(bytes + part.offset,
                         matrices.at(part.name).source(part.matrix.rows, part.matrix.columns));
    } else if (part.kind == DeltaKind::kReplaced) {
      std::memcpy(bytes + part.offset, replaced.at(part.name).data(), part.num_bytes);
    }
  }
  DeviceDelta out;
  out.host = host;
  out.base = bytes;
  if (!allocator.shares_host_memory()) {
    out.bytes = allocator.allocate(end);
    const auto stream = allocator.create_stream();
    allocator.copy_to_device(out.bytes.data(), bytes, end, *stream);
    stream->synchronize();
    out.base = static_cast<const std::byte*>(out.bytes.data());
  }
  return out;
}

TinyModel TinyDelta::merged(const TinyModel& base) const {
  TinyModel out = base;
  out.dtype = DType::kFloat32;
  for (const auto& [name, matrix] : matrices) {
    std::vector<float>& values = out.tensors.at(name).values;
    for (std::size_t i = 0; i < values.size(); ++i) values[i] += matrix.dense[i];
  }
  for (const auto& [name, values] : replaced) out.tensors.at(name).values = values;
  return out;
}

TinyDelta change_everything(const TinyModel& model, std::uint32_t seed) {
  std::mt19937 random(seed);
  TinyDelta out;
  int next = 0;
  for (const auto& [name, tensor] : model.tensors) {
    if (tensor.shape.rank() == 2) {
      const auto type = static_cast<DeltaType>(next++ % 6);
      const float size = type == DeltaType::kDenseInt8      ? 0.002F
                         : type == DeltaType::kSparse24Int4 ? 0.03F
                         : type == DeltaType::kSparse24Int2 ? 0.08F
                         : has_states(type)                 ? 0.2F
                                                            : 0.02F;
      out.matrices.emplace(name, make_tiny_delta_matrix(type, tensor.shape[0], tensor.shape[1],
                                                        size, draw(random, 1000)));
    } else {
      std::vector<float> values = tensor.values;
      for (float& value : values) value += 0.01F * static_cast<float>(draw(random, 41)) - 0.2F;
      out.replaced.emplace(name, std::move(values));
    }
  }
  return out;
}

}  // namespace deltazip::test
