// Micro-kernels for quantised weights: C[R rows, 32] = A[R, k] B[k, 32] in integers, A signed 8 bits, B unsigned 8 bits (I8)
// or 4-bit indices of 8-bit values with a scale per group along k (I4); see linear.h. With VNNI one instruction multiplies and adds four bytes per
// column; elsewhere bytes are widened to 16 bits and multiplied in pairs. Both are exact, so every instruction set gives the
// same integers.
#pragma once

#include "ops/cpu/gemm_impl.h"

namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE {
namespace {

typedef int32_t vi_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));

DLLM_INLINE void store_ints(int32_t* p, vi v) { *reinterpret_cast<vi_mem*>(p) = v; }

constexpr int kStep = 4;  // terms along K that lie together in a column

#ifdef DLLM_DOT_I8

typedef int8_t quantized;
constexpr int kColumnLanes = 1;  // of an accumulator, for each column
typedef vu bytes;  // four terms each of W columns

DLLM_INLINE vi start_at(int32_t offset) { return offset - vi{}; }

DLLM_INLINE bytes load_i8(const uint8_t* p, int v) { return reinterpret_cast<bytes>(_mm512_loadu_si512(p + v * 64)); }
// Columns 0 to 15 are the low halves of 64 bytes, columns 16 to 31 the high ones.
DLLM_INLINE bytes load_i4(const uint8_t* p, int v, __m512i values) {
  const bytes both = load_i8(p, 0), index = (v ? both >> 4 : both) & 0x0f0f0f0fu;
  return reinterpret_cast<bytes>(_mm512_shuffle_epi8(values, reinterpret_cast<__m512i>(index)));
}
DLLM_INLINE __m512i load_values(const uint8_t* p) {
  return _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DLLM_INLINE vi dot(vi s, bytes b, const quantized* a) {
  int32_t four;
  __builtin_memcpy(&four, a, 4);
  return reinterpret_cast<vi>(
      _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(s), reinterpret_cast<__m512i>(b), _mm512_set1_epi32(four)));
}

#else

typedef int16_t quantized;
constexpr int kColumnLanes = 2;
typedef int16_t bytes __attribute__((vector_size(W * 4)));  // four terms each of W / 2 columns, widened
typedef uint8_t packed_bytes __attribute__((vector_size(W * 2), aligned(1), may_alias));

DLLM_INLINE vi start_at(int32_t offset) {  // in the first lane of each column
  typedef int64_t pairs __attribute__((vector_size(W * 4)));
  return reinterpret_cast<vi>(int64_t(uint32_t(offset)) - pairs{});
}
DLLM_INLINE bytes widen_bytes(packed_bytes b) { return __builtin_convertvector(b, bytes); }
DLLM_INLINE bytes load_i8(const uint8_t* p, int v) {
  return widen_bytes(*reinterpret_cast<const packed_bytes*>(p + v * 2 * W));
}
DLLM_INLINE bytes load_i4(const uint8_t* p, int v, packed_bytes values) {
  constexpr int kHalf = 64 / (2 * W);  // vectors of low halves
  const packed_bytes both = *reinterpret_cast<const packed_bytes*>(p + v % kHalf * 2 * W);
  const packed_bytes index = v < kHalf ? both & uint8_t(15) : both >> 4;
#if DLLM_WIDTH == 16
  return widen_bytes(reinterpret_cast<packed_bytes>(
      _mm256_shuffle_epi8(reinterpret_cast<__m256i>(values), reinterpret_cast<__m256i>(index))));
#elif DLLM_WIDTH == 8
  return widen_bytes(reinterpret_cast<packed_bytes>(
      _mm_shuffle_epi8(reinterpret_cast<__m128i>(values), reinterpret_cast<__m128i>(index))));
#else
  (void)values;
  packed_bytes out;
  for (int i = 0; i < 2 * W; ++i) out[i] = kI4Unsigned[index[i]];
  return widen_bytes(out);
#endif
}
// The table of 16 in every 16 bytes.
DLLM_INLINE packed_bytes load_values(const uint8_t* p) {
  packed_bytes v;
  for (int i = 0; i < 2 * W; ++i) v[i] = p[i % 16];
  return v;
}
DLLM_INLINE vi dot(vi s, bytes b, const quantized* a) {
  int64_t four;
  __builtin_memcpy(&four, a, 8);
#if DLLM_WIDTH == 16
  return s + reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(b), _mm512_set1_epi64(four)));
#elif DLLM_WIDTH == 8
  return s + reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(b), _mm256_set1_epi64x(four)));
