#include "runtime/json.h"

#include <charconv>
#include <cmath>
#include <cstdint>

#include "runtime/error.h"

namespace dllm {

namespace {
constexpr int kMaxDepth = 64;  // hostile nesting must not exhaust the stack

const char* kind_name(Json::Kind k) {
  constexpr const char* names[] = {"null", "a boolean", "a number", "a string", "an array", "an object"};
  return names[int(k)];
}

[[noreturn]] void wrong_kind(const std::string& what, const char* wanted, Json::Kind got) {
  fail<CheckpointError>(what, " must be ", wanted, ", not ", kind_name(got));
}
}  // namespace

class JsonParser {
 public:
  JsonParser(std::string_view text, const std::string& source) : text_(text), source_(source) {}

  Json document() {
    Json v = value(0);
    skip_space();
    if (pos_ != text_.size()) bad("text after the end of the document");
    return v;
  }

 private:
  [[noreturn]] void bad(const char* why) {
    fail<CheckpointError>(source_, " is not valid JSON: ", why, " at byte ", pos_);
  }

  void skip_space() {
    while (pos_ < text_.size() &&
           (text_[pos_] == ' ' || text_[pos_] == '\t' || text_[pos_] == '\n' || text_[pos_] == '\r'))
      ++pos_;
  }

  char peek() {
    if (pos_ >= text_.size()) bad("unexpected end");
    return text_[pos_];
  }

  void expect(char c, const char* why) {
    if (peek() != c) bad(why);
    ++pos_;
  }

  bool take_word(std::string_view w) {
    if (text_.substr(pos_, w.size()) != w) return false;
    pos_ += w.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kMaxDepth) bad("nested too deeply");
    skip_space();
    Json v;
    switch (peek()) {
      case '{':
        object(v, depth);
        break;
      case '[':
        array(v, depth);
        break;
      case '"':
        v.kind_ = Json::Kind::String;
        v.string_ = string();
        break;
      case 't':
      case 'f':
        v.kind_ = Json::Kind::Bool;
        v.bool_ = text_[pos_] == 't';
        if (!take_word(v.bool_ ? "true" : "false")) bad("unknown word");
        break;
      case 'n':
        if (!take_word("null")) bad("unknown word");
        break;
      default:
        v.kind_ = Json::Kind::Number;
        v.number_ = number();
    }
    return v;
  }

  void object(Json& v, int depth) {
    v.kind_ = Json::Kind::Object;
    ++pos_;
    skip_space();
    if (peek() == '}') {
      ++pos_;
      return;
    }
    for (;;) {
      skip_space();
      if (peek() != '"') bad("a member name must be a string");
      std::string key = string();
      skip_space();
      expect(':', "':' expected");
      v.object_.emplace_back(std::move(key), value(depth + 1));
      skip_space();
      if (peek() == '}') break;
      expect(',', "',' or '}' expected");
    }
    ++pos_;
  }

  void array(Json& v, int depth) {
    v.kind_ = Json::Kind::Array;
    ++pos_;
    skip_space();
    if (peek() == ']') {
      ++pos_;
      return;
    }
    for (;;) {
      v.array_.push_back(value(depth + 1));
      skip_space();
      if (peek() == ']') break;
      expect(',', "',' or ']' expected");
    }
    ++pos_;
  }

  // Python's json module writes these words for non-finite floats; config.json files may hold them.
  double number() {
    if (take_word("NaN")) return NAN;
    if (take_word("Infinity")) return INFINITY;
    if (take_word("-Infinity")) return -INFINITY;
    double d = 0;
    const char* first = text_.data() + pos_;
    auto [end, ec] = std::from_chars(first, text_.data() + text_.size(), d);
    const bool starts_well = *first == '-' || (*first >= '0' && *first <= '9');
    if (ec != std::errc() || !starts_well) bad("not a value");
    pos_ += size_t(end - first);
    return d;
  }

  unsigned hex4() {
    unsigned u = 0;
    if (pos_ + 4 > text_.size()) bad("unexpected end");
    auto [end, ec] = std::from_chars(text_.data() + pos_, text_.data() + pos_ + 4, u, 16);
    if (ec != std::errc() || end != text_.data() + pos_ + 4) bad("bad \\u escape");
    pos_ += 4;
    return u;
  }

  static void append_utf8(std::string& s, unsigned c) {
    if (c < 0x80) {
      s += char(c);
    } else if (c < 0x800) {
      s += char(0xC0 | c >> 6);
      s += char(0x80 | (c & 63));
    } else if (c < 0x10000) {
      s += char(0xE0 | c >> 12);
      s += char(0x80 | (c >> 6 & 63));
      s += char(0x80 | (c & 63));
    } else {
      s += char(0xF0 | c >> 18);
      s += char(0x80 | (c >> 12 & 63));
      s += char(0x80 | (c >> 6 & 63));
      s += char(0x80 | (c & 63));
    }
  }

  std::string string() {
    std::string s;
    ++pos_;
    for (;;) {
      const char c = peek();
      ++pos_;
      if (c == '"') return s;
      if (static_cast<unsigned char>(c) < 0x20) bad("control character in a string");
      if (c != '\\') {
        s += c;
        continue;
      }
      const char e = peek();
      ++pos_;
      constexpr std::string_view from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
      if (const size_t i = from.find(e); i != from.npos) {
        s += to[i];
      } else if (e == 'u') {
        unsigned u = hex4();
        if (u >= 0xD800 && u < 0xE000) {
          const unsigned low = take_word("\\u") ? hex4() : 0;
          if (u >= 0xDC00 || low < 0xDC00 || low >= 0xE000) bad("bad surrogate pair");
          u = 0x10000 + ((u - 0xD800) << 10) + (low - 0xDC00);
        }
        append_utf8(s, u);
      } else {
        bad("unknown escape");
      }
    }
  }

  std::string_view text_;
  const std::string& source_;
  size_t pos_ = 0;
};

Json Json::parse(std::string_view text, const std::string& source) { return JsonParser(text, source).document(); }

bool Json::as_bool(const std::string& what) const {
  if (kind_ != Kind::Bool) wrong_kind(what, "a boolean", kind_);
  return bool_;
}

double Json::as_number(const std::string& what) const {
  if (kind_ != Kind::Number) wrong_kind(what, "a number", kind_);
  return number_;
}

int64_t Json::as_integer(const std::string& what) const {
  const double d = as_number(what);
  if (!(std::fabs(d) <= 0x1p53) || d != std::floor(d)) fail<CheckpointError>(what, " = ", d, " must be a whole number");
  return int64_t(d);
}

const std::string& Json::as_string(const std::string& what) const {
  if (kind_ != Kind::String) wrong_kind(what, "a string", kind_);
  return string_;
}

const std::vector<Json>& Json::as_array(const std::string& what) const {
  if (kind_ != Kind::Array) wrong_kind(what, "an array", kind_);
  return array_;
}

const std::vector<std::pair<std::string, Json>>& Json::as_object(const std::string& what) const {
  if (kind_ != Kind::Object) wrong_kind(what, "an object", kind_);
  return object_;
}

const Json* Json::find(std::string_view key) const {
  for (const auto& [k, v] : object_)
    if (k == key) return &v;
  return nullptr;
}

}  // namespace dllm
