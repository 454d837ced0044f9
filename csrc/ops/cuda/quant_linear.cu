// W8A16 and W4A16 for few rows, up to 64 in a block (more are split, and the weights read anew for each 64), so that the
// weights' bytes bound it: they are read once, in 16-byte pieces that
// lie in the order in which the lanes of a warp multiply them (quant_linear_impl.h).
//
// A block has eight warps: kParts = 4 divide K, two divide the features, Tiles x 16 to a warp. In a step of 256 terms
// each part has a group of 64. Stages of [rows x 256 activations][weights of each warp] fill through cp.async, 2 to 4
// of them in up to 99 KiB; one barrier per step. Weights are A of the mma (16 features), activations B (8 rows). Parts
// are added in order at the end. Neither the number of rows nor Tiles changes what a sum adds, or when.
//
// Moved per launch: n k bytes of weights (I4: 17/32 of that) and 4 n of scales (I8) from DRAM; rows k 2 of activations
// per block, all but the first from L2; rows n 4 of output. Per byte of weights L2 gives rows / (16 Tiles) bytes of
// activations (I8), or rows / (8.5 Tiles) (I4), which is why launch_16_bit takes as many tiles as leave enough blocks.
//
// On paper only, not measured: an H100 (3.35 TB/s, 132 multiprocessors at 1.7 GHz) delivers 14.9 bytes per clock to
// each multiprocessor: 14.9 weights in I8, 28.1 in I4. It issues 128 lanes' instructions per clock, 64 of them to the
// integer units (LOP3, PRMT, SHF, IADD3, compares). Instructions of the main loop for sm_90, counted in the SASS (all
// warps work):
//                     per weight   integer   share of issue   share of integer units
//   I8   8 rows, 2 tiles    2.3      1.0          27 %              23 %
//   I8  32 rows, 4 tiles    2.5      0.9          29 %              21 %
//   I4   8 rows, 1 tile     4.7      2.4         104 %             105 %
//   I4   8 rows, 2 tiles    3.6      2.1          79 %              92 %
//   I4  32 rows, 4 tiles    4.2      2.0          92 %              88 %
//   I4  64 rows, 2 tiles    6.4      2.6         141 %             115 %
// So I8 leaves room, I4 is just about balanced, and beyond 32 rows I4 is bound by instructions (and by mma.sync: 64
// rows are 1800 of at most 2048 products per clock), not by DRAM. At 32 rows L2 gives I4 about as many bytes as DRAM.
#include "ops/cuda/quant_linear.h"

#include <algorithm>
#include <type_traits>

#include "ops/cuda/kernel.h"
#include "ops/cuda/quant_linear_impl.h"

