// The passes between GEMMs: every element type, widths of whole quads and others, counts below the capacity.
#include "ops/cuda/elementwise.h"

#include "cuda_emulator/case.h"
#include "ops/cuda/kernel.h"

namespace dllm {
namespace {

using namespace ops::cuda;
using emu::all_types;
using emu::bf16;
using emu::half;
using emu::type_of;

// Half a unit in the last place of a number near 1, and a little for fp32's own rounding.
template <class T>
constexpr double precision() {
  return 1e-6 + (std::is_same_v<T, float> ? 0 : std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11);
}

// values[r, i] against expected(r, i) for rows below the count; those beyond it are untouched.
template <class T, class F>
void check(emu::Case& c, const char* what, const T* values, int rows, int capacity, int columns, F&& expected) {
  const size_t n = size_t(capacity) * columns;
  c.output(values, n);
  const std::vector<T> v = c.host(values, n);
  for (int r = 0; r < capacity; ++r)
    for (int i = 0; i < columns; ++i) {
      const double x = cu::to_float(v[size_t(r) * columns + i]);
      if (r >= rows) {
        c.expect(std::isnan(x), std::string(what) + " writes beyond the count");
      } else {
        const double e = expected(r, i);
        c.expect_close(x, e, precision<T>() * (std::abs(e) + 0.1), what);
      }
    }
}

template <class T>
void embedding_case(emu::Case& c, int rows, int capacity, int d) {
  constexpr int kVocab = 11;
  const T* table = c.random<T>(kVocab * d);
  std::vector<int32_t> tokens;
  for (int r = 0; r < rows; ++r) tokens.push_back((7 * r + 10) % kVocab);
  float* out = c.device<float>(size_t(capacity) * d);
  embedding(c.stream(), {table, type_of<T>(), c.upload(tokens), c.upload<int32_t>({rows}), capacity, d, out});
  const std::vector<T> t = c.host(table, kVocab * d);
  check(c, "embedding", out, rows, capacity, d,
        [&](int r, int i) { return cu::to_float(t[size_t(tokens[r] * d + i)]); });
}

template <class T>
void rms_norm_case(emu::Case& c, int rows, int capacity, int d, bool gather) {
  const int sources = capacity + 3;
  const float *x = c.random<float>(size_t(sources) * d, 3.0), *weight = c.random<float>(d);
  std::vector<int32_t> from;
  for (int r = 0; r < rows; ++r) from.push_back((5 * r + 2) % sources);
  T* out = c.device<T>(size_t(capacity) * d);
  constexpr float kEps = 1e-2f;
  rms_norm(c.stream(), type_of<T>(),
           {x, gather ? c.upload(from) : nullptr, c.upload<int32_t>({rows}), capacity, d, weight, kEps, out});
  const std::vector<float> hx = c.host(x, size_t(sources) * d), hw = c.host(weight, d);
  std::vector<double> inverse;
  for (int r = 0; r < rows; ++r) {
    double square = 0;
    for (int j = 0; j < d; ++j) square += std::pow(double(hx[size_t(gather ? from[size_t(r)] : r) * d + j]), 2);
    inverse.push_back(1 / std::sqrt(square / d + kEps));
  }
  check(c, "rms_norm", out, rows, capacity, d, [&](int r, int i) {
    return hx[size_t(gather ? from[size_t(r)] : r) * d + i] * inverse[size_t(r)] * hw[size_t(i)];
  });
}

template <class T>
void rope_case(emu::Case& c, int rows, int capacity, int n_heads, int n_kv, int head_dim, bool with_bias) {
  const int heads = n_heads + 2 * n_kv, width = heads * head_dim, half_dim = head_dim / 2;
  constexpr int kPositions = 19;
  const float *qkv = c.random<float>(size_t(capacity) * width), *bias = with_bias ? c.random<float>(width) : nullptr;
  const float *cosines = c.random<float>(kPositions * half_dim), *sines = c.random<float>(kPositions * half_dim);
  std::vector<int32_t> positions, sequence;
  for (int r = 0; r < rows; ++r) {
    sequence.push_back(r % 3 == 2);
    positions.push_back((3 * r + 1) % kPositions);
  }
  std::vector<KvView> slabs;
  const int32_t capacities[] = {kPositions, kPositions + 5};
  for (int32_t n : capacities)
    slabs.push_back({c.device<T>(size_t(n) * n_kv * head_dim), c.device<T>(size_t(n) * n_kv * head_dim), n});
  T* q = c.device<T>(size_t(capacity) * n_heads * head_dim);
  rope_kv_write(c.stream(), type_of<T>(),
                {qkv, bias, cosines, sines, c.upload(positions), c.upload(sequence), c.upload<int32_t>({rows}),
                 capacity, n_heads, n_kv, head_dim, c.upload(slabs), q});

  const std::vector<float> x = c.host(qkv, size_t(capacity) * width), b = c.host(bias, with_bias ? size_t(width) : 0);
  const std::vector<float> cs = c.host(cosines, kPositions * half_dim), sn = c.host(sines, kPositions * half_dim);
  const auto plain = [&](int r, int head, int i) {
    const int at = head * head_dim + i;
    return double(x[size_t(r) * width + at]) + (with_bias ? b[size_t(at)] : 0.0f);
  };
  const auto rotated = [&](int r, int head, int i) {
    const int angle = positions[size_t(r)] * half_dim + i % half_dim;
    const double low = plain(r, head, i % half_dim), high = plain(r, head, i % half_dim + half_dim);
    return i < half_dim ? low * cs[size_t(angle)] - high * sn[size_t(angle)]
                        : high * cs[size_t(angle)] + low * sn[size_t(angle)];
  };
  check(c, "q", q, rows, capacity, n_heads * head_dim,
        [&](int r, int i) { return rotated(r, i / head_dim, i % head_dim); });
  for (size_t s = 0; s < 2; ++s) {
    const int n = slabs[s].capacity;
    std::vector<int> row_of(size_t(n), -1);  // the slab's positions, in order, then those that no row has
    for (int r = 0; r < rows; ++r)
      if (sequence[size_t(r)] == int(s)) row_of[size_t(positions[size_t(r)])] = r;
    for (int is_v = 0; is_v < 2; ++is_v) {
      const T* slab = static_cast<T*>(is_v ? slabs[s].v : slabs[s].k);
      const std::vector<T> v = c.host(slab, size_t(n) * n_kv * head_dim);
      c.output(slab, v.size());
      for (int head = 0; head < n_kv; ++head)
        for (int p = 0; p < n; ++p)
          for (int i = 0; i < head_dim; ++i) {
            const double value = cu::to_float(v[(size_t(head) * n + p) * head_dim + i]);
            const int r = row_of[size_t(p)], from = n_heads + is_v * n_kv + head;
            if (r < 0) {
              c.expect(std::isnan(value), "a position without a row is written");
            } else {
              const double e = is_v ? plain(r, from, i) : rotated(r, from, i);
              c.expect_close(value, e, precision<T>() * (std::abs(e) + 0.1), is_v ? "v" : "k");
            }
          }
    }
  }
}

template <class T>
void silu_mul_case(emu::Case& c, int rows, int capacity, int m) {
  const float* gate_up = c.random<float>(size_t(capacity) * 2 * m, 8.0);
  T* out = c.device<T>(size_t(capacity) * m);
  silu_mul(c.stream(), type_of<T>(), {gate_up, c.upload<int32_t>({rows}), capacity, m, out});
  const std::vector<float> x = c.host(gate_up, size_t(capacity) * 2 * m);
  check(c, "silu_mul", out, rows, capacity, m, [&](int r, int i) {
    const double gate = x[size_t(r) * 2 * m + i], up = x[size_t(r) * 2 * m + m + i];
    return gate / (1 + std::exp(-gate)) * up;
  });
}

void elementwise_embedding(emu::Case& c) {
  all_types([&]<class T>() {
    embedding_case<T>(c, 5, 7, 36);
    embedding_case<T>(c, 3, 3, 1030);
    embedding_case<T>(c, 0, 2, 4);
  });
}
void elementwise_rms_norm(emu::Case& c) {
  all_types([&]<class T>() {
    rms_norm_case<T>(c, 5, 7, 36, false);
    rms_norm_case<T>(c, 3, 3, 1031, true);
    rms_norm_case<T>(c, 2, 2, 2560, true);
    rms_norm_case<T>(c, 0, 2, 4, false);
  });
  rms_norm_case<float>(c, 1, 1, 8192, false);
}
void elementwise_many_rows(emu::Case& c) {  // more than blocks
  rms_norm_case<float>(c, 530, 531, 8, false);
}
void elementwise_rope(emu::Case& c) {
  all_types([&]<class T>() {
    rope_case<T>(c, 5, 7, 4, 2, 16, true);
    rope_case<T>(c, 6, 6, 3, 1, 6, false);
    rope_case<T>(c, 2, 2, 9, 3, 128, false);
    rope_case<T>(c, 0, 2, 2, 1, 8, true);
  });
}
void elementwise_silu_mul(emu::Case& c) {
  all_types([&]<class T>() {
    silu_mul_case<T>(c, 5, 7, 36);
    silu_mul_case<T>(c, 3, 3, 1030);
    silu_mul_case<T>(c, 0, 2, 4);
  });
}

void elementwise_accesses(emu::Case& c) {  // whole quads, nothing but the floor
  all_types([&]<class T>() {
    embedding_case<T>(c, 8, 8, 512);
    rms_norm_case<T>(c, 8, 8, 512, true);
    rope_case<T>(c, 8, 8, 4, 2, 128, true);
    silu_mul_case<T>(c, 8, 8, 512);
  });
  c.budget("sectors", 1.01);
  c.budget("banks", 1.01);
}

const emu::Registered r1("elementwise/embedding", elementwise_embedding);
const emu::Registered r2("elementwise/rms_norm", elementwise_rms_norm);
const emu::Registered r3("elementwise/many_rows", elementwise_many_rows);
const emu::Registered r4("elementwise/rope", elementwise_rope);
const emu::Registered r5("elementwise/silu_mul", elementwise_silu_mul);
const emu::Registered r6("elementwise/accesses", elementwise_accesses);

}  // namespace
}  // namespace dllm
