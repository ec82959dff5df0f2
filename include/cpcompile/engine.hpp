/// Runs the engines of a bundle with ONNX Runtime.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "error.hpp"
#include "runtime.hpp"
#include "sampling.hpp"
#include "step.hpp"

namespace cpcompile {

/// A loaded engine. Copies share it, and all of its methods may be called from several threads at once.
class Engine {
 public:
    using Batch = std::vector<Tokens>;
    /// Takes the row of the batch and its next token; false ends that text.
    using OnToken = std::function<bool(std::size_t row, std::int64_t token)>;

    Engine(Variant variant, GenerationSettings settings, bool reads_text, std::shared_ptr<detail::LoadedModel> model)
        : variant_(std::move(variant)), settings_(std::move(settings)), model_(std::move(model)) {
        Ort::AllocatorWithDefaultOptions allocator;
        for (std::size_t index = 0; index < session().GetInputCount(); ++index) {
            const std::string name = session().GetInputNameAllocated(index, allocator).get();
            const Ort::TypeInfo type = session().GetInputTypeInfo(index);
            const auto tensor = type.GetTensorTypeAndShapeInfo();
            inputs_[name] = {tensor.GetElementType(), tensor.GetShape()};
            if (name.rfind("past_key_values.", 0) == 0) pasts_.push_back(name);
        }
        for (std::size_t index = 0; index < session().GetOutputCount(); ++index) {
            const std::string name = session().GetOutputNameAllocated(index, allocator).get();
            if (name.rfind("present.", 0) != 0) outputs_.push_back(name);
            if (name != kLogits || !reads_text) continue;
            const Ort::TypeInfo type = session().GetOutputTypeInfo(index);
            const auto tensor = type.GetTensorTypeAndShapeInfo();
            if (!tensor.GetShape().empty() && tensor.GetShape().back() > 0) vocabulary_ = tensor.GetShape().back();
        }
        const Ort::ModelMetadata metadata = session().GetModelMetadata();
        in_place_ = metadata.LookupCustomMetadataMapAllocated("cpcompile.cache_in_place", allocator) != nullptr;
    }

    const Variant& variant() const { return variant_; }
    const GenerationSettings& settings() const { return settings_; }
    /// How many tokens a language model knows; empty for other models.
    std::optional<std::int64_t> vocabulary() const { return vocabulary_; }
    /// The session underneath, for what this class does not offer.
    Ort::Session& session() const { return model_->session; }

    /// Logits of all tokens of a batch of texts of one length.
    Logits run(const Batch& input_ids) const {
        require_tokens(input_ids);
        return Logits(std::move(forward({input_ids, nullptr, {}, 0, false}).front()));
    }

    /// Logits of tokens that follow those in `cache`, and the cache with both.
    /// logits_to_keep: how many of the last tokens' logits are computed; 0 for all.
    Step step(const Batch& input_ids, const Cache& cache = {}, std::size_t logits_to_keep = 0) const {
        require_tokens(input_ids);
        if (pasts_.empty())
            throw UsageError(variant_.model.string() + ": has no cache; use `run`, or build the bundle again");
        require_fit(cache, input_ids.size());
        logits_to_keep = std::min(logits_to_keep, input_ids[0].size());
        if (in_place_ && cache.length() > 0 && input_ids.size() > 1 && input_ids[0].size() > 1)
            return step_by_step(input_ids, cache, logits_to_keep);
        return step({input_ids, &cache, {}, logits_to_keep, true});
    }

    /// Continues `prompt`; the ids of the new tokens, without the one that ended the text.
    Tokens generate(const Tokens& prompt, const Sampling& sampling = {},
                    const std::function<bool(std::int64_t)>& on_token = {}) const {
        OnToken each;
        if (on_token) each = [&on_token](std::size_t, std::int64_t token) { return on_token(token); };
        return std::move(generate(Batch{prompt}, sampling, each).front());
    }