namespace dllm::ops::cuda {
namespace {

using namespace dllm::cu;

constexpr int kThreads = 256;
constexpr int kParts = 4;  // warps that share a tile's features and divide K: part p has the groups 4 i + p
constexpr int kStepTerms = kParts * kGroup;
constexpr int kMaxShared = 99 * 1024;

// With the columns that are wanted made the whole matrix.
struct LaunchArgs : QuantLinearArgs {
  const float* row_scales;  // [n], I8
};

// --- Weights in registers --------------------------------------------------------------------------------------------
// Constants that the compiler can see would be loaded anew for every permute (seen in the SASS). So lane i offers word
// i, and shuffles hand the words round: their results stay in registers.
struct TableRegisters {
  uint32_t upper[2], change[2];
};
DLLM_DEVICE TableRegisters table_registers(int lane) {
  constexpr I4Table kTable;
  constexpr uint32_t kUpper0 = kTable.upper[0], kUpper1 = kTable.upper[1];
  constexpr uint32_t kChange0 = kTable.change[0], kChange1 = kTable.change[1];
  const uint32_t word = lane == 0 ? kUpper0 : lane == 1 ? kUpper1 : lane == 2 ? kChange0 : kChange1;
  return {{__shfl_sync(kAllLanes, word, 0), __shfl_sync(kAllLanes, word, 1)},
          {__shfl_sync(kAllLanes, word, 2), __shfl_sync(kAllLanes, word, 3)}};
}

// Eight codes into eight bytes v + 128.
DLLM_DEVICE void look_up(uint32_t codes, const TableRegisters& t, uint32_t& low, uint32_t& high) {
  const uint32_t in_half = codes & 0x77777777u;
  low = permute_bytes(t.upper[0], t.upper[1], in_half) ^ permute_bytes(t.change[0], t.change[1], codes);
  high = permute_bytes(t.upper[0], t.upper[1], in_half >> 16) ^ permute_bytes(t.change[0], t.change[1], codes >> 16);
}

// A byte u in 0..255 in the low half of 16 bits is u * 2^-133 in bf16 and u * 2^-24 in fp16: the bit patterns up to
// there are evenly spaced, subnormals and the first normal numbers alike. One fma makes of it (u - 128) / kUnit,
// exactly (PTX: without .ftz, fma.f16x2 and fma.bf16x2 support subnormals).
template <class T>
struct Bytes {
  static constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
  static constexpr float kUnit = kIsBf16 ? 64 : 512;
  static constexpr uint32_t kFactor = kIsBf16 ? 0x7f007f00u : 0x78007800u;  // 2^127, 2^15
  static constexpr uint32_t kOffset = kIsBf16 ? 0xc000c000u : 0xb400b400u;  // -128 / kUnit
};

// Four elements (quant_linear_impl.h) as bytes, of features g, g + 8, g, g + 8: a register of A for either.
template <class T>
DLLM_DEVICE void convert(uint32_t bytes, uint32_t& feature_g, uint32_t& feature_g8) {
  feature_g = fma_pairs<T>(bytes & 0x00ff00ffu, Bytes<T>::kFactor, Bytes<T>::kOffset);
  feature_g8 = fma_pairs<T>(permute_bytes(bytes, 0, 0x4341), Bytes<T>::kFactor, Bytes<T>::kOffset);
}

// --- 16-bit activations ----------------------------------------------------------------------------------------------
template <WeightFormat Format, int Rows, int Tiles>
struct Shape {
  static constexpr int kFeatures = kThreads / 32 / kParts * Tiles * kTileFeatures;  // of a block
  static constexpr int kActivationBytes = Rows * kStepTerms * 2;
  static constexpr int kStageBytes = kActivationBytes + kThreads / 32 * Tiles * kTileBytes<Format>;
  // Of a multiprocessor: what registers leave room for.
  static constexpr int kBlocks = Rows * Tiles < (Format == WeightFormat::I8 ? 128 : 64) ? 2 : 1;
  static constexpr int kStages = std::min(4, kMaxShared / kStageBytes);
  // Partial sums [kParts][Rows][kFeatures + 4]: the 4 keep the 8 features x 4 pairs of rows that a warp stores apart.
  static constexpr int kPartialRow = kFeatures + 4;
  static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kParts * Rows * kPartialRow * 4);
  static_assert(kStages >= 2 && kSharedBytes <= kMaxShared);
};

// Adds one group of 64 terms to acc[tile][rows / 8]. `activations` is the group's part of the rows, [Rows] of
// kStepTerms.
template <class T, WeightFormat Format, int Rows, int Tiles>
DLLM_DEVICE void multiply_group(const unsigned char* activations, const unsigned char* weights, int lane,
                                const TableRegisters& table, float (&acc)[Tiles][Rows / 8][4]) {
  const int g = lane / 4, t = lane % 4;
  const auto load_b = [&](int n, int h) {  // terms 32 h + 8 t .. + 7 of row 8 n + g: B of two k-steps
    return load128(activations + (8 * n + g) * (kStepTerms * 2) + ((4 * h + t) ^ (g & 1) * 4) * 16);
  };
  if constexpr (Format == WeightFormat::I8) {
    DLLM_UNROLL
    for (int h = 0; h < 2; ++h) {
      uint32_t w[Tiles][2][4];
      DLLM_UNROLL
      for (int f = 0; f < Tiles; ++f) {
        const uint4 q = load128(weights + f * kTileBytes<Format> + h * 512 + lane * 16);
        convert<T>(q.x, w[f][0][0], w[f][0][1]);
        convert<T>(q.y, w[f][0][2], w[f][0][3]);
        convert<T>(q.z, w[f][1][0], w[f][1][1]);
        convert<T>(q.w, w[f][1][2], w[f][1][3]);
      }
      DLLM_UNROLL
      for (int n = 0; n < Rows / 8; ++n) {
        const uint4 x = load_b(n, h);
        DLLM_UNROLL
        for (int f = 0; f < Tiles; ++f) {
          mma_m16n8k16<T>(acc[f][n], w[f][0], {x.x, x.y});
          mma_m16n8k16<T>(acc[f][n], w[f][1], {x.z, x.w});
        }
      }
    }
  } else {
    constexpr int kAtOnce = Tiles < 2 ? Tiles : 2;  // more would not fit into 128 registers
    DLLM_UNROLL
    for (int first = 0; first < Tiles; first += kAtOnce) {
      uint32_t w[kAtOnce][4][4];
      float2 scale[kAtOnce];
      DLLM_UNROLL
      for (int f = 0; f < kAtOnce; ++f) {
        const unsigned char* tile = weights + (first + f) * kTileBytes<Format>;
        const uint4 q = load128(tile + lane * 16);
        const uint32_t codes[4] = {q.x, q.y, q.z, q.w};
        DLLM_UNROLL
        for (int step = 0; step < 4; ++step) {
          uint32_t low, high;
          look_up(codes[step], table, low, high);
          convert<T>(low, w[f][step][0], w[f][step][1]);
          convert<T>(high, w[f][step][2], w[f][step][3]);
        }
        scale[f] = unpack<bf16>(*reinterpret_cast<const uint32_t*>(tile + kI4Scales + 4 * g));
      }
      DLLM_UNROLL
      for (int n = 0; n < Rows / 8; ++n) {
        const uint4 x0 = load_b(n, 0), x1 = load_b(n, 1);
        DLLM_UNROLL
        for (int f = 0; f < kAtOnce; ++f) {
          float sum[4] = {};
          mma_m16n8k16<T>(sum, w[f][0], {x0.x, x0.y});
          mma_m16n8k16<T>(sum, w[f][1], {x0.z, x0.w});
          mma_m16n8k16<T>(sum, w[f][2], {x1.x, x1.y});
          mma_m16n8k16<T>(sum, w[f][3], {x1.z, x1.w});
          float (&total)[4] = acc[first + f][n];
          total[0] = fmaf(scale[f].x, sum[0], total[0]);
          total[1] = fmaf(scale[f].x, sum[1], total[1]);
          total[2] = fmaf(scale[f].y, sum[2], total[2]);
          total[3] = fmaf(scale[f].y, sum[3], total[3]);
        }
      }
    }
  }
}

DLLM_DEVICE void store_sum(const LaunchArgs& a, int row, int64_t feature, float sum) {
  if (a.format == WeightFormat::I8) sum *= a.row_scales[feature];
  float* out = a.out + int64_t(row) * a.ldo + feature;
  *out = a.accumulate ? *out + sum : sum;
}

template <class T, WeightFormat Format, int Rows, int Tiles>
DLLM_KERNEL_OCCUPANCY(kThreads, (Shape<Format, Rows, Tiles>::kBlocks))
quant_linear_kernel(LaunchArgs a) {
  using S = Shape<Format, Rows, Tiles>;
  DLLM_DYNAMIC_SHARED(unsigned char, shared);
  const int first_row = int(blockIdx.y) * Rows;
  const int rows = min(min(*a.n_rows, a.rows) - first_row, Rows);
  if (rows <= 0) return;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int part = warp % kParts, tile_in_block = warp / kParts * Tiles;
  const int groups = int(a.k / kGroup), steps = (groups + kParts - 1) / kParts;
  const int64_t first_feature = int64_t(blockIdx.x) * S::kFeatures;
  const int64_t first_tile = first_feature / kTileFeatures + tile_in_block;
  const int tiles = int(min(a.n / kTileFeatures - first_tile, int64_t(Tiles)));  // of the warp's that exist

  // What this thread copies next, from and to: its weights, and 16 bytes of rows warp, warp + 8 ..; a warp copies 512
  // bytes of a row. Odd rows swap the halves of 128 bytes: then the eight lanes that a shared-memory access serves at
  // once in load_b, 4 x 16 bytes of two rows, meet all banks.
  const unsigned char* next_weights =
      static_cast<const unsigned char*>(a.weights) + (first_tile * groups + part) * kTileBytes<Format> + lane * 16;
  const int64_t tile_stride = int64_t(groups) * kTileBytes<Format>;
  const unsigned char* next_x =
      static_cast<const unsigned char*>(a.x) + ((first_row + warp) * a.k + lane * 8) * int64_t(sizeof(T));
  const int64_t x_stride = 8 * a.k * int64_t(sizeof(T));
  const int own_weights = S::kActivationBytes + warp * Tiles * kTileBytes<Format>;
  unsigned char* const to_x = shared + warp * (kStepTerms * 2) + (lane ^ (warp & 1) * 4) * 16;
  unsigned char* const to_weights = shared + own_weights + lane * 16;
  const int weight_steps = (groups - part + kParts - 1) / kParts;  // how many groups are the warp's
  const int x_steps = (groups - lane / 8 + kParts - 1) / kParts;  // and this lane's, of the activations
  int copied = 0, write_stage = 0;
  const auto copy_step = [&] {
    DLLM_UNROLL
    for (int i = 0; i < Rows / 8; ++i)
      copy_async16(to_x + write_stage + i * 8 * (kStepTerms * 2), next_x + i * x_stride,
                   copied < x_steps && i * 8 + warp < rows);
    if (copied < weight_steps) {
      DLLM_UNROLL
      for (int f = 0; f < Tiles; ++f) {
        const unsigned char* from = next_weights + f * tile_stride;
        unsigned char* const to = to_weights + write_stage + f * kTileBytes<Format>;
        copy_async16(to, from, f < tiles);
        if constexpr (Format == WeightFormat::I8)
          copy_async16(to + 512, from + 512, f < tiles);
        else if (lane < 2)
          copy_async16(to + kI4Scales, from + kI4Scales, f < tiles);
      }
    }
    next_weights += kParts * kTileBytes<Format>;
    next_x += kStepTerms * sizeof(T);
    ++copied;
    write_stage = write_stage + S::kStageBytes == S::kStages * S::kStageBytes ? 0 : write_stage + S::kStageBytes;
  };

  TableRegisters table = {};
  if constexpr (Format == WeightFormat::I4) table = table_registers(lane);
  float acc[Tiles][Rows / 8][4] = {};
  DLLM_UNROLL
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) copy_step();
    copy_async_commit();
  }
  int read_stage = 0;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<S::kStages - 2>();
    __syncthreads();  // the rows of this step are there, and nobody reads the stage that is filled next
    if (copied < steps) copy_step();
    copy_async_commit();
    if (step < weight_steps)
      multiply_group<T, Format, Rows, Tiles>(shared + read_stage + part * (kGroup * 2),
                                             shared + read_stage + own_weights, lane, table, acc);
    read_stage = read_stage + S::kStageBytes == S::kStages * S::kStageBytes ? 0 : read_stage + S::kStageBytes;
  }
  copy_async_wait<0>();
  __syncthreads();

  float* const partial = reinterpret_cast<float*>(shared);
  DLLM_UNROLL
  for (int f = 0; f < Tiles; ++f) {
    DLLM_UNROLL
    for (int n = 0; n < Rows / 8; ++n) {
      DLLM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * n + lane % 4 * 2 + i % 2, feature = (tile_in_block + f) * 16 + lane / 4 + i / 2 * 8;
        partial[(part * Rows + row) * S::kPartialRow + feature] = acc[f][n][i];
      }
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < rows * S::kFeatures; i += kThreads) {
    const int row = i / S::kFeatures, feature = i % S::kFeatures;
    if (first_feature + feature >= a.n) continue;
    float sum = 0;
    DLLM_UNROLL
    for (int p = 0; p < kParts; ++p) sum += partial[(p * Rows + row) * S::kPartialRow + feature];
    store_sum(a, first_row + row, first_feature + feature, sum * Bytes<T>::kUnit);
  }
}