#elif defined(__x86_64__)
  return s + reinterpret_cast<vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(b), _mm_set1_epi64x(four)));
#else
  for (int i = 0; i < W; ++i) s[i] += b[2 * i] * a[i % 2 * 2] + b[2 * i + 1] * a[i % 2 * 2 + 1];
  return s;
#endif
}

#endif

typedef quantized quantized_mem __attribute__((vector_size(W * sizeof(quantized)), aligned(1), may_alias));

constexpr int kByteVectors = int(kColumns) * kColumnLanes / W;  // accumulators for a panel's row
constexpr int kVectorColumns = W / kColumnLanes;

// Most vectors of accumulators per row that R rows leave room for.
constexpr int byte_vectors(int rows) {
#if DLLM_WIDTH == 16
  return rows > 0 ? 2 : 0;
#else
  return rows == 1 ? 4 : 2;
#endif
}

// An accumulator's columns, one after the other.
DLLM_INLINE void column_sums(vi s, int32_t (&out)[kVectorColumns]) {
  if constexpr (kColumnLanes == 1) {
    store_ints(out, s);
  } else {
    for (int i = 0; i < kVectorColumns; ++i) out[i] = s[2 * i] + s[2 * i + 1];
  }
}

template <int R>
struct ByteRows {
  RowPointers<R> rows;
  ByteRows(const quantized* a, int64_t lda) : rows(a, lda * int64_t(sizeof(quantized))) {}
  DLLM_INLINE const quantized* at(int r, int64_t term) const {
    return reinterpret_cast<const quantized*>(rows.at(r, term * int64_t(sizeof(quantized))));
  }
};

// p += ld, now: the compiler would compute the addresses of all rows before the loop and have no registers to keep them.
template <class T>
DLLM_INLINE void next_row(T*& p, int64_t ld) {
  p += ld;
  __asm__ volatile("" : "+r"(p));
}

// offsets [R]: what a row's sums start with.
template <int R, int V>
__attribute__((noinline)) void tile_i8(int64_t k, const quantized* a, int64_t lda, const int32_t* offsets,
                                       const uint8_t* b, int32_t* c, int64_t ldc, bool accumulate) {
  const ByteRows<R> rows(a, lda);
  for (int g = 0; g < kByteVectors; g += V) {
    vi s[R][V];
    DLLM_UNROLL
    for (int r = 0; r < R; ++r) DLLM_UNROLL
    for (int v = 0; v < V; ++v) s[r][v] = accumulate ? vi{} : start_at(offsets[r]);
    const uint8_t* p = b;
    for (int64_t i = 0; i < k; i += kStep, p += kStep * kColumns) {
      prefetch_b(p);
      bytes w[V];
      DLLM_UNROLL
      for (int v = 0; v < V; ++v) w[v] = load_i8(p, g + v);
      DLLM_UNROLL
      for (int r = 0; r < R; ++r) DLLM_UNROLL
      for (int v = 0; v < V; ++v) s[r][v] = dot(s[r][v], w[v], rows.at(r, i));
    }
    DLLM_UNROLL
    for (int r = 0; r < R; ++r) DLLM_UNROLL
    for (int v = 0; v < V; ++v) {
      int32_t t[kVectorColumns];
      column_sums(s[r][v], t);
      int32_t* out = c + r * ldc + (g + v) * kVectorColumns;
      for (int j = 0; j < kVectorColumns; ++j) out[j] = t[j] + (accumulate ? out[j] : 0);
    }
  }
}

// c += sum * scale for an accumulator's columns; scale in bf16.
DLLM_INLINE void add_scaled(vi s, vf scale, float* c) {
  if constexpr (kColumnLanes == 1) {
    store(c, fma(__builtin_convertvector(s, vf), scale, load(c)));
  } else {
    int32_t t[kVectorColumns];
    column_sums(s, t);
    for (int j = 0; j < kVectorColumns; ++j) {
#ifdef __FMA__
      c[j] = __builtin_fmaf(float(t[j]), scale[j], c[j]);
#else
      c[j] = float(t[j]) * scale[j] + c[j];
#endif
    }
  }
}

// The first kVectorColumns of W scales.
DLLM_INLINE vf load_scales(const uint16_t* p) {
  if constexpr (kColumnLanes == 1) return widen(p);
  vf v = {};
  for (int j = 0; j < kVectorColumns; ++j) v[j] = as_float(uint32_t(p[j]) << 16);
  return v;
}