    /// Continues each of `prompts`, which may have different lengths, as if it were alone.
    Batch generate(const Batch& prompts, const Sampling& sampling, const OnToken& on_token = {}) const {
        detail::require_valid(sampling);
        for (const Tokens& prompt : prompts) require_prompt(prompt);
        for (const std::int64_t token : sampling.stop) require_known(token);
        Batch texts;
        const bool even = std::all_of(prompts.begin(), prompts.end(),
                                      [&](const Tokens& prompt) { return prompt.size() == prompts[0].size(); });
        if (prompts.empty() || even || inputs_.count(kMask) > 0) return continue_texts(prompts, 0, sampling, on_token);
        for (std::size_t row = 0; row < prompts.size(); ++row)  // without a mask nothing can be filled up
            texts.push_back(std::move(continue_texts({prompts[row]}, row, sampling, on_token).front()));
        return texts;
    }

    /// The outputs of any graph by name, for all its inputs by name except the one that selects the context.
    std::map<std::string, Ort::Value> outputs(const std::map<std::string, Ort::Value>& feeds) const;

 private:
    static constexpr const char *kInput = "input_ids", *kMask = "attention_mask", *kPositions = "position_ids";
    static constexpr std::size_t kAhead = 1024;  ///< Tokens for which a cache has room beforehand, at most.
    static constexpr const char *kKeep = "logits_to_keep", *kLogits = "logits";

    struct Declared {
        ONNXTensorElementDataType type;
        std::vector<std::int64_t> shape;
    };

    /// What one pass through a language model reads.
    struct Pass {
        const Batch& ids;
        const Cache* cache;
        std::vector<std::size_t> filled;  ///< How many tokens in front of each text only fill it up; empty for none.
        std::size_t keep;
        bool presents;  ///< Whether the cache is wanted, besides the logits.
        bool in_place = false;  ///< Whether it is written to where the past is read, in `cache`, which has room.
    };

    static Ort::Value whole_numbers(const std::vector<std::int64_t>& shape) {
        static const Ort::AllocatorWithDefaultOptions allocator;
        return Ort::Value::CreateTensor<std::int64_t>(allocator, shape.data(), shape.size());
    }

    /// Refuses a cache of another engine, of other texts, or one that was moved from.
    void require_fit(const Cache& cache, std::size_t texts) const {
        bool fits = cache.length() == 0 || cache.values_.size() == pasts_.size();
        for (std::size_t index = 0; fits && cache.length() > 0 && index < pasts_.size(); ++index) {
            const auto& declared = inputs_.at(pasts_[index]).shape;
            const auto shape = cache.values_[index].GetTensorTypeAndShapeInfo().GetShape();
            fits = shape.size() == 4 && declared.size() == 4 && shape[0] == static_cast<std::int64_t>(texts) &&
                   shape[1] == declared[1] && shape[3] == declared[3];
        }
        if (!fits)
            throw UsageError(variant_.model.string() + ": the cache is not of this engine and of " +
                             std::to_string(texts) + " texts; give the one that `step` returned for them");
    }

    /// Runs the session; the inputs and outputs are named in order. The last outputs are written to `given`.
    std::vector<Ort::Value> run(const std::vector<std::pair<std::string, const OrtValue*>>& feeds,
                                const std::vector<std::string>& wanted,
                                const std::vector<OrtValue*>& given = {}) const {
        std::vector<const char*> names, outputs;
        std::vector<const OrtValue*> values;
        for (const auto& [name, value] : feeds) {
            names.push_back(name.c_str());
            values.push_back(value);
        }
        for (const std::string& name : wanted) outputs.push_back(name.c_str());
        std::vector<OrtValue*> results(wanted.size() - given.size());
        results.insert(results.end(), given.begin(), given.end());
        try {
            Ort::ThrowOnError(Ort::GetApi().Run(session(), nullptr, names.data(), values.data(), values.size(),
                                                outputs.data(), outputs.size(), results.data()));
        } catch (const Ort::Exception& error) {
            throw Error(variant_.model.string() + ": ONNX Runtime " + OrtGetApiBase()->GetVersionString() +
                        " cannot run it on these inputs: " + error.what());
        }
        results.resize(wanted.size() - given.size());
        std::vector<Ort::Value> owned;
        for (OrtValue* result : results) owned.emplace_back(result);
        return owned;
    }

