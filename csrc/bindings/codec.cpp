#include <algorithm>

#include "bindings/bindings.h"
#include "deltazip/base/error.h"
#include "deltazip/delta/packed_stream.h"

namespace deltazip::bindings {
namespace {

namespace py = pybind11;

// Calls share nothing, so threads may share this.
struct StreamCodec {
  std::string name;
};

std::span<const std::byte> view(const py::buffer_info& info) {
  DZ_CHECK(info.ndim == 1 && info.itemsize == 1 && info.strides[0] == 1,
           "expected bytes, got a buffer of ", info.ndim, " dimensions of ", info.itemsize,
           "-byte elements");
  return {static_cast<const std::byte*>(info.ptr), static_cast<std::size_t>(info.size)};
}

py::bytes encode(const StreamCodec& self, const py::buffer& data, std::size_t item_bytes) {
  const py::buffer_info info = data.request();
  const std::span<const std::byte> plain = view(info);
  std::vector<std::byte> encoded;
  {
    const py::gil_scoped_release released;
    encoded = encode_stream(*Codec::make(self.name), plain, item_bytes);
  }
  return {reinterpret_cast<const char*>(encoded.data()), encoded.size()};
}

py::bytearray decode(const StreamCodec& self, const py::buffer& data, std::size_t num_bytes,
                     std::size_t item_bytes, const std::string& what) {
  const py::buffer_info info = data.request();
  const std::span<const std::byte> encoded = view(info);
  const auto codec = Codec::make(self.name);
  const auto read = [&](std::size_t offset, std::span<std::byte> out) {
    std::copy_n(encoded.begin() + static_cast<std::ptrdiff_t>(offset), out.size(), out.begin());
  };
  // Before the memory is asked for: a table that fits bounds it.
  StreamDecoder decoder(*codec, read, encoded.size(), num_bytes, item_bytes, what);
  py::bytearray plain(nullptr, num_bytes);
  auto* bytes = reinterpret_cast<std::byte*>(PyByteArray_AS_STRING(plain.ptr()));
  const py::gil_scoped_release released;
  decoder.decode_all({bytes, num_bytes});
  return plain;
}

}  // namespace

void bind_codec(py::module_& module) {
  py::class_<StreamCodec>(module, "StreamCodec")
      .def(py::init([](const std::string& name) {
             Codec::make(name);  // throws for a name it does not know
             return StreamCodec{name};
           }),
           py::arg("name"))
      .def("encode", &encode, py::arg("data"), py::arg("item_bytes"))
      .def("decode", &decode, py::arg("data"), py::arg("num_bytes"), py::arg("item_bytes"),
           py::arg("what") = "");
}

}  // namespace deltazip::bindings
