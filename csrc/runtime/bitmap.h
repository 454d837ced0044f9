// A fixed-size set of positions.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace dllm {

class Bitmap {
 public:
  Bitmap() = default;
  explicit Bitmap(int64_t size) : size_(size), words_(size_t((size + 63) / 64)) {}

  // Makes it the empty set of another size, in the memory it has.
  void clear(int64_t size) {
    size_ = size;
    words_.assign(size_t((size + 63) / 64), 0);
  }

  int64_t size() const { return size_; }
  bool test(int64_t i) const { return words_[size_t(i / 64)] >> (i % 64) & 1; }
  void set(int64_t i) { words_[size_t(i / 64)] |= uint64_t(1) << (i % 64); }
  void reset(int64_t i) { words_[size_t(i / 64)] &= ~(uint64_t(1) << (i % 64)); }

  int64_t count() const {
    int64_t n = 0;
    for (uint64_t w : words_) n += std::popcount(w);
    return n;
  }
  bool any() const {
    for (uint64_t w : words_)
      if (w) return true;
    return false;
  }
  std::vector<int32_t> members() const {  // ascending
    std::vector<int32_t> out;
    list(out);
    return out;
  }
  // The same in a list that keeps its memory.
  void list(std::vector<int32_t>& out) const {
    out.clear();
    for_each([&](int64_t i) { out.push_back(int32_t(i)); });
  }
  // f(i) for every member, ascending. f may change the set below i.
  template <class F>
  void for_each(F&& f) const {
    for (size_t k = 0; k < words_.size(); ++k)
      for (uint64_t w = words_[k]; w; w &= w - 1) f(int64_t(k * 64) + std::countr_zero(w));
  }

 private:
  int64_t size_ = 0;
  std::vector<uint64_t> words_;
};

}  // namespace dllm
