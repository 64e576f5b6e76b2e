#include "deltazip/delta/delta_file.h"

#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "delta/delta_builder.h"
#include "deltazip/base/error.h"

namespace deltazip {
namespace {

using test::AlignedBytes;
using test::DeltaBuilder;
using test::message_of;
using test::small_delta;
using test::TemporaryFolder;
using test::write_file;

std::string parse_error(const std::string& text) {
  const AlignedBytes bytes(text);
  return message_of<InvalidArgument>([&] { DeltaFile::parse(bytes.span(), "d"); });
}

TEST(DeltaFile, ReadsAValidFile) {
  const DeltaBuilder builder = small_delta();
  const AlignedBytes bytes(builder.str());
  const auto file = DeltaFile::parse(bytes.span(), "d");
  EXPECT_EQ(file->base_digest(), builder.base_digest);
  EXPECT_EQ(file->content_digest(), builder.content_digest());
  EXPECT_EQ(file->manifest_json(), builder.manifest());
  EXPECT_EQ(file->num_bytes(), bytes.span().size());
  EXPECT_EQ(file->name(), "d");

  ASSERT_EQ(file->tensors().size(), builder.entries.size());
  for (std::size_t i = 1; i < file->tensors().size(); ++i) {
    EXPECT_LT(file->tensors()[i - 1].name, file->tensors()[i].name);
  }
  const DeltaTensor* ternary = file->find("model.layers.1.self_attn.q_proj.weight");
  ASSERT_NE(ternary, nullptr);
  EXPECT_EQ(ternary->kind, DeltaKind::kMatrix);
  EXPECT_EQ(ternary->matrix.type, DeltaType::kSparse24Ternary);
  EXPECT_EQ(ternary->matrix.rows, 9);
  EXPECT_EQ(ternary->matrix.columns, 130);
  EXPECT_EQ(ternary->matrix.values.size(), 9u * 25);
  EXPECT_EQ(ternary->matrix.indices.size(), 0u);
  EXPECT_EQ(ternary->matrix.scales.size(), 9u * 3 * 2);
  const DeltaTensor* norm = file->find("model.layers.0.input_layernorm.weight");
  EXPECT_EQ(norm->kind, DeltaKind::kReplaced);
  EXPECT_EQ(norm->replaced.dtype, DType::kBFloat16);
  EXPECT_EQ(file->find("lm_head.weight")->kind, DeltaKind::kUnchanged);
  EXPECT_EQ(file->find("lm_head"), nullptr);
}

struct BadDelta {
  const char* what;
  std::function<void(DeltaBuilder&)> spoil;
  std::vector<std::string> expected;  // each stands in the message
};

std::function<void(DeltaBuilder&)> edit(std::string from, std::string to) {
  return [from, to](DeltaBuilder& d) { d.edits.emplace_back(from, to); };
}

constexpr const char* kEmbed = "model.embed_tokens.weight";
constexpr const char* kInt4 = "model.layers.0.self_attn.q_proj.weight";
constexpr const char* kInt2 = "model.layers.0.mlp.up_proj.weight";
constexpr const char* kTernary = "model.layers.1.self_attn.q_proj.weight";
constexpr const char* kNorm = "model.norm.weight";

// The manifest's line of a tensor, from its name to `key`.
std::string field(const std::string& name, const std::string& text) {
  return "\"" + name + "\":{" + text;
}

std::vector<BadDelta> bad_manifests() {
  const std::string zeros(64, '0');
  return {
      {"no format",
       [](DeltaBuilder& d) { d.metadata_extra["format"] = DeltaBuilder::kAbsent; },
       {"not a delta", "'format'"}},
      {"another format", [](DeltaBuilder& d) { d.format = "pt"; }, {"'pt'", "'deltazip'"}},
      {"no manifest",
       [](DeltaBuilder& d) { d.metadata_extra["manifest"] = DeltaBuilder::kAbsent; },
       {"not a delta", "'manifest'"}},
      {"a manifest that is not JSON", edit("{", "<"), {"manifest", "not valid JSON"}},
      {"a key twice",
       edit("\"version\":1,", "\"version\":1,\"version\":1,"),
       {"'version'", "twice"}},
      {"a tensor twice",
       edit("\"lm_head.weight\":",
            "\"lm_head.weight\":{\"type\":\"unchanged\",\"shape\":[1]},"
            "\"lm_head.weight\":"),
       {"'lm_head.weight'", "twice"}},
      {"no version", edit("\"version\":1,", ""), {"lacks 'version'"}},
      {"a later version", edit("\"version\":1", "\"version\":3"), {"version 3", "versions 1"}},
      {"a version that is text", edit("\"version\":1", "\"version\":\"1\""), {"version \"1\""}},
      {"a version and a half", edit("\"version\":1", "\"version\":1.0"), {"version 1.0"}},
      {"no base digest", edit("\"base_digest\"", "\"base\""), {"comes twice"}},
      {"no content digest", edit("\"content_digest\"", "\"content\""), {"lacks 'content_digest'"}},
      {"a short digest",
       edit("\"content_digest\":\"", "\"content_digest\":\"0"),
       {"'content_digest'", "64", "65"}},
      {"a digest that is a number",
       edit("\"content_digest\":\"", "\"content_digest\":1,\"x\":\""),
       {"'content_digest'", "got 1"}},
      {"no tensors", edit("\"tensors\"", "\"tensor\""), {"lacks 'tensors'"}},
      {"tensors in an array",
       edit("\"tensors\":{", "\"tensors\":[],\"x\":{"),
       {"'tensors'", "got []"}},
      {"an entry that is a number",
       edit(field(kNorm, ""), "\"m\":3," + field(kNorm, "")),
       {"'m'", "got 3"}},
      {"an empty name", edit(field(kNorm, ""), field("", "")), {"empty name"}},
      {"no type",
       edit(field(kNorm, "\"type\""), field(kNorm, "\"kind\"")),
       {kNorm, "lacks 'type'"}},
      {"an unknown type", edit("dense_int8", "dense_int9"), {"'dense_int9'", "dense_int8"}},
      {"a type that is a number", edit("\"type\":\"dense_int8\"", "\"type\":8"), {"got 8"}},
      {"no shape", edit("\"shape\":[12]}", "\"shapes\":[12]}"), {"lacks 'shape'"}},
      {"a shape that is a number", edit("\"shape\":[12]}", "\"shape\":12}"), {"'shape'", "got 12"}},
      {"a negative size", edit("\"shape\":[12]}", "\"shape\":[-12]}"), {"'shape'", "-12"}},
      {"a fraction of a size", edit("\"shape\":[12]}", "\"shape\":[12.5]}"), {"'shape'", "12.5"}},
      {"a size over 2^31", edit("\"shape\":[12]}", "\"shape\":[2147483648]}"), {"2147483648"}},
      {"five dimensions", edit("\"shape\":[12]}", "\"shape\":[12,1,1,1,1]}"), {"at most 4"}},
      {"more than 2^63 elements",
       edit("\"shape\":[12]}", "\"shape\":[2147483647,2147483647,2147483647]}"),
       {"2^63"}},
      {"a compressed vector",
       edit(field(kInt2, "\"type\":\"sparse24_int2\",\"shape\":[5,70]"),
            field(kInt2, "\"type\":\"sparse24_int2\",\"shape\":[350]")),
       {kInt2, "needs a matrix", "[350]"}},
      {"a matrix without rows", edit("\"shape\":[5,70]", "\"shape\":[0,70]"), {kInt2, "[0, 70]"}},
      {"a matrix without columns", edit("\"shape\":[5,70]", "\"shape\":[5,0]"), {kInt2, "[5, 0]"}},
      {"no group size", edit(",\"group_size\":64", ""), {"lacks 'group_size'"}},
      {"a group size of 0",
       edit("\"group_size\":64", "\"group_size\":0"),
       {"'group_size'", "got 0"}},
      {"a group size of 48", edit("\"group_size\":64", "\"group_size\":48"), {"of 32", "got 48"}},
      {"a negative group size", edit("\"group_size\":64", "\"group_size\":-64"), {"got -64"}},
      {"a huge group size",
       edit("\"group_size\":64", "\"group_size\":4294967296"),
       {"got 4294967296"}},
      {"a group size in a string", edit("\"group_size\":64", "\"group_size\":\"64\""), {"\"64\""}},
      {"another content digest",
       edit(small_delta().content_digest().hex(), zeros),
       {small_delta().content_digest().hex(), zeros}},
      {"another base digest",
       edit(small_delta().base_digest.hex(), zeros),
       {small_delta().content_digest().hex()}},
  };
}

std::vector<BadDelta> bad_tensors() {
  const auto name = [](const char* tensor, const char* suffix) {
    return std::string(tensor) + suffix;
  };
  const auto drop = [](const std::string& which) {
    return [which](DeltaBuilder& d) {
      std::erase_if(d.stored, [&](const auto& tensor) { return tensor.name == which; });
    };
  };
  const auto reshape = [](const std::string& which, const std::string& shape) {
    return [which, shape](DeltaBuilder& d) { d.find(which).shape = shape; };
  };
  const auto poke = [](const std::string& which, std::size_t at, const std::string& bytes) {
    return [which, at, bytes](DeltaBuilder& d) {
      d.find(which).data.replace(at, bytes.size(), bytes);
    };
  };
  return {
      {"no values",
       drop(name(kInt4, ".values")),
       {name(kInt4, ".values"), "missing", "U8 [6, 24]"}},
      {"no indices",
       drop(name(kInt4, ".indices")),
       {name(kInt4, ".indices"), "missing", "[6, 12]"}},
      {"no scales",
       drop(name(kInt2, ".scales")),
       {name(kInt2, ".scales"), "missing", "F16 [5, 2]"}},
      {"no codes",
       drop(name(kTernary, ".codes")),
       {name(kTernary, ".codes"), "missing", "[9, 25]"}},
      {"no replacement", drop(kNorm), {kNorm, "missing", "[12]"}},
      {"a tensor too many",
       [](DeltaBuilder& d) { d.stored.push_back({"stray", "U8", "[2]", "ab"}); },
       {"'stray'", "[2]", "does not ask"}},
      {"values of another shape",
       reshape(name(kInt4, ".values"), "[12,12]"),
       {name(kInt4, ".values"), "[12, 12]", "[6, 24]"}},
      {"scales for another group size",
       edit("\"group_size\":32", "\"group_size\":64"),
       {name(kInt4, ".scales"), "[6, 3]", "[6, 2]"}},
      {"a manifest of another shape",
       edit("\"shape\":[6,96]", "\"shape\":[6,128]"),
       {name(kInt4, ".values"), "[6, 24]", "[6, 32]"}},
      {"another type of the same size",
       [](DeltaBuilder& d) { d.entries[1].type = "sparse24_int2"; },
       {name(kInt4, ".values"), "[6, 24]", "[6, 12]"}},
      {"values that are not U8",
       [&](DeltaBuilder& d) {
         auto& tensor = d.find(std::string(kEmbed) + ".values");
         tensor.dtype = "F16";
         tensor.data += tensor.data;
       },
       {name(kEmbed, ".values"), "is F16", "expected U8"}},
      {"scales in BF16",
       [&](DeltaBuilder& d) { d.find(std::string(kEmbed) + ".scales").dtype = "BF16"; },
       {name(kEmbed, ".scales"), "is BF16", "expected F16"}},
      {"a replacement in I32",
       [&](DeltaBuilder& d) { d.find(kNorm).dtype = "I32"; },
       {kNorm, "is I32", "expected BF16, F16 or F32"}},
      {"a stored tensor for two",
       [](DeltaBuilder& d) {
         d.entries.push_back({"model.embed_tokens.weight.values", "replaced", "[7,48]", "7,48", 0});
       },
       {name(kEmbed, ".values"), "is U8"}},
      {"indices that fall",
       poke(name(kInt4, ".indices"), 12, "\x44\x44\x14"),
       {name(kInt4, ".indices"), "indices 20", "row 1, column 2"}},
      {"indices twice the same",
       poke(name(kInt2, ".indices"), 7, "\xA4"),
       {name(kInt2, ".indices"), "indices 164", "row 0, column 7"}},
      {"an infinite scale",
       poke(name(kTernary, ".scales"), 6, std::string("\x00\x7C", 2)),
       {name(kTernary, ".scales"), "not finite", "row 1, column 0"}},
      {"a negative infinite scale",
       poke(name(kTernary, ".scales"), 10, std::string("\x00\xFC", 2)),
       {"row 1, column 2"}},
      {"a scale that is NaN",
       poke(name(kInt4, ".scales"), 0, std::string("\x01\x7C", 2)),
       {name(kInt4, ".scales"), "not finite", "row 0, column 0"}},
      {"a NaN in F32",
       poke(kNorm, 44, std::string("\x00\x00\xC0\x7F", 4)),
       {kNorm, "not finite", "element 11"}},
      {"an infinity in BF16",
       poke("model.layers.0.input_layernorm.weight", 2, std::string("\x80\xFF", 2)),
       {"model.layers.0.input_layernorm.weight", "not finite", "element 1"}},
      {"a NaN in F16",
       poke("model.layers.1.input_layernorm.weight", 22, std::string("\xFF\x7F", 2)),
       {"model.layers.1.input_layernorm.weight", "not finite", "element 11"}},
  };
}

void expect_refused(const std::vector<BadDelta>& cases) {
  for (const BadDelta& bad : cases) {
    DeltaBuilder builder = small_delta();
    bad.spoil(builder);
    const std::string message = parse_error(builder.str());
    EXPECT_NE(message, "") << bad.what << " was accepted";
    for (const std::string& expected : bad.expected) {
      EXPECT_NE(message.find(expected), std::string::npos) << bad.what << ": " << message;
    }
    EXPECT_LT(message.size(), 1000u) << bad.what;
  }
}

TEST(DeltaFile, RefusesABadManifest) { expect_refused(bad_manifests()); }
TEST(DeltaFile, RefusesBadTensors) { expect_refused(bad_tensors()); }

TEST(DeltaFile, AStoredTensorBelongsToOneEntry) {
  DeltaBuilder builder;
  builder.replaced("w.scales", "F16", {2, 1}).matrix("w", "dense_int8", 2, 32, 32);
  builder.stored.erase(builder.stored.begin());  // both would read the other one
  EXPECT_NE(parse_error(builder.str()).find("'w.scales' belongs to two"), std::string::npos);
}

TEST(DeltaFile, EveryFlippedBitOfTheDataIsNoticed) {
  const std::string good = small_delta().str();
  const std::size_t data_begin = good.find("}}", good.size() / 2) + 2;
  for (std::size_t at = good.size() - 600; at < good.size(); ++at) {
    ASSERT_GT(at, data_begin);
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x10);
    EXPECT_NE(parse_error(bad), "") << at;
  }
}

TEST(DeltaFile, EqualBytesOfAnotherDtypeAreOtherContent) {
  DeltaBuilder builder;
  builder.replaced("model.norm.weight", "BF16", {12});
  const std::string as_bfloat16 = builder.content_digest().hex();
  builder.stored.front().dtype = "F16";
  EXPECT_EQ(parse_error(builder.str()), "");
  builder.edits.emplace_back(builder.content_digest().hex(), as_bfloat16);
  EXPECT_NE(parse_error(builder.str()).find("the manifest says " + as_bfloat16), std::string::npos);
}

TEST(DeltaFile, UnknownKeysAreIgnored) {
  DeltaBuilder builder = small_delta();
  builder.edits.emplace_back("\"version\":1,", "\"version\":1,\"later\":{\"a\":[1,2]},");
  builder.edits.emplace_back("\"shape\":[12]}", "\"shape\":[12],\"note\":null}");
  builder.metadata_extra["producer"] = "test";
  EXPECT_EQ(parse_error(builder.str()), "");
}

TEST(DeltaFile, OpensAFolderOrAFile) {
  const TemporaryFolder folder;
  const auto missing = message_of<InvalidArgument>([&] { DeltaFile::open(folder.path()); });
  EXPECT_NE(missing.find("delta.safetensors"), std::string::npos) << missing;
  write_file(folder.path() / "delta.safetensors", small_delta().str());
  const auto by_folder = DeltaFile::open(folder.path());
  const auto by_file = DeltaFile::open(folder.path() / "delta.safetensors");
  EXPECT_EQ(by_folder->content_digest(), by_file->content_digest());
}

TEST(DeltaFile, LoadCopiesWhatTheMappingShows) {
  const TemporaryFolder folder;
  write_file(folder.path() / "delta.safetensors", small_delta().str());
  const auto file = DeltaFile::open(folder.path());
  const auto equal = [](std::span<const std::byte> a, std::span<const std::byte> b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  };
  std::vector<std::byte> storage;
  for (const DeltaTensor& tensor : file->tensors()) {
    const DeltaTensor copy = file->load(tensor, storage);
    EXPECT_EQ(copy.name, tensor.name);
    EXPECT_TRUE(equal(copy.matrix.values, tensor.matrix.values)) << tensor.name;
    EXPECT_TRUE(equal(copy.matrix.indices, tensor.matrix.indices)) << tensor.name;
    EXPECT_TRUE(equal(copy.matrix.scales, tensor.matrix.scales)) << tensor.name;
    if (tensor.kind == DeltaKind::kReplaced) {
      EXPECT_NE(copy.replaced.data, tensor.replaced.data);
      EXPECT_EQ(std::memcmp(copy.replaced.data, tensor.replaced.data, tensor.replaced.num_bytes()),
                0);
    }
  }
}

std::vector<BaseTensor> base_of(const DeltaFile& file) {
  std::vector<BaseTensor> base;
  for (const DeltaTensor& tensor : file.tensors()) base.push_back({tensor.name, tensor.shape});
  return base;
}

TEST(DeltaFile, MatchesItsBaseAndNoOther) {
  const AlignedBytes bytes(small_delta().str());
  const auto file = DeltaFile::parse(bytes.span(), "d");
  const std::vector<BaseTensor> base = base_of(*file);
  const auto error = [&](const Digest& digest, const std::vector<BaseTensor>& tensors) {
    return message_of<InvalidArgument>([&] { check_matches_base(*file, digest, tensors); });
  };
  EXPECT_EQ(error(file->base_digest(), base), "");

  const std::string other = error(Digest{}, base);
  EXPECT_NE(other.find("another base"), std::string::npos) << other;
  EXPECT_NE(other.find(Digest{}.hex()), std::string::npos) << other;

  auto more = base;
  more.push_back({"model.layers.2.mlp.up_proj.weight", Shape({4, 5})});
  const std::string missing = error(file->base_digest(), more);
  EXPECT_NE(missing.find("'model.layers.2.mlp.up_proj.weight' [4, 5] is missing"),
            std::string::npos)
      << missing;

  auto fewer = base;
  std::erase_if(fewer, [](const BaseTensor& tensor) { return tensor.name == "lm_head.weight"; });
  const std::string unknown = error(file->base_digest(), fewer);
  EXPECT_NE(unknown.find("'lm_head.weight' [7, 70] is not a tensor of the base"), std::string::npos)
      << unknown;

  auto reshaped = base;
  reshaped[0].shape = Shape({70, 7});
  const std::string shape = error(file->base_digest(), reshaped);
  EXPECT_NE(shape.find("'lm_head.weight' is [7, 70] in the delta, the base has [70, 7]"),
            std::string::npos)
      << shape;
}

}  // namespace
}  // namespace deltazip
