#include "deltazip/io/json_text.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <vector>

#include "deltazip/base/error.h"
#include "io/mapped_file.h"

namespace deltazip {
namespace {

using Json = nlohmann::json;

// Builds nothing: only what a DOM would accept in silence (depth, repeated keys) is looked at.
class Checker : public nlohmann::json_sax<Json> {
 public:
  explicit Checker(std::string_view what) : what_(what) {}

  bool null() override { return value("null"); }
  bool boolean(bool) override { return value("a boolean"); }
  bool number_integer(Json::number_integer_t) override { return value("a number"); }
  bool number_unsigned(Json::number_unsigned_t) override { return value("a number"); }
  bool number_float(Json::number_float_t, const std::string&) override { return value("a number"); }
  bool string(std::string&) override { return value("a string"); }
  bool binary(Json::binary_t&) override { return value("binary data"); }
  bool start_object(std::size_t) override { return open(); }
  bool start_array(std::size_t) override {
    value("an array");
    return open();
  }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(std::string& name) override {
    DZ_CHECK(keys_.back().insert(name).second, what_, ": key '", printable(name), "' comes twice");
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    detail::fail<InvalidArgument>(what_, ": not valid JSON at byte ", position, ": ",
                                  printable(error.what()));
  }

 private:
  bool value(const char* got) const {
    DZ_CHECK(!keys_.empty(), what_, ": expected a JSON object, got ", got);
    return true;
  }
  bool open() {
    keys_.emplace_back();
    DZ_CHECK(keys_.size() <= kMaxJsonDepth, what_, ": JSON is nested deeper than ", kMaxJsonDepth);
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  std::string_view what_;
  std::vector<std::set<std::string>> keys_;  // of each open object; empty for arrays
};

}  // namespace

void check_json_object(std::string_view text, std::string_view what) {
  // The parser takes a NUL for the end of its input and would not see what follows.
  const std::size_t nul = text.find('\0');
  DZ_CHECK(nul == std::string_view::npos, what, ": not valid JSON: a NUL at byte ", nul);
  Checker checker(what);
  Json::sax_parse(text.begin(), text.end(), &checker);
}

std::string printable(std::string_view text, std::size_t max_chars) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::size_t end = std::min(text.size(), max_chars);
  // Not in the middle of a UTF-8 character: messages end up in JSON.
  while (end > 0 && end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) {
    --end;
  }
  std::string out;
  for (const char c : text.substr(0, end)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte != 0x7F) {
      out += c;
    } else {
      out += "\\x";
      out += kDigits[byte >> 4];
      out += kDigits[byte & 15];
    }
  }
  return end < text.size() ? out + "..." : out;
}

std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes) {
  const OpenedFile file(path);
  DZ_CHECK(file.num_bytes() <= max_bytes, "'", path.string(), "' has ", file.num_bytes(),
           " bytes, at most ", max_bytes, " are read");
  std::string text(file.num_bytes(), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return text;
}

}  // namespace deltazip
