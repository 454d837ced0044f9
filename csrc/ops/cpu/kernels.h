// The inner loops, once per instruction set: single-threaded functions on raw pointers, reached through a table that is
// chosen at run time. Everything above them (splitting over threads, packing, argument handling) is compiled once, for
// the baseline CPU.
//
// This header is read by translation units compiled for AVX-512. It must define no inline function and instantiate no
// template: the linker keeps one copy of those, and it could be the one an older CPU cannot run.
#pragma once

#include <cstdint>

namespace dllm::ops::cpu {

// Columns of the right-hand side's panels (see linear.h and kv_layout.h), and the widest padding of a row of scores.
inline constexpr int64_t kColumns = 32;
// A GEMM's call per block of K: this many bytes of a panel's column, so that the block of the panel (128 KiB) stays in L2
// while all rows pass over it.
inline constexpr int64_t kBlockBytes = 4096;
// The I4 format (quantize.h): terms along K that share a scale, the values that indices stand for, and those as the packed
// weights' bytes mean them.
inline constexpr int64_t kGroup = 64;
inline constexpr float kI4Values[16] = {-127, -98, -77, -61, -46, -33, -21, -10, 1, 13, 24, 36, 50, 65, 83, 107};
inline constexpr uint8_t kI4Unsigned[16] = {1, 30, 51, 67, 82, 95, 107, 118, 129, 141, 152, 164, 178, 193, 211, 235};
inline constexpr float kI4Stretches[] = {0.8f, 0.85f, 0.9f, 0.95f, 1.0f, 1.05f, 1.1f, 1.15f, 1.2f, 1.25f, 1.3f};

// What a tile of a row's logits adds to its statistics; merged in tile order (row_stats.cpp).
struct TileStats {
  float max;  // over the tile; -inf: every id is filtered
  bool finite;
  int32_t top1_id, top2_id;  // -1: none
  float top1, top2;
  double sum;  // sum of exp(x - max)
  double weighted_sum;  // sum of exp(x - max) * (x - max)
};

// The softmax's terms for one chunk of keys:  m = max score,  e = 2^(scale * (score - m)),  sum = sum e.
struct SoftmaxChunk {
  int64_t rows, n;  // n valid columns
  float* scores;  // [rows, n rounded up to 32]: overwritten by e, zero beyond n; where `bf16` is given, only if `keep`
  int64_t lds;
  uint16_t* bf16;  // e rounded to bf16, likewise padded; or null
  int64_t ldb;
  bool keep;
  float scale;
  float *max, *sum;  // [rows]
};

// out[i] = sum over c = 0, 1, ... of weights[c * ldw] * x[c * ldx + i], as fp32 or bf16
struct WeightedSum {
  const float* x;  // [count, n rounded up to 32]
  int64_t ldx;
  const float* weights;
  int64_t ldw, count, n;
  void* out;
  bool bf16;
};

// The draws of ids [first_id, first_id + n) of one position (see philox.h; stream Token).
struct DrawArgs {
  uint64_t seed;
  uint32_t step, position, first_id;
  int64_t n;
  uint64_t least;  // of the 52 random bits
};

// One row of values against the slab's row of one position (see kv_layout.h).
struct CompareArgs {
  const float* v;  // [n_kv * head_dim]
  int64_t n_kv, head_dim;
  const void* cached;  // the position's element of panel 0; bf16: of its pair's first position
  int64_t panel_stride;  // elements
  bool bf16, odd;  // odd: the second position of its pair
};
struct CompareSums {
  double dot, v_square, cached_square;
};

enum class Write { Store, AddTo, SiluMul };

struct WriteArgs {
  Write what;
  int64_t rows, columns;  // columns of the output: up to 32, SiluMul up to 16
  const float* c;  // [rows, 32]
  const float* bias;  // [32] or null
  void* out;
  int64_t ldo;
  const int32_t* out_rows;  // row r goes to row out_rows[r] of `out`; null: to row r
  bool bf16;
};

// One row of activations to 8 bits (linear.h).
struct QuantizeArgs {
  const void* x;  // [n] fp32 or bf16
  bool bf16;
  int64_t n, n_padded;  // n_padded: a multiple of kGroup
  void* out;  // [n_padded] as the GEMM reads A; zero from n on
  float* scale;  // NaN where x is not finite
  // What sums of products with this row start with, because packed weights are unsigned: -128 times the sum of the
  // quantised terms, of all of them and of each group.
  int32_t* offset;
  int32_t* group_offsets;  // [n_padded / kGroup]
};

struct RotateArgs {
  const float* x;  // [head_dim]
  const float *cos, *sin;  // [head_dim / 2]
  int64_t half;
  void* out;  // [head_dim] fp32 or bf16
  bool bf16;
};

struct Kernels {
  // True: gemm_bf16 reads A as bf16. False: the CPU has no bf16 dot product and A must be widened to fp32 first.
  bool bf16_a;

