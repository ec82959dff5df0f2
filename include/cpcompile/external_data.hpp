/// Finds the bytes of other files that an ONNX model refers to, from protobuf's wire format.
///
/// The files that an engine makes ONNX Runtime open must be known before it gets the model. Only the messages that lead
/// to tensors are entered. It is stricter than protobuf where that is simpler: groups, which ONNX does not use, are
/// refused. What a parser may merge (a message given twice) is visited twice, so no reference is missed.
/// Sources: protobuf.dev, Encoding; onnx.proto; ONNX, docs/ExternalData.md.
#pragma once

#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "error.hpp"
#include "files.hpp"
#include "json.hpp"

namespace cpcompile::detail {

/// The part of another file that holds a tensor; `length` is empty where the model does not give it.
struct Reference {
    std::string location;
    std::uint64_t offset = 0;
    std::optional<std::uint64_t> length;
    std::string name;       // of the tensor
    std::int32_t type = 0;  // TensorProto.DataType
    std::vector<std::int64_t> shape;
    bool initializer = false;  // whether it is one of the model's own graph

    std::uint64_t end() const {
        const std::uint64_t size = length.value_or(0), most = std::numeric_limits<std::uint64_t>::max();
        return size > most - offset ? most : offset + size;
    }
};

class ReferenceReader {
 public:
    /// Every reference in a model, in order; Malformed if it is not protobuf or a reference is malformed.
    static std::vector<Reference> read(std::string_view model) {
        ReferenceReader reader;
        reader.visit(model, Message::model, 0);
        return std::move(reader.found_);
    }

 private:
    enum class Message { none, model, training, graph, function, node, attribute, sparse, tensor };
    enum Wire : unsigned { varint = 0, fixed64 = 1, bytes = 2, fixed32 = 5 };

    /// The message in a field of another one, as far as it leads to tensors.
    static Message child(Message parent, std::uint64_t field) {
        switch (parent) {
            case Message::model:
                return field == 7    ? Message::graph
                       : field == 20 ? Message::training
                       : field == 25 ? Message::function
                                     : Message::none;
            case Message::training:
                return field == 1 || field == 2 ? Message::graph : Message::none;
            case Message::graph:
                return field == 1    ? Message::node
                       : field == 5  ? Message::tensor
                       : field == 15 ? Message::sparse
                                     : Message::none;
            case Message::function:
                return field == 7 ? Message::node : field == 11 ? Message::attribute : Message::none;
            case Message::node:
                return field == 5 ? Message::attribute : Message::none;
            case Message::attribute:
                return field == 5 || field == 10    ? Message::tensor
                       : field == 6 || field == 11  ? Message::graph
                       : field == 22 || field == 23 ? Message::sparse
                                                    : Message::none;
            case Message::sparse:
                return field == 1 || field == 2 ? Message::tensor : Message::none;
            default:
                return Message::none;
        }
    }

    void visit(std::string_view data, Message message, int depth) {
        if (depth > kMaxDepth) throw Malformed("messages are nested more than " + std::to_string(kMaxDepth) + " deep");
        if (message == Message::tensor) return add(data, depth == 2);
        fields(data, [&](std::uint64_t field, std::string_view inner) {
            const Message kind = child(message, field);
            if (kind != Message::none) visit(inner, kind, depth + 1);
        });
    }

