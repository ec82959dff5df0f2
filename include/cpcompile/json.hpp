/// JSON as a bundle has it: read strictly, and written as Python's `json.dumps(value, sort_keys=True)` does, because
/// the manifest's own digest is that of those bytes.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "error.hpp"

namespace cpcompile::detail {

using Json = nlohmann::json;

constexpr std::uintmax_t kMaxJson = 1 << 26;  // bytes; a thousand contexts need less than a megabyte
constexpr int kMaxDepth = 100;

/// Something in a manifest or component is not what a build writes; `open_bundle` names the file.
struct Malformed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// UsageError if a file is a pointer: a short text that a repository has in its place until it is fetched.
inline void require_fetched(const std::filesystem::path& path) {
    std::string head(64, '\0');
    std::ifstream file(path, std::ios::binary);
    head.resize(static_cast<std::size_t>(file.read(head.data(), 64).gcount()));
    const char* const tools[][3] = {{"version https://git-lfs.github.com/spec/", "Git LFS", "git lfs pull"},
                                    {"/annex/objects/", "git-annex", "git annex get"}};
    for (const auto& [start, tool, command] : tools)
        if (head.rfind(start, 0) == 0)
            throw UsageError(path.string() + ": is a pointer of " + tool + ", not the file itself; run `" + command +
                             "` in its repository");
}

/// Refuses repeated keys, because one parser may take the first and another the last, and deep nesting.
class StrictParser {
 public:
    bool operator()(int depth, Json::parse_event_t event, Json& value) {
        if (depth > kMaxDepth) throw Malformed("it is nested too deeply");
        if (event == Json::parse_event_t::object_start) keys_.emplace_back();
        if (event == Json::parse_event_t::object_end) keys_.pop_back();
        if (event == Json::parse_event_t::key && !keys_.back().insert(value.get<std::string>()).second)
            throw Malformed("a key appears twice");
        return true;
    }

 private:
    std::vector<std::set<std::string>> keys_;
};

/// The JSON in `path`; UsageError unless it is small, repeats no key and has only finite numbers.
inline Json read_json(const std::filesystem::path& path) {
    try {
        const auto size = std::filesystem::file_size(path);
        if (size > kMaxJson) throw Malformed(grouped(size) + " bytes, more than " + grouped(kMaxJson));
        require_fetched(path);
        std::ifstream file(path, std::ios::binary);
        const std::string text(std::istreambuf_iterator<char>(file), {});
        if (!file) throw Malformed("it cannot be opened");
        if (text.rfind("\xEF\xBB\xBF", 0) == 0) throw Malformed("it begins with a byte order mark");
        return Json::parse(text, [parser = StrictParser()](int depth, Json::parse_event_t event, Json& value) mutable {
            return parser(depth, event, value);
        });
    } catch (const UsageError&) {
        throw;
    } catch (const std::exception& error) {
        std::string reason = error.what();  // it quotes bytes that may be no text
        std::replace_if(reason.begin(), reason.end(), [](char sign) { return sign < ' ' || sign > '~'; }, '?');
        throw UsageError(path.string() + ": cannot be read as JSON (" + reason + "); build the bundle again");
    }
}

/// A number as Python writes it: the shortest digits that give it back, an exponent below 1e-4 and from 1e16 on.
inline std::string python_float(double number) {
    if (!std::isfinite(number)) return std::isnan(number) ? "nan" : number > 0 ? "inf" : "-inf";
    char buffer[32];
    const auto end = std::to_chars(buffer, buffer + sizeof buffer, number, std::chars_format::scientific).ptr;
    const std::string text(buffer, end);
    const std::size_t mark = text.find('e');
    const int exponent = std::stoi(text.substr(mark + 1));
    if (exponent < -4 || exponent >= 16) return text;
    const bool negative = text[0] == '-';
    std::string digits =
        text.substr(negative, 1) + (mark > negative + 2U ? text.substr(negative + 2, mark - negative - 2) : "");
    if (exponent < 0) digits = "0." + std::string(static_cast<std::size_t>(-exponent) - 1, '0') + digits;
    if (exponent >= 0) {
        const auto point = static_cast<std::size_t>(exponent) + 1;
        if (digits.size() <= point) digits += std::string(point - digits.size() + 1, '0');
        digits.insert(point, ".");
    }
    return (negative ? "-" : "") + digits;
}

/// Appends `value` as `json.dumps(value, sort_keys=True)` writes it. Json sorts keys by their bytes, which in UTF-8 is
/// the order of their characters.
inline void python_json(const Json& value, std::string& out) {
    const auto text = [&out](const std::string& string) { out += Json(string).dump(-1, ' ', true); };
    if (value.is_object()) {
        out += '{';
        for (auto item = value.begin(); item != value.end(); ++item) {
            if (item != value.begin()) out += ", ";
            text(item.key());
            out += ": ";
            python_json(item.value(), out);
        }
        out += '}';
    } else if (value.is_array()) {
        out += '[';
        for (auto item = value.begin(); item != value.end(); ++item) {
            if (item != value.begin()) out += ", ";
            python_json(*item, out);
        }
        out += ']';
    } else if (value.is_string()) {
        text(value.get_ref<const std::string&>());
    } else if (value.is_number_float()) {
        out += python_float(value.get<double>());
    } else {
        out += value.dump();
    }
}

/// The name that Python has for the type of `value`.
inline std::string type_name(const Json& value) {
    if (value.is_object()) return "dict";
    if (value.is_array()) return "list";
    if (value.is_string()) return "str";
    if (value.is_boolean()) return "bool";
    if (value.is_number_float()) return "float";
    return value.is_null() ? "NoneType" : "int";
}

/// `value` if it is a `kind`, named as in Python; Malformed names `what` otherwise.
inline const Json& require(const Json& value, const std::string& kind, const std::string& what) {
    if (type_name(value) != kind) throw Malformed(what + " (a " + type_name(value) + " instead of " + kind + ")");
    return value;
}

/// `object[key]`; Malformed if it is missing.
inline const Json& at(const Json& object, const std::string& key) {
    if (!object.is_object()) throw Malformed(repr(key) + " of a " + type_name(object));
    const auto found = object.find(key);
    if (found == object.end()) throw Malformed(repr(key));
    return *found;
}

/// `object[key]`, a `kind`.
inline const Json& at(const Json& object, const std::string& key, const std::string& kind) {
    return require(at(object, key), kind, key);
}

/// A whole number; those beyond 64 bits become the largest.
inline std::int64_t integer(const Json& value) {
    constexpr auto most = std::numeric_limits<std::int64_t>::max();
    return value.is_number_unsigned() && value.get<std::uint64_t>() > std::uint64_t{most} ? most
                                                                                          : value.get<std::int64_t>();
}

inline std::string text_at(const Json& object, const std::string& key) {
    return at(object, key, "str").get<std::string>();
}

}  // namespace cpcompile::detail
