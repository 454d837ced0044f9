// Engine::log_probs: how probable tokens are where they are hidden behind the mask.

#include <algorithm>
#include <cmath>

#include "cache/kv_cache.h"
#include "engine/engine.h"
#include "runtime/error.h"

namespace dllm {

namespace {

void check_hidden(const ModelSpec& spec, size_t index, const std::vector<int32_t>& tokens,
                  const std::vector<int32_t>& hidden) {
  const int64_t length = int64_t(tokens.size());
  if (length > spec.max_positions)
    fail<InputError>("sequence ", index, " has ", length, " tokens, beyond the model's context of ",
                     spec.max_positions);
  for (size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= spec.vocab_size)
      fail<InputError>("sequence ", index, " holds the id ", tokens[i], " at position ", i,
                       "; ids must be between 0 and ", spec.vocab_size - 1);
  const int32_t first =
      spec.logit_shift ? 1 : 0;  // where tokens are read from the left, nothing tells of the first one
  int32_t least = first;
  for (const int32_t p : hidden) {
    if (p < least || p >= length)
      fail<InputError>("sequence ", index, " hides position ", p, "; positions must ascend, between ", first, " and ",
                       length - 1);
    least = p + 1;
  }
}

double log_prob(const float* logits, int64_t vocab, int32_t token) {
  const double largest = *std::max_element(logits, logits + vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(double(logits[i]) - largest);
  return double(logits[token]) - largest - std::log(sum);
}

}  // namespace

std::vector<std::vector<double>> Engine::log_probs(const std::vector<std::vector<int32_t>>& sequences,
                                                   const std::vector<std::vector<int32_t>>& hidden) {
  if (sequences.size() != hidden.size())
    fail<InputError>("there are ", sequences.size(), " sequences and ", hidden.size(), " lists of hidden positions");
  for (size_t i = 0; i < sequences.size(); ++i) check_hidden(spec_, i, sequences[i], hidden[i]);
  const Exclusive exclusive(*this, "log_probs");

  std::vector<std::vector<double>> out(sequences.size());
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (hidden[i].empty()) continue;
    const int64_t length = int64_t(sequences[i].size());
    const KvCache kv(spec_, model_->info().dtype, length, model_->device());
    StepInput in;
    in.tokens = sequences[i];
    for (const int32_t p : hidden[i]) {
      in.tokens[size_t(p)] = spec_.mask_id;
      in.out_rows.push_back(p - (spec_.logit_shift ? 1 : 0));
    }
    for (int32_t p = 0; p < length; ++p) in.positions.push_back(p);
    in.sequences.push_back({0, length, length, kv.slabs()});
    model_->forward(in);
    int64_t ld = 0;
    const float* logits = model_->logits(ld);
    for (size_t r = 0; r < hidden[i].size(); ++r) {
      out[i].push_back(log_prob(logits + int64_t(r) * ld, spec_.vocab_size, sequences[i][size_t(hidden[i][r])]));
      if (!std::isfinite(out[i].back()))
        fail<NumericalError>("sequence ", i, ", position ", hidden[i][r], ": the logits are not finite");
    }
  }
  return out;
}

}  // namespace dllm
