// As much of JSON as manifests and the headers of safetensors files need: read whole, then asked by key.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dlops {

// What is wrong with a file or an argument, in one line.
struct BadInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Json {
  enum class Kind { null, boolean, number, text, list, object };

  Kind kind = Kind::null;
  double number = 0;  // 0 or 1 for a boolean
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  // Throws BadInput where it is no object or has no such key.
  const Json& at(const std::string& key) const {
    auto found = object.find(key);
    if (kind != Kind::object || found == object.end()) throw BadInput("no field \"" + key + "\"");
    return found->second;
  }

  bool is_null() const { return kind == Kind::null; }

  static Json parse(const std::string& text) {
    Reader reader{text};
    Json value = reader.value(0);
    reader.skip_space();
    if (reader.place != text.size()) reader.fail();
    return value;
  }

 private:
  struct Reader {
    const std::string& text;
    size_t place = 0;

    [[noreturn]] void fail() const { throw BadInput("not JSON, at byte " + std::to_string(place)); }

    void skip_space() { place = std::min(text.find_first_not_of(" \t\r\n", place), text.size()); }

    bool take(const std::string& word) {
      skip_space();
      if (text.compare(place, word.size(), word) != 0) return false;
      place += word.size();
      return true;
    }

    void expect(const std::string& word) {
      if (!take(word)) fail();
    }

    Json value(int depth) {
      // A crafted file could nest until the stack ends.
      if (depth > 100) fail();
      Json made;
      if (take("null")) return made;
      if (take("true") || take("false")) {
        made.kind = Kind::boolean;
        made.number = text[place - 2] == 'u';
      } else if (take("{")) {
        made.kind = Kind::object;
        if (take("}")) return made;
        do {
          std::string key = string();
          expect(":");
          made.object[key] = value(depth + 1);
        } while (take(","));
        expect("}");
      } else if (take("[")) {
        made.kind = Kind::list;
        if (take("]")) return made;
        do {
          made.list.push_back(value(depth + 1));
        } while (take(","));
        expect("]");
      } else if (place < text.size() && text[place] == '"') {
        made.kind = Kind::text;
        made.text = string();
      } else {
        made.kind = Kind::number;
        char* end = nullptr;
        made.number = std::strtod(text.c_str() + place, &end);
        if (end == text.c_str() + place) fail();
        place = end - text.c_str();
      }
      return made;
    }

    std::string string() {
      expect("\"");
      std::string made;
      while (place < text.size() && text[place] != '"') {
        char c = text[place++];
        if (c != '\\') {
          made += c;
        } else if (place < text.size() && text[place] == 'u') {
          unsigned code = hex();
          if (code >= 0xD800 && code < 0xDC00) {  // the first half of a pair
            expect("\\");
            code = 0x10000 + ((code - 0xD800) << 10) + (hex() - 0xDC00);
          }
          append_utf8(made, code);
        } else {
          static const std::string names = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
          size_t which = place < text.size() ? names.find(text[place++]) : std::string::npos;
          if (which == std::string::npos) fail();
          made += meant[which];
        }
      }
      expect("\"");
      return made;
    }

    unsigned hex() {
      const std::string digits = text.substr(std::min(place + 1, text.size()), 4);
      if (text.compare(place, 1, "u") != 0 || digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos ||
          digits.size() != 4) {
        fail();
      }
      place += 5;
      return std::stoul(digits, nullptr, 16);
    }

    static void append_utf8(std::string& made, unsigned code) {
      if (code < 0x80) {
        made += char(code);
        return;
      }
      int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
      made += char((0xFF00 >> (more + 1) & 0xFF) | code >> 6 * more);
      while (more-- > 0) made += char(0x80 | (code >> 6 * more & 0x3F));
    }
  };
};

}  // namespace dlops
