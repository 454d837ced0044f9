// Orders of ids by a key, for std::sort, std::nth_element and heaps: in place, where std::stable_sort would take memory.
#pragma once

#include <cstdint>

namespace dllm {

// Falling key; equal keys by rising id. A total order, so that every algorithm gives the same result.
template <class Key>
auto by_falling(Key key) {
  return [key](int32_t a, int32_t b) {
    const auto x = key(a), y = key(b);
    return x != y ? x > y : a < b;
  };
}

}  // namespace dllm
