/// Text for language models: bytes of tokens from tokenizer.json, and token ids from the library of ONNX Runtime GenAI
/// (PyPI: onnxruntime-genai), which is opened when the first text is encoded. Without it everything else works.
#pragma once

#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "byte_level.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "sampling.hpp"

namespace cpcompile {
namespace detail {

/// The functions used of libonnxruntime-genai.so, whose packages bring no headers. Source: microsoft/onnxruntime-genai,
/// src/ort_genai_c.h.
class GenaiLibrary {
 public:
    static const GenaiLibrary& get() {
        static const GenaiLibrary library;
        return library;
    }

    void* create_tokenizer(const std::string& folder) const {
        void* tokenizer = nullptr;
        require(create_tokenizer_(folder.c_str(), &tokenizer));
        return tokenizer;
    }
    void destroy_tokenizer(void* tokenizer) const { destroy_tokenizer_(tokenizer); }

    Tokens encode(const void* tokenizer, const std::string& text) const {
        void* made = nullptr;
        require(create_sequences_(&made));
        const std::unique_ptr<void, void (*)(void*)> sequences(made, destroy_sequences_);
        require(encode_(tokenizer, text.c_str(), made));
        const std::int32_t* ids = data_(made, 0);
        return Tokens(ids, ids + count_(made, 0));
    }

 private:
    GenaiLibrary() {
        const char* named = std::getenv("CPCOMPILE_GENAI");
        const std::string file = named != nullptr && *named != '\0' ? named : "libonnxruntime-genai.so";
        // It opens ONNX Runtime by itself: let it be the one that this program has.
        Dl_info runtime{};
        if (dladdr(reinterpret_cast<void*>(&OrtGetApiBase), &runtime) != 0)
            setenv("ORT_LIB_PATH", runtime.dli_fname, 0);
        library_ = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library_ == nullptr)
            throw Error(
                std::string("text needs the library of ONNX Runtime GenAI, which cannot be opened (") + dlerror() +
                "); set CPCOMPILE_GENAI to its path, which `pip install onnxruntime-genai` brings, or give token ids");
        find(create_tokenizer_, "OgaCreateTokenizerFromPath");
        find(destroy_tokenizer_, "OgaDestroyTokenizer");
        find(create_sequences_, "OgaCreateSequences");
        find(destroy_sequences_, "OgaDestroySequences");
        find(encode_, "OgaTokenizerEncode");
        find(count_, "OgaSequencesGetSequenceCount");
        find(data_, "OgaSequencesGetSequenceData");
        find(error_, "OgaResultGetError");
        find(destroy_result_, "OgaDestroyResult");
    }

    template <typename Function>
    void find(Function& function, const char* name) {
        function = reinterpret_cast<Function>(dlsym(library_, name));
        if (function == nullptr)
            throw Error(std::string("the library of ONNX Runtime GenAI has no ") + name + "; install 0.18");
    }

    void require(void* result) const {
        if (result == nullptr) return;
        const std::string reason = error_(result);
        destroy_result_(result);
        throw Error("ONNX Runtime GenAI: " + reason);
    }

    void* library_ = nullptr;
    void* (*create_tokenizer_)(const char*, void**) = nullptr;
    void (*destroy_tokenizer_)(void*) = nullptr;
    void* (*create_sequences_)(void**) = nullptr;
    void (*destroy_sequences_)(void*) = nullptr;
    void* (*encode_)(const void*, const char*, void*) = nullptr;
    std::size_t (*count_)(const void*, std::size_t) = nullptr;
    const std::int32_t* (*data_)(const void*, std::size_t) = nullptr;
    const char* (*error_)(const void*) = nullptr;
    void (*destroy_result_)(void*) = nullptr;
};

/// A folder that is removed at the end of its block.
class TemporaryFolder {
 public:
    TemporaryFolder() : path_((fs::temp_directory_path() / "cpcompile-XXXXXX").string()) {
        if (mkdtemp(path_.data()) == nullptr) throw Error(path_ + ": cannot be made (" + std::strerror(errno) + ")");
    }
    ~TemporaryFolder() {
        std::error_code ignored;
        fs::remove_all(path_, ignored);
    }
    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;
    const std::string& path() const { return path_; }

    void write(const char* name, const Json& content) const {
        std::ofstream file(fs::path(path_) / name);
        if (!(file << content.dump()).flush()) throw Error(path_ + "/" + name + ": cannot be written");
    }

 private:
    std::string path_;
};

}  // namespace detail

