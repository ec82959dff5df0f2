// Does what it is asked for on standard input, a list of jobs in JSON, and answers with a list of results in JSON, so
// that test_cpp.py can compare each with what Python does.
#include <cpcompile/cpcompile.hpp>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <string>

#include "threads.hpp"

using cpcompile::detail::Json;

namespace {

cpcompile::Sampling sampling_of(const Json& job) {
    cpcompile::Sampling sampling;
    sampling.max_new_tokens = job.value("max_new_tokens", sampling.max_new_tokens);
    sampling.temperature = job.value("temperature", sampling.temperature);
    sampling.top_k = job.value("top_k", sampling.top_k);
    sampling.top_p = job.value("top_p", sampling.top_p);
    sampling.repetition_penalty = job.value("repetition_penalty", sampling.repetition_penalty);
    sampling.stop = job.value("stop", sampling.stop);
    sampling.stop_at_end = job.value("stop_at_end", sampling.stop_at_end);
    if (job.contains("seed")) sampling.seed = job["seed"].get<std::uint64_t>();
    return sampling;
}

Json plain(const cpcompile::Logits& logits) {
    Json rows = Json::array();
    for (std::size_t row = 0; row < logits.batch(); ++row) {
        rows.emplace_back(Json::array());
        for (std::size_t position = 0; position < logits.kept(); ++position) {
            const float* scores = logits.at(row, position);
            rows.back().push_back(std::vector<float>(scores, scores + logits.vocabulary()));
        }
    }
    return rows;
}

/// Logits of each text of a batch, read in pieces, and of a second continuation from the same cache.
Json stepped(const cpcompile::Engine& engine, const cpcompile::Engine::Batch& batch, std::size_t pieces) {
    cpcompile::Cache cache;
    Json all = Json::array();
    const std::size_t width = batch[0].size() / pieces;
    for (std::size_t start = 0; start < batch[0].size(); start += width) {
        cpcompile::Engine::Batch part;
        for (const auto& row : batch)
            part.emplace_back(row.begin() + static_cast<std::ptrdiff_t>(start),
                              row.begin() + static_cast<std::ptrdiff_t>(std::min(start + width, row.size())));
        const cpcompile::Step again = engine.step(part, cache, 1);
        cpcompile::Step next = engine.step(part, cache);
        if (again.cache.length() != next.cache.length()) throw std::logic_error("a step has changed its cache");
        cache = std::move(next.cache);
        all.push_back({{"logits", plain(next.logits)}, {"last", plain(again.logits)}, {"length", cache.length()}});
    }
    return all;
}

/// Ids of texts, or why one is refused; or texts of ids, at once and token by token.
Json text_job(const cpcompile::Tokenizer& tokenizer, const Json& job) {
    Json result = Json::array();
    for (const Json& text : job.value("encode", Json::array())) {
        try {
            result.push_back(tokenizer.encode(text.get<std::string>()));
        } catch (const cpcompile::UsageError& error) {
            result.push_back(error.what());
        }
    }
    for (const Json& ids : job.value("decode", Json::array())) {
        std::string pending;
        Json pieces = Json::array();
        for (const std::int64_t id : ids.get<cpcompile::Tokens>()) {
            pending += tokenizer.bytes_of(id);
            pieces.push_back(cpcompile::detail::take_text(pending, false));
        }
        pieces.push_back(cpcompile::detail::take_text(pending, true));
        result.push_back({{"text", tokenizer.decode(ids.get<cpcompile::Tokens>())}, {"pieces", pieces}});
    }
    return result;
}

/// What a step says of a cache of other texts, of another engine and one that was moved from; and how many of two
/// logits it keeps if it shall keep as many as there are.
Json misused(const cpcompile::Engine& engine, const cpcompile::Engine& other) {
    Json said = Json::array();
    const auto attempt = [&](const cpcompile::Engine::Batch& ids, const cpcompile::Cache& cache) {
        try {
            engine.step(ids, cache);
            said.push_back(nullptr);
        } catch (const cpcompile::UsageError& error) {
            said.push_back(error.what());
        }
    };
    cpcompile::Cache cache = engine.step({{1, 2, 3}}).cache;
    attempt({{4}, {5}}, cache);
    attempt({{4}}, other.step({{1, 2, 3}}).cache);
    const cpcompile::Cache moved = std::move(cache);
    attempt({{4}}, cache);
    said.push_back(engine.step({{4, 5}}, moved, static_cast<std::size_t>(-1)).logits.kept());
    return said;
}

Json do_job(const Json& job) {
    if (job.contains("choose")) {  // no bundle: samples from logits
        const auto logits = job["choose"].get<std::vector<float>>();
        const auto sampling = sampling_of(job);
        cpcompile::detail::require_valid(sampling);
        cpcompile::detail::Sampler sampler(sampling, 0);
        cpcompile::Tokens chosen;
        for (int count = job["count"]; count > 0; --count)
            chosen.push_back(sampler.choose(logits.data(), logits.size(), job.value("before", cpcompile::Tokens())));
        return chosen;
    }
    if (job.contains("dumps")) {
        std::string text;
        cpcompile::detail::python_json(Json::parse(job["dumps"].get<std::string>()), text);
        return text;
    }
    if (job.contains("requests")) return run_threads(job["bundle"], job["requests"]);
    const auto bundle = cpcompile::open_bundle(job["bundle"].get<std::string>());
    if (job.value("verify", false)) bundle.verify_all();
    if (!job.contains("context")) return bundle.contexts();
    const std::string context = job["context"], variant = job.value("variant", "best");
    if (job.contains("encode") || job.contains("decode")) return text_job(cpcompile::Tokenizer(bundle, context), job);
    static std::map<std::string, cpcompile::Engine> loaded;  // none of the bundles changes
    const std::string key = bundle.root().string() + "\n" + context + "\n" + variant;
    if (loaded.count(key) == 0) loaded.emplace(key, cpcompile::load(bundle, context, variant));
    const cpcompile::Engine& engine = loaded.at(key);
    if (job.contains("run")) return plain(engine.run(job["run"].get<cpcompile::Engine::Batch>()));
    if (job.contains("step")) return stepped(engine, job["step"].get<cpcompile::Engine::Batch>(), job["pieces"]);
    if (job.contains("misuse")) return misused(engine, cpcompile::load(bundle, job["misuse"].get<std::string>()));
    if (job.contains("outputs")) {
        std::map<std::string, Ort::Value> feeds;
        for (const auto& item : job["outputs"].items()) {
            const auto numbers = item.value().get<std::vector<float>>();
            const auto size = static_cast<std::int64_t>(numbers.size());
            Ort::Value value = Ort::Value::CreateTensor<float>(Ort::AllocatorWithDefaultOptions(), &size, 1);
            std::copy(numbers.begin(), numbers.end(), value.GetTensorMutableData<float>());
            feeds.emplace(item.key(), std::move(value));
        }
        Json result;
        for (const auto& [name, value] : engine.outputs(feeds)) {
            const auto* data = value.GetTensorData<float>();
            result[name] = std::vector<float>(data, data + value.GetTensorTypeAndShapeInfo().GetElementCount());
        }
        return result;
    }
    if (!job.contains("generate")) return engine.vocabulary() ? Json(*engine.vocabulary()) : Json();
    Json seen = Json::array();
    const std::size_t most = job.value("stop_after", std::numeric_limits<std::size_t>::max());
    const auto texts = engine.generate(job["generate"].get<cpcompile::Engine::Batch>(), sampling_of(job),
                                       [&](std::size_t row, std::int64_t token) {
                                           seen.push_back({row, token});
                                           return seen.size() < most;
                                       });
    return {{"texts", texts}, {"seen", seen}};
}

}  // namespace

int main() {
    const std::string input(std::istreambuf_iterator<char>(std::cin), {});
    Json results = Json::array();
    for (const Json& job : Json::parse(input)) {
        try {
            results.push_back({{"result", do_job(job)}});
        } catch (const cpcompile::UsageError& error) {
            results.push_back({{"kind", "UsageError"}, {"error", error.what()}});
        } catch (const cpcompile::Error& error) {
            results.push_back({{"kind", "Error"}, {"error", error.what()}});
        }
    }
    std::cout << results.dump() << "\n";
}
