#include "bindings/bindings.h"
#include "deltazip/base/error.h"

namespace deltazip::bindings {

void bind_errors(pybind11::module_& module) {
  namespace py = pybind11;
  py::register_exception<InvalidArgument>(module, "InvalidArgument", PyExc_ValueError);
  py::register_exception<NotFound>(module, "NotFound", PyExc_KeyError);
  py::register_exception<ResourceExhausted>(module, "ResourceExhausted", PyExc_RuntimeError);
  py::register_exception<InternalError>(module, "InternalError", PyExc_RuntimeError);
}

}  // namespace deltazip::bindings