/// The tokenizer of a context. Copies share it, and all of its methods may be called from several threads at once.
class Tokenizer {
 public:
    /// UsageError: no such context, or its tokenizer is missing, damaged or not byte-level BPE.
    Tokenizer(const Bundle& bundle, const std::string& context) : state_(std::make_shared<State>()) {
        const auto path = bundle.tokenizer(context);
        state_->where = path.string();
        if (const auto settings = bundle.generation(context)) state_->leading = settings->leading;
        try {
            state_->json = detail::read_json(path);
            const detail::Json &model = detail::at(state_->json, "model"),
                               &decoder = detail::at(state_->json, "decoder");
            if (decoder.is_null() || detail::text_at(decoder, "type") != "ByteLevel")
                throw detail::Malformed("its tokens are not bytes, as those of GPT-2 are");
            for (const auto& item : detail::at(model, "vocab", "dict").items())
                put(detail::integer(item.value()), bytes_of(item.key()), false);
            for (const auto& token : detail::at(state_->json, "added_tokens", "list"))
                put(detail::integer(detail::at(token, "id", "int")), detail::text_at(token, "content"),
                    detail::at(token, "special", "bool"));
        } catch (const detail::Malformed& error) {
            throw UsageError(state_->where + ": cannot be read (" + error.what() + "); use token ids");
        } catch (const detail::Json::exception& error) {
            throw UsageError(state_->where + ": cannot be read (" + error.what() + "); build the bundle again");
        }
    }

    /// The ids of `text`, behind those that stand in front of every text.
    /// UsageError: GenAI would read the tokenizer or the text in another way than `tokenizers`. Error: it is missing.
    Tokens encode(const std::string& text) const {
        detail::require_encodable(text);
        std::call_once(state_->opened, [this] { state_->open(); });
        Tokens ids = state_->leading;
        if (text.empty()) return ids;
        const Tokens own = detail::GenaiLibrary::get().encode(state_->genai.get(), text);
        ids.insert(ids.end(), own.begin(), own.end());
        return ids;
    }

    /// The text of `ids` without special tokens; U+FFFD stands for bytes that are no characters.
    std::string decode(const Tokens& ids) const {
        std::string bytes;
        for (const std::int64_t id : ids) bytes += bytes_of(id);
        return detail::take_text(bytes, true);
    }

    /// The bytes of a token, which may be a part of a character; none of a special or unknown token.
    const std::string& bytes_of(std::int64_t id) const {
        static const std::string none;
        return id < 0 || id >= static_cast<std::int64_t>(state_->bytes.size())
                   ? none
                   : state_->bytes[static_cast<std::size_t>(id)];
    }

    /// Continues `prompt` with `engine`, and passes on the new text as it comes, in whole characters, until `on_text`
    /// returns false. Returns all new text.
    std::string generate(const Engine& engine, const std::string& prompt, const Sampling& sampling = {},
                         const std::function<bool(const std::string&)>& on_text = {}) const {
        std::string pending, all;
        const auto pass = [&](bool last) {
            const std::string piece = detail::take_text(pending, last);
            all += piece;
            return piece.empty() || !on_text || on_text(piece);
        };
        bool go_on = true;
        engine.generate(encode(prompt), sampling, [&](std::int64_t token) {
            pending += bytes_of(token);
            return go_on = pass(false);
        });
        if (go_on) pass(true);
        return all;
    }

 private:
    struct State {
        std::string where;
        detail::Json json;
        Tokens leading;
        std::vector<std::string> bytes;
        std::once_flag opened;
        std::shared_ptr<void> genai;

        void open() {
            const detail::TemporaryFolder folder;
            folder.write("tokenizer.json", detail::GenaiRewriter(json, where).rewrite());
            folder.write("tokenizer_config.json",
                         {{"tokenizer_class", "GPT2Tokenizer"}, {"add_bos_token", false}, {"add_eos_token", false}});
            folder.write("genai_config.json",
                         {{"model", {{"type", "decoder"}, {"context_length", 1}, {"vocab_size", 1}}}});
            const auto& library = detail::GenaiLibrary::get();
            json = nullptr;  // it was only needed for this
            genai = {library.create_tokenizer(folder.path()),
                     [&library](void* made) { library.destroy_tokenizer(made); }};
        }
    };

    void put(std::int64_t id, std::string bytes, bool special) {
        if (id < 0 || id > 1 << 24) throw detail::Malformed("the token id " + std::to_string(id));
        const auto place = static_cast<std::size_t>(id);
        if (place >= state_->bytes.size()) state_->bytes.resize(place + 1);
        state_->bytes[place] = special ? "" : std::move(bytes);
    }

    static std::string bytes_of(const std::string& token) {
        std::string bytes;
        for (const std::string& character : detail::characters(token)) {
            const auto code = detail::first_character(character).code;
            const auto found = code ? detail::bytes_of_characters().find(*code) : detail::bytes_of_characters().end();
            if (found == detail::bytes_of_characters().end()) return token;  // as `tokenizers` decodes it
            bytes += found->second;
        }
        return bytes;
    }

    std::shared_ptr<State> state_;
};

}  // namespace cpcompile
