#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <concepts>
#include <string>
#include <type_traits>

#include "deltazip/base/error.h"

// Structs that Python fills: a keyword constructor and attributes, each value checked for type and
// range with the field's name in the message.
namespace deltazip::bindings {

// Python's own words for a value, cut to fit a message.
inline std::string shown(pybind11::handle value) {
  const std::string text = pybind11::repr(value);
  return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

template <typename T>
constexpr const char* expected_name() {
  if constexpr (std::same_as<T, bool>) return "True or False";
  if constexpr (std::is_integral_v<T>) return sizeof(T) == 4 ? "a 32-bit integer" : "an integer";
  if constexpr (std::is_floating_point_v<T>) return "a number";
  if constexpr (std::same_as<T, std::string>) return "a string";
  return "a value of the right type";
}

// Python's bool is an int and its int a float; only the second is welcome.
template <typename T>
T cast_field(const std::string& owner, const char* field, pybind11::handle value,
             const char* expected = expected_name<T>()) {
  namespace py = pybind11;
  const bool is_bool = py::isinstance<py::bool_>(value);
  bool fits = std::same_as<T, bool> ? is_bool : !is_bool;
  if constexpr (std::is_integral_v<T> && !std::same_as<T, bool>) {
    fits = fits && PyIndex_Check(value.ptr()) != 0;  // a float is not rounded silently
  }
  if constexpr (std::same_as<T, std::string>) fits = py::isinstance<py::str>(value);  // not bytes
  const auto refuse = [&] {
    detail::fail<InvalidArgument>(owner, ": ", field, " must be ", expected, ", got ",
                                  shown(value));
  };
  if (!fits) refuse();
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    refuse();
    throw;
  }
}

template <typename Struct>
class Fields {
 public:
  Fields(pybind11::module_& module, const char* name, const char* doc)
      : name_(name), class_(module, name, doc) {
    namespace py = pybind11;
    class_.def(py::init([owner = name_](const py::kwargs& kwargs) {
      py::object made = py::cast(Struct{});
      for (const auto& [key, value] : kwargs) {
        const bool is_known = !std::string(py::str(key)).starts_with('_') &&
                              PyObject_HasAttr(py::type::of(made).ptr(), key.ptr()) == 1;
        if (!is_known) {
          throw py::type_error(owner + " has no field " + shown(key));
        }
        py::setattr(made, key, value);
      }
      return made.cast<Struct>();
    }));
  }

  template <typename T>
  Fields& field(const char* field, T Struct::* member) {
    class_.def_property(
        field, [member](const Struct& self) -> const T& { return self.*member; },
        [member, field, owner = name_](Struct& self, pybind11::handle value) {
          self.*member = cast_field<T>(owner, field, value);
        });
    return *this;
  }

  pybind11::class_<Struct>& type() { return class_; }
  const std::string& name() const { return name_; }

 private:
  std::string name_;
  pybind11::class_<Struct> class_;
};

}  // namespace deltazip::bindings
