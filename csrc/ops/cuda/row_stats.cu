// Folds a vocabulary tile's logits into the rows' statistics. Reads 4 n bytes per row, once: a block has a row, and a part
// of 8192 logits lies in its registers while the block goes through it three times, with a reduction after each:
//   1. the highest logit, the two best ids, whether all are finite
//   2. the sums of exponentials, in fp64; for sampling, every id's noisy logit in fp32
//   3. the ids that may hold the best noisy logit, exactly
// A draw costs ten rounds of Philox and two logarithms. Ids that could not win with the greatest noise there is have
// none; of the others the fp32 logarithms single out those (nearly always one) that need the fp64 ones. The bounds leave
// more room than all rounding errors together, so the id is the one that comparing all of them in fp64 gives.
#include "ops/cuda/row_stats.h"

#include "ops/cuda/kernel.h"

namespace dllm::ops::cuda {
namespace {

using namespace cu;

constexpr int kMaxThreads = 1024;  // of a block; fewer for a narrow tile
constexpr int kMaxWarps = kMaxThreads / 32;  // no more than a warp has lanes
constexpr int kElements = 8;  // of a part, in a thread's registers
constexpr int kMaxBlocks = 192;  // one runs on each SM
constexpr float kInfinity = INFINITY;
constexpr double kMinGumbel = -3.61;  // no draw lies below: -ln(-ln(2^-53))

// A proposable id, as an integer that is larger for a higher logit, and for the lower id of two that are equal. 0: none.
DLLM_DEVICE uint64_t candidate(float logit, int32_t id) {
  const float x = logit + 0.0f;  // makes -0 0
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = bits >> 31 ? ~bits : bits | 1u << 31;
  return uint64_t(bits) << 32 | uint32_t(~id);
}
DLLM_DEVICE int32_t id_of(uint64_t candidate) { return int32_t(~uint32_t(candidate)); }
DLLM_DEVICE float logit_of(uint64_t candidate) {
  uint32_t bits = uint32_t(candidate >> 32);
  bits = bits >> 31 ? bits & ~(1u << 31) : ~bits;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The two best.
struct BestTwo {
  uint64_t first, second;

  DLLM_DEVICE void offer(uint64_t other) {
    second = other > first ? first : (other > second ? other : second);
    first = other > first ? other : first;
  }
};
DLLM_DEVICE BestTwo best_two_of_warp(BestTwo x) {
  DLLM_UNROLL
  for (int offset = 16; offset; offset >>= 1) {
    const uint64_t first = __shfl_xor_sync(kAllLanes, x.first, offset);
    const uint64_t second = __shfl_xor_sync(kAllLanes, x.second, offset);
    x.offer(first);
    x.offer(second);
  }
  return x;
}

struct Sample {
  double score;  // with noise
  int32_t id;  // -1: none
  float logit;

  // Ties go to the lowest id, whatever the order of the candidates.
  DLLM_DEVICE void offer(const Sample& other) {
    if (other.id >= 0 && (id < 0 || other.score > score || (other.score == score && other.id < id))) *this = other;
  }
};
DLLM_DEVICE Sample best_of_warp(Sample x) {
  DLLM_UNROLL
  for (int offset = 16; offset; offset >>= 1)
    x.offer({__shfl_xor_sync(kAllLanes, x.score, offset), __shfl_xor_sync(kAllLanes, x.id, offset),
             __shfl_xor_sync(kAllLanes, x.logit, offset)});
  return x;
}

// gumbel(u) in fp32, within 2e-5.
DLLM_DEVICE float approximate_gumbel(double u) { return -logf(u < 0.5 ? -logf(float(u)) : -log1pf(-float(1.0 - u))); }

// What a part adds to a row.
struct PartStats {
  float max;
  bool finite;
  BestTwo best;
  double sum, weighted_sum;
  Sample sample;
};

// state and a part after it. With M the higher maximum: s = sum_t s_t exp(m_t - M), w = sum_t (w_t + (m_t - M) s_t)
// exp(m_t - M).
DLLM_DEVICE void fold(RowStatsState& state, const PartStats& part) {
  RowStats& stats = state.stats;
  stats.finite = stats.finite && part.finite;
  if (!stats.finite) return;
  if (part.sum > 0) {
    if (state.sum == 0 || part.max > state.max) {
      if (state.sum > 0) {
        const double difference = double(state.max) - double(part.max), scale = exp(difference);
        state.weighted_sum = (state.weighted_sum + difference * state.sum) * scale;
        state.sum *= scale;
      }
      state.max = part.max;
      state.sum += part.sum;
      state.weighted_sum += part.weighted_sum;
    } else {
      const double difference = double(part.max) - double(state.max), scale = exp(difference);
      state.sum += part.sum * scale;
      state.weighted_sum += (part.weighted_sum + difference * part.sum) * scale;
    }
  }
  // Later parts hold higher ids: only a strictly better logit displaces one.
  const auto offer = [&](uint64_t c) {
    if (c == 0) return;
    const float logit = logit_of(c);
    if (stats.top1_id < 0 || logit > stats.top1_logit) {
      stats.top2_id = stats.top1_id;
      stats.top2_logit = stats.top1_logit;
      stats.top1_id = id_of(c);
      stats.top1_logit = logit;
    } else if (stats.top2_id < 0 || logit > stats.top2_logit) {
      stats.top2_id = id_of(c);
      stats.top2_logit = logit;
    }
  };
  offer(part.best.first);
  offer(part.best.second);
  if (part.sample.id >= 0 && (stats.sampled_id < 0 || part.sample.score > state.best_noisy)) {
    state.best_noisy = part.sample.score;
    stats.sampled_id = part.sample.id;
    stats.sampled_logit = part.sample.logit;
  }
}

// log sum exp = M + ln s,  entropy = ln s - w / s
DLLM_DEVICE void finish(RowStatsState& state, bool sampled) {
  RowStats& stats = state.stats;
  if (!stats.finite || stats.top1_id < 0) {
    stats = RowStats{};
    stats.finite = false;
    return;
  }
  const double log_sum = log(state.sum), entropy = log_sum - state.weighted_sum / state.sum;
  stats.log_sum_exp = double(state.max) + log_sum;
  stats.entropy = entropy > 0.0 ? entropy : 0.0;
  if (!sampled) {
    stats.sampled_id = stats.top1_id;
    stats.sampled_logit = stats.top1_logit;
  }
}

DLLM_KERNEL(kMaxThreads)
row_stats_tile_kernel(RowStatsArgs a) {
  DLLM_SHARED(float, warp_max, [kMaxWarps]);
  DLLM_SHARED(BestTwo, warp_best, [kMaxWarps]);
  DLLM_SHARED(double, warp_sums, [2][kMaxWarps]);
  DLLM_SHARED(float, warp_noisy, [kMaxWarps]);
  DLLM_SHARED(Sample, warp_sample, [kMaxWarps]);
  const int threads = int(blockDim.x), warps = threads / 32, width = threads * kElements;  // of a part
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, rows = *a.n_rows;
  const bool sampling = a.params.noise_scale > 0;
  // For sampling, every thread keeps its logits, and those with noise, kElements of each: only it looks at them, so that
  // there is no barrier, and no bank conflict. (In registers they would be too many beside what a draw needs.)
  DLLM_DYNAMIC_SHARED(float, kept);
  float *own = kept + thread, *own_noisy = own + width;
  const bool aligned = a.ld % 4 == 0 && reinterpret_cast<uintptr_t>(a.logits) % 16 == 0;  // else a logit at a time
  const auto column = [&](int base, int e) { return base + (e / 4 * threads + thread) * 4 + e % 4; };

  for (int r = int(blockIdx.x); r < rows; r += int(gridDim.x)) {
    const float* logits = a.logits + int64_t(r) * a.ld;
    for (int base = 0; base < a.n; base += width) {
      const bool fresh = a.first && base == 0;  // the row has no state yet

      // 1. What is past the end, or banned, is -inf.
      float x[kElements];
      DLLM_UNROLL
      for (int e = 0; e < kElements; e += 4) {
        const int c = column(base, e);
        float quad[4] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
        if (aligned && c + 4 <= a.n) {
          load_elements(logits + c, quad);
        } else {
          DLLM_UNROLL
          for (int j = 0; j < 4; ++j)
            if (c + j < a.n) quad[j] = logits[c + j];
        }
        DLLM_UNROLL
        for (int j = 0; j < 4; ++j) x[e + j] = quad[j];
      }
      bool finite = true;
      float highest = -kInfinity;
      BestTwo best{0, 0};
      DLLM_UNROLL
      for (int e = 0; e < kElements; ++e) {
        const int32_t id = a.first_id + column(base, e);
        if (a.params.temperature != 1.0f) x[e] /= a.params.temperature;
        if (id == a.params.banned_id) x[e] = -kInfinity;
        finite = finite && x[e] < kInfinity;
        highest = x[e] > highest ? x[e] : highest;
        if (x[e] > -kInfinity && id != a.params.mask_id) best.offer(candidate(x[e], id));
      }
      highest = max_warp(highest);
      best = best_two_of_warp(best);
      if (lane == 0) {
        warp_max[warp] = highest;
        warp_best[warp] = best;
      }
      finite = __syncthreads_and(finite);
      highest = max_warp(lane < warps ? warp_max[lane] : -kInfinity);
      best = best_two_of_warp(lane < warps ? warp_best[lane] : BestTwo{0, 0});

      // 2. Without a finite logit there is nothing to add: all threads of the block see the same.
      PartStats part{highest, finite, best, 0.0, 0.0, {0.0, -1, 0.0f}};
      if (finite && highest > -kInfinity) {
        double sum = 0, weighted = 0;
        DLLM_UNROLL
        for (int e = 0; e < kElements; ++e) {
          float d = x[e] - highest;
          d = d > -128.0f ? d : -128.0f;  // finite: 0 * -inf would be NaN
          const double weight = double(expf(d));
          sum += weight;
          weighted += weight * double(d);
        }
        sum = sum_warp(sum);
        weighted = sum_warp(weighted);

        const bool draws = sampling && best.first != 0;
        NoiseKey key{};
        float best_noisy = -kInfinity, slack = 0;
        if (draws) {
          // The best id's logit + noise is above `reached`; so is the winner's, which is therefore within 41 noise_scale
          // of the highest logit, and its error in fp32 below 1e-4 noise_scale + 1e-6 |highest|. `slack` is four times that.
          key = a.keys[r];
          const double scale = a.params.noise_scale, top = double(logit_of(best.first));
          const double before = fresh || a.state[r].stats.sampled_id < 0 ? -double(kInfinity) : a.state[r].best_noisy;
          const double lowest = top + kMinGumbel * scale, reached = before > lowest ? before : lowest;
          slack = float(5e-4 * scale + 4e-6 * (fabs(top) + (before > lowest ? fabs(before) : 0.0)));
          const float least = float(reached - kMaxGumbel * scale) - slack;
          best_noisy = float(before);
          DLLM_UNROLL
          for (int e = 0; e < kElements; ++e)
            own[e * threads] = a.first_id + column(base, e) == a.params.mask_id ? -kInfinity : x[e];
          for (int e = 0; e < kElements; ++e) {
            const float logit = own[e * threads];
            float noisy = -kInfinity;
            if (logit > -kInfinity && !(logit < least)) {
              const double u = philox_uniform(key, uint32_t(a.first_id + column(base, e)), NoiseStream::Token);
              noisy = logit + float(scale) * approximate_gumbel(u);
              best_noisy = noisy > best_noisy ? noisy : best_noisy;
            }
            own_noisy[e * threads] = noisy;
          }
          best_noisy = max_warp(best_noisy);
        }
        if (lane == 0) {
          warp_sums[0][warp] = sum;
          warp_sums[1][warp] = weighted;
          warp_noisy[warp] = best_noisy;
        }
        __syncthreads();
        part.sum = sum_warp(lane < warps ? warp_sums[0][lane] : 0.0);
        part.weighted_sum = sum_warp(lane < warps ? warp_sums[1][lane] : 0.0);

        // 3. NaN (noise_scale beyond fp32) makes every id a candidate.
        if (draws) {
          const float least = max_warp(lane < warps ? warp_noisy[lane] : -kInfinity) - slack;
          Sample sample{0.0, -1, 0.0f};
          for (int e = 0; e < kElements; ++e) {
            const float logit = own[e * threads];
            if (own_noisy[e * threads] < least || !(logit > -kInfinity)) continue;
            const int32_t id = a.first_id + column(base, e);
            const double noise = gumbel(philox_uniform(key, uint32_t(id), NoiseStream::Token));
            sample.offer({double(logit) + a.params.noise_scale * noise, id, logit});
          }
          sample = best_of_warp(sample);
          if (lane == 0) warp_sample[warp] = sample;
          __syncthreads();
          part.sample = best_of_warp(lane < warps ? warp_sample[lane] : Sample{0.0, -1, 0.0f});
        }
      }
      if (thread == 0) {
        RowStatsState state{};
        state.max = -kInfinity;
        state.best_noisy = -double(kInfinity);
        if (!fresh) state = a.state[r];
        fold(state, part);
        if (a.last && base + width >= a.n) finish(state, sampling);
        a.state[r] = state;
      }
      __syncthreads();  // the state and shared memory are used again
    }
  }
}

}  // namespace

void row_stats_tile(Stream stream, const RowStatsArgs& a) {
  if (a.capacity == 0) return;
  const dim3 blocks(unsigned(min(a.capacity, kMaxBlocks)));
  const int warps = (a.n + 32 * kElements - 1) / (32 * kElements);
  const dim3 threads(unsigned(32 * max(1, min(warps, kMaxWarps))));
  const size_t kept = threads.x * 2 * kElements * sizeof(float);
  launch(stream, "row_stats_tile", row_stats_tile_kernel, blocks, threads, kept, a);
}

}  // namespace dllm::ops::cuda
