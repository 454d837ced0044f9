// Test cases for kernels that run in the emulator; the program cuda_cases runs them (cases/main.cpp).
//
//   void scale_odd(emu::Case& c) {
//     const float* x = c.random<float>(37, 1.0);
//     float* y = c.device<float>(37);
//     ops::cuda::scale(c.stream(), {x, y, 37});
//     c.output(y, 37);
//     c.expect_close(c.host(y, 37)[0], 2 * c.host(x, 37)[0], 1e-6, "first element");
//   }
//   static const emu::Registered r("scale/odd", scale_odd);
//
// Every case runs under each schedule, under sanitizers and under the race detector; its outputs must be the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_emulator/emulator.h"
#include "cuda_emulator/races.h"
#include "cuda_emulator/stream.h"

namespace dllm::emu {

class Case {
 public:
  Case() = default;
  ~Case();
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  Queue* stream() { return &queue_; }

  // Device memory of exactly n elements, filled with 0xFF.
  template <class T>
  T* device(size_t n) {
    return static_cast<T*>(take(n * sizeof(T)));
  }
  template <class T>
  T* upload(const std::vector<T>& values) {
    T* p = device<T>(values.size());
    copy_in(p, values.data(), values.size() * sizeof(T));
    return p;
  }
  // Values uniform in [-scale, scale], rounded to T; they depend on the calls before, not on the schedule.
  template <class T>
  T* random(size_t n, double scale = 1.0) {
    std::vector<T> values(n);
    for (T& v : values) v = rounded<T>(scale * (2 * uniform() - 1));
    return upload(values);
  }
  double uniform();  // [0, 1)

  // Waits for the stream and copies.
  template <class T>
  std::vector<T> host(const T* p, size_t n) {
    std::vector<T> values(n);
    copy_out(values.data(), p, n * sizeof(T));
    return values;
  }

  // A result: its bits must be the same in every run. Waits for the stream.
  template <class T>
  void output(const T* p, size_t n) {
    const std::vector<T> values = host(p, n);
    hash(values.data(), n * sizeof(T));
  }

  void expect(bool ok, const std::string& what);
  void expect_close(double value, double expected, double tolerance, const std::string& what);

  // f, and the work it pushed, must fail with an EmulatorError whose message holds `words`.
  template <class F>
  void expect_error(const std::string& words, F&& f) {
    std::string message;
    try {
      f();
      queue_.synchronize();
    } catch (const EmulatorError& e) {
      message = e.what();
    }
    expect(message.find(words) != message.npos, "an error with \"" + words + "\"; there was: \"" + message + "\"");
  }
  // Race build: one of the reports so far holds `words`; all of them are taken as expected.
  void expect_report(const std::string& words);

  // Race build: the most units moved over the least possible, at any source line of this case that makes at least 32
  // requests and 5 % of the units. `what`: "sectors" (device memory) or "banks" (shared memory).
  void budget(const std::string& what, double ratio);

  uint64_t hash() const { return hash_; }
  const std::vector<std::string>& failures() const { return failures_; }
  // After the case: waits for the stream and collects the race detector's reports.
  void finish();
  std::vector<std::string> over_budget(const std::vector<races::Site>& sites) const;

 private:
  template <class T>
  static T rounded(double x) {
    if constexpr (std::is_same_v<T, bf16>)
      return to_bf16(float(x));
    else if constexpr (std::is_same_v<T, half>)
      return to_half(float(x));
    else
      return T(x);
  }
  void* take(size_t bytes);
  void copy_in(void* to, const void* from, size_t bytes);
  void copy_out(void* to, const void* from, size_t bytes);
  void hash(const void* p, size_t bytes);

  Queue queue_{Queue::Mode::Lazy};
  std::vector<void*> memory_;
  uint64_t random_ = 0x9E3779B97F4A7C15ull, hash_ = 0xcbf29ce484222325ull;
  std::vector<std::string> failures_;
  struct Budget {
    std::string what;
    double ratio;
  };
  std::vector<Budget> budgets_;
};

struct Registered {
  Registered(const char* name, void (*run)(Case&));
};
struct CaseEntry {
  const char* name;
  void (*run)(Case&);
};
std::vector<CaseEntry>& registered_cases();

// The element types of kernels: float, bf16, half.
template <class T>
constexpr DType type_of() {
  return std::is_same_v<T, float> ? DType::F32 : std::is_same_v<T, bf16> ? DType::BF16 : DType::F16;
}

// f<T>() for every element type.
template <class F>
void all_types(F&& f) {
  f.template operator()<float>();
  f.template operator()<bf16>();
  f.template operator()<half>();
}

}  // namespace dllm::emu
