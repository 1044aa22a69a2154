// main [--quick] SUITE..: runs the suites named, or all.
#include <cstdio>
#include <cstring>

#include "check.h"
#include "suites.h"

int main(int argc, char** argv) {
  const struct {
    const char* name;
    void (*run)();
  } kSuites[] = {
      {"gram_registers", gram_registers},
      {"gram_tensor_cores", gram_tensor_cores},
      {"gram_tables", gram_tables},
      {"gram_long", gram_long},
      {"combine", combine},
      {"grad_drop", grad_drop},
      {"trimmed_mean", trimmed_mean},
      {"min_norm", min_norm},
      {"bounded_min_norm", bounded_min_norm},
      {"dual_cone", dual_cone},
      {"frank_wolfe", frank_wolfe},
      {"simplex_lp", simplex_lp},
      {"cagrad", cagrad},
      {"krum", krum},
      {"projected_gradient", projected_gradient},
      {"random_weights", random_weights},
      {"fairgrad", fairgrad},
      {"spectral", spectral},
      {"pcgrad", pcgrad},
      {"gradvac", gradvac},
  };
  check::quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
  const int first = check::quick ? 2 : 1;
  for (const auto& suite : kSuites) {
    bool named = argc == first;
    for (int i = first; i < argc; ++i) named |= strcmp(argv[i], suite.name) == 0;
    if (named) suite.run();
  }
  printf("%d cases, %d failures\n", check::num_cases, check::num_failures);
  return check::num_failures > 0 || check::num_cases == 0;
}
