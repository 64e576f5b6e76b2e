"""From a delta matrix and the Hessian of its inputs to codes and scales."""