  // C[rows, 32] = A[rows, k] B[k, 32], or += where `accumulate`. B is (part of) a packed panel; lda in elements of A.
  void (*gemm_f32)(int64_t rows, int64_t k, const void* a, int64_t lda, const void* b, float* c, int64_t ldc,
                   bool accumulate);
  void (*gemm_bf16)(int64_t rows, int64_t k, const void* a, int64_t lda, const void* b, float* c, int64_t ldc,
                    bool accumulate);
  // A in 8 bits, as quantize_row leaves it, of this many bytes an element: 2 where the CPU has no 8-bit dot product.
  int64_t quantized_size;
  // B I8: C in integers. offsets [rows].
  void (*gemm_i8)(int64_t rows, int64_t k, const void* a, int64_t lda, const int32_t* offsets, const void* b,
                  int32_t* c, int64_t ldc, bool accumulate);
  // B I4, k in groups: C before the rows' scales. offsets [rows, ld_offsets].
  void (*gemm_i4)(int64_t rows, int64_t groups, const void* a, int64_t lda, const int32_t* offsets, int64_t ld_offsets,
                  const void* b, float* c, int64_t ldc, bool accumulate);
  // C of gemm_i8 to fp32, in place, and C of gemm_i4.
  void (*scale_i8)(int64_t rows, float* c, int64_t ldc, const float* row_scale, const float* column_scale);
  void (*scale_i4)(int64_t rows, float* c, int64_t ldc, const float* row_scale);
  void (*quantize_row)(const QuantizeArgs& args);
  // w [kGroup] to indices and a bf16 scale; false, and the scale NaN, where one is not finite.
  bool (*quantize_group)(const float* w, uint8_t* index, uint16_t* scale);
  void (*write)(const WriteArgs& args);
  void (*softmax_chunk)(const SoftmaxChunk& args);
  // Chunks' maxima m_c and sums s_c [chunks, rows rounded up to 16] -> the weight of chunk c's terms, in place of m_c:
  //   2^(scale * (m_c - M)) / sum over c of 2^(scale * (m_c - M)) s_c,  M = max m_c
  void (*softmax_weights)(int64_t rows, int64_t chunks, float scale, float* max_in_weights_out, const float* sums,
                          int64_t ld);
  void (*weighted_sum)(const WeightedSum& args);
  // out[i] = x[i] * scale, fp32 or bf16
  void (*scale_row)(const float* x, float scale, int64_t n, void* out, bool bf16);
  // out[i] += factor * x[i], x fp32 or bf16
  void (*axpy)(float factor, const void* x, bool bf16, int64_t n, float* out);
  void (*rms_norm_row)(const float* x, const float* weight, float eps, int64_t n, void* out, bool bf16);
  // v is rounded to bf16 first where the cached row is. Sums are fp64, in the same order on every instruction set.
  void (*compare_values)(const CompareArgs& args, CompareSums* out);
  void (*rotate)(const RotateArgs& args);
  void (*widen)(const uint16_t* x, int64_t n, float* out);
  // x [n padded to 32] is changed: divided by `temperature` unless that is 1, `bias` (or null) added before, columns
  // n.. and `banned` set to -inf, and `masked` too once the softmax has seen it (both relative to the tile; < 0: none).
  // first_id is the id of column 0.
  void (*tile_stats)(float* x, int64_t n, const float* bias, float temperature, int64_t banned, int64_t masked,
                     int32_t first_id, TileStats* out);
  // The columns, relative to first_id and ascending, whose draw's 52 bits are at least `least`; returns how many.
  int64_t (*draws_from)(const DrawArgs& args, int32_t* columns);
};

const Kernels& kernels();  // of current_isa()

// One per kernels_<isa>.cpp; DLLM_HAVE_* says which of them are built.
namespace portable {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_vnni {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}

}  // namespace dllm::ops::cpu
