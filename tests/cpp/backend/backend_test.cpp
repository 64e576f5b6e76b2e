// Memory, streams, names, and how a backend is found.

#include <algorithm>
#include <cstring>

#include "backend/harness.h"
#include "backend/ternary_from_sign.h"

namespace deltazip::testing {
namespace {

class MemoryTest : public BackendTest {};
DZ_ON_EVERY_BACKEND(MemoryTest);

TEST_P(MemoryTest, AllocatesAlignedAndCopies) {
  Buffer device = backend().allocate(1000), other = backend().allocate(1000);
  Buffer host = backend().allocate_host(1000);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(device.data()) % 64, 0u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(host.data()) % 64, 0u);
  EXPECT_EQ(device.num_bytes(), 1000u);
  std::vector<unsigned char> sent(1000), received(1000);
  for (unsigned char& byte : sent) byte = static_cast<unsigned char>(rng_());
  backend().copy_to_device(device.data(), sent.data(), 1000, stream());
  backend().copy_on_device(other.data(), device.data(), 1000, stream());
  backend().copy_to_host(received.data(), other.data(), 1000, stream());
  stream().synchronize();
  EXPECT_EQ(sent, received);
  const auto event = backend().create_event();
  event->record(stream());
  event->wait(stream());
  stream().synchronize();
  EXPECT_TRUE(event->is_done());
  EXPECT_NO_THROW(backend().allocate(0));
}

TEST_P(MemoryTest, TooMuchIsAnErrorThatSaysSo) {
  try {
    backend().allocate(std::size_t{1} << 60);
    FAIL() << "2^60 bytes were allocated";
  } catch (const ResourceExhausted& error) {
    EXPECT_NE(std::string(error.what()).find("1152921504606846976"), std::string::npos);
  }
  const MemoryInfo info = backend().memory_info();
  EXPECT_GT(info.free_bytes, 0u);
  EXPECT_LE(info.free_bytes, info.total_bytes);
}

TEST_P(MemoryTest, DescribesItself) {
  const char* detail = is_device() ? name(dtype()).data() : "2 threads";
  EXPECT_NE(backend().description().find(detail), std::string::npos) << backend().description();
  EXPECT_EQ(backend().description().substr(0, 3), GetParam().substr(0, 3));
}

TEST_P(MemoryTest, PackingRefusesWhatIsNoWeight) {
  EXPECT_THROW(backend().packed_bytes(DType::kInt32, 4, 4), InvalidArgument);
  EXPECT_THROW(backend().packed_bytes(DType::kFloat32, 0, 4), InvalidArgument);
  const std::vector<float> values(16);
  Buffer buffer = backend().allocate(4096);
  EXPECT_THROW(
      backend().pack_weight(buffer.data(), {values.data(), DType::kFloat32, {16}}, stream()),
      InvalidArgument);
}

std::string error_of(std::string_view device, const BackendOptions& options = {}) {
  try {
    make_backend(device, options);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no error";
}

TEST(RegistryTest, NamesWhatIsWrong) {
  EXPECT_NE(error_of("tpu").find("unknown device 'tpu'"), std::string::npos);
  EXPECT_NE(error_of("cuda:x").find("cuda:N"), std::string::npos);
  EXPECT_NE(error_of("cuda:-1").find("cuda:N"), std::string::npos);
  EXPECT_NE(error_of("").find("expected cpu"), std::string::npos);
  EXPECT_NE(error_of("cpu", {.num_threads = 1, .isa = "mmx"}).find("'mmx'"), std::string::npos);
  EXPECT_NE(error_of("cpu", {.num_threads = -1, .isa = ""}).find("num_threads"), std::string::npos);
}

// Where there is no GPU this is the one test that says so.
TEST(CudaTest, RunsWhereAGpuIs) {
  DZ_NEEDS_GPU();
  const auto backend = make_backend("cuda");
  EXPECT_FALSE(backend->shares_host_memory());
  EXPECT_EQ(backend->activation_dtype(DType::kFloat32), DType::kBFloat16);
  EXPECT_EQ(backend->description().substr(0, 7), "cuda:0:");
  EXPECT_EQ(make_backend("cuda:0")->description(), backend->description());
}

TEST(CudaTest, SaysWhyItCannotBeOpened) {
  const std::string error = error_of("cuda:99");
  EXPECT_NE(error, "no error");
  if (cuda_problem().empty()) {
    EXPECT_NE(error.find("cuda:99"), std::string::npos) << error;
    EXPECT_NE(error.find("GPUs"), std::string::npos) << error;
    EXPECT_NE(error_of("cuda", {.num_threads = 0, .isa = "", .compute_dtype = DType::kFloat32})
                  .find("float32"),
              std::string::npos);
    return;
  }
  // No library, no driver or no GPU: each message names the device, and what was looked for.
  EXPECT_NE(error.find("device 'cuda"), std::string::npos) << error;
  EXPECT_TRUE(error.find("libdeltazip_cuda.so") != std::string::npos ||
              error.find("driver") != std::string::npos || error.find("GPU") != std::string::npos)
      << error;
}

TEST(RegistryTest, DeltaTypesHaveTheFilesNames) {
  for (const DeltaType type : kDeltaTypes) EXPECT_EQ(delta_type_from_name(name(type)), type);
  EXPECT_EQ(name(DeltaType::kSparse24Ternary), "sparse24_ternary");
  EXPECT_EQ(delta_type_from_name("sparse24_int3"), std::nullopt);
}

TEST(RegistryTest, TernaryHoldsWhatASignDoes) {
  const auto backend = make_backend("cpu", {.num_threads = 1, .isa = "", .compute_dtype = {}});
  Rng rng(3);
  for (const auto& [rows, columns] : {std::pair{5, 100}, {1, 1}, {7, 256}}) {
    const Delta delta(*backend, DeltaType::kSparse14Sign, rows, columns, 64, rng);
    const std::vector<std::byte> codes = ternary_from_sign(delta.source());
    DeltaSource wide = delta.source();
    wide.type = DeltaType::kSparse24Ternary;
    wide.values = codes;
    EXPECT_NO_THROW(check_delta_source(wide));
    const std::int64_t groups = (columns + 31) / 32 * 8, scales = (columns + 63) / 64;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < columns; ++column) {
        unsigned code = 0;
        for (std::int64_t bit = 0; bit < 5; ++bit) {
          const std::int64_t at = 5 * (row * groups + column / 4) + bit;
          code |=
              (std::to_integer<unsigned>(codes[static_cast<std::size_t>(at / 8)]) >> (at % 8) & 1u)
              << bit;
        }
        std::uint16_t bits;
        std::memcpy(&bits, delta.scales.data() + 2 * (row * scales + column / 64), sizeof(bits));
        const TernaryState& state = ternary_states()[code];
        const int value = column % 4 == state.index0   ? state.value0
                          : column % 4 == state.index1 ? state.value1
                                                       : 0;
        EXPECT_EQ(static_cast<double>(to_float(Half{bits})) * value, delta.at(row, column));
      }
    }
    DeltaSource cut = delta.source();
    cut.values = cut.values.first(cut.values.size() - 1);
    EXPECT_THROW(ternary_from_sign(cut), InvalidArgument);
    EXPECT_THROW(ternary_from_sign(wide), InvalidArgument);
  }
}

TEST(RegistryTest, TernaryStatesAreTheFormats) {
  std::vector<std::string> seen;
  for (std::size_t code = 0; code < 32; ++code) {
    const TernaryState& state = ternary_states()[code];
    ASSERT_LT(state.index0, state.index1);
    ASSERT_LT(state.index1, 4);
    int values[4] = {};
    values[state.index0] = state.value0;
    values[state.index1] = state.value1;
    std::string text;
    int kept = 0;
    for (const int value : values) {
      text += value == 0 ? '0' : value > 0 ? '+' : '-';
      kept += value != 0 ? 1 : 0;
    }
    EXPECT_EQ(kept, code < 8 ? 1 : 2) << code;
    EXPECT_EQ(std::count(seen.begin(), seen.end(), text), 0) << text << " twice";
    seen.push_back(text);
  }
  EXPECT_EQ(seen[0], "+000");
  EXPECT_EQ(seen[7], "000-");
  EXPECT_EQ(seen[8], "++00");
  EXPECT_EQ(seen[9], "-+00");
  EXPECT_EQ(seen[31], "00--");
}

}  // namespace
}  // namespace deltazip::testing
