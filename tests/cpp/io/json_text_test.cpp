#include "deltazip/io/json_text.h"

#include <gtest/gtest.h>

#include "deltazip/base/error.h"
#include "io/safetensors_builder.h"

namespace deltazip {
namespace {

std::string error_of(std::string_view text) {
  return test::message_of<InvalidArgument>([&] { check_json_object(text, "config"); });
}

std::string nested(int depth) {
  std::string text = "{\"k\":";
  for (int i = 1; i < depth; ++i) text += '[';
  text += '1';
  for (int i = 1; i < depth; ++i) text += ']';
  return text + "}";
}

TEST(JsonText, AcceptsOneObject) {
  EXPECT_EQ(error_of("{}"), "");
  EXPECT_EQ(error_of(R"({"a": [1, -2.5, null, true, {"a": "b"}], "b": {"a": {}}})"), "");
  EXPECT_EQ(error_of(nested(kMaxJsonDepth)), "");
}

TEST(JsonText, RefusesTheRest) {
  using namespace std::string_literals;
  const std::pair<std::string, std::string> cases[] = {
      {"", "not valid JSON"},
      {"[]", "got an array"},
      {"3", "got a number"},
      {"\"x\"", "got a string"},
      {"null", "got null"},
      {"{", "not valid JSON"},
      {"{} x", "not valid JSON"},
      {"{}\0x"s, "NUL at byte 2"},
      {"{\"a\": NaN}", "not valid JSON"},
      {"{\"a\": 1e999}", "not valid JSON"},
      {"{\"\xff\": 1}", "not valid JSON"},
      {R"({"a": 1, "a": 2})", "'a' comes twice"},
      {R"({"x": [{"deep": 1, "deep": 2}]})", "'deep' comes twice"},
      {nested(kMaxJsonDepth + 1), "deeper than 64"},
      {"{\"k\":" + std::string(1 << 20, '['), "deeper than 64"},
  };
  for (const auto& [text, expected] : cases) {
    const std::string message = error_of(text);
    EXPECT_NE(message.find(expected), std::string::npos) << text.substr(0, 80) << ": " << message;
    EXPECT_NE(message.find("config"), std::string::npos) << message;
  }
}

TEST(JsonText, PrintableEscapesAndCuts) {
  EXPECT_EQ(printable("plain"), "plain");
  EXPECT_EQ(printable("a\n\x1b[0m\x7f"), "a\\x0a\\x1b[0m\\x7f");
  EXPECT_EQ(printable("abcdef", 3), "abc...");
  EXPECT_EQ(printable("abc", 3), "abc");
  EXPECT_EQ(printable("a\xC3\xA9z", 2), "a...");  // not half an e-acute
  EXPECT_EQ(printable("a\xC3\xA9z", 3), "a\xC3\xA9...");
}

}  // namespace
}  // namespace deltazip