    /// The logits, and with `presents` the cache behind them.
    std::vector<Ort::Value> forward(const Pass& pass) const {
        const auto batch = static_cast<std::int64_t>(pass.ids.size());
        const auto sequence = static_cast<std::int64_t>(pass.ids[0].size());
        const auto past = pass.cache ? static_cast<std::int64_t>(pass.cache->length()) : 0;
        std::vector<std::pair<std::string, const OrtValue*>> feeds;
        std::vector<Ort::Value> made;
        made.reserve(inputs_.size());
        for (const auto& [name, declared] : inputs_) {
            if (const auto chosen = variant_.feeds.find(name); chosen != variant_.feeds.end()) {
                made.push_back(whole_numbers({}));
                *made.back().GetTensorMutableData<std::int64_t>() = chosen->second;
            } else if (name == kInput) {
                made.push_back(whole_numbers({batch, sequence}));
                auto* place = made.back().GetTensorMutableData<std::int64_t>();
                for (const Tokens& row : pass.ids) place = std::copy(row.begin(), row.end(), place);
            } else if (name == kKeep) {
                made.push_back(whole_numbers({}));
                *made.back().GetTensorMutableData<std::int64_t>() = static_cast<std::int64_t>(pass.keep);
            } else if (name == kMask || name == kPositions) {
                const bool mask = name == kMask;
                const std::int64_t length = mask ? past + sequence : sequence;
                made.push_back(whole_numbers({batch, length}));
                auto* place = made.back().GetTensorMutableData<std::int64_t>();
                for (std::size_t row = 0; row < pass.ids.size(); ++row) {
                    const std::int64_t filled = pass.filled.empty() ? 0 : static_cast<std::int64_t>(pass.filled[row]);
                    for (std::int64_t index = 0; index < length; ++index)
                        *place++ = mask ? index >= filled : std::max<std::int64_t>(past + index - filled, 0);
                }
            } else if (past == 0 && is_past(name) && !pass.in_place) {
                const std::int64_t shape[] = {batch, declared.shape.at(1), 0, declared.shape.at(3)};
                made.push_back(Ort::Value::CreateTensor(Ort::AllocatorWithDefaultOptions(), shape, 4, declared.type));
            } else if (!is_past(name)) {
                throw UsageError(variant_.model.string() + ": is no language model, it needs the input " +
                                 detail::repr(name) + ": use `outputs`");
            } else {
                continue;
            }
            feeds.emplace_back(name, made.back());
        }
        std::vector<std::string> wanted{kLogits};
        std::vector<OrtValue*> written;
        for (std::size_t index = 0; index < pasts_.size(); ++index) {
            if (past > 0 || pass.in_place) feeds.emplace_back(pasts_[index], pass.cache->values_[index]);
            if (pass.presents)
                wanted.push_back("present." + pasts_[index].substr(std::string("past_key_values.").size()));
            if (pass.in_place) written.push_back(const_cast<OrtValue*>(feeds.back().second));
        }
        std::vector<Ort::Value> results = run(feeds, wanted, written);
        if (results[0].GetTensorTypeAndShapeInfo().GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
            throw Error(variant_.model.string() + ": its logits are not float32; choose another variant");
        return results;
    }

    Step step(const Pass& pass) const {
        std::vector<Ort::Value> results = forward(pass);
        Cache cache;
        cache.length_ = (pass.cache ? pass.cache->length() : 0) + pass.ids[0].size();
        cache.values_.assign(std::make_move_iterator(results.begin() + 1), std::make_move_iterator(results.end()));
        return {Logits(std::move(results.front())), std::move(cache)};
    }

    /// The same, token by token: GroupQueryAttention takes several after a cache from one text alone.
    Step step_by_step(const Batch& input_ids, const Cache& cache, std::size_t logits_to_keep) const {
        const std::size_t length = input_ids[0].size();
        const std::size_t kept = logits_to_keep ? std::min(logits_to_keep, length) : length;
        Batch column(input_ids.size());
        std::vector<float> logits;
        Cache next;
        for (std::size_t index = 0; index < length; ++index) {
            for (std::size_t row = 0; row < input_ids.size(); ++row) column[row] = {input_ids[row][index]};
            Step one = step({column, index ? &next : &cache, {}, 1, true});
            next = std::move(one.cache);
            if (index + kept < length) continue;
            const std::size_t classes = one.logits.vocabulary();
            logits.resize(input_ids.size() * kept * classes);
            for (std::size_t row = 0; row < input_ids.size(); ++row)
                std::copy_n(one.logits.at(row, 0), classes, &logits[(row * kept + index + kept - length) * classes]);
        }
        const std::int64_t shape[] = {static_cast<std::int64_t>(input_ids.size()), static_cast<std::int64_t>(kept),
                                      static_cast<std::int64_t>(logits.size() / input_ids.size() / kept)};
        Ort::Value joined = Ort::Value::CreateTensor<float>(Ort::AllocatorWithDefaultOptions(), shape, 3);
        std::copy(logits.begin(), logits.end(), joined.GetTensorMutableData<float>());
        return {Logits(std::move(joined)), std::move(next)};
    }

    /// Reads `feed` behind what is in `cache`, and leaves it there, too.
    /// most: the tokens that the texts have in the end, if it is not more.
    Logits read_on(const Batch& feed, const std::vector<std::size_t>& filled, Cache& cache, std::size_t most) const {
        if (!in_place_) {
            Step next = step({feed, pasts_.empty() ? nullptr : &cache, filled, 1, !pasts_.empty()});
            cache = std::move(next.cache);
            return std::move(next.logits);
        }
        const std::size_t length = cache.length_ + feed[0].size();
        if (length > cache.room_) {
            std::vector<std::vector<std::int64_t>> shapes;
            for (const std::string& name : pasts_) shapes.push_back(inputs_.at(name).shape);
            cache.grow(shapes, feed.size(), std::max(length, std::min(most, length + kAhead)));
        }
        Logits logits(std::move(forward({feed, &cache, filled, 1, true, true}).front()));
        cache.length_ = length;
        return logits;
    }

    /// Continues `prompts` together; rows count from `first` for the seed and `on_token`.
    Batch continue_texts(const Batch& prompts, std::size_t first, const Sampling& sampling,
                         const OnToken& on_token) const {
        Batch texts = prompts, feed = prompts, generated(prompts.size());
        std::vector<detail::Sampler> samplers;
        std::vector<std::size_t> filled;
        std::size_t longest = 0;
        for (const Tokens& prompt : prompts) longest = std::max(longest, prompt.size());
        for (std::size_t row = 0; row < prompts.size(); ++row) {
            samplers.emplace_back(sampling, first + row);
            filled.push_back(longest - prompts[row].size());
            feed[row].insert(feed[row].begin(), filled[row], 0);
        }
        std::vector<bool> done(prompts.size());
        Cache cache;
        for (std::size_t count = 0; count < sampling.max_new_tokens; ++count) {
            for (std::size_t row = 0; row < texts.size(); ++row) done[row] = done[row] || is_full(texts[row]);
            if (std::all_of(done.begin(), done.end(), [](bool each) { return each; })) break;
            const Logits logits = read_on(feed, filled, cache, longest + sampling.max_new_tokens);
            for (std::size_t row = 0; row < texts.size(); ++row) {
                std::int64_t token = 0;  // of a complete text
                if (!done[row]) {
                    token = samplers[row].choose(logits.at(row, logits.kept() - 1), logits.vocabulary(), texts[row]);
                    done[row] = is_end(token, sampling);
                }
                if (!done[row]) {
                    texts[row].push_back(token);
                    generated[row].push_back(token);
                    done[row] = on_token && !on_token(first + row, token);
                }
                if (!pasts_.empty()) feed[row].clear();  // with a cache only what is new is read
                feed[row].push_back(token);
            }
        }
        return generated;
    }

    bool is_past(const std::string& name) const {
        return std::find(pasts_.begin(), pasts_.end(), name) != pasts_.end();
    }

    bool is_full(const Tokens& text) const {
        return settings_.context_length && static_cast<std::int64_t>(text.size()) >= *settings_.context_length;
    }

    bool is_end(std::int64_t token, const Sampling& sampling) const {
        const auto among = [token](const Tokens& ids) { return std::find(ids.begin(), ids.end(), token) != ids.end(); };
        return among(sampling.stop) || (sampling.stop_at_end && among(settings_.end));
    }

    void require_tokens(const Batch& batch) const {
        if (inputs_.count(kInput) == 0 || std::find(outputs_.begin(), outputs_.end(), kLogits) == outputs_.end())
            throw UsageError(variant_.model.string() + ": is no language model, its inputs are " +
                             detail::joined(inputs_, [](const auto& each) { return each.first; }) + ": use `outputs`");
        if (batch.empty() || batch[0].empty())
            throw UsageError("input_ids has the shape (" + std::to_string(batch.size()) + ", " +
                             (batch.empty() ? "" : "0") + ") and holds no token; give at least one");
        for (const Tokens& row : batch) {
            if (row.size() != batch[0].size())
                throw UsageError("input_ids: cannot be made an array of int64 (its rows have different lengths)");
            for (const std::int64_t token : row) require_known(token);
        }
    }

    /// ONNX would count negative tokens from the end of a table.
    void require_known(std::int64_t token) const {
        if (vocabulary_ && (token < 0 || token >= *vocabulary_))
            throw UsageError("input_ids has the token " + std::to_string(token) + "; those of " + variant_.context +
                             " are 0 to " + std::to_string(*vocabulary_ - 1));
    }

    void require_prompt(const Tokens& prompt) const {
        if (prompt.empty())
            throw UsageError("the prompt is empty; give at least one token, such as the one that texts begin with");
        require_tokens({prompt});
        if (settings_.context_length && static_cast<std::int64_t>(prompt.size()) > *settings_.context_length)
            throw UsageError("the prompt has " + detail::grouped(prompt.size()) + " tokens; " + variant_.context +
                             " reads at most " +
                             detail::grouped(static_cast<std::uint64_t>(*settings_.context_length)) + ": shorten it");
    }

    Variant variant_;
    GenerationSettings settings_;
    std::shared_ptr<detail::LoadedModel> model_;
    std::map<std::string, Declared> inputs_;  // with the context
    std::vector<std::string> pasts_, outputs_;
    std::optional<std::int64_t> vocabulary_;
    bool in_place_ = false;  ///< Whether past and present may be one buffer, with room for more tokens.
};

inline std::map<std::string, Ort::Value> Engine::outputs(const std::map<std::string, Ort::Value>& feeds) const {
    std::vector<std::pair<std::string, const OrtValue*>> complete;
    std::vector<Ort::Value> made;
    made.reserve(variant_.feeds.size());
    for (const auto& [name, value] : feeds) {
        if (inputs_.count(name) == 0 || variant_.feeds.count(name) > 0)
            throw UsageError(variant_.model.string() + ": has no input " + detail::repr(name));
        complete.emplace_back(name, value);
    }
    for (const auto& [name, number] : variant_.feeds) {
        made.push_back(whole_numbers({}));
        *made.back().GetTensorMutableData<std::int64_t>() = number;
        complete.emplace_back(name, made.back());
    }
    std::map<std::string, Ort::Value> results;
    std::vector<Ort::Value> values = run(complete, outputs_);
    for (std::size_t index = 0; index < outputs_.size(); ++index)
        results.emplace(outputs_[index], std::move(values[index]));
    return results;
}

}  // namespace cpcompile
