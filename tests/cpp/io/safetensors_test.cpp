#include "deltazip/io/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <cstring>
#include <vector>

#include "deltazip/base/error.h"
#include "io/safetensors_builder.h"

namespace deltazip {
namespace {

using test::AlignedBytes;
using test::message_of;
using test::safetensors_text;
using test::SafetensorsBuilder;
using test::TemporaryFolder;
using test::write_file;

std::string parse_error(std::string_view text) {
  const AlignedBytes bytes(text);
  return message_of<InvalidArgument>([&] { SafetensorsFile::parse(bytes.span(), "f"); });
}

SafetensorsBuilder valid() {
  SafetensorsBuilder builder;
  builder.metadata["format"] = "pt";
  builder.add("b.long", "I64", "[1]", std::string(8, '\1'));
  builder.add("a.weight", "F32", "[2,3]", std::string(24, '\2'));
  builder.add("scalar", "BF16", "[]", std::string(2, '\3'));
  builder.add("empty", "F16", "[0,7]", "");
  builder.add("codes", "U8", "[5]", "abcde");
  return builder;
}

TEST(Safetensors, ReadsEveryEntry) {
  const AlignedBytes bytes(valid().str());
  const auto file = SafetensorsFile::parse(bytes.span(), "f");
  ASSERT_EQ(file->entries().size(), 5u);
  EXPECT_EQ(file->entries()[0].name, "b.long");
  EXPECT_EQ(file->metadata().at("format"), "pt");
  EXPECT_EQ(file->num_bytes(), bytes.span().size());

  const SafetensorsEntry* weight = file->find("a.weight");
  ASSERT_NE(weight, nullptr);
  EXPECT_EQ(weight->view.dtype, DType::kFloat32);
  EXPECT_EQ(weight->view.shape, Shape({2, 3}));
  EXPECT_EQ(weight->bytes().size(), 24u);
  EXPECT_EQ(weight->bytes()[23], std::byte{2});
  EXPECT_EQ(file->find("scalar")->view.rank(), 0);
  EXPECT_EQ(file->find("empty")->view.num_bytes(), 0u);
  EXPECT_EQ(std::memcmp(file->find("codes")->view.data, "abcde", 5), 0);
  for (const char* absent : {"", "a", "a.weight2", "zzz"}) EXPECT_EQ(file->find(absent), nullptr);
}

TEST(Safetensors, AnEmptyHeaderIsAFileWithoutTensors) {
  EXPECT_EQ(parse_error(safetensors_text("{}", "")), "");
}

struct BadFile {
  const char* what;
  std::string text;
  std::vector<std::string> expected;  // each stands in the message
};

// One entry whose description is given, over `data_bytes` zero bytes.
std::string one(const std::string& entry, std::size_t data_bytes) {
  return safetensors_text("{\"w\":" + entry + "}", std::string(data_bytes, '\0'));
}

std::string with_length(std::string text, std::uint64_t length) {
  std::memcpy(text.data(), &length, 8);
  return text;
}

std::vector<BadFile> bad_files() {
  const std::string good = valid().str();
  const std::string w = "{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}";
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return "{\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
  };
  const std::string f32 = "\"F32\"";
  return {
      {"no bytes", "", {"8 bytes of header length", "0 bytes"}},
      {"seven bytes", "1234567", {"7 bytes"}},
      {"a header beyond the file", with_length(good, good.size()), {"header has", "the file has"}},
      {"a header over the cap", with_length(good, ~0ull), {"18446744073709551615", "at most"}},
      {"a header of odd length", with_length(good, 13), {"13", "multiple of 8"}},
      {"not JSON", safetensors_text("{\"a\":", ""), {"not valid JSON"}},
      {"invalid UTF-8", safetensors_text("{\"\xff\":{}}", ""), {"not valid JSON"}},
      {"text after the object", safetensors_text("{} {}", ""), {"not valid JSON"}},
      {"a NUL after the object", safetensors_text(std::string("{}\0\0{]", 6), ""), {"NUL", "2"}},
      {"a byte-order mark", safetensors_text("\xEF\xBB\xBF{}", ""), {"start with '{'"}},
      {"a space first", safetensors_text(" {}", ""), {"start with '{'"}},
      {"an array", safetensors_text("[]", ""), {"start with '{'"}},
      {"a number for a tensor", safetensors_text("{\"w\":3}", ""), {"'w'", "object", "3"}},
      {"a string for a tensor", safetensors_text("{\"w\":\"x\"}", ""), {"'w'", "a string"}},
      {"an array for a tensor", safetensors_text("{\"w\":[]}", ""), {"'w'", "an array"}},
      {"metadata that is no object", safetensors_text("{\"__metadata__\":1}", ""), {"1"}},
      {"a number in the metadata",
       safetensors_text("{\"__metadata__\":{\"k\":1}}", ""),
       {"'k'", "a string", "1"}},
      {"an object in the metadata",
       safetensors_text("{\"__metadata__\":{\"k\":{}}}", ""),
       {"'k'", "an object"}},
      {"metadata twice",
       safetensors_text("{\"__metadata__\":{},\"__metadata__\":{}}", ""),
       {"__metadata__", "twice"}},
      {"a metadata key twice",
       safetensors_text("{\"__metadata__\":{\"k\":\"\",\"k\":\"\"}}", ""),
       {"'k'", "twice"}},
      {"an empty name", safetensors_text("{\"\":" + w + "}", std::string(8, ' ')), {"empty name"}},
      {"a name twice",
       safetensors_text("{\"w\":" + w + ",\"w\":" + w + "}", std::string(8, ' ')),
       {"'w'", "twice"}},
      {"no dtype", one("{\"shape\":[2],\"data_offsets\":[0,8]}", 8), {"'w'", "lacks 'dtype'"}},
      {"no shape", one("{\"dtype\":\"F32\",\"data_offsets\":[0,8]}", 8), {"lacks 'shape'"}},
      {"no offsets", one("{\"dtype\":\"F32\",\"shape\":[2]}", 8), {"lacks 'data_offsets'"}},
      {"an unknown key", one("{\"dtype\":\"F32\",\"strides\":[1]}", 8), {"'w'", "'strides'"}},
      {"a key twice", one("{\"dtype\":\"F32\",\"dtype\":\"F32\"}", 8), {"'dtype' twice"}},
      {"an unsupported dtype", one(entry("\"F64\"", "[1]", "[0,8]"), 8), {"'w'", "'F64'", "BF16"}},
      {"an unknown dtype", one(entry("\"f32\"", "[2]", "[0,8]"), 8), {"'f32'"}},
      {"a dtype that is a number", one(entry("32", "[2]", "[0,8]"), 8), {"32", "'dtype'"}},
      {"a dtype that is an array", one(entry("[]", "[2]", "[0,8]"), 8), {"an array", "'dtype'"}},
      {"a shape that is a string", one(entry(f32, "\"2\"", "[0,8]"), 8), {"a string", "'shape'"}},
      {"a null shape", one(entry(f32, "null", "[0,8]"), 8), {"null", "'shape'"}},
      {"a negative dimension", one(entry(f32, "[-2]", "[0,8]"), 8), {"-2", "shape"}},
      {"a fraction in the shape", one(entry(f32, "[2.0]", "[0,8]"), 8), {"2.0", "shape"}},
      {"a boolean in the shape", one(entry(f32, "[true]", "[0,8]"), 8), {"boolean", "shape"}},
      {"a nested shape", one(entry(f32, "[[2]]", "[0,8]"), 8), {"an array", "shape"}},
      {"five dimensions", one(entry(f32, "[1,1,1,1,2]", "[0,8]"), 8), {"'w'", "4 dimensions"}},
      {"a dimension over int64",
       one(entry(f32, "[18446744073709551615]", "[0,8]"), 8),
       {"18446744073709551615"}},
      {"a dimension over uint64",
       one(entry(f32, "[99999999999999999999]", "[0,8]"), 8),
       {"99999999999999999999"}},
      {"a product over int64",
       one(entry(f32, "[4294967296,4294967296]", "[0,8]"), 8),
       {"[4294967296, 4294967296]", "2^63"}},
      {"a product over int64 hidden by a zero",
       one(entry(f32, "[4294967296,4294967296,0]", "[0,0]"), 0),
       {"2^63"}},
      {"one offset", one(entry(f32, "[2]", "[8]"), 8), {"1 data_offsets", "expected 2"}},
      {"three offsets", one(entry(f32, "[2]", "[0,8,8]"), 8), {"more than two"}},
      {"a negative offset", one(entry(f32, "[2]", "[-8,0]"), 8), {"-8", "data_offsets"}},
      {"offsets that run backwards", one(entry(f32, "[2]", "[8,0]"), 8), {"[8, 0]", "backwards"}},
      {"offsets past the end", one(entry(f32, "[2]", "[0,8]"), 7), {"'w'", "[0, 8]", "7 bytes"}},
      {"huge offsets",
       one(entry(f32, "[2]", "[18446744073709551608,18446744073709551615]"), 8),
       {"18446744073709551615", "8 bytes"}},
      {"fewer bytes than the shape",
       one(entry(f32, "[3]", "[0,8]"), 8),
       {"8 bytes", "F32 [3]", "12"}},
      {"more bytes than the shape",
       one(entry(f32, "[1]", "[0,8]"), 8),
       {"8 bytes", "F32 [1]", "4"}},
      {"trailing bytes", one(entry(f32, "[2]", "[0,8]"), 9), {"byte 8", "9"}},
      {"data without tensors", safetensors_text("{}", "x"), {"byte 0", "has 1"}},
      {"a hole at the start", one(entry(f32, "[1]", "[4,8]"), 8), {"'w'", "hole", "4", "0"}},
      {"a hole",
       safetensors_text("{\"v\":" + entry("\"U8\"", "[1]", "[0,1]") +
                            ",\"w\":" + entry("\"U8\"", "[1]", "[2,3]") + "}",
                        "abc"),
       {"'w'", "hole", "begins at 2", "ends at 1"}},
      {"an overlap",
       safetensors_text("{\"v\":" + entry("\"U8\"", "[2]", "[0,2]") +
                            ",\"w\":" + entry("\"U8\"", "[2]", "[1,3]") + "}",
                        "abc"),
       {"'w'", "overlaps", "begins at 1", "ends at 2"}},
      {"the same bytes twice",
       safetensors_text("{\"v\":" + w + ",\"w\":" + w + "}", "12345678"),
       {"'w'", "overlaps"}},
      {"a tensor out of alignment",
       safetensors_text("{\"v\":" + entry("\"U8\"", "[2]", "[0,2]") +
                            ",\"w\":" + entry(f32, "[1]", "[2,6]") + "}",
                        "abcdef"),
       {"'w'", "byte 2", "4"}},
      {"deep nesting", safetensors_text("{\"w\":" + std::string(1 << 20, '['), ""), {"an array"}},
      {"deep nesting of objects",
       safetensors_text("{\"w\":{\"shape\":{\"a\":{", ""),
       {"an object", "'shape'"}},
  };
}

TEST(Safetensors, RefusesWhatIsNotValidAndSaysWhy) {
  for (const BadFile& bad : bad_files()) {
    const std::string message = parse_error(bad.text);
    EXPECT_NE(message, "") << bad.what << " was accepted";
    for (const std::string& expected : bad.expected) {
      EXPECT_NE(message.find(expected), std::string::npos) << bad.what << ": " << message;
    }
    EXPECT_LT(message.size(), 1000u) << bad.what;
  }
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string good = valid().str();
  for (std::size_t size = 0; size < good.size(); ++size) {
    EXPECT_NE(parse_error(good.substr(0, size)), "") << size;
  }
}

TEST(Safetensors, UnalignedMemoryIsRefused) {
  const AlignedBytes bytes("x" + valid().str());
  const auto message =
      message_of<InvalidArgument>([&] { SafetensorsFile::parse(bytes.span().subspan(1), "f"); });
  EXPECT_NE(message.find("8-byte aligned"), std::string::npos) << message;
}

TEST(Safetensors, OpensAFileThatIsThenRemoved) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "m.safetensors";
  write_file(path, valid().str());
  const auto file = SafetensorsFile::open(path);
  std::filesystem::remove(path);
  std::string codes(5, ' ');
  file->read(*file->find("codes"), 0, std::as_writable_bytes(std::span(codes)));
  EXPECT_EQ(codes, "abcde");
  EXPECT_EQ(file->digest(*file->find("codes")), sha256(std::as_bytes(std::span(codes))));
  file->check_unchanged();
}

