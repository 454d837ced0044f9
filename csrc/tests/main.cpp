// dllm_tests [NAME]: runs the native tests whose name contains NAME.

#include <cstdio>
#include <cstring>
#include <exception>

#include "tests/check.h"

int main(int argc, char** argv) {
  int passed = 0, failed = 0;
  for (const auto& c : dllm::test::cases()) {
    if (argc > 1 && !std::strstr(c.name, argv[1])) continue;
    try {
      c.run();
      ++passed;
    } catch (const std::exception& e) {
      ++failed;
      std::printf("FAILED %s\n  %s\n", c.name, e.what());
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
