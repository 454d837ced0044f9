// The weights of a model in device memory: linear layers as [n, k] rows of the model's type for cuBLAS, or packed in
// 8 or 4 bits (ops/cuda/quant_linear.h); norms, biases and rotary tables in fp32.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/model.h"
#include "ops/quantize.h"
#include "runtime/device.h"

namespace dllm {

struct CudaLinear {
  int64_t n = 0, k = 0;
  ops::WeightFormat format = ops::WeightFormat::F32;  // I8 and I4 as such; else it is the model's type
  DeviceBuffer weight;

  bool quantized() const { return ops::is_quantized(format); }
};

struct CudaLayer {
  DeviceBuffer attn_norm;  // fp32 [d]
  CudaLinear qkv;  // [(n_heads + 2 n_kv) head_dim, d]
  DeviceBuffer qkv_bias;  // fp32, or empty
  CudaLinear attn_out;  // [d, n_heads head_dim]
  DeviceBuffer ffn_norm;  // fp32 [d]
  CudaLinear gate_up;  // [2 mlp, d]: gate, then up
  CudaLinear down;  // [d, mlp]

  size_t bytes() const;
};

struct CudaWeights {
  ModelInfo info;
  DeviceBuffer embedding;  // [vocab, d] of embedding_dtype
  DType embedding_dtype = DType::F32;
  DeviceBuffer cos, sin;  // fp32 [max_positions, head_dim / 2]
  std::vector<CudaLayer> layers;
  DeviceBuffer final_norm;  // fp32 [d]
  CudaLinear head;  // [vocab, d]
};

CudaWeights load_cuda_weights(const ModelSpec& spec, const Checkpoint& checkpoint, DType dtype,
                              Quantization quantization, const LoadProgress& progress, Device& device);

}  // namespace dllm
