/// Opens a bundle `model.cpc/`: an ONNX Runtime model package (schema 1.0) whose components are contexts.
///
/// Everything is checked before it is used, as by cpcompile in Python: the manifest against its own digest, each file
/// against the manifest, each path against the root, and the files that an engine makes ONNX Runtime open against both.
/// Digests reveal damage, not the author: a bundle sealed by a stranger can take any amount of time and memory, but it
/// cannot open a file outside of it, load a library or write a file. It must not change while it is in use.
#pragma once

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "error.hpp"
#include "external_data.hpp"
#include "files.hpp"
#include "json.hpp"

namespace cpcompile {

using Tokens = std::vector<std::int64_t>;

/// What a program that generates text has to know besides the graph and the tokenizer. Ids are those of the engine.
struct GenerationSettings {
    Tokens end;                                  ///< A text is complete after any of them.
    Tokens leading;                              ///< They stand in front of every text, such as that of a BOS token.
    std::optional<std::int64_t> context_length;  ///< Tokens that the model reads at most; empty if there is no limit.
    std::optional<std::string> chat_template;    ///< A Jinja template that makes a prompt of messages.
};

/// One engine of one context in a bundle.
struct Variant {
    std::string context, name, runtime, precision;
    std::string provider;  ///< Execution provider of ONNX Runtime; empty for engines that it does not run.
    std::filesystem::path model;
    std::optional<std::filesystem::path> weights;  ///< The folder of the shared weights.
    std::map<std::string, std::string> session_options, provider_options;
    std::map<std::string, std::int64_t> feeds;  ///< Inputs that select the context, where the engine serves several.
    std::int64_t bytes = 0;                     ///< The bytes of its own files and of its share of the weights.
    bool plan = false;                          ///< Whether it is a TensorRT plan, which this library does not run.
};

class Bundle;
Bundle open_bundle(const std::filesystem::path& path);

/// An opened bundle: its manifest has been checked; `verify` checks its files before they are loaded.
class Bundle {
 public:
    const std::filesystem::path& root() const { return root_; }
    const std::string& name() const { return name_; }
    const std::vector<std::string>& contexts() const { return contexts_; }

    /// The engines of `context`; UsageError lists the contexts that exist.
    std::vector<Variant> variants(const std::string& context) const {
        require_context(context);
        std::vector<Variant> result;
        for (const auto& item : detail::at(components_.at(context), "variants", "dict").items())
            result.push_back(read_variant(context, context, item.key()));
        if (components_.count(kRouter) == 0) return result;
        for (const auto& item : detail::at(components_.at(kRouter), "variants", "dict").items()) {
            const Json& served = own_info(item.value())["contexts"];
            if (std::find(served.begin(), served.end(), context) != served.end())
                result.push_back(read_variant(context, kRouter, item.key()));
        }
        return result;
    }

    /// One engine of `context`; UsageError lists the variants that exist.
    Variant variant(const std::string& context, const std::string& given) const {
        std::vector<Variant> all = variants(context);
        const std::string name = given == "best" ? metadata_.value("best", "cpu-fp32") : given;
        for (const Variant& each : all)
            if (each.name == name) return each;
        std::sort(all.begin(), all.end(), [](const Variant& a, const Variant& b) { return a.name < b.name; });
        throw UsageError(root_.string() + ": " + context + " has no variant " + detail::repr(name) + "; it has " +
                         detail::joined(all, [](const Variant& each) { return each.name; }));
    }

    /// The verified tokenizer.json of `context`; UsageError if the model does not read text.
    std::filesystem::path tokenizer(const std::string& context) const {
        if (!reads_text(context))
            throw UsageError(root_.string() + ": has no tokenizer of " + detail::repr(context) +
                             "; it was built from a program");
        const auto path = asset(metadata_["tokenizers"][context].get<std::string>()) / "tokenizer.json";
        verify(path);
        return path;
    }

    /// Whether `context` is a language model.
    bool reads_text(const std::string& context) const {
        require_context(context);
        return metadata_["tokenizers"].contains(context);
    }

    /// Empty for a model that reads no text, and in older bundles.
    std::optional<GenerationSettings> generation(const std::string& context) const {
        require_context(context);
        const auto found = metadata_.find("generation");
        if (found == metadata_.end() || !found->contains(context) || (*found)[context].is_null()) return std::nullopt;
        const Json& plain = (*found)[context];
        GenerationSettings settings{ids(plain, "end"), ids(plain, "leading"), std::nullopt, std::nullopt};
        const Json &length = detail::at(plain, "context_length"), &chat = detail::at(plain, "chat_template");
        if (!length.is_null()) settings.context_length = whole(length, "context_length");
        if (!chat.is_null()) settings.chat_template = detail::require(chat, "str", "chat_template").get<std::string>();
        return settings;
    }

