// The one micro-kernel: C[R rows, 32] (+)= A[R, k] B[k, 32] for a panel B, A row-major. It serves the linear layers, the
// LM head, Q K^T and P V.
//
// R rows times V vectors of accumulators stay in registers over the whole K range: per term of K, V loads of B and R
// broadcasts of A feed R * V multiply-adds. Every element is a sum, in order, of chains of kChain terms along K, each a
// sequence of multiply-adds from zero: the same whatever R and V, and much more accurate than one long chain (the error
// grows with the square root of the chain's length plus that of their number).
#pragma once

#include "ops/cpu/kernels.h"
#include "ops/cpu/simd.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

// Accumulators must be registers: a loop over them that is not unrolled puts the whole array into memory.
#define DLLM_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t kChainF32 = 64, kChainBf16 = 128;  // divide kBlockBytes' terms

constexpr int kVectors = int(kColumns) / W;  // vectors in a panel's row

// Most rows per tile, and the vectors of accumulators that R rows leave room for: 32 registers with AVX-512, else 16, of
// which unpacking bf16 takes two more.
#if DLLM_WIDTH == 16
constexpr int kMaxRows = 14;
constexpr int vectors_f32(int) { return 2; }
constexpr int vectors_bf16(int) { return 2; }
#elif DLLM_WIDTH == 8
constexpr int kMaxRows = 6;
constexpr int vectors_f32(int rows) { return rows <= 3 ? 4 : 2; }
constexpr int vectors_bf16(int rows) { return rows <= 2 ? 4 : 2; }
#else
constexpr int kMaxRows = 5;
constexpr int vectors_f32(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }
constexpr int vectors_bf16(int rows) { return rows <= 2 ? 4 : 2; }
#endif

// How far ahead B is fetched: it comes from memory once per call, faster than the hardware's prefetcher alone brings it.
constexpr int kPrefetchBytes = 4096;

template <int R, int V>
DLLM_INLINE void write_tile(const vf (&s)[R][V], float* c, int64_t ldc, bool accumulate) {
  DLLM_UNROLL
  for (int r = 0; r < R; ++r) DLLM_UNROLL
  for (int v = 0; v < V; ++v) {
    float* p = c + r * ldc + v * W;
    store(p, accumulate ? load(p) + s[r][v] : s[r][v]);
  }
}

// Element (r, i) of A is at a + r * lda + i * 4 bytes. Rows are addressed from every third one, so that the addresses
// of 14 rows fit in the integer registers.
template <int R>
struct RowPointers {
  const char* base[(R + 2) / 3];
  int64_t ld;

  DLLM_INLINE RowPointers(const void* a, int64_t ld_bytes) : ld(ld_bytes) {
    for (int i = 0; i < (R + 2) / 3; ++i) base[i] = static_cast<const char*>(a) + 3 * i * ld_bytes;
  }
  DLLM_INLINE const char* at(int r, int64_t offset) const { return base[r / 3] + (r % 3) * ld + offset; }
};

DLLM_INLINE void prefetch_b(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kPrefetchBytes);
  __builtin_prefetch(static_cast<const char*>(p) + kPrefetchBytes + 64);
}

template <int R, int V>
__attribute__((noinline)) void tile_f32(int64_t k, const void* a, int64_t lda, const float* b, float* c, int64_t ldc,
                                        bool accumulate) {
  const RowPointers<R> rows(a, lda * 4);
  for (int g = 0; g < kVectors; g += V) {
    const float* p = b + g * W;
    for (int64_t i = 0; i < k;) {
      vf s[R][V] = {};
      for (const int64_t stop = i + kChainF32 < k ? i + kChainF32 : k; i < stop; ++i, p += kColumns) {
        prefetch_b(p);
        vf w[V];
        DLLM_UNROLL
        for (int v = 0; v < V; ++v) w[v] = load(p + v * W);
        DLLM_UNROLL
        for (int r = 0; r < R; ++r) {
          const vf x = splat(*reinterpret_cast<const float*>(rows.at(r, i * 4)));
          DLLM_UNROLL
          for (int v = 0; v < V; ++v) s[r][v] = fma(x, w[v], s[r][v]);
        }
      }
      write_tile<R, V>(s, c + g * W, ldc, accumulate || i > kChainF32);
    }
  }
}

#ifdef DLLM_DOT_BF16

