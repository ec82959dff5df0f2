/// The errors of this library, and how their messages quote what they name. The words are those of cpcompile in Python.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>

namespace cpcompile {

/// The work failed: ONNX Runtime refuses a model, or a library is missing.
class Error : public std::runtime_error {
 public:
    using std::runtime_error::runtime_error;
};

/// The input or the settings are wrong; the user can fix them.
class UsageError : public Error {
 public:
    using Error::Error;
};

namespace detail {

/// The first `count` characters of UTF-8 text.
inline std::string_view first(std::string_view text, std::size_t count) {
    std::size_t end = 0;
    for (; end < text.size(); ++end)
        if ((static_cast<unsigned char>(text[end]) & 0xC0) != 0x80 && count-- == 0) break;
    return text.substr(0, end);
}

/// `text` in quotation marks, with escapes for what a terminal could take for commands.
inline std::string repr(std::string_view text) {
    const char mark = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
    std::string result(1, mark);
    for (const char sign : text) {
        const auto byte = static_cast<unsigned char>(sign);
        if (sign == mark || sign == '\\') {
            result += {'\\', sign};
        } else if (sign == '\n' || sign == '\r' || sign == '\t') {
            result += {'\\', sign == '\n' ? 'n' : sign == '\r' ? 'r' : 't'};
        } else if (byte < 0x20 || byte == 0x7F) {
            char escape[5];
            std::snprintf(escape, sizeof escape, "\\x%02x", byte);
            result += escape;
        } else {
            result += sign;
        }
    }
    return result + mark;
}

/// `number` with a comma between thousands.
inline std::string grouped(std::uint64_t number) {
    std::string digits = std::to_string(number);
    for (std::size_t place = digits.size(); place > 3; place -= 3) digits.insert(place - 3, 1, ',');
    return digits;
}

/// `items`, or what `name` makes of each, separated by commas.
template <typename Items, typename Name>
std::string joined(const Items& items, const Name& name) {
    std::string result;
    for (const auto& item : items) {
        if (!result.empty()) result += ", ";
        result += name(item);
    }
    return result;
}

}  // namespace detail
}  // namespace cpcompile
