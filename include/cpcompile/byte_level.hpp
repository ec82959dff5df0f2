/// Byte-level BPE, as far as it is not left to ONNX Runtime GenAI: whether GenAI reads a tokenizer.json as `tokenizers`
/// does, how it has to be rewritten for that, and bytes of tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "error.hpp"
#include "json.hpp"

namespace cpcompile::detail {

/// Appends a character in UTF-8.
inline void append_utf8(std::uint32_t code, std::string& text) {
    const auto add = [&text](std::uint32_t byte) { text += static_cast<char>(byte); };
    if (code < 0x80) return add(code);
    if (code < 0x800) {
        add(0xC0 | code >> 6);
    } else {
        if (code < 0x10000) {
            add(0xE0 | code >> 12);
        } else {
            add(0xF0 | code >> 18);
            add(0x80 | (code >> 12 & 0x3F));
        }
        add(0x80 | (code >> 6 & 0x3F));
    }
    add(0x80 | (code & 0x3F));
}

/// The character at the beginning of UTF-8 text. `length` is that of the bytes it takes; of invalid ones, of as many as
/// are replaced together (Unicode 3.9, table 3-7). Without a `code` they are no character, or not all of one yet.
struct Character {
    std::optional<std::uint32_t> code;
    std::size_t length = 1;
    bool incomplete = false;
};

inline Character first_character(std::string_view text) {
    const auto byte = [&text](std::size_t place) { return static_cast<std::uint8_t>(text[place]); };
    const std::uint8_t lead = byte(0);
    if (lead < 0x80) return {lead, 1, false};
    const std::size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4) return {std::nullopt, 1, false};
    std::uint32_t code = lead & (0xFF >> (length + 1));
    for (std::size_t place = 1; place < length; ++place) {
        if (place == text.size()) return {std::nullopt, place, true};
        const std::uint8_t least = place > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        const std::uint8_t most = place > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (byte(place) < least || byte(place) > most) return {std::nullopt, place, false};
        code = code << 6 | (byte(place) & 0x3F);
    }
    return {code, length, false};
}

/// Takes whole characters from the beginning of `bytes`, with U+FFFD for what is none; `all` takes an unfinished one
/// too.
inline std::string take_text(std::string& bytes, bool all) {
    std::string text;
    std::size_t start = 0;
    while (start < bytes.size()) {
        const Character next = first_character(std::string_view(bytes).substr(start));
        if (next.incomplete && !all) break;
        next.code ? text.append(bytes, start, next.length) : text.append("\xEF\xBF\xBD");
        start += next.length;
    }
    bytes.erase(0, start);
    return text;
}

/// Letters and digits of Unicode 14 and later, which GenAI 0.18 takes for other signs and `tokenizers` does not. Found
/// by comparing both on every character.
constexpr std::pair<std::uint32_t, std::uint32_t> kNewCharacters[] = {
    {0x85, 0x85},       {0x870, 0x887},     {0x889, 0x88E},     {0x8B5, 0x8B5},     {0x8C8, 0x8C9},
    {0xC5D, 0xC5D},     {0xCDD, 0xCDD},     {0x170D, 0x170D},   {0x171F, 0x171F},   {0x1B4C, 0x1B4C},
    {0x1C89, 0x1C8A},   {0x2C2F, 0x2C2F},   {0x2C5F, 0x2C5F},   {0x9FFD, 0x9FFF},   {0xA7C0, 0xA7C1},
    {0xA7CB, 0xA7CD},   {0xA7D0, 0xA7D1},   {0xA7D3, 0xA7D3},   {0xA7D5, 0xA7DC},   {0xA7F2, 0xA7F4},
    {0x10570, 0x1057A}, {0x1057C, 0x1058A}, {0x1058C, 0x10592}, {0x10594, 0x10595}, {0x10597, 0x105A1},
    {0x105A3, 0x105B1}, {0x105B3, 0x105B9}, {0x105BB, 0x105BC}, {0x105C0, 0x105F3}, {0x10780, 0x10785},
    {0x10787, 0x107B0}, {0x107B2, 0x107BA}, {0x10D40, 0x10D65}, {0x10D6F, 0x10D85}, {0x10EC2, 0x10EC4},
    {0x10F70, 0x10F81}, {0x11071, 0x11072}, {0x11075, 0x11075}, {0x1123F, 0x11240}, {0x11380, 0x11389},
    {0x1138B, 0x1138B}, {0x1138E, 0x1138E}, {0x11390, 0x113B5}, {0x113B7, 0x113B7}, {0x113D1, 0x113D1},
    {0x113D3, 0x113D3}, {0x116D0, 0x116E3}, {0x11740, 0x11746}, {0x11AB0, 0x11ABF}, {0x11BC0, 0x11BE0},
    {0x11BF0, 0x11BF9}, {0x11F02, 0x11F02}, {0x11F04, 0x11F10}, {0x11F12, 0x11F33}, {0x11F50, 0x11F59},
    {0x12F90, 0x12FF0}, {0x1342F, 0x1342F}, {0x13441, 0x13446}, {0x13460, 0x143FA}, {0x16100, 0x1611D},
    {0x16130, 0x16139}, {0x16A70, 0x16ABE}, {0x16AC0, 0x16AC9}, {0x16D40, 0x16D6C}, {0x16D70, 0x16D79},
    {0x18CFF, 0x18CFF}, {0x1AFF0, 0x1AFF3}, {0x1AFF5, 0x1AFFB}, {0x1AFFD, 0x1AFFE}, {0x1B11F, 0x1B122},
    {0x1B132, 0x1B132}, {0x1B155, 0x1B155}, {0x1CCF0, 0x1CCF9}, {0x1D2C0, 0x1D2D3}, {0x1DF00, 0x1DF1E},
    {0x1DF25, 0x1DF2A}, {0x1E030, 0x1E06D}, {0x1E290, 0x1E2AD}, {0x1E4D0, 0x1E4EB}, {0x1E4F0, 0x1E4F9},
    {0x1E5D0, 0x1E5ED}, {0x1E5F0, 0x1E5FA}, {0x1E7E0, 0x1E7E6}, {0x1E7E8, 0x1E7EB}, {0x1E7ED, 0x1E7EE},
    {0x1E7F0, 0x1E7FE}, {0x2A6DE, 0x2A6DF}, {0x2B735, 0x2B739}, {0x2EBF0, 0x2EE5D}, {0x31350, 0x323AF}};

