#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace deltazip {

// Nesting that any JSON of ours may have; real files stay below ten.
inline constexpr int kMaxJsonDepth = 64;

// Throws InvalidArgument unless `text` is one JSON object in UTF-8, nested at most kMaxJsonDepth
// deep, with no NUL byte and no key twice in one object. `what` stands in messages.
// To be called before any parser that would accept or recurse over such text.
void check_json_object(std::string_view text, std::string_view what);

// `text` as it may stand in an error message: control characters escaped, cut after `max_chars`.
std::string printable(std::string_view text, std::size_t max_chars = 200);

// The whole of a regular file. Throws InvalidArgument: missing, unreadable, over `max_bytes`.
std::string read_text_file(const std::filesystem::path& path, std::size_t max_bytes);

}  // namespace deltazip
