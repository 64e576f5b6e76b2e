#include <gtest/gtest.h>

#include <filesystem>
#include <vector>

#include "deltazip/base/error.h"
#include "deltazip/delta/delta_file.h"
#include "deltazip/delta/dequantize.h"
#include "io/safetensors_builder.h"

namespace deltazip {
namespace {

const std::filesystem::path kData = DELTAZIP_TEST_DATA;

// Against values that tests/data/make_golden.py worked out from the page of the format alone.
TEST(Golden, DequantisesToTheExpectedValues) {
  const auto file = DeltaFile::open(kData / "golden_delta.safetensors");
  const auto expected = SafetensorsFile::open(kData / "golden_expected.safetensors");
  std::size_t num_matrices = 0, num_replaced = 0;
  for (const DeltaTensor& tensor : file->tensors()) {
    if (tensor.kind == DeltaKind::kUnchanged) continue;
    const SafetensorsEntry* entry = expected->find(tensor.name);
    ASSERT_NE(entry, nullptr) << tensor.name;
    ASSERT_EQ(entry->view.shape, tensor.shape) << tensor.name;
    const auto* values = static_cast<const float*>(entry->view.data);
    if (tensor.kind == DeltaKind::kReplaced) {
      ++num_replaced;
      for (std::int64_t i = 0; i < tensor.shape.num_elements(); ++i) {
        const void* data = tensor.replaced.data;
        const float value = tensor.replaced.dtype == DType::kFloat32
                                ? static_cast<const float*>(data)[i]
                            : tensor.replaced.dtype == DType::kFloat16
                                ? to_float(static_cast<const Half*>(data)[i])
                                : to_float(static_cast<const BFloat16*>(data)[i]);
        EXPECT_EQ(value, values[i]) << tensor.name << " " << i;
      }
      continue;
    }
    ++num_matrices;
    std::vector<float> row(static_cast<std::size_t>(tensor.matrix.columns));
    for (std::int64_t r = 0; r < tensor.matrix.rows; ++r) {
      dequantize_row(tensor.matrix, r, row);
      for (std::size_t c = 0; c < row.size(); ++c) {
        EXPECT_EQ(row[c], values[r * tensor.matrix.columns + static_cast<std::int64_t>(c)])
            << tensor.name << " row " << r << " column " << c;
      }
    }
  }
  EXPECT_EQ(num_matrices, 7u);
  EXPECT_EQ(num_replaced, 3u);
}

TEST(Golden, DequantiseChecksItsArguments) {
  const auto file = DeltaFile::open(kData / "golden_delta.safetensors");
  const DeltaSource& matrix = file->find("model.embed_tokens.weight")->matrix;
  std::vector<float> row(70), short_row(69);
  for (const std::int64_t bad : {std::int64_t{-1}, std::int64_t{7}}) {
    EXPECT_THROW(dequantize_row(matrix, bad, row), InvalidArgument);
  }
  EXPECT_THROW(dequantize_row(matrix, 0, short_row), InvalidArgument);
}

// Whatever the codes are.
TEST(Golden, SparseRowsKeepAtMostTwoOfFour) {
  const auto file = DeltaFile::open(kData / "golden_delta.safetensors");
  for (const DeltaTensor& tensor : file->tensors()) {
    if (tensor.kind != DeltaKind::kMatrix || !is_sparse24(tensor.matrix.type)) continue;
    std::vector<float> row(static_cast<std::size_t>(tensor.matrix.columns));
    for (std::int64_t r = 0; r < tensor.matrix.rows; ++r) {
      dequantize_row(tensor.matrix, r, row);
      for (std::size_t c = 0; c < row.size(); c += 4) {
        std::size_t kept = 0;
        for (std::size_t i = c; i < std::min(c + 4, row.size()); ++i) kept += row[i] != 0.0F;
        EXPECT_LE(kept, 2u) << tensor.name << " row " << r << " column " << c;
      }
    }
  }
}

}  // namespace
}  // namespace deltazip
