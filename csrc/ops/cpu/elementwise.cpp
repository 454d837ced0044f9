#include "ops/elementwise.h"

#include <algorithm>
#include <cstring>

#include "ops/cpu/activations.h"
#include "ops/cpu/kernels.h"
#include "ops/cpu/kv_write.h"
#include "ops/linear.h"
#include "runtime/parallel.h"

namespace dllm::ops {
namespace {

// K of one head and position: 32 positions share a panel, so neighbouring elements are a panel row apart.
void write_k(const KvSlab& slab, int64_t position, int head, const float* k) {
  if (slab.dtype == DType::F32) {
    float* out = static_cast<float*>(slab.k) + slab.k_offset(position, head, 0);
    for (int i = 0; i < slab.head_dim; ++i) out[i * kPanel] = k[i];
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(slab.k) + slab.k_offset(position, head, 0);
  for (int i = 0; i < slab.head_dim; i += 2, out += 2 * kPanel) {
    out[0] = float_to_bf16(k[i]);
    out[1] = float_to_bf16(k[i + 1]);
  }
}

}  // namespace

// V likewise: 32 of its elements share a panel, in which they are neighbours (bf16: interleaved with the pair's other
// position).
void cpu::write_v(const KvSlab& slab, int64_t position, int head, const float* v) {
  for (int i = 0; i < slab.head_dim; i += kPanel) {
    const int n = std::min(kPanel, slab.head_dim - i);
    const int64_t at = slab.v_offset(position, head, i);
    if (slab.dtype == DType::F32) {
      std::memcpy(static_cast<float*>(slab.v) + at, v + i, size_t(n) * 4);
    } else {
      uint16_t* out = static_cast<uint16_t*>(slab.v) + at;
      for (int j = 0; j < n; ++j) out[2 * j] = float_to_bf16(v[i + j]);
    }
  }
}

void embedding(const EmbeddingArgs& args) {
  const auto widen = cpu::kernels().widen;
  parallel_for(args.rows, cpu::row_grain(args.d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t from = int64_t(args.tokens[r]) * args.d;
      float* out = args.out + r * args.ldo;
      if (args.dtype == DType::F32)
        std::memcpy(out, static_cast<const float*>(args.table) + from, size_t(args.d) * 4);
      else
        widen(static_cast<const uint16_t*>(args.table) + from, args.d, out);
    }
  });
}

void rms_norm(const RmsNormArgs& args) {
  const auto rms_norm_row = cpu::kernels().rms_norm_row;
  const bool bf16 = args.out_dtype == DType::BF16;
  const int64_t row_bytes = args.ldo * int64_t(size_of(args.out_dtype));
  parallel_for(args.rows, cpu::row_grain(args.d), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      rms_norm_row(args.x + (args.rows_in ? args.rows_in[r] : r) * args.ldx, args.weight, args.eps, args.d,
                   static_cast<char*>(args.out) + r * row_bytes, bf16);
  });
}

void rope_kv_write(const RopeKvArgs& args) {
  const auto& kernels = cpu::kernels();
  const int64_t hd = args.head_dim;
  const int first_k = args.n_heads, first_v = first_k + args.n_kv, heads = first_v + args.n_kv;
  const bool bf16 = args.dtype == DType::BF16;
  // Split over heads, rows inside: 32 positions of a head share their cache lines of K.
  parallel_for(heads, cpu::row_grain(args.rows * hd), [&](int64_t begin, int64_t end) {
    thread_local Buffer scratch;
    scratch.reserve(size_t(hd) * 4, "rotated head");
    float* rotated = scratch.as<float>();
    for (int head = int(begin); head < int(end); ++head)
      for (int64_t r = 0; r < args.rows; ++r) {
        const float* x = args.qkv + r * args.ldqkv + head * hd;
        const int64_t position = args.positions[r];
        const KvSlab& slab = args.slabs[args.row_to_slab[r]];
        if (head >= first_v) {
          cpu::write_v(slab, position, head - first_v, x);
          continue;
        }
        const bool is_k = head >= first_k;
        void* q = static_cast<char*>(args.q_out) + (r * args.ldq + head * hd) * int64_t(size_of(args.dtype));
        kernels.rotate({x, args.cos + position * (hd / 2), args.sin + position * (hd / 2), hd / 2, is_k ? rotated : q,
                        bf16 && !is_k});
        if (is_k) write_k(slab, position, head - first_k, rotated);
      }
  });
}

void read_kv(const KvSlab& slab, const int32_t* positions, int64_t n, float* k_out, float* v_out) {
  const auto value = [&](const void* base, int64_t offset) {
    return slab.dtype == DType::F32 ? static_cast<const float*>(base)[offset]
                                    : bf16_to_float(static_cast<const uint16_t*>(base)[offset]);
  };
  for (int64_t p = 0; p < n; ++p)
    for (int head = 0; head < slab.n_kv; ++head)
      for (int i = 0; i < slab.head_dim; ++i) {
        const int64_t to = (p * slab.n_kv + head) * slab.head_dim + i;
        k_out[to] = value(slab.k, slab.k_offset(positions[p], head, i));
        v_out[to] = value(slab.v, slab.v_offset(positions[p], head, i));
      }
}

}  // namespace dllm::ops