// --- fp32 activations ------------------------------------------------------------------------------------------------
constexpr int kRowsF32 = 8;  // of a block

template <WeightFormat Format>
DLLM_KERNEL_OCCUPANCY(kParts * 32, 1)
quant_linear_f32_kernel(LaunchArgs a) {
  DLLM_SHARED(float, partial, [kParts][kRowsF32][kTileFeatures]);
  const int first_row = int(blockIdx.y) * kRowsF32, rows = min(min(*a.n_rows, a.rows) - first_row, kRowsF32);
  if (rows <= 0) return;
  const int lane = int(threadIdx.x) % 32, part = int(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int groups = int(a.k / kGroup);
  const TableRegisters table = table_registers(lane);
  const float* const x = static_cast<const float*>(a.x) + int64_t(first_row) * a.k + t * 8;

  float acc[kRowsF32][2] = {};
  for (int group = part; group < groups; group += kParts) {
    const unsigned char* const tile =
        static_cast<const unsigned char*>(a.weights) + (int64_t(blockIdx.x) * groups + group) * kTileBytes<Format>;
    const uint4 q = load128_once(tile + lane * 16);
    uint32_t bytes[8];
    float2 scale = make_float2(1, 1);
    if constexpr (Format == WeightFormat::I8) {
      const uint4 q1 = load128_once(tile + 512 + lane * 16);
      const uint32_t words[8] = {q.x, q.y, q.z, q.w, q1.x, q1.y, q1.z, q1.w};
      DLLM_UNROLL
      for (int i = 0; i < 8; ++i) bytes[i] = words[i];
    } else {
      const uint32_t words[4] = {q.x, q.y, q.z, q.w};
      DLLM_UNROLL
      for (int i = 0; i < 4; ++i) look_up(words[i], table, bytes[2 * i], bytes[2 * i + 1]);
      scale = unpack<bf16>(*reinterpret_cast<const uint32_t*>(tile + kI4Scales + 4 * g));
    }
    float w[32];
    DLLM_UNROLL
    for (int i = 0; i < 32; ++i) w[i] = float(int(bytes[i / 4] >> i % 4 * 8 & 0xff) - 128);
    DLLM_UNROLL
    for (int row = 0; row < kRowsF32; ++row) {
      if (row >= rows) break;
      float sum[2] = {};
      DLLM_UNROLL
      for (int i = 0; i < 4; ++i) {  // four of the lane's terms
        const uint4 bits = load128(x + row * a.k + group * kGroup + i / 2 * 32 + i % 2 * 4);
        const float v[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
                            __uint_as_float(bits.w)};
        DLLM_UNROLL
        for (int j = 0; j < 4; ++j) {
          sum[0] = fmaf(v[j], w[8 * i + 2 * j], sum[0]);
          sum[1] = fmaf(v[j], w[8 * i + 2 * j + 1], sum[1]);
        }
      }
      acc[row][0] = fmaf(scale.x, sum[0], acc[row][0]);
      acc[row][1] = fmaf(scale.y, sum[1], acc[row][1]);
    }
  }
  DLLM_UNROLL
  for (int row = 0; row < kRowsF32; ++row) {
    DLLM_UNROLL
    for (int j = 0; j < 2; ++j) {
      float sum = acc[row][j];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (t == 0) partial[part][row][g + 8 * j] = sum;
    }
  }
  __syncthreads();
  const int row = int(threadIdx.x) / kTileFeatures, feature = int(threadIdx.x) % kTileFeatures;
  if (row >= rows) return;
  float sum = 0;
  DLLM_UNROLL
  for (int p = 0; p < kParts; ++p) sum += partial[p][row][feature];
  store_sum(a, first_row + row, int64_t(blockIdx.x) * kTileFeatures + feature, sum);
}

// --- Launches --------------------------------------------------------------------------------------------------------
template <class T, WeightFormat Format, int Rows, int Tiles>
void launch_tiles(Stream stream, const LaunchArgs& a) {
  using S = Shape<Format, Rows, Tiles>;
  launch(stream, Format == WeightFormat::I8 ? "quant_linear_i8" : "quant_linear_i4",
         quant_linear_kernel<T, Format, Rows, Tiles>,
         dim3(unsigned((a.n + S::kFeatures - 1) / S::kFeatures), unsigned((a.rows + Rows - 1) / Rows)), kThreads,
         S::kSharedBytes, a);
}

// Tiles of a warp: Small or twice as many, the latter where that leaves `enough` blocks. For 8 rows that is two per
// multiprocessor of an H100; more rows are bound by L2, and there fewer activations outweigh idle multiprocessors.
template <class T, WeightFormat Format, int Rows, int Small>
void launch_rows(Stream stream, const LaunchArgs& a, int enough) {
  if (a.n >= int64_t(enough) * Shape<Format, Rows, 2 * Small>::kFeatures)
    launch_tiles<T, Format, Rows, 2 * Small>(stream, a);
  else
    launch_tiles<T, Format, Rows, Small>(stream, a);
}

template <class T, WeightFormat Format>
void launch_16_bit(Stream stream, const LaunchArgs& a) {
  if (a.rows <= 8)
    launch_rows<T, Format, 8, 1>(stream, a, 264);
  else if (a.rows <= 16)
    launch_rows<T, Format, 16, 2>(stream, a, 96);
  else if (a.rows <= 32)
    launch_rows<T, Format, 32, 2>(stream, a, 96);
  else
    launch_tiles<T, Format, 64, 2>(stream, a);
}

template <WeightFormat Format>
void launch_f32(Stream stream, const LaunchArgs& a) {
  launch(stream, Format == WeightFormat::I8 ? "quant_linear_i8_f32" : "quant_linear_i4_f32",
         quant_linear_f32_kernel<Format>,
         dim3(unsigned(a.n / kTileFeatures), unsigned((a.rows + kRowsF32 - 1) / kRowsF32)), kParts * 32, 0, a);
}

template <WeightFormat Format>
void launch_format(Stream stream, DType type, const LaunchArgs& a) {
  switch (type) {
    case DType::F32:
      return launch_f32<Format>(stream, a);
    case DType::BF16:
      return launch_16_bit<bf16, Format>(stream, a);
    case DType::F16:
      return launch_16_bit<half, Format>(stream, a);
  }
}

}  // namespace

