#include "io/safetensors_header.h"

#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "deltazip/base/error.h"
#include "deltazip/io/json_text.h"
#include "deltazip/io/safetensors.h"

namespace deltazip {
namespace {

using Json = nlohmann::json;

// Events instead of a tree: a hostile header can neither nest nor repeat keys unseen, and nothing
// is kept that is not an entry.
class Reader : public nlohmann::json_sax<Json> {
 public:
  explicit Reader(const std::string& file_name) : file_(file_name) {}
  SafetensorsHeader take() { return std::move(header_); }

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(Json::number_integer_t value) override {
    return unexpected(std::to_string(value));
  }
  bool number_float(Json::number_float_t, const std::string& text) override {
    return unexpected(printable(text, 40));
  }
  bool binary(Json::binary_t&) override { return unexpected("binary data"); }

  bool number_unsigned(Json::number_unsigned_t value) override {
    if (where_ == Where::kShape) {
      DZ_CHECK(num_dims_ < kMaxRank, at(), "has more than ", kMaxRank, " dimensions");
      DZ_CHECK(value <= kMaxSize, at(), "has a dimension of ", value);
      dims_[num_dims_++] = static_cast<std::int64_t>(value);
    } else if (where_ == Where::kOffsets) {
      DZ_CHECK(num_offsets_ < 2, at(), "has more than two data_offsets");
      (num_offsets_++ == 0 ? tensor_.begin : tensor_.end) = value;
    } else {
      return unexpected(std::to_string(value));
    }
    return true;
  }

  bool string(std::string& value) override {
    if (where_ == Where::kMetadata) {
      const bool is_new = header_.metadata.emplace(key_, std::move(value)).second;
      DZ_CHECK(is_new, file_, ": __metadata__ key '", printable(key_), "' comes twice");
    } else if (where_ == Where::kTensor && key_ == "dtype") {
      const auto dtype = dtype_from_safetensors_name(value);
      DZ_CHECK(dtype.has_value(), at(), "has dtype '", printable(value, 40),
               "', expected one of F32, F16, BF16, I64, I32, U8");
      tensor_.dtype = *dtype;
    } else {
      return unexpected("a string");
    }
    return true;
  }

  bool key(std::string& value) override {
    key_ = std::move(value);
    if (where_ != Where::kTensor) return true;
    const int field = key_ == "dtype" ? 1 : key_ == "shape" ? 2 : key_ == "data_offsets" ? 4 : 0;
    DZ_CHECK(field != 0, at(), "has an unknown key '", printable(key_, 40), "'");
    DZ_CHECK((fields_ & field) == 0, at(), "has '", key_, "' twice");
    fields_ |= field;
    return true;
  }

  bool start_object(std::size_t) override {
    if (where_ == Where::kStart) {
      where_ = Where::kTop;
    } else if (where_ == Where::kTop && key_ == "__metadata__") {
      DZ_CHECK(!has_metadata_, file_, ": __metadata__ comes twice");
      has_metadata_ = true;
      where_ = Where::kMetadata;
    } else if (where_ == Where::kTop) {
      tensor_ = {};
      tensor_.name = std::move(key_);
      key_.clear();
      fields_ = 0;
      num_dims_ = 0;
      num_offsets_ = 0;
      DZ_CHECK(!tensor_.name.empty(), file_, ": a tensor has an empty name");
      DZ_CHECK(names_.insert(tensor_.name).second, at(), "comes twice");
      where_ = Where::kTensor;
    } else {
      return unexpected("an object");
    }
    return true;
  }

  bool end_object() override {
    if (where_ == Where::kTensor) finish_tensor();
    where_ = where_ == Where::kTop ? Where::kEnd : Where::kTop;
    return true;
  }

  bool start_array(std::size_t) override {
    if (where_ != Where::kTensor || key_ == "dtype") return unexpected("an array");
    where_ = key_ == "shape" ? Where::kShape : Where::kOffsets;
    return true;
  }

  bool end_array() override {
    where_ = Where::kTensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    detail::fail<InvalidArgument>(file_, ": header is not valid JSON at byte ", position, ": ",
                                  printable(error.what()));
  }

 private:
  enum class Where { kStart, kTop, kMetadata, kTensor, kShape, kOffsets, kEnd };
  static constexpr std::uint64_t kMaxSize = std::numeric_limits<std::int64_t>::max();

  std::string at() const { return file_ + ": tensor '" + printable(tensor_.name) + "' "; }

  bool unexpected(const std::string& got) const {
    switch (where_) {
      case Where::kMetadata:
        detail::fail<InvalidArgument>(file_, ": __metadata__ key '", printable(key_),
                                      "' must be a string, got ", got);
      case Where::kShape:
        detail::fail<InvalidArgument>(at(), "has ", got, " in its shape, expected an integer >= 0");
      case Where::kOffsets:
        detail::fail<InvalidArgument>(at(), "has ", got,
                                      " in its data_offsets, expected an integer >= 0");
      case Where::kTensor:
        detail::fail<InvalidArgument>(at(), "has ", got, " for '", printable(key_, 40), "'");
      case Where::kTop:
        detail::fail<InvalidArgument>(file_, ": '", printable(key_), "' must be an object, got ",
                                      got);
      default:
        detail::fail<InvalidArgument>(file_, ": the header must be a JSON object, got ", got);
    }
  }

  void finish_tensor() {
    DZ_CHECK(fields_ == 7, at(), "lacks ",
             (fields_ & 1) == 0   ? "'dtype'"
             : (fields_ & 2) == 0 ? "'shape'"
                                  : "'data_offsets'");
    DZ_CHECK(num_offsets_ == 2, at(), "has ", num_offsets_, " data_offsets, expected 2");
    tensor_.shape = Shape(std::span<const std::int64_t>(dims_.data(), num_dims_));
    // Also with a zero among the dimensions no partial product may overflow: views multiply them.
    std::int64_t num_bytes = static_cast<std::int64_t>(size_of(tensor_.dtype));
    for (std::size_t axis = 0; axis < num_dims_; ++axis) {
      DZ_CHECK(!__builtin_mul_overflow(num_bytes, dims_[axis], &num_bytes), at(), "has shape ",
               tensor_.shape.str(), ", more than 2^63 bytes");
    }
    tensor_.num_bytes = static_cast<std::uint64_t>(num_bytes);
    header_.tensors.push_back(std::move(tensor_));
  }

  const std::string& file_;
  SafetensorsHeader header_;
  std::unordered_set<std::string> names_;
  Where where_ = Where::kStart;
  std::string key_;
  bool has_metadata_ = false;

  SafetensorsHeader::Tensor tensor_;  // the one being read
  int fields_ = 0;
  std::array<std::int64_t, kMaxRank> dims_{};
  std::size_t num_dims_ = 0, num_offsets_ = 0;
};

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& file_name) {
  // The parser takes a NUL for the end of its input and would not see what follows.
  const std::size_t nul = json.find('\0');
  DZ_CHECK(nul == std::string_view::npos, file_name, ": header has a NUL at byte ", nul);
  DZ_CHECK(!json.empty() && json.front() == '{', file_name, ": the header must start with '{'");
  Reader reader(file_name);
  Json::sax_parse(json.begin(), json.end(), &reader);
  return reader.take();
}

}  // namespace deltazip
