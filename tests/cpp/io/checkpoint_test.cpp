#include "deltazip/io/checkpoint.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "deltazip/base/error.h"
#include "io/safetensors_builder.h"

namespace deltazip {
namespace {

using test::message_of;
using test::SafetensorsBuilder;
using test::TemporaryFolder;
using test::write_file;

std::string floats(std::size_t count, char fill) { return std::string(4 * count, fill); }

// w.a and w.b in one shard, w.c in another, and the index that says so.
void write_sharded(const std::filesystem::path& folder, const std::string& weight_map) {
  write_file(folder / "config.json", "{}");
  write_file(folder / "one.safetensors", SafetensorsBuilder()
                                             .add("w.b", "F32", "[2,3]", floats(6, 'b'))
                                             .add("w.a", "F32", "[4]", floats(4, 'a'))
                                             .str());
  write_file(folder / "two.safetensors",
             SafetensorsBuilder().add("w.c", "BF16", "[1]", "cc").str());
  write_file(folder / "model.safetensors.index.json", "{\"weight_map\":" + weight_map + "}");
}

constexpr const char* kGoodMap =
    R"({"w.a":"one.safetensors","w.b":"one.safetensors","w.c":"two.safetensors"})";

std::string open_error(const std::filesystem::path& folder) {
  return message_of<InvalidArgument>([&] { Checkpoint::open(folder); });
}

TEST(Checkpoint, OneFileAndShardsAreTheSameWeights) {
  const TemporaryFolder single, sharded;
  write_file(single.path() / "config.json", R"({"model_type": "llama"})");
  write_file(single.path() / "model.safetensors", SafetensorsBuilder()
                                                      .add("w.a", "F32", "[4]", floats(4, 'a'))
                                                      .add("w.b", "F32", "[2,3]", floats(6, 'b'))
                                                      .add("w.c", "BF16", "[1]", "cc")
                                                      .str());
  write_sharded(sharded.path(), kGoodMap);

  const Checkpoint one = Checkpoint::open(single.path());
  const Checkpoint many = Checkpoint::open(sharded.path());
  EXPECT_EQ(one.config_json(), R"({"model_type": "llama"})");
  for (const Checkpoint* checkpoint : {&one, &many}) {
    ASSERT_EQ(checkpoint->tensors().size(), 3u);
    EXPECT_EQ(checkpoint->tensors()[0].name, "w.a");
    EXPECT_EQ(checkpoint->tensors()[2].name, "w.c");
    EXPECT_EQ(checkpoint->find("w.b")->view.shape, Shape({2, 3}));
    EXPECT_EQ(checkpoint->find("w"), nullptr);
  }
  ThreadPool pool(2), alone(1);
  EXPECT_EQ(one.weights_digest(pool), many.weights_digest(alone));
}

// The bytes of the definition in docs/delta_format.md, spelt out by hand.
TEST(Checkpoint, DigestIsThatOfTheFormat) {
  const TemporaryFolder folder;
  write_sharded(folder.path(), kGoodMap);
  const auto hash_of = [](const std::string& text) {
    const Digest digest = sha256(std::as_bytes(std::span(text)));
    return std::string(reinterpret_cast<const char*>(digest.bytes.data()), digest.bytes.size());
  };
  using namespace std::string_literals;
  const std::string text = "w.a\0F32\0"s + "4\0"s + hash_of(floats(4, 'a')) +  //
                           "w.b\0F32\0"s + "2,3\0"s + hash_of(floats(6, 'b')) + "w.c\0BF16\0"s +
                           "1\0"s + hash_of("cc");
  ThreadPool pool(2);
  EXPECT_EQ(Checkpoint::open(folder.path()).weights_digest(pool),
            sha256(std::as_bytes(std::span(text))));
}

TEST(Checkpoint, DigestFollowsNameTypeShapeAndBytes) {
  const auto digest = [](const char* name, const char* dtype, const char* shape, char fill) {
    const TemporaryFolder folder;
    write_file(folder.path() / "config.json", "{}");
    write_file(folder.path() / "model.safetensors",
               SafetensorsBuilder().add(name, dtype, shape, floats(4, fill)).str());
    ThreadPool pool(1);
    return Checkpoint::open(folder.path()).weights_digest(pool);
  };
  const Digest reference = digest("w", "F32", "[4]", 'a');
  EXPECT_EQ(digest("w", "F32", "[4]", 'a'), reference);
  EXPECT_NE(digest("v", "F32", "[4]", 'a'), reference);
  EXPECT_NE(digest("w", "I32", "[4]", 'a'), reference);
  EXPECT_NE(digest("w", "F32", "[2,2]", 'a'), reference);
  EXPECT_NE(digest("w", "F32", "[4]", 'b'), reference);
}

TEST(Checkpoint, RefusesABadIndex) {
  const std::pair<const char*, std::vector<const char*>> cases[] = {
      {R"({"w.a":"one.safetensors","w.c":"two.safetensors"})", {"'w.b'", "does not name"}},
      {R"({"w.a":"one.safetensors","w.b":"two.safetensors","w.c":"two.safetensors"})",
       {"'w.b'", "'one.safetensors'", "'two.safetensors'"}},
      {R"({"w.a":"one.safetensors","w.b":"one.safetensors","w.x":"one.safetensors"})",
       {"'w.x'", "is not in shard"}},
      {R"({"w.a":"none.safetensors"})", {"none.safetensors"}},
      {R"({"w.a":"../one.safetensors"})", {"'../one.safetensors'", "plain file name"}},
      {R"({"w.a":"/etc/x.safetensors"})", {"plain file name"}},
      {R"({"w.a":"a\\b.safetensors"})", {"plain file name"}},
      {R"({"w.a":"..safetensors"})", {"plain file name"}},
      {R"({"w.a":".safetensors"})", {"plain file name"}},
      {R"({"w.a":"one.bin"})", {"'one.bin'", "plain file name"}},
      {R"({"w.a":""})", {"plain file name"}},
      {R"({"w.a":7})", {"'w.a'", "got 7"}},
      {R"({"w.a":"one.safetensors","w.a":"two.safetensors"})", {"'w.a' comes twice"}},
      {"{}", {"weight_map"}},
      {"[]", {"weight_map"}},
  };
  for (const auto& [weight_map, fragments] : cases) {
    const TemporaryFolder folder;
    write_sharded(folder.path(), weight_map);
    const std::string message = open_error(folder.path());
    for (const char* expected : fragments) {
      EXPECT_NE(message.find(expected), std::string::npos) << weight_map << ": " << message;
    }
  }
}

TEST(Checkpoint, ATensorInTwoShardsIsRefused) {
  const TemporaryFolder folder;
  write_sharded(folder.path(), kGoodMap);
  write_file(
      folder.path() / "two.safetensors",
      SafetensorsBuilder().add("w.c", "BF16", "[1]", "cc").add("w.a", "BF16", "[1]", "aa").str());
  const std::string message = open_error(folder.path());
  EXPECT_NE(message.find("'w.a' is in shard 'two.safetensors'"), std::string::npos) << message;
}

TEST(Checkpoint, SaysWhatAFolderLacks) {
  const TemporaryFolder folder;
  EXPECT_NE(open_error(folder.path() / "none").find("is not a folder"), std::string::npos);
  EXPECT_NE(open_error(folder.path()).find("no config.json"), std::string::npos);
  write_file(folder.path() / "config.json", "{");
  EXPECT_NE(open_error(folder.path()).find("not valid JSON"), std::string::npos);
  write_file(folder.path() / "config.json", "{}");
  EXPECT_NE(open_error(folder.path()).find("neither model.safetensors"), std::string::npos);
  write_file(folder.path() / "model.safetensors.index.json", "[]");
  EXPECT_NE(open_error(folder.path()).find("expected a JSON object"), std::string::npos);
  write_file(folder.path() / "model.safetensors.index.json", "{}");
  EXPECT_NE(open_error(folder.path()).find("weight_map"), std::string::npos);
  write_file(folder.path() / "model.safetensors", SafetensorsBuilder().str());
  EXPECT_NE(open_error(folder.path()).find("no tensors"), std::string::npos);
}

TEST(Checkpoint, OpensARealModel) {
  const char* models = std::getenv("DELTAZIP_TEST_MODELS");
  if (models == nullptr) GTEST_SKIP() << "DELTAZIP_TEST_MODELS is not set";
  const Checkpoint base = Checkpoint::open(std::filesystem::path(models) / "base");
  const Checkpoint math = Checkpoint::open(std::filesystem::path(models) / "math");
  ASSERT_EQ(base.tensors().size(), math.tensors().size());
  for (std::size_t i = 0; i < base.tensors().size(); ++i) {
    EXPECT_EQ(base.tensors()[i].name, math.tensors()[i].name);
    EXPECT_EQ(base.tensors()[i].view.shape, math.tensors()[i].view.shape);
  }
  ThreadPool pool(2);
  EXPECT_NE(base.weights_digest(pool), math.weights_digest(pool));
}

}  // namespace
}  // namespace deltazip