void quant_linear(Stream stream, DType type, const QuantLinearArgs& args) {
  quant_bytes(args.format, args.n, args.k);  // for its checks
  const int64_t begin = args.column_begin, end = args.column_end < 0 ? args.n : args.column_end;
  if (begin < 0 || begin > end || end > args.n || begin % kTileFeatures || end % kTileFeatures)
    fail<ConfigError>("quant_linear: columns ", begin, " to ", end, " of ", args.n, " are not multiples of ",
                      kTileFeatures, " within the matrix");
  if (args.rows <= 0 || begin == end) return;
  const bool wide = args.format == WeightFormat::I8;
  const unsigned char* const weights = static_cast<const unsigned char*>(args.weights);
  const int64_t tile_bytes = wide ? kTileBytes<WeightFormat::I8> : kTileBytes<WeightFormat::I4>;
  LaunchArgs a{args, wide ? reinterpret_cast<const float*>(weights + args.n * args.k) + begin : nullptr};
  a.weights = weights + begin / kTileFeatures * (args.k / kGroup) * tile_bytes;
  a.n = end - begin;
  if (wide)
    launch_format<WeightFormat::I8>(stream, type, a);
  else
    launch_format<WeightFormat::I4>(stream, type, a);
}

}  // namespace dllm::ops::cuda
