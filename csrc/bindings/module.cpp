#include "bindings/bindings.h"

PYBIND11_MODULE(_C, module) {
  namespace bindings = deltazip::bindings;
  module.doc() = "The compiled engine. Token ids and numbers cross this border.";
  module.attr("__version__") = DELTAZIP_VERSION;
  bindings::bind_errors(module);
  bindings::bind_codec(module);
  bindings::bind_config(module);
  bindings::bind_sampling(module);
  bindings::bind_events(module);
  bindings::bind_stats(module);
  bindings::bind_engine(module);
}