// s + a.lo * b.lo + a.hi * b.hi for pairs of bf16.
DLLM_INLINE vf dot_pair(vf s, uint32_t a, vu b) {
  return _mm512_dpbf16_ps(s, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
}

template <int R, int V>
__attribute__((noinline)) void tile_bf16(int64_t k, const void* a, int64_t lda, const uint16_t* b, float* c,
                                         int64_t ldc, bool accumulate) {
  constexpr int64_t kPairs = kChainBf16 / 2;
  const RowPointers<R> rows(a, lda * 2);
  const uint16_t* p = b;
  const int64_t pairs = k / 2;
  int64_t i = 0;
  do {
    vf s[R][V] = {};
    for (const int64_t stop = i + kPairs < pairs ? i + kPairs : pairs; i < stop; ++i, p += 2 * kColumns) {
      prefetch_b(p);
      vu w[V];
      DLLM_UNROLL
      for (int v = 0; v < V; ++v) w[v] = load_bits(p + v * 2 * W);
      DLLM_UNROLL
      for (int r = 0; r < R; ++r) {
        const uint32_t x = *reinterpret_cast<const u32_mem*>(rows.at(r, i * 4));
        DLLM_UNROLL
        for (int v = 0; v < V; ++v) s[r][v] = dot_pair(s[r][v], x, w[v]);
      }
    }
    write_tile<R, V>(s, c, ldc, accumulate || i > kPairs);
  } while (i < pairs);
  if (k % 2) {  // half a pair: the last row of A may end here
    vf s[R][V];
    DLLM_UNROLL
    for (int r = 0; r < R; ++r) {
      const uint32_t x = *reinterpret_cast<const uint16_t*>(rows.at(r, pairs * 4));
      DLLM_UNROLL
      for (int v = 0; v < V; ++v) s[r][v] = dot_pair(vf{}, x, load_bits(p + v * 2 * W));
    }
    write_tile<R, V>(s, c, ldc, true);
  }
}

#else

// Without a bf16 dot product: A is fp32, pairs of B are two fp32 vectors.
template <int R, int V>
__attribute__((noinline)) void tile_bf16(int64_t k, const void* a, int64_t lda, const uint16_t* b, float* c,
                                         int64_t ldc, bool accumulate) {
  const RowPointers<R> rows(a, lda * 4);
  for (int g = 0; g < kVectors; g += V) {
    const uint16_t* p = b + g * 2 * W;
    for (int64_t i = 0; i < k;) {
      vf s[R][V] = {};
      for (const int64_t stop = i + kChainBf16 < k ? i + kChainBf16 : k; i < stop; i += 2, p += 2 * kColumns) {
        prefetch_b(p);
        vf w[V];
        DLLM_UNROLL
        for (int v = 0; v < V; ++v) w[v] = as_float(load_bits(p + v * 2 * W) << 16);
        DLLM_UNROLL
        for (int r = 0; r < R; ++r) {
          const vf x = splat(*reinterpret_cast<const float*>(rows.at(r, i * 4)));
          DLLM_UNROLL
          for (int v = 0; v < V; ++v) s[r][v] = fma(x, w[v], s[r][v]);
        }
        if (i + 1 == k) {  // half a pair: the last row of A may end here
          i = k;
          break;
        }
        DLLM_UNROLL
        for (int v = 0; v < V; ++v) w[v] = as_float(load_bits(p + v * 2 * W) & 0xffff0000u);
        DLLM_UNROLL
        for (int r = 0; r < R; ++r) {
          const vf x = splat(*reinterpret_cast<const float*>(rows.at(r, i * 4 + 4)));
          DLLM_UNROLL
          for (int v = 0; v < V; ++v) s[r][v] = fma(x, w[v], s[r][v]);
        }
      }
      write_tile<R, V>(s, c + g * W, ldc, accumulate || i > kChainBf16);
    }
  }
}

#endif

template <int R>
struct Tiles {
  // Runs the tile of `rows` <= R rows.
  static void f32(int rows, int64_t k, const void* a, int64_t lda, const float* b, float* c, int64_t ldc, bool add) {
    if (rows == R) return tile_f32<R, vectors_f32(R)>(k, a, lda, b, c, ldc, add);
    if constexpr (R > 1) Tiles<R - 1>::f32(rows, k, a, lda, b, c, ldc, add);
  }
  static void bf16(int rows, int64_t k, const void* a, int64_t lda, const uint16_t* b, float* c, int64_t ldc,
                   bool add) {
    if (rows == R) return tile_bf16<R, vectors_bf16(R)>(k, a, lda, b, c, ldc, add);
    if constexpr (R > 1) Tiles<R - 1>::bf16(rows, k, a, lda, b, c, ldc, add);
  }
};

// Tiles of equal height (32 rows: 11, 11, 10): the last one would otherwise be too thin to hide its latencies.
template <class Tile>
DLLM_INLINE void for_row_tiles(int64_t rows, Tile&& tile) {
  const int64_t tiles = (rows + kMaxRows - 1) / kMaxRows;
  const int64_t height = rows / tiles, taller = rows % tiles;
  for (int64_t t = 0, r = 0; t < tiles; ++t) {
    const int64_t h = height + (t < taller);
    tile(r, int(h));
    r += h;
  }
}

void gemm_f32(int64_t rows, int64_t k, const void* a, int64_t lda, const void* b, float* c, int64_t ldc,
              bool accumulate) {
  const float* x = static_cast<const float*>(a);
  for_row_tiles(rows, [&](int64_t r, int h) {
    Tiles<kMaxRows>::f32(h, k, x + r * lda, lda, static_cast<const float*>(b), c + r * ldc, ldc, accumulate);
  });
}

void gemm_bf16(int64_t rows, int64_t k, const void* a, int64_t lda, const void* b, float* c, int64_t ldc,
               bool accumulate) {
#ifdef DLLM_DOT_BF16
  constexpr int kSize = 2;
#else
  constexpr int kSize = 4;
#endif
  const char* x = static_cast<const char*>(a);
  for_row_tiles(rows, [&](int64_t r, int h) {
    Tiles<kMaxRows>::bf16(h, k, x + r * lda * kSize, lda, static_cast<const uint16_t*>(b), c + r * ldc, ldc,
                          accumulate);
  });
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