TEST(Safetensors, AFileCutShortIsAnErrorAndNotASignal) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "m.safetensors";
  write_file(path, valid().str());
  const auto file = SafetensorsFile::open(path);
  std::filesystem::resize_file(path, file->num_bytes() - 3);
  const auto read = message_of<InvalidArgument>([&] { file->digest(*file->find("codes")); });
  EXPECT_NE(read.find("ends at byte"), std::string::npos) << read;
  const auto check = message_of<InvalidArgument>([&] { file->check_unchanged(); });
  EXPECT_NE(check.find("when it was opened"), std::string::npos) << check;
}

TEST(Safetensors, AFileWrittenToIsNoticed) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "m.safetensors";
  write_file(path, valid().str());
  const auto file = SafetensorsFile::open(path);
  std::filesystem::last_write_time(
      path, std::filesystem::file_time_type::clock::now() + std::chrono::seconds(5));
  const auto check = message_of<InvalidArgument>([&] { file->check_unchanged(); });
  EXPECT_NE(check.find("written to"), std::string::npos) << check;
}

TEST(Safetensors, OnlyRegularFilesAreOpened) {
  const TemporaryFolder folder;
  const auto missing = message_of<InvalidArgument>(
      [&] { SafetensorsFile::open(folder.path() / "none.safetensors"); });
  EXPECT_NE(missing.find("none.safetensors"), std::string::npos) << missing;
  const auto directory = message_of<InvalidArgument>([&] { SafetensorsFile::open(folder.path()); });
  EXPECT_NE(directory.find("not a regular file"), std::string::npos) << directory;
  const auto fifo = folder.path() / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  const auto message = message_of<InvalidArgument>([&] { SafetensorsFile::open(fifo); });
  EXPECT_NE(message.find("not a regular file"), std::string::npos) << message;
  write_file(folder.path() / "empty", "");
  EXPECT_NE(message_of<InvalidArgument>([&] { SafetensorsFile::open(folder.path() / "empty"); }),
            "");
}

}  // namespace
}  // namespace deltazip
