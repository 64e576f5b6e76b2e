#include "bindings/bindings.h"

PYBIND11_MODULE(_C, module) {
  using namespace deltazip::bindings;
  module.doc() = "The compiled engine. Token ids and numbers cross this border.";
  module.attr("__version__") = DELTAZIP_VERSION;
  bind_errors(module);
  bind_config(module);
  bind_sampling(module);
  bind_events(module);
  bind_stats(module);
  bind_engine(module);
}
