// sbmm_check [verify | verify=WORD | time | anchors | bytes | chains]...: SBMM on the current CUDA
// device, without the engine.

#include <cstdio>
#include <string_view>

#include "cuda/sbmm_cases.h"

int main(int argc, char** argv) {
  using namespace deltazip::bench;
  setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
  constexpr std::string_view kFiltered = "verify=";
  int failures = 0;
  try {
    for (int i = 1; i < argc; ++i) {
      const std::string_view what = argv[i];
      if (what == "verify") {
        failures += verify_sbmm("");
      } else if (what.starts_with(kFiltered)) {
        failures += verify_sbmm(what.substr(kFiltered.size()));
      } else if (what == "time") {
        time_sbmm(TimedCases::kAll);
      } else if (what == "anchors") {
        time_sbmm(TimedCases::kAnchors);
      } else if (what == "bytes") {
        time_sbmm(TimedCases::kBytes);
      } else if (what == "chains") {
        time_sbmm(TimedCases::kChains);
      } else {
        printf("unknown: %s; expected verify[=WORD], time, anchors, bytes or chains\n", argv[i]);
        return 2;
      }
    }
  } catch (const std::exception& error) {
    printf("FAIL %s\n", error.what());
    return 1;
  }
  return failures == 0 ? 0 : 1;
}
