// The smallest test harness that serves: TEST(name) { CHECK(...); }, each in its own function, all run by main.cpp.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace dllm::test {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail_at(const char* file, int line, const std::string& what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

template <class A, class B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream s;
  s << text << ": " << a << " and " << b << " differ";
  fail_at(file, line, s.str());
}

// The message of the E that f throws; fails if it throws nothing. Another exception passes through.
template <class E, class F>
std::string message_of(F&& f, const char* file, int line) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  }
  fail_at(file, line, "no exception was thrown");
}

}  // namespace dllm::test

#define TEST(name)                                                         \
  static void test_##name();                                               \
  static const ::dllm::test::Register register_##name{#name, test_##name}; \
  static void test_##name()

#define CHECK(condition) \
  if (!(condition)) ::dllm::test::fail_at(__FILE__, __LINE__, #condition)
#define CHECK_EQ(a, b) ::dllm::test::check_equal(a, b, #a " == " #b, __FILE__, __LINE__)
// CHECK_THROWS(ConfigError, "threshold", config.validate()): throws it, and the message holds the word.
#define CHECK_THROWS(E, word, ...)                                                                 \
  if (const std::string m = ::dllm::test::message_of<E>([&] { __VA_ARGS__; }, __FILE__, __LINE__); \
      m.find(word) == m.npos)                                                                      \
  ::dllm::test::fail_at(__FILE__, __LINE__, "message without \"" + std::string(word) + "\": " + m)