// offsets [R, ld_offsets]: what a row's sums start with in each group.
template <int R, int V>
__attribute__((noinline)) void tile_i4(int64_t groups, const quantized* a, int64_t lda, const int32_t* offsets,
                                       int64_t ld_offsets, const uint8_t* b, float* c, int64_t ldc, bool accumulate) {
  const ByteRows<R> rows(a, lda);
  const auto values = load_values(kI4Unsigned);
  if (!accumulate)
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < kColumns; j += W) store(c + r * ldc + j, vf{});
  for (int g = 0; g < kByteVectors; g += V) {
    const uint8_t* p = b;
    for (int64_t group = 0; group < groups; ++group) {
      __builtin_prefetch(p + kPrefetchBytes);
      vf scale[V];
      DLLM_UNROLL
      for (int v = 0; v < V; ++v)
        scale[v] = load_scales(reinterpret_cast<const uint16_t*>(p) + (g + v) * kVectorColumns);
      p += 2 * kColumns;
      vi s[R][V];
      const int32_t* offset = offsets + group;
      DLLM_UNROLL
      for (int r = 0; r < R; ++r) {
        const vi start = start_at(*offset);
        next_row(offset, ld_offsets);
        DLLM_UNROLL
        for (int v = 0; v < V; ++v) s[r][v] = start;
      }
      for (int64_t i = group * kGroup; i < (group + 1) * kGroup; i += kStep, p += kStep * kColumns / 2) {
        __builtin_prefetch(p + kPrefetchBytes);
        bytes w[V];
        DLLM_UNROLL
        for (int v = 0; v < V; ++v) w[v] = load_i4(p, g + v, values);
        DLLM_UNROLL
        for (int r = 0; r < R; ++r) DLLM_UNROLL
        for (int v = 0; v < V; ++v) s[r][v] = dot(s[r][v], w[v], rows.at(r, i));
      }
      float* out = c + g * kVectorColumns;
      DLLM_UNROLL
      for (int r = 0; r < R; ++r) {
        DLLM_UNROLL
        for (int v = 0; v < V; ++v) add_scaled(s[r][v], scale[v], out + v * kVectorColumns);
        next_row(out, ldc);
      }
    }
  }
}

template <int R>
struct ByteTiles {
  template <class... Args>
  static void i8(int rows, Args... args) {
    if (rows == R) return tile_i8<R, byte_vectors(R)>(args...);
    if constexpr (R > 1) ByteTiles<R - 1>::i8(rows, args...);
  }
  template <class... Args>
  static void i4(int rows, Args... args) {
    if (rows == R) return tile_i4<R, byte_vectors(R)>(args...);
    if constexpr (R > 1) ByteTiles<R - 1>::i4(rows, args...);
  }
};

void gemm_i8(int64_t rows, int64_t k, const void* a, int64_t lda, const int32_t* offsets, const void* b, int32_t* c,
             int64_t ldc, bool accumulate) {
  const quantized* x = static_cast<const quantized*>(a);
  for_row_tiles(rows, [&](int64_t r, int h) {
    ByteTiles<kMaxRows>::i8(h, k, x + r * lda, lda, offsets + r, static_cast<const uint8_t*>(b), c + r * ldc, ldc,
                            accumulate);
  });
}

void gemm_i4(int64_t rows, int64_t groups, const void* a, int64_t lda, const int32_t* offsets, int64_t ld_offsets,
             const void* b, float* c, int64_t ldc, bool accumulate) {
  const quantized* x = static_cast<const quantized*>(a);
  for_row_tiles(rows, [&](int64_t r, int h) {
    ByteTiles<kMaxRows>::i4(h, groups, x + r * lda, lda, offsets + r * ld_offsets, ld_offsets,
                            static_cast<const uint8_t*>(b), c + r * ldc, ldc, accumulate);
  });
}

// In place: float(c) * row_scale[r] * column_scale.
void scale_i8(int64_t rows, float* c, int64_t ldc, const float* row_scale, const float* column_scale) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < kColumns; j += W) {
      float* p = c + r * ldc + j;
      const vi terms = *reinterpret_cast<const vi_mem*>(p);
      store(p, __builtin_convertvector(terms, vf) * row_scale[r] * load(column_scale + j));
    }
}

void scale_i4(int64_t rows, float* c, int64_t ldc, const float* row_scale) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < kColumns; j += W) store(c + r * ldc + j, load(c + r * ldc + j) * row_scale[r]);
}

}  // namespace
}  // namespace dllm::ops::cpu::DLLM_ISA_NAMESPACE
