// SPDX-License-Identifier: Apache-2.0
// As much JSON as a manifest needs: objects, arrays, strings, numbers, true, false, null. Throws std::runtime_error.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

struct Json {
  std::map<std::string, Json> members;
  std::vector<Json> items;
  std::string text;  // of a string
  double number = 0;

  const Json& operator[](const std::string& name) const {
    const auto found = members.find(name);
    if (found == members.end()) throw std::runtime_error("the manifest has no " + name);
    return found->second;
  }
  std::int64_t integer() const { return static_cast<std::int64_t>(number); }
};

class JsonReader {
 public:
  static Json read(std::string_view text) {
    JsonReader reader(text);
    Json value = reader.value(0);
    if (reader.next() != '\0') reader.fail();
    return value;
  }

 private:
  explicit JsonReader(std::string_view text) : text_(text) {}
  [[noreturn]] void fail() const { throw std::runtime_error("not JSON at byte " + std::to_string(at_)); }

  // The next character that is no white space, not consumed; '\0' at the end.
  char next() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  void expect(char wanted) {
    if (next() != wanted) fail();
    ++at_;
  }
  bool more(char end) {
    if (next() == ',') return ++at_, true;
    expect(end);
    return false;
  }

  Json value(int depth) {
    if (depth > 64) fail();
    Json found;
    const char first = next();
    if (first == '{') {
      ++at_;
      if (next() == '}') return ++at_, found;
      do {
        std::string name = string();
        expect(':');
        if (!found.members.emplace(std::move(name), value(depth + 1)).second) fail();  // twice the same
      } while (more('}'));
    } else if (first == '[') {
      ++at_;
      if (next() == ']') return ++at_, found;
      do found.items.push_back(value(depth + 1));
      while (more(']'));
    } else if (first == '"') {
      found.text = string();
    } else {
      const std::size_t begin = at_;
      while (at_ < text_.size() && std::string_view("+-.eE0123456789aflnrstu").find(text_[at_]) != text_.npos) ++at_;
      const std::string word(text_.substr(begin, at_ - begin));
      char* end = nullptr;
      found.number = std::strtod(word.c_str(), &end);
      if (word == "true") found.number = 1;
      else if (word != "false" && word != "null" && (word.empty() || *end)) fail();
    }
    return found;
  }

  std::string string() {
    expect('"');
    std::string found;
    while (at_ < text_.size() && text_[at_] != '"') {
      char c = text_[at_++];
      if (c == '\\') {
        if (at_ == text_.size()) fail();
        c = text_[at_++];
        const std::size_t known = std::string_view("nrtbf").find(c);
        if (known != std::string_view::npos) c = "\n\r\t\b\f"[known];
        else if (c == 'u') fail();  // ids, names and digests are ASCII, and the other strings are not needed
      }
      found += c;
    }
    expect('"');
    return found;
  }

  std::string_view text_;
  std::size_t at_ = 0;
};