/// UsageError if the GenAI library would make other ids of `text` than `tokenizers` does.
inline void require_encodable(std::string_view text) {
    for (std::size_t start = 0; start < text.size();) {
        const Character next = first_character(text.substr(start));
        if (!next.code) throw UsageError("the text is not valid UTF-8 at byte " + std::to_string(start));
        const auto is_new = [code = *next.code](const auto& range) {
            return range.first <= code && code <= range.second;
        };
        const bool ends = *next.code == 0, blank = *next.code == 0x85;  // it ends a text; to one of them it is a blank
        if (ends || blank ||
            (*next.code > 0x7F && std::any_of(std::begin(kNewCharacters), std::end(kNewCharacters), is_new))) {
            char name[16];
            std::snprintf(name, sizeof name, "U+%04X", static_cast<unsigned>(*next.code));
            throw UsageError(
                std::string("the text has the character ") + name +
                ", which ONNX Runtime GenAI does not read as `tokenizers` does; remove it, or make the token "
                "ids with `tokenizers`");
        }
        start += next.length;
    }
}

/// Character -> byte, as GPT-2 writes bytes: those that are printable in Latin-1 as themselves, others from U+0100 on.
inline const std::map<std::uint32_t, char>& bytes_of_characters() {
    static const auto table = [] {
        std::map<std::uint32_t, char> result;
        std::uint32_t next = 0x100;
        for (std::uint32_t byte = 0; byte < 0x100; ++byte) {
            const bool printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
            result[printable ? byte : next++] = static_cast<char>(byte);
        }
        return result;
    }();
    return table;
}

/// The characters of `text`.
inline std::vector<std::string> characters(std::string_view text) {
    std::vector<std::string> result;
    while (!text.empty()) {
        const std::size_t length = first_character(text).length;
        result.emplace_back(text.substr(0, length));
        text.remove_prefix(length);
    }
    return result;
}

/// A tokenizer.json rewritten so that GenAI makes the same ids of a text. Its wording knows few regular expressions,
/// and it silently ignores the rest: normalizers, `Digits`, `ByteLevel.use_regex`. So the pre-tokenizer becomes a
/// sequence of expressions that both sides split by alike; what cannot be written in this way is refused. Source:
/// microsoft/onnxruntime-extensions, operators/tokenizer.
class GenaiRewriter {
 public:
    GenaiRewriter(Json tokenizer, std::string where) : tokenizer_(std::move(tokenizer)), where_(std::move(where)) {}