    /// Compares a file, or all files of a folder, with the digests in the manifest.
    void verify(const std::filesystem::path& path) const {
        if (!detail::within(path, root_))
            throw UsageError(path.string() + ": lies outside of " + root_.string() +
                             "; give a path that begins with it");
        const std::string relative = path.lexically_relative(root_).generic_string();
        bool listed = false;
        for (const auto& item : metadata_["files"].items()) {
            if (item.key() != relative && item.key().rfind(relative + "/", 0) != 0) continue;
            listed = true;
            detail::verify_file(detail::inside(root_, item.key()), item.value().get<std::string>());
        }
        if (!listed)
            throw UsageError(path.string() + ": is not listed in " + (root_ / kManifest).string() +
                             "; build the bundle again");
    }

    /// The SHA-256 of a file that the manifest lists.
    std::string digest(const std::filesystem::path& path) const {
        return detail::text_at(metadata_["files"], path.lexically_relative(root_).generic_string());
    }

    /// Checks every file that the manifest lists, and what every engine refers to.
    void verify_all() const {
        for (const auto& item : metadata_["files"].items())
            detail::verify_file(detail::inside(root_, item.key()), item.value().get<std::string>());
        for (const std::string& context : contexts_)
            for (const Variant& each : variants(context)) verify_references(each);
    }

    /// Checks the files that loading `variant` opens, its model and weights, and that it refers to no others.
    void verify_engine(const Variant& variant) const {
        verify(variant.model);
        if (variant.weights) verify(*variant.weights);
        verify_references(variant);
    }

 private:
    friend Bundle open_bundle(const std::filesystem::path& path);
    using Json = detail::Json;
    static constexpr const char *kManifest = "manifest.json", *kRouter = "router";
    static constexpr const char* kOpenVino = "openvino";  // the runtime, and what runs it
    static constexpr const char* kWeights = "session.model_external_initializers_file_folder_path";
    static constexpr std::int64_t kLargest = std::numeric_limits<std::int32_t>::max();

    void require_context(const std::string& context) const {
        if (std::find(contexts_.begin(), contexts_.end(), context) == contexts_.end())
            throw UsageError(root_.string() + ": has no context " + detail::repr(context) + "; it has " +
                             detail::joined(contexts_, [](const std::string& each) { return each; }));
    }

    /// Checks that every external tensor lies within a file of its weights that the manifest lists.
    void verify_references(const Variant& variant) const {
        if (variant.plan) return;  // a plan is one file
        const auto folder = variant.weights ? variant.weights->lexically_relative(root_).generic_string() : "";
        for (const detail::Reference& reference : detail::references_of(variant.model)) {
            const std::string name = folder + "/" + reference.location;
            if (!variant.weights || !metadata_["files"].contains(name))
                throw UsageError(variant.model.string() + ": a tensor lies in " + detail::repr(reference.location) +
                                 ", which is not a file of its weights, so it is refused; build the bundle again");
            const std::uintmax_t size = std::filesystem::file_size(detail::inside(root_, name));
            if (reference.end() > size)
                throw UsageError(variant.model.string() + ": a tensor needs the bytes up to " +
                                 detail::grouped(reference.end()) + " of " + reference.location + ", which has " +
                                 detail::grouped(size) + "; build the bundle again");
        }
    }

    static const Json& own_info(const Json& variant) {
        const Json& own = detail::at(detail::at(variant, "executor_info"), "cpcompile");
        for (const Json& context : detail::at(own, "contexts", "list")) detail::require(context, "str", "contexts");
        return own;
    }

    Variant read_variant(const std::string& context, const std::string& component, const std::string& name) const {
        const Json& body = detail::at(detail::at(components_.at(component), "variants"), name);
        const Json &own = own_info(body), &info = detail::at(body, "executor_info");
        Variant variant;
        variant.plan = info.contains("tensorrt");
        variant.context = context;
        variant.name = name;
        variant.runtime = detail::text_at(own, "runtime");
        variant.precision = detail::text_at(own, "precision");
        const bool openvino = !variant.plan && variant.runtime == kOpenVino;
        const Json& executor = detail::at(info, variant.plan ? "tensorrt" : openvino ? kOpenVino : "ort");
        if (!variant.plan && !openvino) variant.provider = detail::text_at(body, "ep");
        const std::string folder =
            body.contains("variant_directory") ? detail::text_at(body, "variant_directory") : name;
        variant.model = detail::inside(root_, component + "/" + folder + "/" + detail::text_at(executor, "model_file"));
        variant.session_options = options(executor, "session_options", "session option ");
        variant.provider_options = options(executor, "provider_options", "provider option ");
        std::string weights;
        if (openvino) {
            if (executor.contains("weights")) weights = detail::text_at(executor, "weights");
        } else if (const auto given = variant.session_options.extract(kWeights)) {
            weights = given.mapped();
        }
        if (!weights.empty()) variant.weights = asset(weights);
        const Json& served = own["contexts"];
        const auto place = std::find(served.begin(), served.end(), context);
        if (!served.empty() && place == served.end()) throw detail::Malformed("contexts of " + name);
        if (!served.empty()) variant.feeds["context"] = place - served.begin();
        variant.bytes = detail::integer(detail::at(own, "bytes", "int"));
        return variant;
    }