    void add(std::string_view tensor, bool initializer) {
        std::vector<std::pair<std::string, std::string>> entries;
        Reference reference;
        const auto use_bytes = [&](std::uint64_t field, std::string_view content) {
            if (field == 1)  // packed
                while (!content.empty()) reference.shape.push_back(static_cast<std::int64_t>(take_varint(content)));
            if (field == 8) reference.name = content;
            if (field != 13) return;
            entries.emplace_back();
            fields(content, [&](std::uint64_t part, std::string_view text) {
                if (part == 1) entries.back().first = text;
                if (part == 2) entries.back().second = text;
            });
        };
        fields(tensor, use_bytes, [&](std::uint64_t field, std::uint64_t value) {
            if (field == 1) reference.shape.push_back(static_cast<std::int64_t>(value));
            if (field == 2) reference.type = static_cast<std::int32_t>(value);
        });
        if (entries.empty()) return;
        const auto value = [&entries](const std::string& wanted) {
            std::optional<std::string> result;
            for (const auto& [key, text] : entries)
                if (key == wanted) result = text;
            return result;
        };
        for (std::size_t one = 0; one < entries.size(); ++one)
            for (std::size_t other = 0; other < one; ++other)
                if (entries[one].first == entries[other].first) throw Malformed("a tensor has two locations");
        reference.location = value("location").value_or("");
        if (reference.location.empty()) throw Malformed("a tensor is in another file that is not named");
        reference.offset = number("offset", value("offset")).value_or(0);
        reference.length = number("length", value("length"));
        reference.initializer = initializer;
        found_.push_back(std::move(reference));
    }

    static std::optional<std::uint64_t> number(const std::string& key, const std::optional<std::string>& text) {
        if (!text) return std::nullopt;
        if (text->empty() || text->find_first_not_of("0123456789") != text->npos)
            throw Malformed("the " + key + " of a tensor is " + repr(first(*text, 40)));
        std::uint64_t value = 0;
        if (std::from_chars(text->data(), text->data() + text->size(), value).ec != std::errc())
            throw Malformed("the offset or length of a tensor exceeds 64 bits");
        return value;
    }

    static void ignore(std::uint64_t, std::uint64_t) {}

    /// Calls `use_bytes(number, content)` for each length-delimited field of a message, `use_number` for each number.
    template <typename UseBytes, typename UseNumber = decltype(&ignore)>
    static void fields(std::string_view data, const UseBytes& use_bytes, const UseNumber& use_number = &ignore) {
        while (!data.empty()) {
            const std::uint64_t tag = take_varint(data), field = tag >> 3;
            if (field == 0 || tag >> 32 != 0) throw Malformed("no field can have the number " + std::to_string(field));
            std::uint64_t length = 0;
            switch (tag & 7) {
                case varint:
                    use_number(field, take_varint(data));
                    break;
                case fixed32:
                case fixed64:
                    length = (tag & 7) == fixed32 ? 4 : 8;
                    break;
                case bytes:
                    length = take_varint(data);
                    if (length <= data.size()) use_bytes(field, data.substr(0, length));
                    break;
                default:
                    throw Malformed("a field has the wire type " + std::to_string(tag & 7));
            }
            if (length > data.size()) throw Malformed("it is truncated, or a length in it is wrong");
            data.remove_prefix(length);
        }
    }

    static std::uint64_t take_varint(std::string_view& data) {
        std::uint64_t value = 0;
        for (std::size_t place = 0; place < data.size() && place < 10; ++place) {
            const auto byte = static_cast<unsigned char>(data[place]);
            if (place == 9 && byte > 1 && byte < 0x80)
                value = std::numeric_limits<std::uint64_t>::max();  // beyond 64 bits
            else
                value |= static_cast<std::uint64_t>(byte & 0x7F) << (7 * place);
            if (byte < 0x80) {
                data.remove_prefix(place + 1);
                return value;
            }
        }
        throw Malformed("it is truncated, or a number in it has no end");
    }

    std::vector<Reference> found_;
};

/// Every reference in the file `model`; UsageError if it cannot be read.
inline std::vector<Reference> references_of(const fs::path& model) {
    try {
        const MappedFile file(model);
        if (file.bytes().empty()) throw Malformed("it is empty");
        return ReferenceReader::read(file.bytes());
    } catch (const std::system_error& error) {
        throw UsageError(model.string() + ": cannot be read (" + error.code().message() + "); build the bundle again");
    } catch (const Malformed& error) {
        throw UsageError(model.string() + ": is not a valid ONNX model (" + error.what() + "); build the bundle again");
    }
}

}  // namespace cpcompile::detail
