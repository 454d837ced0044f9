// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), counter based: a draw depends on
// (seed, step, position, token id, stream) and on nothing else, so neither batch, threads nor device can change it.
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/host_device.h"

namespace dllm {

enum class NoiseStream : uint32_t {
  Token = 0,  // one draw per vocabulary id: which token
  Selection = 1,  // token id 0: which position
};

struct NoiseKey {
  uint64_t seed;
  uint32_t step;  // the sequence's own forward index
  uint32_t position;  // absolute position, prompt included
};

// Uniform in the open interval (0, 1): 52 random bits and a half.
DLLM_HD inline double philox_uniform(NoiseKey key, uint32_t token_id, NoiseStream stream) {
  uint32_t c0 = token_id, c1 = key.position, c2 = key.step, c3 = uint32_t(stream);
  uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (double(uint64_t(c0 >> 6) << 26 | (c1 >> 6)) + 0.5) * 0x1p-52;
}

DLLM_HD inline double gumbel(double u) { return -std::log(-std::log(u)); }

// No draw of gumbel(philox_uniform(...)) exceeds this: -ln(-ln(1 - 2^-53)).
inline constexpr double kMaxGumbel = 36.75;

}  // namespace dllm