    Json rewrite() {
        require_byte_level_bpe();
        for (const Json& token : at(tokenizer_, "added_tokens", "list"))
            for (const char* key : {"lstrip", "rstrip", "single_word"})
                if (at(token, key, "bool")) refuse(key + (" of the token " + repr(text_at(token, "content"))));
        Json steps = Json::array();
        for (const std::string& expression : expressions())
            steps.push_back(
                {{"type", "Split"}, {"pattern", {{"Regex", expression}}}, {"behavior", "Isolated"}, {"invert", false}});
        steps.push_back(
            {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}});
        tokenizer_["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", steps}};
        return std::move(tokenizer_);
    }

 private:
    static constexpr const char *kDigit = "\\p{N}", *kDigits = "\\p{N}{1,3}";
    static constexpr const char* kGpt2 =
        "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

    [[noreturn]] void refuse(const std::string& what) const {
        throw UsageError(where_ + ": ONNX Runtime GenAI does not read " + what +
                         " as `tokenizers` does; make the token ids with `tokenizers`");
    }

    void require_byte_level_bpe() const {
        const Json &model = at(tokenizer_, "model"), &decoder = at(tokenizer_, "decoder");
        const Json& normalizer = at(tokenizer_, "normalizer");
        const std::string type = model.value("type", "");
        if (type != "BPE") refuse("the model " + type);
        if (decoder.is_null() || text_at(decoder, "type") != "ByteLevel") refuse("BPE whose tokens are not bytes");
        for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"}) {
            const Json setting = model.value(key, Json());
            if (!setting.is_null() && setting != false && setting != 0 && setting != "")
                refuse(std::string("the setting ") + key);
        }
        if (!normalizer.is_null()) refuse("the normalizer " + text_at(normalizer, "type"));
        if (!model.value("ignore_merges", false)) require_made_tokens(model);
    }

    /// Refuses a token that GenAI takes for a whole word though merges do not make it of its own text.
    void require_made_tokens(const Json& model) const {
        std::map<std::pair<std::string, std::string>, std::size_t> ranks;
        for (const Json& merge : at(model, "merges", "list")) {
            const std::string line = merge.is_string() ? merge.get<std::string>() : "";
            const std::size_t space = line.find(' ');
            const auto pair = merge.is_string() ? std::pair{line.substr(0, space), line.substr(space + 1)}
                                                : merge.get<std::pair<std::string, std::string>>();
            ranks.emplace(pair, ranks.size());
        }
        std::set<std::string> added;  // they are found before
        for (const Json& token : tokenizer_["added_tokens"]) added.insert(text_at(token, "content"));
        for (const auto& item : at(model, "vocab", "dict").items()) {
            if (added.count(item.key()) > 0) continue;
            std::vector<std::string> parts = characters(item.key());
            while (parts.size() > 1) {
                std::size_t best = ranks.size(), place = 0;
                for (std::size_t index = 0; index + 1 < parts.size(); ++index)
                    if (const auto found = ranks.find({parts[index], parts[index + 1]});
                        found != ranks.end() && found->second < best) {
                        best = found->second;
                        place = index;
                    }
                if (best == ranks.size())
                    refuse("the token " + repr(item.key()) + ", which merges do not make of its own text,");
                parts[place] += parts[place + 1];
                parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(place) + 1);
            }
        }
    }

    /// The regular expressions that split a text one after the other as the pre-tokenizer does.
    std::vector<std::string> expressions() const {
        std::vector<Json> steps;
        collect(at(tokenizer_, "pre_tokenizer"), steps);
        if (steps.empty()) refuse("the pre-tokenizer none at the end");
        const Json last = steps.back();
        steps.pop_back();
        if (text_at(last, "type") != "ByteLevel") refuse("the pre-tokenizer " + text_at(last, "type") + " at the end");
        if (at(last, "add_prefix_space", "bool")) refuse("the setting add_prefix_space");
        std::vector<std::string> found;
        for (const Json& step : steps) {
            const std::string type = text_at(step, "type");
            const bool split =
                type == "Split" && step.value("behavior", "") == "Isolated" && !step.value("invert", false);
            if (type == "Digits" && step.value("individual_digits", false)) {
                found.emplace_back(kDigit);
            } else if (split && at(step, "pattern").contains("Regex")) {
                found.push_back(text_at(step["pattern"], "Regex"));
                const std::string& own = found.back();
                if (own != kGpt2 && own != kDigit && own != kDigits) refuse("texts that are split by " + own);
            } else {
                refuse("the pre-tokenizer " + type);
            }
        }
        if (last.value("use_regex", true)) found.emplace_back(kGpt2);
        if (found.empty()) refuse("texts that are not split at all");
        return found;
    }

    static void collect(const Json& step, std::vector<Json>& steps) {
        if (step.is_null()) return;
        if (text_at(step, "type") != "Sequence") return steps.push_back(step);
        for (const Json& each : at(step, "pretokenizers", "list")) collect(each, steps);
    }

    Json tokenizer_;
    std::string where_;
};

}  // namespace cpcompile::detail
