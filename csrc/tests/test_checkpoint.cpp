#include "model/checkpoint.h"
#include "model/weights.h"
#include "runtime/error.h"
#include "runtime/json.h"
#include "tests/check.h"
#include "tests/tiny_model.h"

using namespace dllm;
using test::TempFolder;

namespace {

std::string header_file(const std::string& header, size_t data_bytes = 0) {
  std::string out(8, '\0');
  for (int i = 0; i < 8; ++i) out[size_t(i)] = char(uint64_t(header.size()) >> (8 * i));
  return out + header + std::string(data_bytes, 'x');
}

void open_with(const std::string& file) {
  const TempFolder f;
  f.write("config.json", test::tiny_config(Family::LLaDA));
  f.write("model.safetensors", file);
  const Checkpoint c(f.path());
}

void parse_config(const std::string& text) { ModelSpec::from_config(text, "config.json"); }

}  // namespace

TEST(json_reads_values_and_escapes) {
  const Json j = Json::parse(R"( {"a": [1, -2.5e3, true, null], "b\u00e9\ud83d\ude00": "x\n\"", "a": 2} )", "t");
  CHECK_EQ(j.find("a")->as_array("a")[1].as_number("n"), -2500.0);
  CHECK_EQ(j.find("b\xC3\xA9\xF0\x9F\x98\x80")->as_string("s"), "x\n\"");
  CHECK(j.find("c") == nullptr);
}

TEST(json_refuses_malformed_text) {
  for (const char* text : {"", "{", "[1,]", "{\"a\" 1}", "{\"a\":1,}", "tru", "1 2", "\"\\q\"", "\"\\ud800\"",
                           "\"\\u12\"", "\"\x01\"", "[1", "\"abc", "+1", ".5", "{a:1}", "nul"})
    CHECK_THROWS(CheckpointError, "not valid JSON", Json::parse(text, "t"));
  CHECK_THROWS(CheckpointError, "nested too deeply", Json::parse(std::string(100000, '['), "t"));
}

TEST(hostile_safetensors_headers_are_refused) {
  CHECK_THROWS(CheckpointError, "empty", open_with(""));
  CHECK_THROWS(CheckpointError, "too short", open_with("abc"));
  CHECK_THROWS(CheckpointError, "truncated", open_with(std::string(8, '\xff') + "{}"));
  CHECK_THROWS(CheckpointError, "not valid JSON", open_with(header_file("{\"a\":")));
  CHECK_THROWS(CheckpointError, "lacks", open_with(header_file(R"({"a":{"dtype":"F32"}})")));
  CHECK_THROWS(CheckpointError, "unknown dtype",
               open_with(header_file(R"({"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}})", 4)));
  CHECK_THROWS(CheckpointError, "outside its file",
               open_with(header_file(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4)));
  CHECK_THROWS(CheckpointError, "outside its file",
               open_with(header_file(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 16)));
  CHECK_THROWS(CheckpointError, "needs 12",
               open_with(header_file(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8)));
  CHECK_THROWS(
      CheckpointError, "impossible shape",
      open_with(header_file(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 8)));
  CHECK_THROWS(CheckpointError, "impossible shape",
               open_with(header_file(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 8)));
  CHECK_THROWS(CheckpointError, "twice",
               open_with(header_file(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                     R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
                                     1)));
}

TEST(every_truncation_of_a_checkpoint_is_refused) {
  const TempFolder f;
  test::write_tiny_model(f, Family::LLaDA);
  const std::string whole = [&] {
    std::ifstream in(f.path() + "/model.safetensors", std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  }();
  for (size_t n = 0; n < whole.size(); n += 1 + whole.size() / 97) {
    f.write("model.safetensors", whole.substr(0, n));
    CHECK_THROWS(CheckpointError, "", Checkpoint(f.path()));
  }
}

TEST(a_shard_index_cannot_lead_out_of_its_folder) {
  for (const char* shard : {"../x.safetensors", "/etc/passwd", "", ".hidden", "a/b"}) {
    const TempFolder f;
    f.write("config.json", test::tiny_config(Family::LLaDA));
    f.write("model.safetensors.index.json", std::string(R"({"weight_map":{"a":")") + shard + "\"}}");
    CHECK_THROWS(CheckpointError, "not the name of a shard", Checkpoint(f.path()));
  }
}

TEST(config_errors_name_the_key) {
  CHECK_THROWS(CheckpointError, "model_type", parse_config("{}"));
  CHECK_THROWS(CheckpointError, "\"gpt2\" is not supported", parse_config(R"({"model_type":"gpt2"})"));
  CHECK_THROWS(CheckpointError, "d_model is missing", parse_config(R"({"model_type":"llada"})"));
  CHECK_THROWS(CheckpointError, "must be an object", parse_config("[]"));
  auto changed = [](const std::string& from, const std::string& to) {
    std::string c = test::tiny_config(Family::LLaDA);
    c.replace(c.find(from), from.size(), to);
    return c;
  };
  CHECK_THROWS(CheckpointError, "alibi", parse_config(changed("\"n_layers\"", "\"alibi\": true, \"n_layers\"")));
  CHECK_THROWS(CheckpointError, "n_heads", parse_config(changed("\"n_heads\": 2", "\"n_heads\": 0")));
  CHECK_THROWS(CheckpointError, "multiple", parse_config(changed("\"d_model\": 32", "\"d_model\": 33")));
  CHECK_THROWS(CheckpointError, "n_kv_heads", parse_config(changed("\"n_kv_heads\": 2", "\"n_kv_heads\": 3")));
  CHECK_THROWS(CheckpointError, "mask_token_id",
               parse_config(changed("\"mask_token_id\": 1", "\"mask_token_id\": 70")));
  CHECK_THROWS(CheckpointError, "whole number", parse_config(changed("\"vocab_size\": 70", "\"vocab_size\": 7.5")));
}

TEST(unused_tensors_are_reported) {
  const TempFolder f;
  test::write_tiny_model(f, Family::Dream);
  const auto spec = ModelSpec::from_config(test::tiny_config(Family::Dream), "config.json");
  const Weights w = load_weights(spec, std::make_unique<Checkpoint>(f.path()), DType::F32, Quantization::None, {});
  CHECK(w.unused_tensors.empty());
  CHECK(w.resident_bytes() > 0);
}