    static std::map<std::string, std::string> options(const Json& executor, const char* key, const std::string& what) {
        std::map<std::string, std::string> result;
        if (!executor.contains(key)) return result;
        for (const auto& item : detail::at(executor, key, "dict").items())
            result[item.key()] = detail::require(item.value(), "str", what + item.key()).get<std::string>();
        return result;
    }

    static Tokens ids(const Json& plain, const std::string& key) {
        Tokens result;
        for (const Json& id : detail::at(plain, key, "list"))
            result.push_back(whole(id, key + "[" + std::to_string(result.size()) + "]"));
        return result;
    }

    static std::int64_t whole(const Json& value, const std::string& where) {
        const auto number = detail::integer(detail::require(value, "int", where));
        if (number < -kLargest || number > kLargest) throw UsageError(where + ": is beyond 2,147,483,647 in size");
        return number;
    }

    std::filesystem::path asset(std::string uri) const {
        std::replace(uri.begin(), uri.end(), ':', '-');
        return detail::inside(root_, "shared_assets/" + uri);
    }

    void require_readable() const;

    std::filesystem::path root_;
    std::string name_;
    std::vector<std::string> contexts_;
    Json metadata_;
    std::map<std::string, Json> components_;
};

namespace detail {

constexpr int kReadable[] = {3, 4};  // bundles of version 3 have graphs without a cache

inline void require_name(const std::string& name, const std::string& what) {
    const auto valid = [](char sign) { return (sign >= 'a' && sign <= 'z') || (sign >= '0' && sign <= '9'); };
    const auto inner = [&valid](char sign) { return valid(sign) || sign == '.' || sign == '_' || sign == '-'; };
    if (name.empty() || name.size() > 100 || !valid(name[0]) || !std::all_of(name.begin(), name.end(), inner))
        throw Malformed(what + " " + repr(name) + " is not a valid name");
}

/// The options that a bundle may set: others load libraries or write files, and devices and caches belong to the
/// machine.
inline bool may_set(const std::string& provider, const std::string& option) {
    static const std::map<std::string, std::set<std::string>> allowed{
        {"", {"session.disable_prepacking", "session.x64quantprecision"}},  // options of the session
        {"CUDAExecutionProvider", {"use_tf32", "prefer_nhwc", "enable_cuda_graph", "cudnn_conv_algo_search"}},
        {"TensorrtExecutionProvider",
         {"trt_fp16_enable", "trt_bf16_enable", "trt_cuda_graph_enable", "trt_builder_optimization_level",
          "trt_profile_min_shapes", "trt_profile_max_shapes", "trt_profile_opt_shapes"}},
        {"NvTensorRTRTXExecutionProvider",
         {"enable_cuda_graph", "nv_multi_profile_enable", "nv_profile_min_shapes", "nv_profile_max_shapes",
          "nv_profile_opt_shapes"}}};
    const auto found = allowed.find(provider);
    return found != allowed.end() && found->second.count(option) > 0;
}

/// The digest of a manifest without its own digest, which is taken out of it.
inline std::string manifest_digest(Json& manifest) {
    manifest["additional_metadata"]["cpcompile"].erase("manifest_digest");
    std::string text;
    python_json(manifest, text);
    Sha256 sha;
    sha.add(text);
    return sha.hex();
}

}  // namespace detail

/// Checks that everything read later has the form that a build writes; Malformed if not.
inline void Bundle::require_readable() const {
    using detail::at, detail::require, detail::Malformed;
    at(metadata_, "shared_weights", "bool");
    const Json& tokenizers = at(metadata_, "tokenizers", "dict");
    if (!tokenizers.empty())
        for (const std::string& context : contexts_) require(at(tokenizers, context), "str", "tokenizer of " + context);
    at(metadata_, "checkpoint", "str");
    for (const auto& item : at(metadata_, "files", "dict").items())
        require(item.value(), "str", "the digest of " + item.key());
    for (const char* key : {"generation", "cache"})
        if (metadata_.contains(key)) at(metadata_, key, "dict");
    if (metadata_.contains("best")) at(metadata_, "best", "str");
    for (const std::string& context : contexts_) {
        generation(context);
        const Json cache = metadata_.value("cache", Json::object()).value(context, Json());
        for (const char* key : {"bytes_per_token", "dense_bytes_per_token"})
            if (!cache.is_null() && detail::integer(at(cache, key, "int")) < 0) throw Malformed("cache of " + context);
        const Json& parameters = at(at(metadata_, "parameters", "dict"), context, "dict");
        for (const char* key : {"total", "kept", "removed"})
            if (detail::integer(require(at(parameters, key), "int", "parameters of " + context)) <
                (key == std::string("total")))
                throw Malformed("parameters of " + context + ": " + key);
        require(at(parameters, "removed_experts"), "dict", "removed experts of " + context);
        for (const auto& item : at(parameters, "removed_by_kind", "dict").items())
            require(item.value(), "int", "removed " + item.key() + " of " + context);
        if (require(at(components_.at(context), "variants"), "dict", "variants of " + context).empty())
            throw Malformed(context + " has no variants");
        for (const Variant& variant : variants(context)) {
            detail::require_name(variant.name, "variant of " + context);
            if (variant.bytes < 0) throw Malformed("bytes of " + variant.name + ": " + std::to_string(variant.bytes));
            const std::string suffix = variant.plan ? ".plan" : ".onnx";
            if (variant.model.extension() != suffix)
                throw Malformed("model_file of " + variant.name + ": " +
                                detail::repr(variant.model.filename().string()) + " is not named " + suffix);
            for (const std::string& field : {variant.runtime, variant.precision, variant.provider})
                if (!std::all_of(field.begin(), field.end(), [](char sign) { return sign >= ' ' && sign <= '~'; }))
                    throw Malformed("variant of " + context + ": " + detail::repr(field));
            for (const auto& option : variant.session_options)
                if (!detail::may_set("", option.first))
                    throw Malformed("session option " + detail::repr(option.first) + ", which a bundle may not set");
            for (const auto& option : variant.provider_options)
                if (variant.provider.empty() || !detail::may_set(variant.provider, option.first))
                    throw Malformed("option " + detail::repr(option.first) + " of " + variant.provider +
                                    ", which a bundle may not set");
        }
    }
}

/// Opens and checks the manifest and the components of the bundle `path`.
inline Bundle open_bundle(const std::filesystem::path& path) {
    namespace fs = std::filesystem;
    const fs::path file = detail::inside(path, Bundle::kManifest);
    if (!fs::is_regular_file(file)) {
        const fs::path failed = path.string() + ".failed";
        if (!fs::exists(path) && fs::is_regular_file(failed / Bundle::kManifest))
            throw UsageError(path.string() + ": there is no such folder; a build whose verdict is fail wrote " +
                             failed.string());
        throw UsageError(path.string() + ": " +
                         (fs::exists(path) ? "is not a bundle (no manifest.json in it)" : "there is no such folder") +
                         "; `cpcompile build model.pt -o model.cpc` makes one");
    }
    detail::Json manifest = detail::read_json(file);
    Bundle bundle;
    bundle.root_ = path;
    try {
        bundle.metadata_ = detail::at(detail::at(manifest, "additional_metadata"), "cpcompile", "dict");
        const detail::Json digest = detail::at(bundle.metadata_, "manifest_digest");
        const detail::Json& version = detail::at(bundle.metadata_, "version");
        if (std::find(std::begin(detail::kReadable), std::end(detail::kReadable), version) ==
            std::end(detail::kReadable))
            throw UsageError(path.string() + ": bundle version " +
                             (version.is_string() ? detail::repr(version.get<std::string>()) : version.dump()) +
                             ", this cpcompile reads 3 and 4; build it again");
        if (digest != detail::manifest_digest(manifest))
            throw UsageError(file.string() + ": was changed or damaged after the build; build the bundle again");
        for (const auto& item : detail::at(manifest, "components", "dict").items()) {
            detail::require_name(item.key(), "context");
            const std::string name =
                detail::require(item.value(), "str", "components").get<std::string>() + "/component.json";
            const fs::path component = detail::inside(path, name);
            detail::verify_file(component, detail::text_at(detail::at(bundle.metadata_, "files"), name));
            bundle.components_[item.key()] = detail::read_json(component);
            if (item.key() != Bundle::kRouter) bundle.contexts_.push_back(item.key());
        }
        bundle.name_ = detail::text_at(manifest, "package_name");
        bundle.require_readable();
    } catch (const detail::Malformed& error) {
        throw UsageError(file.string() + ": is incomplete or malformed (" + error.what() + "); build the bundle again");
    } catch (const detail::Json::exception& error) {
        throw UsageError(file.string() + ": is incomplete or malformed (" + error.what() + "); build the bundle again");
    }
    return bundle;
}

}  // namespace cpcompile
