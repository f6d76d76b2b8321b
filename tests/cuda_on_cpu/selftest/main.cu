#include "harness.h"

int main(int argc, char** argv) {
  if (argc > 1 && cases().count(argv[1])) return cases()[argv[1]].run(), 0;
  for (const auto& [name, test] : cases()) {
    if (argc > 1) return std::fprintf(stderr, "no case %s\n", argv[1]), 2;
    if (!test.planted) test.run();
  }
}
